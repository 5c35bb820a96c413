"""Two hosts on one machine: network namespaces joined by a cable of two virtual interfaces, an sshd in each."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import environment

PORT = 2222
SSHD = "/usr/sbin/sshd"


def sh(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()}")
    return result.stdout


@dataclass
class Host:
    """A network namespace with a hostname and an sshd of its own. Processes and files are shared with the machine."""

    name: str
    namespace: str
    address: str
    sshd: "subprocess.Popen[bytes] | None" = None

    def serve(self, folder: Path) -> None:
        """Starts the sshd; its sessions inherit the namespace and the hostname."""
        config = folder / f"sshd-{self.name}"
        config.write_text(
            f"ListenAddress {self.address}\nPort {PORT}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
            f"PidFile {folder}/{self.name}.pid\nStrictModes no\nUsePAM no\nPermitRootLogin yes\n"
        )
        start = f"hostname {self.name} && exec {SSHD} -D -e -f {config}"
        command = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", start]
        with (folder / f"sshd-{self.name}.log").open("wb") as log:
            self.sshd = subprocess.Popen(command, stdout=log, stderr=log)

    def cable(self, state: str) -> None:
        """Plugs the host's cable in (``up``) or out (``down``): what is sent meanwhile is lost without a word."""
        sh("ip", "-n", self.namespace, "link", "set", "eth0", state)

    def remove(self) -> None:
        """Ends whatever runs in the namespace, and the namespace."""
        for _ in range(100):
            pids = [int(pid) for pid in sh("ip", "netns", "pids", self.namespace).split()]
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not pids:
                break
            time.sleep(0.1)
        if self.sshd:
            self.sshd.kill()
            self.sshd.wait()
        sh("ip", "netns", "del", self.namespace)


@dataclass
class Hosts:
    """Two hosts, and how ``deepspeed`` reaches them."""

    first: Host
    second: Host
    folder: Path

    def command(self, *arguments: str) -> list[str]:
        """``deepspeed`` on the first host, with one rank on each."""
        hostfile = self.folder / "hostfile"
        hostfile.write_text(f"{self.first.address} slots=1\n{self.second.address} slots=1\n")
        head = ["ip", "netns", "exec", self.first.namespace, "deepspeed", "--hostfile", str(hostfile), "--no_ssh_check"]
        return [*head, "--master_addr", self.first.address, *arguments]

    def environment(self) -> dict[str, str]:
        """What the launcher needs, and the file of what it passes on to the other host's shell."""
        exported = self.folder / "deepspeed_env"
        path = environment()["PATH"]
        exported.write_text(f"DS_ACCELERATOR=cpu\nGLOO_SOCKET_IFNAME=eth0\nPATH={path}\n")
        return {"DS_ENV_FILE": str(exported), "PDSH_SSH_ARGS_APPEND": f"-F {self.folder}/ssh_config"}


def missing() -> str | None:
    """Why there cannot be two hosts here; None if there can."""
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    programs = {
        "ip": "iproute2",
        "pdsh": "pdsh",
        "ssh": "openssh-client",
        SSHD: "openssh-server",
        "unshare": "util-linux",
    }
    absent = [package for program, package in programs.items() if shutil.which(program) is None]
    return f"needs {', '.join(absent)}; .ci/run installs them" if absent else None


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if reason := missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("hosts")
    # A net of its own for each test process, should several run at once.
    net = f"10.{os.getpid() // 250 % 250}.{os.getpid() % 250}"
    pair = [Host(f"host-{x}", f"wads-{os.getpid()}-{x}", f"{net}.{i}") for i, x in ((1, "a"), (2, "b"))]
    made = []
    try:
        try:
            for host in pair:
                sh("ip", "netns", "add", host.namespace)
                made.append(host)
            a, b = pair
            sh(*f"ip link add eth0 netns {a.namespace} type veth peer name eth0 netns {b.namespace}".split())
        except RuntimeError as error:
            pytest.skip(f"network namespaces are not permitted here ({error})")
        for host in pair:
            sh(*f"ip -n {host.namespace} addr add {host.address}/24 dev eth0".split())
            sh(*f"ip -n {host.namespace} link set lo up".split())
            host.cable("up")
        for key in ("host", "user"):
            sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
        (folder / "ssh_config").write_text(
            f"Host *\n User root\n Port {PORT}\n IdentityFile {folder}/user\n StrictHostKeyChecking no\n"
            f" UserKnownHostsFile /dev/null\n LogLevel ERROR\n"
            # Without these, the launcher waits for a host that has vanished until TCP gives up.
            f" ServerAliveInterval 5\n ServerAliveCountMax 3\n"
        )
        Path("/run/sshd").mkdir(exist_ok=True)
        for host in pair:
            host.serve(folder)
        for host in pair:
            reach = ["ip", "netns", "exec", a.namespace, "ssh", "-F", f"{folder}/ssh_config", host.address, "hostname"]
            deadline = time.monotonic() + 60
            while (answer := subprocess.run(reach, capture_output=True, text=True)).stdout.strip() != host.name:
                assert time.monotonic() < deadline, f"{answer.stderr}\n{(folder / f'sshd-{host.name}.log').read_text()}"
                time.sleep(0.2)
        yield Hosts(a, b, folder)
    finally:
        for host in made:
            host.remove()
