"""A sweep: every run of a grid and its seeds, each over all of its categories, on this machine or as a Slurm job array.

The plan stands in the sweep's folder (``sweep_plan.py``). Here, run after run is launched with all of its categories; under
Slurm every category of every run is a task of its own (``slurm.py``) with a launch of its own. What is done is what has a
``metrics.json``, so the same command goes on wherever things were left.
"""

import argparse
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields

from rich import box
from rich.console import Console
from rich.table import Table

from wads_dist.common.errors import ConfigError, ExitCode
from wads_dist.common.files import write_text
from wads_dist.runs.folder import CHECKPOINTS, SUMMARY
from wads_dist.shards.addresses import VARIABLE, public, with_credentials
from wads_dist.sweep import slurm
from wads_dist.sweep.launch import POLL_SECONDS, Signals, train
from wads_dist.sweep.plan import (
    Run,
    Sweep,
    add_job,
    held,
    load,
    open_sweep,
    parse_grid,
    plan_runs,
    read_variants,
    record,
)
from wads_dist.sweep.summary import exit_code_of, show, summarise
from wads_dist.sweep.watch import Watch
from wads_dist.training.checkpoint_files import steps

QUEUE_SECONDS = 10.0
LOGS = "logs"


def sweep(
    given: argparse.Namespace, arguments: Sequence[str], variants: Mapping[str, Mapping[str, str]] | None = None
) -> int:
    """Plans, trains or submits, watches and sums up; returns the exit code.

    Args:
        given: what ``launch/sweep.py`` parsed.
        arguments: the rest of its command line, which are settings.
        variants: as ``plan_runs`` takes them.

    Raises:
        ConfigError, DataError: before anything is started, with every problem of every run.
        ResumeError: the folder holds another sweep.
    """
    out = given.out.absolute()
    if given.task is not None:
        return run_task(load(out), given.task)
    console = Console(stderr=given.json)
    if given.variants:
        variants = read_variants(given.variants, given.only)
    runs = plan_runs(out, arguments, parse_grid(given.grid), given.seeds, build=not given.dry_run, variants=variants)
    options = None
    if given.slurm:
        refuse_credentials(runs)
        options = slurm.JobOptions(**{field.name: getattr(given, field.name) for field in fields(slurm.JobOptions)})
    if given.dry_run:
        show_plan(open_sweep(out, runs, given.ranks), options, given.json)
        return ExitCode.OK
    with held(out):
        plan = open_sweep(out, runs, given.ranks)
        record(plan, command_line())
        if options:
            submit_missing(plan, options, console)
    if options and given.no_watch:
        return ExitCode.OK
    watch = Watch(plan, console, live=not given.no_watch)
    if options and not watch_slurm(watch):
        return ExitCode.INTERRUPTED
    stopped = None if options else run_here(watch)
    summary = summarise(plan)
    summary["exit_code"] = int(exit_code_of(summary) if stopped is None else stopped)
    write_text(out / SUMMARY, json.dumps(summary, indent=1))
    with suppress(OSError, SystemExit):  # nobody may be left to read it
        show(summary, console)
        if given.json:
            print(json.dumps(summary, indent=1), flush=True)
    return summary["exit_code"]


def command_line() -> str:
    """What a person has typed to start this, without credentials."""
    # Word by word: join puts quotation marks into a word that holds an apostrophe, and there an address ends for public.
    return shlex.join(["python", *map(public, sys.argv)])


def show_plan(plan: Sweep, options: slurm.JobOptions | None, as_json: bool) -> None:
    """Prints what would be started; with ``options``, by Slurm."""
    if as_json:
        shown = ("name", "settings", "categories", "missing")
        runs = [{name: getattr(run, name) for name in shown} for run in plan.runs]
        print(json.dumps({"sweep": str(plan.out), "ranks": plan.ranks, "runs": runs}, indent=1))
        return
    console = Console(highlight=False)
    table = Table(title=f"Sweep {plan.out}", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("run")
    for name in ("categories", "not done"):
        table.add_column(name, justify="right")
    for run in plan.runs:
        table.add_row(run.name, str(len(run.categories)), str(len(run.missing)))
    console.print(table)
    console.print("\nCategories: " + ", ".join(dict.fromkeys(category for _, category in plan.tasks)))
    open_tasks, ranks = plan.open_tasks, f"{plan.ranks} ranks" if plan.ranks else "a rank on each accelerator"
    if options is None:
        launches = sum(1 for run in plan.runs if run.missing)
        console.print(f"{len(open_tasks)} categories to train; launches, one after the other: {launches}; {ranks}")
    else:
        console.print(f"{len(open_tasks)} categories to train, each a task of a Slurm job array; {ranks}\n")
        console.print(slurm.job_script(plan.out, plan.job_name, open_tasks, options), markup=False, soft_wrap=True)


def run_here(watch: Watch) -> ExitCode | None:
    """Launches one run after the other; the exit code if somebody stopped that."""
    plan, signals = watch.sweep, Signals()
    with watch:
        for run in plan.runs:
            if not run.missing:
                continue
            log = plan.out / LOGS / f"{run.name}.log"
            watch.say(f"{run.name}: {len(run.missing)} of {len(run.categories)} categories to train; output: {log}")
            code = train(plan, run, run.categories, signals, log, watch.look)
            if code in (ExitCode.PREEMPTED, ExitCode.INTERRUPTED):
                watch.say(f"{run.name}: stopped; the same command goes on from the last checkpoints", "yellow")
                return code
            if code != ExitCode.OK:
                lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
                watch.say("\n  ".join([f"{run.name}: exit code {int(code)}; {log} ends with", *lines[-3:]]), "red")
    return None


# --- Slurm -------------------------------------------------------------------------------------------------------


def refuse_credentials(runs: Sequence[Run]) -> None:
    """Refuses runs whose data needs credentials that this process alone has: Slurm gets none of them, because it would store
    them, so that the tasks would have none."""
    addresses = {place for run in runs for place in (run.config.data.shards, run.config.data.textures) if place}
    if known := sorted(place for place in addresses if with_credentials(place) != place):
        raise ConfigError(
            [
                f"{place}: its credentials do not reach the tasks of --slurm; write them to ~/.netrc on the cluster, and leave "
                f"them out of the address and of {VARIABLE}"
                for place in known
            ]
        )


def submit_missing(plan: Sweep, options: slurm.JobOptions, console: Console) -> None:
    """Submits the tasks that are neither done nor in the queue."""
    queued = slurm.queue(plan.job_name)
    tasks = [number for number in plan.open_tasks if number not in queued]
    if queued:
        console.print(f"In the queue already: {len(queued)} tasks", highlight=False)
    if tasks:
        job = slurm.submit(plan.out, plan.job_name, tasks, options)
        add_job(plan.out, job, tasks)
        told = f"Submitted: job {job}, {len(tasks)} tasks; output: {plan.out / slurm.FOLDER}"
        console.print(told, highlight=False, markup=False, soft_wrap=True)


def watch_slurm(watch: Watch) -> bool:
    """Shows the tasks until all is done or none is in the queue any more; False if the person who looks on leaves earlier."""
    plan, asked, known = watch.sweep, -QUEUE_SECONDS, False
    try:
        with watch:
            while True:
                if time.monotonic() - asked >= QUEUE_SECONDS:
                    asked = time.monotonic()
                    try:
                        watch.queue, known = slurm.queue(plan.job_name), True
                    except slurm.SlurmError as error:
                        watch.say(f"{error}; asking again", "yellow")
                if watch.look().complete or (known and not watch.queue):
                    return True
                time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        watch.say(f"Detached; the jobs go on. To watch again: {command_line()}")
        watch.say(f"To cancel them: scancel --me --name={plan.job_name}")
        return False


def run_task(plan: Sweep, number: int) -> ExitCode:
    """Trains one category of one run: an element of the job array.

    Asked by SIGUSR1 to save, because its time is almost over, it goes back into the queue. Asked by SIGTERM (scancel, or a
    requeue that somebody else has asked for), it only saves.
    """
    if not 0 <= number < len(plan.tasks):
        raise ConfigError([f"--task {number}: {plan.out} has tasks 0 to {len(plan.tasks) - 1}"])
    name, category = plan.tasks[number]
    run, signals = plan.run(name), Signals()
    checkpoints = run.folder / category / CHECKPOINTS
    before = steps(checkpoints)[:1]
    code = train(plan, run, [category], signals, None, lambda: None)
    told = f"task {number} ({name}, {category}): exit code {int(code)}"
    if code == ExitCode.PREEMPTED and signals.first == signal.SIGUSR1 and "SLURM_ARRAY_JOB_ID" in os.environ:
        if steps(checkpoints)[:1] == before:
            told += (
                "; it saved nothing in all of its time, so it does not go back into the queue: give it more (--time)"
            )
        elif problem := slurm.requeue():
            told += f"; saved, but it cannot go back into the queue ({problem})"
        else:
            told += "; saved, and back in the queue"
    print(told, flush=True)
    return code
