"""One rank of one category's training, in a process of its own: ``python -m wads_dist.worker`` (started by ``run.py``).

DeepSpeed cannot be initialised twice in one process, and a category that dies must take nothing with it.
"""

import argparse
import contextlib
import faulthandler
import json
import math
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
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from kernels.philox import shuffled
from shards.source import Dataset
from shards.verify import open_category
from wads_dist import checkpoint
from wads_dist.config import Config, load_config
from wads_dist.data import TrainingData, rank_samples
from wads_dist.distributed import Ranks, unname_shared_memory
from wads_dist.entry import leave
from wads_dist.errors import EXPLAINED, ExitCode, PreemptedError, exit_code
from wads_dist.evaluate import evaluate, load_model, save_weights
from wads_dist.figures import save_samples
from wads_dist.guards import Requests, slowness
from wads_dist.pulse import Pulse
from wads_dist.signals import StopRequest, worker_signals
from wads_dist.trainer import Losses, Trainer

METRICS, REJECTED = "metrics.json", "rejected.jsonl"
QUIET_SECONDS = 15.0
# A rank is called slow on the terminal from here on; events.jsonl has every rank's score.
SLOW = 1.5


class Events:
    """``RUN/<category>/events.jsonl``: one JSON object a line, appended; for machines. Rank 0 only."""

    def __init__(self, folder: Path, enabled: bool) -> None:
        self.file = (folder / "events.jsonl").open("a") if enabled else None

    def write(self, event: str, **values: Any) -> None:
        if self.file:
            values = finite_or_none(values)
            self.file.write(json.dumps({"event": event, "time": round(time.time(), 3), **values}) + "\n")
            self.file.flush()


def finite_or_none(values: dict[str, Any]) -> dict[str, Any]:
    """A rejected step's losses are not finite, and NaN is no JSON."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


class Display:
    """Progress for people: a live bar on a terminal, a line every few seconds elsewhere. Rank 0 only."""

    def __init__(self, category: str, total: int, enabled: bool) -> None:
        self.category, self.total, self.enabled = category, total, enabled
        self.last_line = 0.0
        self.bar: Progress | None = None
        self.task = TaskID(0)
        if enabled and sys.stdout.isatty():
            columns = "[bold]{task.description}", BarColumn(), "{task.completed:,.0f}/{task.total:,.0f} samples"
            self.bar = Progress(*columns, TextColumn("{task.fields[losses]}"), TimeRemainingColumn(), transient=True)
            self.task = self.bar.add_task(category, total=total, losses="")
            self.bar.start()

    def update(self, samples: int, rate: float, losses: dict[str, float], slow: str) -> None:
        if not self.enabled:
            return
        names = {"dissimilarity": "1-SSIM", "focal": "focal", "adversarial": "adv", "discriminator": "disc"}
        text = f"{rate:.1f} img/s  " + "  ".join(f"{names[k]} {losses[k]:.4f}" for k in names) + slow
        if self.bar:
            self.bar.update(self.task, completed=samples, losses=text)
        elif time.monotonic() - self.last_line > QUIET_SECONDS or samples >= self.total:
            self.last_line = time.monotonic()
            say(f"{self.category}: {samples:,}/{self.total:,} samples  {text}")

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


def say(text: str) -> None:
    """Prints a line, if anyone is left to read it: a launcher that dies takes the pipe with it, and the step must be saved."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


class SkippedSamples:
    """``RUN/<category>/rejected.jsonl``: the samples of every step that was not taken, and the images they come from; one
    line a step. Rank 0 only."""

    def __init__(self, folder: Path, config: Config, dataset: Dataset, category: str) -> None:
        self.path, self.config = folder / REJECTED, config
        self.entries = dataset.manifest(category).samples("train")

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


def initialise(config: Config) -> Ranks:
    """Joins the world this process was started for and gives it its share of the node's cores."""
    ranks = Ranks.from_environment()
    torch.set_num_threads(config.trainer.threads or max(1, (os.cpu_count() or 1) // ranks.local_world_size))
    if config.trainer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    elif ranks.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    deepspeed.utils.logger.setLevel("WARNING")
    deepspeed.init_distributed(
        get_accelerator().communication_backend_name(),
        auto_mpi_discovery=False,
        verbose=False,
        # Later than the supervisors, which say who hangs; a collective only says that it has waited.
        timeout=timedelta(seconds=max(1800, 2 * config.trainer.hang_timeout)),
    )
    unname_shared_memory(ranks)
    return ranks


def train_category(config: Config, location: str, category: str, run: Path, stop: StopRequest, pulse: Pulse) -> None:
    """Trains, evaluates and records one category; resumes from its newest checkpoint.

    Raises:
        PreemptedError: asked to stop; saved.
    """
    # Before the process group exists: a slow download must not run into its time-out.
    first = os.environ.get("RANK", "0") == "0"
    dataset = open_category(location, category, config.data.cache, decode_test=first)
    ranks = initialise(config)
    folder = run / category
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = folder / "checkpoints"
    manifest = dataset.manifest(category)
    data = checkpoint.DataHashes(manifest.fingerprint, {shard.name: shard.sha256 for shard in manifest.shards})
    last_save = time.monotonic()

    def requests() -> Requests:
        minutes = config.checkpoint.every_minutes
        return Requests(stop.requested, bool(minutes) and time.monotonic() - last_save > minutes * 60)

    trainer = Trainer(config, ranks, TrainingData(config, dataset, category, ranks.device), requests, pulse)
    events = Events(folder, ranks.is_first)
    display = Display(category, config.trainer.samples, ranks.is_first)
    resumed = checkpoint.resume(trainer, checkpoints, data, events.write)
    started_at, started = trainer.progress.next_sample, time.monotonic()
    events.write(
        "resume" if resumed else "start",
        step=trainer.progress.step,
        samples=started_at,
        world_size=ranks.world_size,
        precision=trainer.precision,
        fingerprint=data.fingerprint,
    )
    if resumed and ranks.is_first:
        say(f"{category}: resumed at sample {started_at:,} (step {trainer.progress.step:,})")
    skipped = SkippedSamples(folder, config, dataset, category)
    seconds = [0.0] * ranks.world_size
    taken: list[float] = []  # losses of the steps taken since the last save
    unsaved: str | None = None  # why the last save did not succeed

    def on_step(trainer: Trainer, losses: Losses) -> None:
        nonlocal last_save, seconds, unsaved
        progress, every, verdict = trainer.progress, config.checkpoint, losses.verdict
        assert verdict is not None
        finished = progress.next_sample >= config.trainer.samples
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
            worst = max(scores)
            slow = f"  slowest: rank {scores.index(worst)}, {worst:.1f} times" if worst > SLOW else ""
            display.update(progress.next_sample, rate, values, slow)
            if ranks.is_first and trainer.gs.monitor.enabled:
                trainer.gs.monitor.write_events([(f"train/{k}", v, progress.next_sample) for k, v in values.items()])
        due = every.every_steps is not None and progress.step % every.every_steps == 0
        if due or finished or verdict.save or verdict.stop:
            pulse.mark("save", progress.step)
            saved = checkpoint.save(trainer, checkpoints, data, fmean(taken) if taken else None)
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

    try:
        with stop.deferred():
            spent = trainer.train(on_step)
    finally:
        display.close()
    if stop.requested or not spent:
        events.write("preempted", step=trainer.progress.step, samples=trainer.progress.next_sample)
        outcome = f"BUT NOT SAVED ({unsaved})" if unsaved else "and saved"
        raise PreemptedError(
            f"stopped as asked, {outcome}, at sample {trainer.progress.next_sample:,} (step {trainer.progress.step:,}); the "
            "same command goes on from the last checkpoint"
        )
    pulse.mark("evaluate", trainer.progress.step)
    state = trainer.inference_state()
    if ranks.is_first:
        save_weights(state, folder, config, category)
    ranks.barrier()
    evaluation = evaluate(load_model(folder, config, ranks.device), config, dataset, category, ranks)
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
            "precision": trainer.precision,
            "backbone": f"{config.model.backbone} ({config.model.weights} weights)",
            "fingerprint": data.fingerprint,
        }
        save_samples(folder / "samples.png", category, evaluation)
        # Last: this file says that the category is done.
        checkpoint.write_text(folder / METRICS, json.dumps(metrics, indent=1))
        events.write(
            "done", **{k: metrics[k] for k in ("pixel_auroc", "pixel_ap", "image_auroc", "seconds", "reconstruction")}
        )
        health = [f"{k} {v:.3f}" for k, v in metrics["reconstruction"].items() if v is not None]
        say(f"{category}: {', '.join(health) or 'too few normal test images to judge the reconstructor'}")
    ranks.barrier()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="the run's folder, which holds config.toml")
    parser.add_argument("--category", required=True)
    parser.add_argument("--shards", required=True, help="location of the shards")
    parser.add_argument("--pulse", type=int, help="descriptor of the pipe on which the supervisor listens")
    arguments = parser.parse_args()
    stop, pulse = worker_signals(), Pulse()
    if arguments.pulse is not None:
        pulse.beat(arguments.pulse)
    rank = int(os.environ.get("RANK", 0))
    folder = arguments.run / arguments.category
    folder.mkdir(parents=True, exist_ok=True)
    stacks = folder / f"stacks-rank-{rank:05d}.txt"
    faulthandler.register(signal.SIGUSR2, stacks.open("w"))  # supervisors send it when a rank hangs
    try:
        config = load_config(["--config", str(arguments.run / "config.toml")])
        train_category(config, arguments.shards, arguments.category, arguments.run, stop, pulse)
    except PreemptedError as error:
        if rank == 0:
            say(f"{arguments.category}: {error}")
        return error.exit_code
    except EXPLAINED as error:
        print(f"{arguments.category}, rank {rank}: {error or 'interrupted'}", file=sys.stderr)
        return exit_code(error)
    finally:
        stacks.unlink(missing_ok=True)
    return ExitCode.OK


if __name__ == "__main__":
    leave(main())
