"""Joint training of one category: two DeepSpeed engines, one loop, one integer of data state."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from wads_dist.common.errors import NotFiniteError
from wads_dist.common.heartbeat import Heartbeat
from wads_dist.common.ranks import Ranks
from wads_dist.config.deepspeed import deepspeed_config, resolve_precision, with_monitors, without_monitors
from wads_dist.config.schema import Config, TrainerConfig, resolve_batches
from wads_dist.data.training import TrainingData, rank_samples
from wads_dist.kernels.objective import objective
from wads_dist.kernels.synthesis import Batch
from wads_dist.model.layers import use_kernels
from wads_dist.model.networks import Discriminator, Wads
from wads_dist.runs.folder import MONITOR
from wads_dist.training import engines, graph, step_check
from wads_dist.training.losses import Losses, WithGradient, adversarial_loss, discriminator_loss, objective_weights
from wads_dist.training.progress import Progress, is_over, random_state, restore_random_state
from wads_dist.training.step_check import Report, Requests, StepDecision
from wads_dist.training.timing import OwnTime

CODE_SAMPLES = 128


def learning_rate(trainer: TrainerConfig, position: int) -> float:
    """The rate at sample ``position`` of the budget: a function of the position alone, so there is no scheduler state."""
    done = min(position / trainer.samples, 1.0)
    if done < trainer.warmup:
        return trainer.learning_rate * min(1.0, (done + trainer.global_batch_size / trainer.samples) / trainer.warmup)
    if trainer.schedule == "constant":
        return trainer.learning_rate
    after = (done - trainer.warmup) / (1 - trainer.warmup)
    return trainer.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * after)) / 2)


class Trainer:
    """Owns the engines and the progress of one category."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        data: TrainingData,
        requests: Callable[[], Requests] = Requests,
        heartbeat: Heartbeat | None = None,
        category: str = "",
        stage: int | None = None,
    ) -> None:
        """Builds networks and engines; every rank starts from the same weights, which depend on the seed only.

        ``requests`` is asked at every step whether this rank wants to save or to stop; ``heartbeat`` is told where it stands;
        ``category`` names what DeepSpeed's monitors write; ``stage`` is the ZeRO stage, by default that of DeepSpeed's file.
        """
        self.config, self.ranks, self.data = config, ranks, data
        self.requests, self.heartbeat, self.own_time = requests, heartbeat or Heartbeat(), OwnTime(ranks.device.type)
        self.precision = resolve_precision(config.trainer.precision, ranks.device.type)
        self.micro_batch_size, self.accumulation = resolve_batches(config.trainer, ranks.world_size)
        torch.manual_seed(config.trainer.seed)
        wads = Wads(config.model, config.data.image_size, self.precision).to(ranks.device)
        if config.model.standardise_code:
            # The same samples on every rank, whatever their number: all ranks start from the same weights.
            wads.generator.standardise_code(data.batch(torch.arange(CODE_SAMPLES, device=ranks.device)).clean)
        discriminator = Discriminator(config.data.image_size, config.model.width, self.precision).to(ranks.device)
        for network in (wads, discriminator):
            use_kernels(network, config.trainer.kernels)
        settings = deepspeed_config(config.trainer, ranks.world_size, stage)
        rate, betas = config.trainer.learning_rate, config.trainer.betas
        monitored = with_monitors(settings, config.run.dir / MONITOR, category)
        self.generator_engine = engines.initialize(wads, engines.adam(wads, rate, betas), monitored)
        self.discriminator_engine = engines.initialize(
            discriminator, engines.adam(discriminator, rate, betas), without_monitors(settings)
        )
        if ranks.device.type != "cpu" and self.zero_stage == 0:
            # Or cuDNN would copy every weight at every pass. (DeepSpeed would not broadcast such weights, so not before it.)
            for engine in self.both:
                engine.module.to(memory_format=torch.channels_last)
        if config.trainer.compile != "off":
            graph.compile_networks(self.both, config.trainer.compile)
        self.ema = (
            engines.ParameterAverage(self.generator_engine.module, config.trainer.ema) if config.trainer.ema else None
        )
        self.weights = objective_weights(config.objective)
        self.loss_scale = engines.LossScale.for_precision(self.precision)
        self.progress = Progress()
        self.best: dict[str, Tensor] | None = None
        """Weights of the best of ``progress.scores``, as ``inference_state`` returns them; on the first rank."""
        self.graph: graph.StepGraph | None = None
        self.why_no_graph = graph.why_no_graph(
            config.trainer.cuda_graph, ranks.device.type, ranks.world_size, self.zero_stage
        )
        if not self.why_no_graph:
            self.graph = graph.StepGraph(self, self.micro_batch_size, ranks.device)

    @property
    def both(self) -> tuple[DeepSpeedEngine, DeepSpeedEngine]:
        return self.generator_engine, self.discriminator_engine

    @property
    def zero_stage(self) -> int:
        return int(self.generator_engine.zero_optimization_stage())

    def sample_ids(self, first: int) -> list[Tensor]:
        """This rank's sample ids of the step that starts at ``first``, one int64 tensor a micro-batch."""
        mine = rank_samples(first, self.config.trainer.global_batch_size, self.ranks.rank, self.ranks.world_size)
        ids = torch.arange(mine.start, mine.stop, device=self.ranks.device)
        return list(ids.split(self.micro_batch_size))

    def parameters(self) -> list[Tensor]:
        """What both optimisers train."""
        return [p for engine in self.both for p in engine.module.parameters() if p.requires_grad]

    def buffers(self) -> list[Tensor]:
        """What a forward pass changes: BatchNorm's statistics."""
        return list(self.generator_engine.module.buffers())

    def losses(self, batch: Batch, direct: bool = False) -> dict[str, Tensor]:
        """Forward passes of all networks: what generator and segmenter minimise (``total``), its terms, and what the
        ``discriminator`` does. ``direct``: past DeepSpeed, which then knows nothing of the passes, and without entering phases.

        The discriminator sees X and X̂ once, for both: L_adv's gradient for X̂ is taken from the graph on which L_disc's
        backward then runs (on X̂ detached, both would need a pass of their own over each image). It is not taken if L_adv weighs
        nothing.
        """
        weights, step = self.config.objective, self.progress.step
        enter = (Heartbeat() if direct else self.heartbeat).enter
        wads, critic = (engine.module for engine in self.both) if direct else self.both
        x_hat, logits, z, z_hat = wads(batch.clean, batch.anomalous, weights.latent.detach)
        enter("discriminator", step)
        seen = x_hat.detach().requires_grad_(weights.adversarial.weight > 0)
        # DeepSpeed must know of a forward pass, but would take a gradient for the outputs it has seen as the step's backward.
        real, fake = critic(batch.clean), self.discriminator_engine.module(seen)
        adversarial = adversarial_loss(weights.adversarial.form, fake, real)
        if seen.requires_grad:
            scaled = adversarial * self.loss_scale.scale
            (gradient,) = torch.autograd.grad(scaled, seen, retain_graph=True)
            adversarial = WithGradient.apply(x_hat, adversarial.detach(), gradient, self.loss_scale.scale)
        else:
            adversarial = adversarial.detach()
        discriminator = discriminator_loss(real[1], fake[1])
        enter("objective", step)
        target = batch.clean if weights.reconstruction.target == "clean" else batch.anomalous
        terms = objective(target, x_hat, logits, batch.mask, self.weights, self.config.trainer.kernels)
        latent = F.mse_loss(z_hat.float(), z.float())
        total = terms.total + weights.adversarial.weight * adversarial + weights.latent.weight * latent
        return {
            "total": total,
            "dissimilarity": terms.dissimilarity,
            "mse": terms.mse,
            "focal": terms.focal,
            "kl": terms.kl,
            "discriminator": discriminator,
            "adversarial": adversarial,
            "latent": latent,
        }

    def micro_batch(self, ids: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Losses, and a gradient for each of ``parameters()``, of the samples ``ids``: what DeepSpeed's backward passes would
        leave on one rank at ZeRO-0."""
        losses = self.losses(self.data.batch(ids), direct=True)
        gradients: list[Tensor] = []
        for name, engine in (("total", self.generator_engine), ("discriminator", self.discriminator_engine)):
            trained = [p for p in engine.module.parameters() if p.requires_grad]
            scaled = losses[name] * self.loss_scale.scale / self.accumulation
            gradients += torch.autograd.grad(scaled, trained, materialize_grads=True)
        return {name: loss.detach() for name, loss in losses.items()}, gradients

    def warm_up(self) -> None:
        """Compiles, for minutes perhaps, and leaves no trace: a pass of the next samples whose gradients nobody sees, and that
        enters no phase (no step takes so long). Not collective."""
        self.generator_engine.train()
        self.discriminator_engine.train()
        kept = engines.copy_all([torch.empty_like(b) for b in self.buffers()], self.buffers())
        self.micro_batch(self.sample_ids(self.progress.next_sample)[0])
        engines.copy_all(self.buffers(), kept)

    def step(self, first: int) -> Losses:
        """One optimiser step of both engines on the samples [first, first + global batch), or of neither."""
        losses, enter, number = Losses(first=first), self.heartbeat.enter, self.progress.step
        seconds = self.own_time.take()  # the last step's: the device has finished it
        micro_batches = self.sample_ids(first)
        upcoming = self.sample_ids(first + self.config.trainer.global_batch_size)[:1]
        kept = self.buffers()
        buffers = engines.copy_all([torch.empty_like(b) for b in kept], kept)
        if self.graph:
            self.graph.begin()
        for i, ids in enumerate(micro_batches):
            if self.graph:
                enter("forward", number)
                losses.add(**self.graph(ids))
            else:
                with self.own_time:
                    enter("data", number)
                    batch = self.data.batch(ids, (micro_batches[i + 1 :] + upcoming)[0])
                    enter("forward", number)
                    terms = self.losses(batch)
                enter("backward", number)
                self.generator_engine.backward(terms["total"] * self.loss_scale.scale)
                self.discriminator_engine.backward(terms["discriminator"] * self.loss_scale.scale)
                losses.add(**terms)
            if i + 1 < len(micro_batches):
                for engine in self.both:
                    engine.step()  # counts the micro-batch; the optimiser steps at the boundary only
        enter("agree", number)
        grads = [g for engine in self.both for g in engines.gradients(engine)]
        losses.decision = decision = self._agree(losses, grads, seconds)
        enter("update", number)
        self._step_both_or_neither(decision, grads, buffers, first)
        self._count(decision, first)
        return losses

    def _agree(self, losses: Losses, grads: list[Tensor], seconds: float) -> StepDecision:
        """The step's only collective of our own."""
        total = losses.values["total"]
        finite_losses = torch.isfinite(total + losses.values["discriminator"])
        wants = self.requests()
        report = Report(0.0, 0.0, wants.stop, wants.save, seconds)
        # From pinned memory a copy to a GPU does not make the host wait.
        row = torch.tensor(report, dtype=torch.float64, pin_memory=total.is_cuda).to(total.device, non_blocking=True)
        row[0] = engines.finite(grads) & finite_losses
        row[1] = torch.where(finite_losses, total / losses.count, math.nan)
        reports = [Report(*r) for r in self.ranks.gather_rows(row)]
        return step_check.decide(reports, self._spike_threshold())

    def _spike_threshold(self) -> float:
        """Infinite after ``spike_patience`` spikes in a row: that is no spike but another level, and skipping must end."""
        trainer, progress = self.config.trainer, self.progress
        if progress.spikes_in_a_row >= trainer.spike_patience:
            return math.inf
        return step_check.spike_threshold(progress.recent, trainer)

    def _step_both_or_neither(
        self, decision: StepDecision, grads: list[Tensor], buffers: list[Tensor], first: int
    ) -> None:
        if decision.rejected:
            for engine in self.both:
                engines.discard(engine)
            engines.copy_all(self.buffers(), buffers)
        else:
            if self.loss_scale.scale != 1:
                torch._foreach_div_(grads, self.loss_scale.scale)
            rate = learning_rate(self.config.trainer, first)
            for engine in self.both:
                engines.set_learning_rate(engine, rate)
                engine.step()
            if self.ema:
                self.ema.update(self.generator_engine.module, self.progress.step + 1)
        self.loss_scale.update(finite=decision.rejected != step_check.NOT_FINITE)

    def _count(self, decision: StepDecision, first: int) -> None:
        progress, trainer = self.progress, self.config.trainer
        progress.step += 1
        progress.next_sample = first + trainer.global_batch_size
        if decision.rejected:
            progress.rejected += 1
            progress.rejected_in_a_row += 1
            progress.spikes += decision.rejected == step_check.SPIKE
            progress.spikes_in_a_row += decision.rejected == step_check.SPIKE
            return
        progress.rejected_in_a_row = progress.spikes_in_a_row = 0
        if decision.loss > step_check.spike_threshold(progress.recent, trainer):
            progress.recent.clear()  # accepted out of patience: the ordinary loss is another now
        progress.recent = [*progress.recent, decision.loss][-trainer.spike_window :]

    def _give_up_if_hopeless(self, losses: Losses) -> None:
        progress, limit = self.progress, self.config.trainer.max_rejected
        if (
            progress.rejected_in_a_row >= limit
            and losses.decision
            and losses.decision.rejected == step_check.NOT_FINITE
        ):
            raise NotFiniteError(
                f"{limit} steps in a row were skipped, the last because losses or gradients were not finite on rank "
                f"{', '.join(map(str, losses.decision.ranks))}; it used the samples {losses.first} to "
                f"{progress.next_sample - 1}. rejected.jsonl lists the images of all skipped steps. If they look right, lower "
                f"trainer.learning_rate or set trainer.precision = 'fp32' in a new --run.dir; the same command goes on from "
                f"the last checkpoint."
            )

    def train(self, on_step: Callable[["Trainer", Losses], None]) -> bool:
        """Steps until the training is ``finished``, or until a rank asks to stop; ``on_step`` logs, scores and saves. Returns
        whether it is finished.

        Raises:
            NotFiniteError: too many steps in a row were skipped.
        """
        self.generator_engine.train()
        self.discriminator_engine.train()
        started = time.monotonic() - self.progress.seconds
        while not self.finished:
            losses = self.step(self.progress.next_sample)
            self.progress.seconds = time.monotonic() - started
            on_step(self, losses)
            self._give_up_if_hopeless(losses)
            if losses.decision and losses.decision.stop:
                break
        return self.finished

    @property
    def finished(self) -> bool:
        """Whether the budget is spent, or early stopping has ended the training before."""
        spent = self.progress.next_sample >= self.config.trainer.samples
        return spent or is_over(self.progress.scores, self.config.stopping)

    def inference_state(self) -> dict[str, Tensor]:
        """Whole fp32 weights of generator and segmenter for evaluation and export: the moving average where one is kept,
        with BatchNorm's buffers averaged over ranks. Collective."""
        buffers = self.ranks.average_buffers(self.generator_engine.module)
        if self.ema is None:
            return engines.full_state(self.generator_engine, buffers)
        with self.ema.applied(self.generator_engine.module):
            return engines.full_state(self.generator_engine, buffers)

    def state_dict(self) -> dict[str, Any]:
        """What all ranks have alike besides the engines' state; JSON."""
        return {"progress": self.progress.state_dict(), "loss_scale": self.loss_scale.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes ``state_dict`` back."""
        self.progress.load_state_dict(state["progress"])
        self.loss_scale.load_state_dict(state["loss_scale"])

    def rank_state(self) -> dict[str, Any]:
        """What only this rank has: DeepSpeed stores the first rank's buffers only, and no random state. The moving average is
        each rank's own at ZeRO-3; below, every rank has the whole of it, and the first one's stands for all (None)."""
        average = self.ema.shadow if self.ema and (self.zero_stage == 3 or self.ranks.is_first) else None
        return {"random": random_state(), "buffers": dict(self.generator_engine.module.named_buffers()), "ema": average}

    @torch.no_grad()
    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Takes ``rank_state`` back; ``ema`` must be there if an average is kept."""
        for name, buffer in self.generator_engine.module.named_buffers():
            buffer.copy_(state["buffers"][name])
        if self.ema:
            torch._foreach_copy_(self.ema.shadow, state["ema"])
        restore_random_state(state["random"])
