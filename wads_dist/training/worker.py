"""One rank of one category's training, in a process of its own: ``python -m wads_dist.training.worker``.

DeepSpeed cannot be initialised twice in one process, and a category that dies must take nothing with it.
"""

import argparse
import contextlib
import faulthandler
import io
import json
import logging
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from kernels.philox import shuffled
from shards.addresses import public
from shards.arguments import Parser, local_path
from shards.names import category_problem, printable, quoted
from shards.source import Dataset
from shards.verify import open_category
from wads_dist.common.errors import EXPLAINED, ConfigError, ExitCode, PreemptedError, RankLostError, exit_code
from wads_dist.common.heartbeat import Pulse
from wads_dist.common.host_memory import keep_freed_memory
from wads_dist.common.processes import leave
from wads_dist.common.ranks import Ranks, unname_shared_memory
from wads_dist.common.signals import StopRequest, worker_signals
from wads_dist.config.deepspeed import read_settings
from wads_dist.config.load import load_config
from wads_dist.config.schema import Config, ExpertsConfig
from wads_dist.data.training import TrainingData, TrainingSplit, rank_samples
from wads_dist.evaluation.calibration import fit_experts
from wads_dist.evaluation.evaluate import evaluate
from wads_dist.model.features import load_network
from wads_dist.model.weights import load_model, save_weights
from wads_dist.reporting.results import save_results
from wads_dist.runs.events import Events, finite_or_none
from wads_dist.runs.folder import METRICS, REJECTED
from wads_dist.runs.leases import still_held
from wads_dist.runs.record import refuse_links
from wads_dist.training import checkpoint, validation
from wads_dist.training.batch_size import find_batch_size
from wads_dist.training.losses import Losses
from wads_dist.training.step_check import Requests, slowness
from wads_dist.training.stopping import HeldOutScore, is_due
from wads_dist.training.trainer import Trainer


def say(text: str) -> None:
    """Prints a line, if anyone is left to read it: a launcher that dies takes the pipe with it, and the step must be saved."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


class SkippedSamples:
    """``RUN/<category>/rejected.jsonl``: the samples of every step that was not taken, and the images they come from; one
    line a step. Rank 0 only."""

    def __init__(self, folder: Path, config: Config, dataset: Dataset, category: str) -> None:
        self.path, self.config = folder / REJECTED, config
        self.entries = TrainingSplit.of(dataset, category, config).trained

    def write(self, trainer: Trainer, losses: Losses) -> dict[str, Any]:
        """Appends a line for the step; returns what ``events.jsonl`` says of it."""
        verdict, trained = losses.verdict, self.config.trainer
        assert verdict is not None
        images = {}
        for rank in verdict.ranks:
            ids = rank_samples(losses.first, trained.global_batch_size, rank, trainer.ranks.world_size)
            indices = shuffled(trained.seed, torch.tensor(ids), len(self.entries)).tolist()
            for sample, (shard, entry) in zip(ids, (self.entries[i] for i in indices), strict=True):
                images[sample] = f"{shard.name}/{entry.key}"
        summary = {
            "step": trainer.progress.step,
            "reason": verdict.rejected,
            "ranks": list(verdict.ranks),
            "loss": verdict.loss,
            "threshold": verdict.threshold,
        }
        with self.path.open("a") as stream:
            stream.write(json.dumps(finite_or_none(summary) | {"samples": images}) + "\n")
        return summary | {"samples": list(images)}


def initialise(config: Config, threads: int) -> Ranks:
    """Joins the world this process was started for."""
    ranks = Ranks.from_environment()
    torch.set_num_threads(threads)
    if config.trainer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    elif ranks.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    elif ranks.device.type == "cpu":
        keep_freed_memory()
    deepspeed.utils.logger.setLevel("WARNING")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # warns of a missing CUDA on every CPU
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints a line of praise for every operator it loads
        deepspeed.init_distributed(
            get_accelerator().communication_backend_name(),
            auto_mpi_discovery=False,
            verbose=False,
            # Later than the supervisors, which say who hangs; a collective only says that it has waited.
            timeout=timedelta(seconds=max(1800, 2 * config.trainer.hang_timeout)),
        )
    unname_shared_memory(ranks)
    return ranks


def stage_note(config: Config, stage: int | None, resumed: bool) -> str | None:
    """Why the ZeRO stage is not that of DeepSpeed's file, if it is not."""
    path, settings = read_settings(config)
    of_file = (settings.get("zero_optimization") or {}).get("stage", 0)
    if stage in (None, of_file):
        return None
    if resumed:
        return f"ZeRO-{stage}, as its checkpoint has it, and not stage {of_file} of {path}"
    return f"ZeRO-0: a rank that trains alone has nothing to share (stage {of_file} of {path} is for groups)"


def train_category(config: Config, work: argparse.Namespace, stop: StopRequest, pulse: Pulse) -> None:
    """Trains, evaluates and records one category; resumes from its newest checkpoint.

    Raises:
        PreemptedError: asked to stop; saved.
        RankLostError: another group has taken over.
    """
    location, category, run = work.shards, work.category, work.run
    # Before the process group exists: a slow download must not run into its time-out.
    frozen = None if config.model.features == "none" else load_network(config.model.features, config.features.weights)
    first = os.environ.get("RANK", "0") == "0"
    dataset = open_category(location, category, config.data.cache, decode_test=first)
    ranks = initialise(config, work.threads)
    folder = run / category
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = folder / "checkpoints"
    manifest = dataset.manifest(category)
    data = checkpoint.DataHashes(manifest.fingerprint, {shard.name: shard.sha256 for shard in manifest.shards})
    last_save = time.monotonic()

    def requests() -> Requests:
        minutes = config.checkpoint.every_minutes
        return Requests(stop.requested, bool(minutes) and time.monotonic() - last_save > minutes * 60)

    images, events = TrainingData(config, dataset, category, ranks.device), Events(folder, ranks.is_first)
    if config.trainer.find_batch_size:
        config, tried = find_batch_size(config, ranks, images, folder)
        events.write("batch size", micro_batch_size=config.trainer.micro_batch_size, images_per_second=tried)
        if ranks.is_first:
            rates = ", ".join(f"{micro}: {rate:.1f}" for micro, rate in tried.items()) or "as found before"
            say(
                f"{category}: micro-batches of {config.trainer.micro_batch_size} (forward and backward, img/s: {rates})"
            )
    resumed = checkpoint.choose(ranks, checkpoints, events.write)
    stage = checkpoint.zero_stage(resumed, ranks.world_size)
    trainer = Trainer(config, ranks, images, requests, pulse, category, stage)
    if ranks.is_first and (note := stage_note(config, stage, resumed is not None)):
        say(f"{category}: {note}")
    pictured = (
        validation.ValidationSamples.of(config, dataset, category, trainer.data) if validation.wanted(trainer) else None
    )
    held_out = HeldOutScore(config, dataset, category, images, ranks) if config.stopping.every else None
    if resumed:
        checkpoint.restore(trainer, resumed, data, events.write)
    if config.trainer.cuda_graph and ranks.is_first and trainer.why_no_graph:
        say(f"{category}: no CUDA graph: {trainer.why_no_graph}")
    if config.trainer.compile != "off":
        if ranks.is_first:
            say(f"{category}: compiling the networks (at a first start for minutes)")
        started = time.monotonic()
        trainer.warm_up()
        events.write("compiled", seconds=round(time.monotonic() - started, 3))
    started_at, started = trainer.progress.next_sample, time.monotonic()
    events.write(
        "resume" if resumed else "start",
        step=trainer.progress.step,
        samples=started_at,
        world_size=ranks.world_size,
        precision=trainer.precision,
        zero_stage=trainer.gs.zero_optimization_stage(),
        fingerprint=data.fingerprint,
    )
    skipped = SkippedSamples(folder, config, dataset, category)
    seconds = [0.0] * ranks.world_size
    taken: list[float] = []  # losses of the steps taken since the last save
    unsaved: str | None = None  # why the last save did not succeed

    def score_if_due() -> None:
        if held_out and is_due(trainer.progress, config):
            score, is_best = held_out(trainer)
            samples, step = trainer.progress.next_sample, trainer.progress.step
            events.write("score", step=step, samples=samples, score=score, best=is_best)
            if ranks.is_first and trainer.gs.monitor.enabled:
                trainer.gs.monitor.write_events([("synthetic/pixel_ap", score, samples)])

    def on_step(trainer: Trainer, losses: Losses) -> None:
        nonlocal last_save, seconds, unsaved
        progress, every, verdict = trainer.progress, config.checkpoint, losses.verdict
        assert verdict is not None
        if not verdict.stop:  # whoever asks to stop will not wait; the score is taken when training goes on
            score_if_due()
        finished = trainer.finished
        seconds = [a + b for a, b in zip(seconds, verdict.seconds, strict=True)]
        if not verdict.rejected:
            taken.append(verdict.loss)
        elif ranks.is_first:
            events.write("rejected", **skipped.write(trainer, losses))
        if progress.step % config.trainer.log_every == 0 or finished:
            values = losses.means()
            rate = (progress.next_sample - started_at) / (time.monotonic() - started)
            scores = [round(score, 3) for score in slowness(seconds)]
            seconds = [0.0] * ranks.world_size
            events.write(
                "step",
                step=progress.step,
                samples=progress.next_sample,
                images_per_second=rate,
                rejected=progress.rejected,
                slowness=scores,
                **values,
            )
            if ranks.is_first and trainer.gs.monitor.enabled:
                trainer.gs.monitor.write_events([(f"train/{k}", v, progress.next_sample) for k, v in values.items()])
        due = every.every_steps is not None and progress.step % every.every_steps == 0
        if due or finished or verdict.save or verdict.stop:
            pulse.mark("save", progress.step)
            require_lease(work.lease, ranks)
            saved = checkpoint.save(
                trainer, checkpoints, data, fmean(taken) if taken else None, lambda: holds(work.lease)
            )
            last_save, unsaved = time.monotonic(), saved.problem
            taken.clear()
            events.write(
                "checkpoint failed" if saved.problem else "checkpoint",
                step=progress.step,
                samples=progress.next_sample,
                problem=saved.problem,
                bytes=saved.bytes,
                seconds=round(saved.seconds, 3),
            )
            if pictured and not verdict.stop:
                pulse.mark("figure", progress.step)
                validation.show(trainer, pictured)

    with stop.deferred():
        score_if_due()
        ended = trainer.train(on_step)
    if stop.requested or not ended:
        events.write("preempted", step=trainer.progress.step, samples=trainer.progress.next_sample)
        outcome = f"BUT NOT SAVED ({unsaved})" if unsaved else "and saved"
        raise PreemptedError(
            f"stopped as asked, {outcome}, at sample {trainer.progress.next_sample:,} (step {trainer.progress.step:,}); the "
            "same command goes on from the last checkpoint"
        )
    pulse.mark("evaluate", trainer.progress.step)
    state = trainer.inference_state()
    if held_out and ranks.is_first:
        assert trainer.best is not None
        state = trainer.best
        say(f"{category}: {held_out.note(trainer)}")
    require_lease(work.lease, ranks)
    # Until it has its experts, what is published is a whole model without any.
    without = {"model": config.model.model_copy(update={"features": "none"}), "experts": ExpertsConfig()}
    plain = config.model_copy(update=without)
    if ranks.is_first:
        save_weights(state, folder, plain, category)
    ranks.barrier()
    model = load_model(folder, plain, ranks.device)
    if config.has_experts:
        model.experts = fit_experts(model, frozen[0] if frozen else None, config, dataset, category, ranks)
        require_lease(work.lease, ranks)
        if ranks.is_first:
            finished = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
            save_weights(finished, folder, config, category, features=frozen[1] if frozen else None)
        ranks.barrier()
    evaluation = evaluate(model, config, dataset, category, ranks)
    progress = trainer.progress
    if ranks.is_first:
        metrics = evaluation.metrics | {
            "category": category,
            "samples": progress.next_sample,
            "rejected_steps": progress.rejected,
            "spikes": progress.spikes,
            "images_per_second": progress.next_sample / max(progress.seconds, 1e-9),
            "seconds": progress.seconds,
            "world_size": ranks.world_size,
            "micro_batch_size": trainer.micro_batch_size,
            "precision": trainer.precision,
            "backbone": f"{config.model.backbone} ({config.model.weights} weights)",
            "fingerprint": data.fingerprint,
            "features": frozen[1] if frozen else None,
            "grey": images.settings.grey,
            "stopping": held_out.record(trainer) if held_out else None,
        }
        save_results(folder, category, evaluation, config)
        require_lease(work.lease, ranks)
        # Last: this file says that the category is done.
        checkpoint.write_text(folder / METRICS, json.dumps(metrics, indent=1))
        events.write(
            "done", **{k: metrics[k] for k in ("pixel_auroc", "pixel_ap", "image_auroc", "seconds", "reconstruction")}
        )
        if trainer.gs.monitor.enabled:
            scores = {k: metrics[k] for k in ("pixel_auroc", "pixel_ap", "image_auroc") if metrics[k] is not None}
            trainer.gs.monitor.write_events([(f"test/{k}", v, progress.next_sample) for k, v in scores.items()])
    ranks.barrier()


def category(text: str) -> str:
    if problem := category_problem(text):
        raise argparse.ArgumentTypeError(f"{quoted(text)} {problem}")
    return text


def holds(lease: Path | None) -> bool:
    return lease is None or still_held(lease)


def require_lease(lease: Path | None, ranks: Ranks) -> None:
    """Before anything is published: a process that was frozen for minutes must not overwrite what its successor has done.

    Raises:
        RankLostError: the category is another group's now.
    """
    if lease and ranks.is_first and not holds(lease):
        raise RankLostError(
            f"{lease.parent.name} was taken over by another group, because this one was silent for too long"
        )


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--run", type=local_path, required=True, help="the run's folder")
    parser.add_argument("--category", required=True, type=category)
    parser.add_argument("--shards", required=True, help="location of the shards")
    parser.add_argument("--config", required=True, help="the launch's configuration")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of this rank")
    parser.add_argument("--cores", help="cores this rank may use, separated by commas; none: any")
    parser.add_argument("--lease", type=local_path, help="file that says that the category is this group's")
    parser.add_argument("--pulse", type=int, help="descriptor of the pipe on which the supervisor listens")
    arguments = parser.parse_args()
    stop, pulse = worker_signals(), Pulse()
    if arguments.pulse is not None:
        pulse.beat(arguments.pulse)
    if arguments.cores:
        os.sched_setaffinity(0, {int(core) for core in arguments.cores.split(",")})
    rank = int(os.environ.get("RANK", 0))
    try:
        refuse_links(arguments.run, [arguments.category])
    except ConfigError as error:
        print(f"{arguments.category}, rank {rank}: {error}", file=sys.stderr)
        return exit_code(error)
    folder = arguments.run / arguments.category
    folder.mkdir(parents=True, exist_ok=True)
    stacks = folder / f"stacks-rank-{rank:05d}.txt"
    faulthandler.register(signal.SIGUSR2, stacks.open("w"))  # supervisors send it when a rank hangs
    try:
        config = load_config(["--config", arguments.config])
        train_category(config, arguments, stop, pulse)
    except PreemptedError as error:
        if rank == 0:
            say(f"{arguments.category}: {error}")
        return error.exit_code
    except Exception as error:
        text = printable(public(str(error)))
        with contextlib.suppress(OSError):  # for the lease's end; any rank may be the one that knows
            Events(folder, True).write("failed", rank=rank, reason=text or type(error).__name__)
        if not isinstance(error, EXPLAINED):
            raise
        print(f"{arguments.category}, rank {rank}: {text}", file=sys.stderr)
        return exit_code(error)
    finally:
        stacks.unlink(missing_ok=True)
    return ExitCode.OK


if __name__ == "__main__":
    leave(main())
