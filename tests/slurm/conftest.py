"""A real Slurm on this machine, of two nodes, with keys, ports, folders and daemons of its own: the system's is not touched."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.conftest import environment

NODES = ("node-a", "node-b")
CONFIG = """\
ClusterName=wads
SlurmUser=root
SlurmdUser=root
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
CredType=cred/munge
# A job that was put back into the queue starts when its old credential has expired: 120 s by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n.spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
MailProg=/bin/true
# What needs neither cgroups nor a database.
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_min_interval=100000,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=30
KillWait=10
NodeName=node-a NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=node-b NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass
class Slurm:
    """A controller and two nodes; every node may run one task at a time on its two CPUs."""

    folder: Path
    daemons: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """With which Slurm's commands find this one; its jobs inherit it."""
        theirs = {name: value for name, value in environment().items() if not name.startswith(("SLURM", "SBATCH"))}
        return theirs | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str) -> str:
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()}")
        return result.stdout.strip()

    def start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=out, stderr=out, start_new_session=True
            )

    def start_node(self, node: str) -> None:
        self.start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str, *, tasks: bool) -> None:
        """``kill -9`` of a node's daemon; with ``tasks`` of all that it has started, as when the machine goes down."""
        self.daemons[node].kill()
        self.daemons[node].wait()
        # The watchers of jobs first: they would report the jobs as ended.
        for process in [*self.watchers(node), *self.started(node)] if tasks else ():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def watchers(self, node: str) -> list[psutil.Process]:
        """The ``slurmstepd`` of every job on ``node``. They hide their environment, but hold the node's log open."""
        log = str(self.folder / f"{node}.log")
        return [p for p in psutil.process_iter() if p.name() == "slurmstepd" and log in _open_files(p)]

    def started(self, node: str | None = None) -> list[psutil.Process]:
        """Every process with this Slurm's configuration, or those of jobs on ``node``."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                variables = process.environ() if process.status() != psutil.STATUS_ZOMBIE else {}
                ours = variables.get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if ours and node in (None, variables.get("SLURMD_NODENAME")):
                    found.append(process)
        return found

    def tasks(self, name: str = "") -> dict[int, str]:
        """State by element of the job array ``name``, of those in the queue."""
        only = [f"--name={name}"] if name else []
        rows = self.run("squeue", *only, "--array", "--noheader", "--format=%K|%T").splitlines()
        return {int(task): state for task, state in (row.split("|") for row in rows) if task.isdecimal()}

    def node(self, task: str) -> str:
        """Where a task runs."""
        return self.run("squeue", f"--jobs={task}", "--noheader", "--format=%N")

    def end(self) -> None:
        for _ in range(100):
            left = [*(p for node in NODES for p in self.watchers(node)), *self.started()]
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            for daemon in self.daemons.values():
                daemon.poll()
            if not left:
                return
            time.sleep(0.1)


def _open_files(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return [file.path for file in process.open_files()]
    return []


def wait_for(condition: Callable[[], object], what: str, patience: float = 60) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"waited {patience:.0f} s in vain until {what}"
        time.sleep(0.1)


def missing() -> str | None:
    """Why there cannot be a Slurm here; None if there can."""
    if os.geteuid() != 0:
        return "needs root: slurmd starts jobs as the users they are of"
    programs = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client"}
    absent = [package for program, package in programs.items() if shutil.which(program) is None]
    return f"needs {', '.join(absent)}; .ci/run installs them" if absent else None


def free_ports(count: int) -> list[int]:
    listeners = [socket.socket() for _ in range(count)]
    try:
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if reason := missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "slurm.conf").write_text(
        CONFIG.format(host=socket.gethostname(), folder=folder, ports=free_ports(1 + len(NODES)))
    )
    for made in ("state", *(f"{node}.spool" for node in NODES)):
        (folder / made).mkdir()
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    cluster = Slurm(folder)
    names = {"key-file": key.name, "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log",
             "seed-file": "munged.seed"}  # fmt: skip
    try:
        cluster.start("munged", "munged", "--foreground", "--force", *(f"--{o}={folder / n}" for o, n in names.items()))
        wait_for((folder / "munge.socket").exists, "munged listens")
        cluster.start("slurmctld", "slurmctld", "-D")
        for node in NODES:
            cluster.start_node(node)

        def ready() -> bool:
            for name, daemon in cluster.daemons.items():
                said = (folder / f"{name}.out").read_text(errors="replace")
                assert daemon.poll() is None, f"{name} has ended with {daemon.returncode}:\n{said[-2000:]}"
            with suppress(RuntimeError):
                return cluster.run("sinfo", "--noheader", "--format=%T") == "idle"
            return False

        wait_for(ready, "both nodes are idle")
        yield cluster
    finally:
        cluster.end()
