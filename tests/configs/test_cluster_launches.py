"""What the templates for Slurm and Kubernetes start, with real ranks: asked to stop as the scheduler asks, a launch saves, and
started again it goes on. Slurm is a stub here that starts two tasks; a pod is a torchrun with the variables that Trainer sets.
"""

import os
import shlex
import signal
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPOSITORY, environment
from tests.support.launching import BATCH, CATEGORY, OPTIONS, events, free_port, launched, processes, summary
from wads_dist.common.errors import ExitCode

pytestmark = [pytest.mark.fault, pytest.mark.slow]
CLUSTER = REPOSITORY / "configs" / "cluster"
SHORT = [*OPTIONS, "--trainer.samples", str(BATCH * 24)]
STUBS = {
    "scontrol": """case $1 in show) echo localhost ;; requeue) echo "put back: $2" ;; esac""",
    "srun": """while [[ $1 == --* ]]; do shift; done
        for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 "$@" & tasks+=($!); done
        for task in "${tasks[@]}"; do wait "$task"; this=$?; code=$((this > ${code:-0} ? this : ${code:-0})); done
        exit "$code" """,
}


def test_tasks_of_slurm_save_on_sigusr1_and_go_on(demo_shards: Path, tmp_path: Path) -> None:
    run, script, bin = tmp_path / "run", tmp_path / "train.sbatch", tmp_path / "bin"
    text = (CLUSTER / "train.sbatch").read_text()
    for placeholder, ours in (
        ("/shared/mvtec-shards", demo_shards),
        ("/shared/runs/mvtec", run),
        ("/tmp/$USER", tmp_path),
    ):
        text = text.replace(placeholder, str(ours))
    # What has been compiled here already is used.
    script.write_text(text.replace("export TORCH_EXTENSIONS_DIR=", "unused="))
    bin.mkdir()
    for name, body in STUBS.items():
        (bin / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin / name).chmod(0o755)
    job = {"JOB_ID": "4711", "JOB_NODELIST": "localhost", "NTASKS": "2", "NTASKS_PER_NODE": "2", "CPUS_PER_TASK": "1"}
    env = {f"SLURM_{name}": value for name, value in job.items()} | {"SLURM_SUBMIT_DIR": str(REPOSITORY)}
    env |= {"PATH": f"{bin}:{environment()['PATH']}", "USER": "me"}
    command = ["bash", str(script), *SHORT]
    with launched(run, command, tmp_path / "log", **env) as first:
        first.wait_for_steps(2)
        for process in processes(run):  # as Slurm signals the processes that it has started
            if process.kind == "supervisor":
                os.kill(process.pid, signal.SIGUSR1)
        code, _ = first.ended(60)
        assert code == ExitCode.PREEMPTED and "put back: 4711" in first.text()
    assert events(run, "preempted")[-1]["step"] == events(run, "checkpoint")[-1]["step"]
    with launched(run, command, tmp_path / "log", **env) as second:
        assert second.ended(600)[0] == ExitCode.OK and "put back" not in second.text()
    assert events(run, "resume")[-1]["step"] > 0 and summary(run)["complete"]


def test_a_pod_saves_on_sigterm_and_its_successor_goes_on(demo_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = list(yaml.safe_load_all((CLUSTER / "trainjob.yaml").read_text()))[1]["spec"]["trainer"]
    text = shlex.join([*trainer["command"], *trainer["args"], *SHORT])
    for placeholder, ours in (("/data", demo_shards), ("/runs/mvtec", run), ("/cache", tmp_path)):
        text = text.replace(f"={placeholder}", f"={ours}")
    pod = {
        "NNODES": "1",
        "NPROC_PER_NODE": "2",
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    env = {f"PET_{name}": value for name, value in pod.items()}
    with launched(run, shlex.split(text), tmp_path / "log", **env) as first:
        first.wait_for_steps(2)
        first.process.send_signal(signal.SIGTERM)
        code, _ = first.ended(60)
        assert code != 0 and summary(run)["exit_code"] == ExitCode.PREEMPTED
    assert events(run, "preempted")[-1]["step"] == events(run, "checkpoint")[-1]["step"]
    with launched(run, shlex.split(text), tmp_path / "log", **env) as second:
        assert second.ended(600)[0] == ExitCode.OK
    assert events(run, "resume")[-1]["step"] > 0 and summary(run)["categories"][CATEGORY]["world_size"] == 2
