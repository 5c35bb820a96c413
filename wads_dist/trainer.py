"""Joint training of one category: two DeepSpeed engines, one loop, one integer of data state."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from kernels.objective import ObjectiveTerms, ObjectiveWeights, objective
from kernels.synthesis import Batch
from wads_dist import engines
from wads_dist.config import Config, ObjectiveConfig, resolve_batches
from wads_dist.data import TrainingData, rank_samples
from wads_dist.deepspeed_config import deepspeed_config, resolve_precision
from wads_dist.distributed import Ranks
from wads_dist.errors import NotFiniteError
from wads_dist.models import Discriminator, Wads

MAX_REJECTED_IN_A_ROW = 20
CODE_SAMPLES = 128


@dataclass
class Progress:
    """What a restart needs to know besides weights and optimisers: the data position and the counts."""

    next_sample: int = 0
    step: int = 0
    rejected: int = 0
    rejected_in_a_row: int = 0
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


@dataclass
class Losses:
    """Sums of detached losses over micro-batches, on the device; read once every ``log_every`` steps."""

    values: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0

    def add(self, **terms: Tensor) -> None:
        for name, term in terms.items():
            self.values[name] = self.values.get(name, 0) + term.detach()
        self.count += 1

    def means(self) -> dict[str, float]:
        return {name: (value / self.count).item() for name, value in self.values.items()}


def objective_weights(config: ObjectiveConfig) -> ObjectiveWeights:
    return ObjectiveWeights(
        reconstruction=config.reconstruction.weight,
        ssim=config.reconstruction.ssim,
        l2=config.reconstruction.l2,
        focal=config.focal.weight,
        gamma=config.focal.gamma,
        kl=config.kl.weight,
        rho=config.kl.rho,
        kl_form=config.kl.form,
    )


def adversarial_loss(form: str, fake: tuple[Tensor, Tensor], real_feature: Tensor | None) -> Tensor:
    """L_adv (paper Eq 3.3) for ``fake`` = (feature f(X̂), logit D(X̂)); the real feature f(X) carries no gradient."""
    feature, logit = fake[0].float(), fake[1].float()
    if form == "non_saturating":
        return F.binary_cross_entropy_with_logits(logit, torch.ones_like(logit))
    assert real_feature is not None
    real = real_feature.detach().float()
    if form == "feature_l2":
        return F.mse_loss(feature, real)
    return F.binary_cross_entropy_with_logits(feature, torch.sigmoid(real))


def discriminator_loss(real_logit: Tensor, fake_logit: Tensor) -> Tensor:
    """L_disc: BCE(D(X), 1) + BCE(D(X̂), 0), halved."""
    real, fake = real_logit.float(), fake_logit.float()
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def learning_rate(config: Config, position: int) -> float:
    """The rate at sample ``position`` of the budget: a function of the position alone, so there is no scheduler state."""
    trainer = config.trainer
    done = min(position / trainer.samples, 1.0)
    if done < trainer.warmup:
        return trainer.learning_rate * min(1.0, (done + trainer.global_batch_size / trainer.samples) / trainer.warmup)
    if trainer.schedule == "constant":
        return trainer.learning_rate
    after = (done - trainer.warmup) / (1 - trainer.warmup)
    return trainer.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * after)) / 2)


class Trainer:
    """Owns the engines and the progress of one category."""

    def __init__(self, config: Config, ranks: Ranks, data: TrainingData) -> None:
        """Builds networks and engines; every rank starts from the same weights, which depend on the seed only."""
        self.config, self.ranks, self.data = config, ranks, data
        self.precision = resolve_precision(config.trainer.precision, ranks.device.type)
        self.micro_batch_size, self.accumulation = resolve_batches(config, ranks.world_size)
        torch.manual_seed(config.trainer.seed)
        wads = Wads(config.model, config.data.image_size, self.precision).to(ranks.device)
        if config.model.standardise_code:
            # The same samples on every rank, whatever their number: all ranks start from the same weights.
            wads.generator.standardise_code(data.batch(torch.arange(CODE_SAMPLES, device=ranks.device)).clean)
        discriminator = Discriminator(config.data.image_size, config.model.width, self.precision).to(ranks.device)
        settings = deepspeed_config(config, ranks.world_size)
        quiet = {key: value for key, value in settings.items() if key not in MONITORS}
        rate, betas = config.trainer.learning_rate, config.trainer.betas
        self.gs = engines.initialize(wads, engines.adam(wads, rate, betas), settings)
        # Every engine builds its own monitor; one is enough.
        self.d = engines.initialize(discriminator, engines.adam(discriminator, rate, betas), quiet)
        self.ema = engines.ParameterAverage(self.gs.module, config.trainer.ema) if config.trainer.ema else None
        self.weights = objective_weights(config.objective)
        self.loss_scale = engines.LossScale.for_precision(self.precision)
        self.progress = Progress()

    @property
    def both(self) -> tuple[DeepSpeedEngine, DeepSpeedEngine]:
        return self.gs, self.d

    def sample_ids(self, first: int) -> list[Tensor]:
        """This rank's sample ids of the step that starts at ``first``, one int64 tensor a micro-batch."""
        mine = rank_samples(first, self.config.trainer.global_batch_size, self.ranks.rank, self.ranks.world_size)
        ids = torch.arange(mine.start, mine.stop, device=self.ranks.device)
        return list(ids.split(self.micro_batch_size))

    def generator_losses(self, batch: Batch) -> tuple[Tensor, ObjectiveTerms, dict[str, Tensor], Tensor]:
        """Forward of generator and segmenter and their whole objective; also X̂, detached."""
        weights = self.config.objective
        x_hat, logits, z, z_hat = self.gs(batch.clean, batch.anomalous, weights.latent.detach)
        with engines.frozen(self.d.module):
            # Through the module, frozen: through the engine, ZeRO would count it as the discriminator's own step.
            fake = self.d.module(x_hat)
            with torch.no_grad():
                real = self.d.module(batch.clean)[0]
        target = batch.clean if weights.reconstruction.target == "clean" else batch.anomalous
        terms = objective(target, x_hat, logits, batch.mask, self.weights, self.config.trainer.kernels)
        adversarial = adversarial_loss(weights.adversarial.form, fake, real)
        latent = F.mse_loss(z_hat.float(), z.float())
        total = terms.total + weights.adversarial.weight * adversarial + weights.latent.weight * latent
        return total, terms, {"adversarial": adversarial, "latent": latent}, x_hat.detach()

    def discriminator_losses(self, clean: Tensor, reconstruction: Tensor) -> Tensor:
        """One pass over real and reconstructed images together, so that there is one backward."""
        _, logits = self.d(torch.cat([clean, reconstruction.to(clean.dtype)]))
        return discriminator_loss(*logits.chunk(2))

    def step(self, first: int) -> Losses:
        """One optimiser step of both engines on the samples [first, first + global batch), or of neither."""
        losses = Losses()
        micro_batches = self.sample_ids(first)
        upcoming = self.sample_ids(first + self.config.trainer.global_batch_size)[:1]
        buffers = [b.clone() for b in self.gs.module.buffers()]
        for i, ids in enumerate(micro_batches):
            batch = self.data.batch(ids, (micro_batches[i + 1 :] + upcoming)[0])
            total, terms, extra, x_hat = self.generator_losses(batch)
            self.gs.backward(total * self.loss_scale.scale)
            disc = self.discriminator_losses(batch.clean, x_hat)
            self.d.backward(disc * self.loss_scale.scale)
            losses.add(
                total=total,
                dissimilarity=terms.dissimilarity,
                mse=terms.mse,
                focal=terms.focal,
                kl=terms.kl,
                discriminator=disc,
                **extra,
            )
            if i + 1 < len(micro_batches):
                for engine in self.both:
                    engine.step()  # counts the micro-batch; the optimiser steps at the boundary only
        self._step_both_or_neither(losses, buffers, first)
        return losses

    def _step_both_or_neither(self, losses: Losses, buffers: list[Tensor], first: int) -> None:
        grads = [g for engine in self.both for g in engines.gradients(engine)]
        local = engines.finite(grads) & torch.isfinite(losses.values["total"] + losses.values["discriminator"])
        rejected = self.ranks.any(~local)
        if rejected:
            for engine in self.both:
                engines.discard(engine)
            torch._foreach_copy_(list(self.gs.module.buffers()), buffers)
        else:
            if self.loss_scale.scale != 1:
                torch._foreach_div_(grads, self.loss_scale.scale)
            rate = learning_rate(self.config, first)
            for engine in self.both:
                engines.set_learning_rate(engine, rate)
                engine.step()
            if self.ema:
                self.ema.update(self.gs.module, self.progress.step + 1)
        self.loss_scale.update(finite=not rejected)
        self._count(rejected, first)

    def _count(self, rejected: bool, first: int) -> None:
        progress = self.progress
        progress.step += 1
        progress.next_sample = first + self.config.trainer.global_batch_size
        progress.rejected += rejected
        progress.rejected_in_a_row = progress.rejected_in_a_row + 1 if rejected else 0
        if progress.rejected_in_a_row >= MAX_REJECTED_IN_A_ROW:
            raise NotFiniteError(
                f"{MAX_REJECTED_IN_A_ROW} steps in a row had losses or gradients that were not finite; the last used the "
                f"samples {first} to {progress.next_sample - 1}. Lower trainer.learning_rate, or set "
                f"trainer.precision = 'fp32', and run the same command again: it goes on from the last checkpoint."
            )

    def train(self, on_step: Callable[["Trainer", Losses], None]) -> None:
        """Steps until the budget is spent; ``on_step`` logs and saves."""
        self.gs.train()
        self.d.train()
        started = time.monotonic() - self.progress.seconds
        while self.progress.next_sample < self.config.trainer.samples:
            losses = self.step(self.progress.next_sample)
            self.progress.seconds = time.monotonic() - started
            on_step(self, losses)

    def inference_state(self) -> dict[str, Tensor]:
        """Whole fp32 weights of generator and segmenter for evaluation and export: the moving average where one is kept,
        with BatchNorm's buffers averaged over ranks. Collective."""
        buffers = self.ranks.average_buffers(self.gs.module)
        if self.ema is None:
            return engines.full_state(self.gs, buffers)
        with self.ema.applied(self.gs.module):
            return engines.full_state(self.gs, buffers)


MONITORS = ("tensorboard", "csv_monitor", "wandb", "comet")
