"""One category in one group of ranks, from its data to ``metrics.json``: every rank has a ``CategoryTraining`` of its own.

``train`` steps, logs, scores and saves; ``publish`` writes weights, gives them their experts, evaluates and says that the
category is done.
"""

import contextlib
import io
import json
import logging
import os
import time
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from wads_dist.common.errors import PreemptedError, RankLostError
from wads_dist.common.files import write_text
from wads_dist.common.heartbeat import Heartbeat
from wads_dist.common.host_memory import keep_freed_memory
from wads_dist.common.ranks import Ranks, unname_shared_memory
from wads_dist.common.signals import StopRequest
from wads_dist.config.deepspeed import read_settings
from wads_dist.config.schema import Config, ExpertsConfig, TrainerConfig
from wads_dist.data.training import TrainingData, TrainingSplit, rank_samples
from wads_dist.evaluation.calibration import fit_experts
from wads_dist.evaluation.evaluate import Evaluation, evaluate
from wads_dist.kernels.philox import shuffled
from wads_dist.model.features import FrozenNetwork, load_network
from wads_dist.model.networks import Wads
from wads_dist.model.weights import load_model, save_weights
from wads_dist.reporting.results import save_results
from wads_dist.runs.events import Events, finite_or_none
from wads_dist.runs.folder import CHECKPOINTS, METRICS, REJECTED
from wads_dist.runs.leases import still_held
from wads_dist.shards.source import Dataset
from wads_dist.shards.verify import open_category
from wads_dist.training import checkpoint, validation
from wads_dist.training.batch_size import find_batch_size
from wads_dist.training.losses import Losses
from wads_dist.training.progress import is_due
from wads_dist.training.step_check import Requests, slowness
from wads_dist.training.stopping import HeldOutScore
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
        decision, trained = losses.decision, self.config.trainer
        assert decision is not None
        images = {}
        for rank in decision.ranks:
            ids = rank_samples(losses.first, trained.global_batch_size, rank, trainer.ranks.world_size)
            indices = shuffled(trained.seed, torch.tensor(ids), len(self.entries)).tolist()
            for sample, (shard, entry) in zip(ids, (self.entries[i] for i in indices), strict=True):
                images[sample] = f"{shard.name}/{entry.key}"
        summary = {
            "step": trainer.progress.step,
            "reason": decision.rejected,
            "ranks": list(decision.ranks),
            "loss": decision.loss,
            "threshold": decision.threshold,
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


def stage_note(trainer: TrainerConfig, stage: int | None, resumed: bool) -> str | None:
    """Why the ZeRO stage is not that of DeepSpeed's file, if it is not."""
    path, settings = read_settings(trainer)
    of_file = (settings.get("zero_optimization") or {}).get("stage", 0)
    if stage in (None, of_file):
        return None
    if resumed:
        return f"ZeRO-{stage}, as its checkpoint has it, and not stage {of_file} of {path}"
    return f"ZeRO-0: a rank that trains alone has nothing to share (stage {of_file} of {path} is for groups)"


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


class CategoryTraining:
    """What one rank holds while its group trains one category."""

    def __init__(
        self,
        config: Config,
        run: Path,
        category: str,
        shards: str,
        threads: int,
        lease: Path | None,
        stop: StopRequest,
        heartbeat: Heartbeat,
    ) -> None:
        """Opens the data, joins the group, and restores the newest checkpoint if there is one. Collective.

        Args:
            run: the run's folder.
            shards: location of the shards.
            threads: CPU threads of this rank.
            lease: the file that says that the category is this group's; None: nobody else can have it.
            stop: whether this rank was asked to stop.
            heartbeat: told where this rank stands.
        """
        self.category, self.folder, self.lease, self.stop, self.heartbeat = (
            category,
            run / category,
            lease,
            stop,
            heartbeat,
        )
        # Before the process group exists: a slow download must not run into its time-out.
        self.network: FrozenNetwork | None = None
        self.network_source: dict[str, str] | None = None
        if config.model.features != "none":
            self.network, self.network_source = load_network(config.model.features, config.features.weights)
        first = os.environ.get("RANK", "0") == "0"
        self.dataset = open_category(shards, category, config.data.cache, decode_test=first)
        self.ranks = initialise(config, threads)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.checkpoints = self.folder / CHECKPOINTS
        manifest = self.dataset.manifest(category)
        self.data = checkpoint.DataHashes(manifest.fingerprint, {s.name: s.sha256 for s in manifest.shards})
        self.last_save = time.monotonic()
        self.images = TrainingData(config, self.dataset, category, self.ranks.device)
        self.events = Events(self.folder, self.ranks.is_first)
        self.config = config = self._with_batch_size(config)
        resumed = checkpoint.choose(self.ranks, self.checkpoints, self.events.write)
        stage = checkpoint.zero_stage(resumed, self.ranks.world_size)
        self.trainer = Trainer(config, self.ranks, self.images, self._requests, heartbeat, category, stage)
        if note := stage_note(config.trainer, stage, resumed is not None):
            self.say(note)
        shown = (config, self.dataset, category, self.images)
        self.pictured = validation.ValidationSamples.of(*shown) if validation.wanted(self.trainer) else None
        self.held_out = HeldOutScore(*shown, self.ranks) if config.stopping.every else None
        self.skipped = SkippedSamples(self.folder, config, self.dataset, category)
        self.seconds = [0.0] * self.ranks.world_size
        """Of each rank's own part of a step, summed since the last line of the log."""
        self.taken: list[float] = []
        """Losses of the steps taken since the last save."""
        self.unsaved: str | None = None
        """Why the last save did not succeed."""
        self._begin(resumed)

    def _begin(self, resumed: Path | None) -> None:
        """Everything as the checkpoint has it; from here on the clock of the training runs."""
        if resumed:
            checkpoint.restore(self.trainer, resumed, self.data, self.events.write)
        self._compile()
        self.started_at, self.started = self.trainer.progress.next_sample, time.monotonic()
        self.events.write(
            "resume" if resumed else "start",
            step=self.trainer.progress.step,
            samples=self.started_at,
            world_size=self.ranks.world_size,
            precision=self.trainer.precision,
            zero_stage=self.trainer.zero_stage,
            fingerprint=self.data.fingerprint,
        )

    def say(self, text: str) -> None:
        """A line for people, from the first rank."""
        if self.ranks.is_first:
            say(f"{self.category}: {text}")

    def _with_batch_size(self, config: Config) -> Config:
        """``config`` with the micro-batch that is found fastest, where that is asked for."""
        if not config.trainer.find_batch_size:
            return config
        config, tried = find_batch_size(config, self.ranks, self.images, self.folder)
        micro = config.trainer.micro_batch_size
        self.events.write("batch size", micro_batch_size=micro, images_per_second=tried)
        rates = ", ".join(f"{size}: {rate:.1f}" for size, rate in tried.items()) or "as found before"
        self.say(f"micro-batches of {micro} (forward and backward, img/s: {rates})")
        return config

    def _compile(self) -> None:
        if self.config.trainer.cuda_graph and self.trainer.why_no_graph:
            self.say(f"no CUDA graph: {self.trainer.why_no_graph}")
        if self.config.trainer.compile != "off":
            self.say("compiling the networks (at a first start for minutes)")
            started = time.monotonic()
            self.trainer.warm_up()
            self.events.write("compiled", seconds=round(time.monotonic() - started, 3))

    def _requests(self) -> Requests:
        """What this rank asks of the others at a step."""
        minutes = self.config.checkpoint.every_minutes
        return Requests(self.stop.requested, bool(minutes) and time.monotonic() - self.last_save > minutes * 60)

    def _monitor(self, values: list[tuple[str, float]]) -> None:
        """For TensorBoard and CSV, at the samples seen so far."""
        monitor = self.trainer.generator_engine.monitor
        if self.ranks.is_first and monitor.enabled:
            samples = self.trainer.progress.next_sample
            monitor.write_events([(name, value, samples) for name, value in values])

    # --- training ----------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Steps until the budget is spent or early stopping ends it. Collective.

        Raises:
            PreemptedError: asked to stop; saved.
            RankLostError: another group has taken over.
            NotFiniteError: too many steps in a row were skipped.
        """
        with self.stop.deferred():
            self._score_if_due()
            ended = self.trainer.train(self._on_step)
        progress = self.trainer.progress
        if self.stop.requested or not ended:
            self.events.write("preempted", step=progress.step, samples=progress.next_sample)
            outcome = f"BUT NOT SAVED ({self.unsaved})" if self.unsaved else "and saved"
            raise PreemptedError(
                f"stopped as asked, {outcome}, at sample {progress.next_sample:,} (step {progress.step:,}); the same command "
                "goes on from the last checkpoint"
            )

    def _on_step(self, trainer: Trainer, losses: Losses) -> None:
        progress, decision = trainer.progress, losses.decision
        assert decision is not None
        if not decision.stop:  # whoever asks to stop will not wait; the score is taken when training goes on
            self._score_if_due()
        finished = trainer.finished
        self.seconds = [a + b for a, b in zip(self.seconds, decision.seconds, strict=True)]
        if not decision.rejected:
            self.taken.append(decision.loss)
        elif self.ranks.is_first:
            self.events.write("rejected", **self.skipped.write(trainer, losses))
        if progress.step % self.config.trainer.log_every == 0 or finished:
            self._log(losses)
        every = self.config.checkpoint.every_steps
        due = every is not None and progress.step % every == 0
        if due or finished or decision.save or decision.stop:
            self._save()
            if self.pictured and not decision.stop:
                self.heartbeat.enter("figure", progress.step)
                validation.show(trainer, self.pictured)

    def _score_if_due(self) -> None:
        """Early stopping's score."""
        if self.held_out and is_due(self.trainer.progress, self.config):
            score, is_best = self.held_out(self.trainer)
            progress = self.trainer.progress
            self.events.write("score", step=progress.step, samples=progress.next_sample, score=score, best=is_best)
            self._monitor([("synthetic/pixel_ap", score)])

    def _log(self, losses: Losses) -> None:
        progress, values = self.trainer.progress, losses.means()
        scores = [round(score, 3) for score in slowness(self.seconds)]
        self.seconds = [0.0] * self.ranks.world_size
        self.events.write(
            "step",
            step=progress.step,
            samples=progress.next_sample,
            images_per_second=(progress.next_sample - self.started_at) / (time.monotonic() - self.started),
            rejected=progress.rejected,
            slowness=scores,
            **values,
        )
        self._monitor([(f"train/{name}", value) for name, value in values.items()])

    def _save(self) -> None:
        progress = self.trainer.progress
        self.heartbeat.enter("save", progress.step)
        require_lease(self.lease, self.ranks)
        loss = fmean(self.taken) if self.taken else None
        saved = checkpoint.save(self.trainer, self.checkpoints, self.data, loss, lambda: holds(self.lease))
        self.last_save, self.unsaved = time.monotonic(), saved.problem
        self.taken.clear()
        self.events.write(
            "checkpoint failed" if saved.problem else "checkpoint",
            step=progress.step,
            samples=progress.next_sample,
            problem=saved.problem,
            bytes=saved.bytes,
            seconds=round(saved.seconds, 3),
        )

    # --- what comes of it --------------------------------------------------------------------------------------------

    def publish(self) -> None:
        """Writes weights, evaluates them, and records the category as done. Collective.

        Raises:
            RankLostError: another group has taken over.
            NotFiniteError: the network's scores are not finite.
        """
        self.heartbeat.enter("evaluate", self.trainer.progress.step)
        model = self._with_experts(self._best_state())
        evaluation = evaluate(model, self.config, self.dataset, self.category, self.ranks)
        if self.ranks.is_first:
            self._record(evaluation)
        self.ranks.barrier()

    def _best_state(self) -> dict[str, Tensor]:
        """The weights to evaluate; on other ranks than the first, those of the last step."""
        state = self.trainer.inference_state()
        if self.held_out and self.ranks.is_first:
            assert self.trainer.best is not None
            state = self.trainer.best
            self.say(self.held_out.note(self.trainer))
        return state

    def _with_experts(self, state: dict[str, Tensor]) -> Wads:
        """The finished model, whose weights are published on the way: until it has its experts, what stands in the folder is a
        whole model without any."""
        config, ranks = self.config, self.ranks
        require_lease(self.lease, ranks)
        without = {"model": config.model.model_copy(update={"features": "none"}), "experts": ExpertsConfig()}
        plain = config.model_copy(update=without)
        if ranks.is_first:
            save_weights(state, self.folder, plain, self.category)
        ranks.barrier()
        model = load_model(self.folder, plain, ranks.device)
        if config.has_experts:
            model.experts = fit_experts(model, self.network, config, self.dataset, self.category, ranks)
            require_lease(self.lease, ranks)
            if ranks.is_first:
                finished = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
                save_weights(finished, self.folder, config, self.category, features=self.network_source)
            ranks.barrier()
        return model

    def _record(self, evaluation: Evaluation) -> None:
        """Pictures, curves, the threshold, and last ``metrics.json``, which says that the category is done."""
        trainer, progress, config = self.trainer, self.trainer.progress, self.config
        metrics = evaluation.metrics | {
            "category": self.category,
            "samples": progress.next_sample,
            "rejected_steps": progress.rejected,
            "spikes": progress.spikes,
            "images_per_second": progress.next_sample / max(progress.seconds, 1e-9),
            "seconds": progress.seconds,
            "world_size": self.ranks.world_size,
            "micro_batch_size": trainer.micro_batch_size,
            "precision": trainer.precision,
            "backbone": f"{config.model.backbone} ({config.model.weights} weights)",
            "fingerprint": self.data.fingerprint,
            "features": self.network_source,
            "grey": self.images.settings.grey,
            "stopping": self.held_out.record(trainer) if self.held_out else None,
        }
        save_results(self.folder, self.category, evaluation, config.evaluation)
        require_lease(self.lease, self.ranks)
        write_text(self.folder / METRICS, json.dumps(metrics, indent=1))
        scores = {name: metrics[name] for name in ("pixel_auroc", "pixel_ap", "image_auroc")}
        self.events.write("done", **scores, seconds=metrics["seconds"], reconstruction=metrics["reconstruction"])
        self._monitor([(f"test/{name}", score) for name, score in scores.items() if score is not None])
