"""One rank of one category's training, in a process of its own: ``python -m wads_dist.worker`` (started by ``run.py``).

DeepSpeed cannot be initialised twice in one process, and a category that dies must take nothing with it.
"""

import argparse
import json
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from shards.source import Dataset
from wads_dist import checkpoint
from wads_dist.config import Config, load_config
from wads_dist.data import TrainingData
from wads_dist.distributed import Ranks
from wads_dist.errors import EXPLAINED, ExitCode, exit_code
from wads_dist.evaluate import evaluate, load_model, save_weights
from wads_dist.figures import save_samples
from wads_dist.trainer import Losses, Trainer

METRICS = "metrics.json"
QUIET_SECONDS = 15.0


class Events:
    """``RUN/<category>/events.jsonl``: one JSON object a line, appended; for machines. Rank 0 only."""

    def __init__(self, folder: Path, enabled: bool) -> None:
        self.file = (folder / "events.jsonl").open("a") if enabled else None

    def write(self, event: str, **values: Any) -> None:
        if self.file:
            # A rejected step's losses are not finite, and NaN is no JSON.
            values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            self.file.write(json.dumps({"event": event, "time": round(time.time(), 3), **values}) + "\n")
            self.file.flush()


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

    def update(self, samples: int, rate: float, losses: dict[str, float]) -> None:
        if not self.enabled:
            return
        names = {"dissimilarity": "1-SSIM", "focal": "focal", "adversarial": "adv", "discriminator": "disc"}
        text = f"{rate:.1f} img/s  " + "  ".join(f"{names[k]} {losses[k]:.4f}" for k in names)
        if self.bar:
            self.bar.update(self.task, completed=samples, losses=text)
        elif time.monotonic() - self.last_line > QUIET_SECONDS or samples >= self.total:
            self.last_line = time.monotonic()
            print(f"{self.category}: {samples:,}/{self.total:,} samples  {text}", flush=True)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


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
    deepspeed.init_distributed(get_accelerator().communication_backend_name(), auto_mpi_discovery=False, verbose=False)
    return ranks


def open_dataset(config: Config, location: str, category: str) -> Dataset:
    """The data set, with the category's shards fetched (once a machine) and verified."""
    dataset = Dataset.open(location, cache=config.data.cache)
    for shard in dataset.manifest(category).shards:
        dataset.shard(category, shard)
    return dataset


def end_with_parent() -> None:
    """Ends this process soon after its supervisor has died, however that happened: nobody would collect its result, and
    the next run of the same command must find the folder to itself."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(ExitCode.CRASHED)

    threading.Thread(target=watch, daemon=True).start()


def train_category(config: Config, location: str, category: str, run: Path) -> None:
    """Trains, evaluates and records one category; resumes from its newest checkpoint."""
    # Before the process group exists: a slow download must not run into its time-out.
    dataset = open_dataset(config, location, category)
    ranks = initialise(config)
    folder = run / category
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = folder / "checkpoints"
    fingerprint = dataset.manifest(category).fingerprint
    trainer = Trainer(config, ranks, TrainingData(config, dataset, category, ranks.device))
    events = Events(folder, ranks.is_first)
    display = Display(category, config.trainer.samples, ranks.is_first)
    resumed = checkpoint.resume(trainer, checkpoints, fingerprint)
    started_at, started = trainer.progress.next_sample, time.monotonic()
    events.write(
        "resume" if resumed else "start",
        step=trainer.progress.step,
        samples=started_at,
        world_size=ranks.world_size,
        precision=trainer.precision,
        fingerprint=fingerprint,
    )
    if resumed and ranks.is_first:
        print(f"{category}: resumed at sample {started_at:,} (step {trainer.progress.step:,})", flush=True)
    last_save = time.monotonic()

    def on_step(trainer: Trainer, losses: Losses) -> None:
        nonlocal last_save
        progress, every = trainer.progress, config.checkpoint
        finished = progress.next_sample >= config.trainer.samples
        if progress.step % config.trainer.log_every == 0 or finished:
            values = losses.means()
            rate = (progress.next_sample - started_at) / (time.monotonic() - started)
            events.write("step", step=progress.step, samples=progress.next_sample, images_per_second=rate, **values)
            display.update(progress.next_sample, rate, values)
            if ranks.is_first and trainer.gs.monitor.enabled:
                trainer.gs.monitor.write_events([(f"train/{k}", v, progress.next_sample) for k, v in values.items()])
        due = every.every_steps is not None and progress.step % every.every_steps == 0
        if every.every_minutes and progress.step % config.trainer.log_every == 0:
            # Rank 0's clock decides for all: clocks that differ must not make half of the ranks save.
            due |= ranks.gather(time.monotonic() - last_save > every.every_minutes * 60)[0]
        if due or finished:
            checkpoint.save(trainer, checkpoints, fingerprint)
            last_save = time.monotonic()
            events.write("checkpoint", step=progress.step, samples=progress.next_sample)

    try:
        trainer.train(on_step)
    finally:
        display.close()
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
            "images_per_second": progress.next_sample / max(progress.seconds, 1e-9),
            "seconds": progress.seconds,
            "world_size": ranks.world_size,
            "precision": trainer.precision,
            "backbone": f"{config.model.backbone} ({config.model.weights} weights)",
            "fingerprint": fingerprint,
        }
        save_samples(folder / "samples.png", category, evaluation)
        # Last: this file says that the category is done.
        checkpoint.write_text(folder / METRICS, json.dumps(metrics, indent=1))
        events.write(
            "done", **{k: metrics[k] for k in ("pixel_auroc", "pixel_ap", "image_auroc", "seconds", "reconstruction")}
        )
        health = metrics["reconstruction"]
        print(f"{category}: " + ", ".join(f"{k} {v:.3f}" for k, v in health.items() if v is not None), flush=True)
    ranks.barrier()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="the run's folder, which holds config.toml")
    parser.add_argument("--category", required=True)
    parser.add_argument("--shards", required=True, help="location of the shards")
    arguments = parser.parse_args()
    end_with_parent()
    try:
        config = load_config(["--config", str(arguments.run / "config.toml")])
        train_category(config, arguments.shards, arguments.category, arguments.run)
    except EXPLAINED as error:
        print(f"{arguments.category}, rank {os.environ.get('RANK', 0)}: {error or 'interrupted'}", file=sys.stderr)
        return exit_code(error)
    return ExitCode.OK


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # Without the interpreter's teardown: gloo's threads of a peer that has already gone can abort it.
    os._exit(status)
