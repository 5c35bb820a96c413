"""Slurm as a sweep needs it: a job array whose element I trains the task I, what of it is still in the queue, and how a task
goes back there. Without accounting (sacct), which many clusters do not have.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from wads_dist.common.errors import ExitCode, WadsError
from wads_dist.common.files import PACKAGE, write_text
from wads_dist.shards.addresses import VARIABLE

FOLDER = "slurm"
PATIENCE_SECONDS = 60.0


class SlurmError(WadsError):
    """Slurm's commands are not there, do not answer, or refuse."""

    exit_code = ExitCode.BAD_CONFIG


@dataclass(frozen=True)
class JobOptions:
    """What a task asks Slurm for; None: what the cluster gives by itself."""

    partition: str | None = None
    time: str | None = None
    gpus: int | None = None
    cpus: int | None = None
    array_limit: int | None = None
    """Tasks that may run at the same time."""
    signal_before: int = 120
    """Seconds before the time limit at which a task is told to save."""
    sbatch: Sequence[str] = ()
    """Further options of sbatch, as on its command line."""


@dataclass(frozen=True)
class Queued:
    """A task in Slurm's queue."""

    state: str
    """Slurm's word: PENDING, RUNNING, COMPLETING, …"""
    node: str
    reason: str
    """Why it waits."""

    @property
    def started(self) -> bool:
        return self.state != "PENDING"


def array_of(tasks: Iterable[int]) -> str:
    """Slurm's spelling of a set of numbers: ``0-3,7``."""
    ranges: list[list[int]] = []
    for task in sorted(tasks):
        if ranges and task == ranges[-1][1] + 1:
            ranges[-1][1] = task
        else:
            ranges.append([task, task])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def job_script(out: Path, name: str, tasks: Iterable[int], options: JobOptions) -> str:
    """The batch script of an array over ``tasks``; ``out`` is the sweep's folder, absolute."""
    limit = "" if options.array_limit is None else f"%{options.array_limit}"
    log = str(out / FOLDER).replace("%", "%%") + "/%A_%a.log"
    asked = {
        "partition": options.partition,
        "time": options.time,
        "gpus-per-node": options.gpus,
        "cpus-per-task": options.cpus,
    }
    lines = [
        *options.sbatch,
        *(f"--{option}={value}" for option, value in asked.items() if value is not None),
        f"--job-name={name}",
        f"--array={array_of(tasks)}{limit}",
        "--nodes=1",
        "--ntasks=1",
        "--requeue",
        "--open-mode=append",
        f"--signal=B:USR1@{options.signal_before}",
        f"--output={shlex.quote(log)}",
        f"--chdir={shlex.quote(os.getcwd())}",
    ]
    program = shlex.join([sys.executable, str(PACKAGE / "launch" / "sweep.py"), "--out", str(out), "--task"])
    return "\n".join(
        [
            "#!/bin/bash",
            "# Written by wads sweep. Each element of the array trains one category of one run.",
            *(f"#SBATCH {line}" for line in lines),
            "",
            "# exec, because the signal before the time limit reaches this shell alone.",
            f'exec {program} "$SLURM_ARRAY_TASK_ID"',
            "",
        ]
    )


def submit(out: Path, name: str, tasks: Sequence[int], options: JobOptions) -> str:
    """Submits ``tasks``; returns the job's id.

    Raises:
        SlurmError: Slurm refuses the job, or does not answer.
    """
    script = out / FOLDER / "job.sh"
    script.parent.mkdir(exist_ok=True)
    text = job_script(out, name, tasks, options)
    write_text(script, text)
    # On the command line too: SBATCH_PARTITION and the like in the environment count for more than the script.
    asked = [word for line in text.splitlines() if line.startswith("#SBATCH ") for word in shlex.split(line)[1:]]
    result = _run("sbatch", "--parsable", *asked, str(script))
    if result.returncode:
        raise SlurmError(f"sbatch refuses {script}: {result.stderr.strip()}")
    return result.stdout.strip().partition(";")[0]


def queue(name: str) -> dict[int, Queued]:
    """What of this user's jobs called ``name`` waits or runs, by task.

    Raises:
        SlurmError: Slurm does not answer.
    """
    result = _run("squeue", "--me", f"--name={name}", "--array", "--noheader", "--format=%K|%T|%N|%r")
    if result.returncode:
        raise SlurmError(f"squeue does not answer: {result.stderr.strip()}")
    rows = [line.strip().split("|") for line in result.stdout.splitlines()]
    return {int(row[0]): Queued(*row[1:]) for row in rows if row[0].isdecimal()}


def requeue() -> str | None:
    """Puts the task that this process is back into the queue, for which Slurm ends it; what stands against that, or None."""
    task = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        result = _run("scontrol", "requeue", task)
    except SlurmError as error:
        return str(error)
    return result.stderr.strip() or f"exit code {result.returncode}" if result.returncode else None


def _run(program: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    if shutil.which(program) is None:
        raise SlurmError(f"{program}: not found; submit where Slurm's commands are, or leave --slurm out")
    # sbatch exports its environment to the job, and Slurm's controller stores it.
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    try:
        return subprocess.run(
            [program, *arguments], env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{program}: no answer for {PATIENCE_SECONDS:.0f} s") from None
