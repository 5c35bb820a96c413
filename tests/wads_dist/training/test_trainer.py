import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

from wads_dist.common.errors import NotFiniteError
from wads_dist.common.heartbeat import Heartbeat
from wads_dist.config.load import load_config
from wads_dist.kernels.synthesis import Batch
from wads_dist.model.networks import Discriminator
from wads_dist.training.checkpoint import zero_stage
from wads_dist.training.engines import LossScale
from wads_dist.training.loop import stage_note
from wads_dist.training.losses import Losses, WithGradient, adversarial_loss, discriminator_loss, objective_weights
from wads_dist.training.progress import Progress
from wads_dist.training.step_check import Report, StepDecision, decide
from wads_dist.training.trainer import Trainer
from wads_dist.training.trainer import learning_rate as rate


@pytest.mark.parametrize("form", ["bce_feature", "bce_output", "non_saturating", "feature_l2"])
def test_adversarial_forms(form: str) -> None:
    fake = torch.randn(2, 4, 4, 4, requires_grad=True), torch.randn(2, requires_grad=True)
    real = torch.randn(2, 4, 4, 4, requires_grad=True), torch.randn(2, requires_grad=True)
    (feature, logit), (real_feature, real_logit) = fake, real
    loss = adversarial_loss(form, fake, real)
    expected = {
        "bce_feature": F.binary_cross_entropy(torch.sigmoid(feature), torch.sigmoid(real_feature)),
        "bce_output": F.binary_cross_entropy(torch.sigmoid(logit), torch.sigmoid(real_logit)),
        "non_saturating": -torch.sigmoid(logit).log().mean(),
        "feature_l2": (feature - real_feature).pow(2).mean(),
    }[form]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert real_feature.grad is None and real_logit.grad is None  # the image's are targets
    assert (logit.grad is not None) == (form in ("bce_output", "non_saturating"))


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_a_loss_whose_gradient_was_taken_before_goes_on_with_it(scale: float) -> None:
    """As L_adv's is, with a float16 loss scale or without."""
    x, w = torch.randn(3, requires_grad=True), torch.randn(3)
    seen = (2 * x).detach().requires_grad_()
    value = (seen * w).square().sum()
    (gradient,) = torch.autograd.grad(value * scale, seen, retain_graph=True)
    loss = WithGradient.apply(2 * x, value.detach(), gradient, scale)
    assert loss.item() == value.item()
    (3 * loss * scale).backward()
    assert x.grad is not None and torch.allclose(x.grad / scale, 3 * 2 * 2 * (2 * x) * w**2)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_gradient_for_the_adversary_is_taken_only_where_it_has_a_weight(
    weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ablation noGAN: its discriminator goes on learning, and L_adv is told."""
    taken, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *given, **options: taken.append(1) or grad(*given, **options))
    config = load_config(["--data.shards", "x", "--objective.adversarial.weight", str(weight)])
    x_hat = torch.rand(2, 3, 64, 64, requires_grad=True)
    critic = Discriminator(64, 8)
    generator = Mock(side_effect=lambda *_: (x_hat, torch.zeros(2, 1, 64, 64), torch.zeros(2, 8), torch.zeros(2, 8)))
    discriminator = Mock(side_effect=critic, module=critic)
    trainer = SimpleNamespace(
        config=config,
        weights=objective_weights(config.objective),
        both=(generator, discriminator),
        discriminator_engine=discriminator,
        heartbeat=Heartbeat(),
        progress=Progress(),
        loss_scale=LossScale(),
    )
    batch = Batch(torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64), torch.zeros(2, 1, 64, 64, dtype=torch.uint8))
    losses = Trainer.losses(trainer, batch)  # type: ignore[arg-type]
    (losses["total"] + losses["discriminator"]).backward()
    assert len(taken) == weight and losses["adversarial"] > 0
    assert x_hat.grad is not None and all(p.grad is not None for p in critic.parameters())


def test_discriminator_loss_is_the_mean_of_two_cross_entropies() -> None:
    real, fake = torch.randn(5), torch.randn(5)
    expected = (-torch.sigmoid(real).log().mean() - (1 - torch.sigmoid(fake)).log().mean()) / 2
    assert discriminator_loss(real, fake).item() == pytest.approx(expected.item(), rel=1e-5)


def test_learning_rate_is_a_function_of_the_position() -> None:
    base = "--data.shards x --trainer.samples 1000 --trainer.global_batch_size 10 --trainer.learning_rate 0.1".split()
    assert rate(load_config(base).trainer, 990) == 0.1
    config = load_config([*base, "--trainer.schedule", "cosine", "--trainer.warmup", "0.1"])
    rates = [rate(config.trainer, position) for position in range(0, 1000, 10)]
    assert rates[0] == pytest.approx(0.01) and rates[9] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[55] == pytest.approx(0.1 * (0.01 + 0.99 / 2)) and 0.001 <= rates[-1] < 0.0012


def test_losses_average_over_micro_batches() -> None:
    losses = Losses()
    losses.add(a=torch.tensor(1.0), b=torch.tensor(0.0))
    losses.add(a=torch.tensor(3.0), b=torch.tensor(1.0))
    assert losses.means() == {"a": 2.0, "b": 0.5}


def test_training_gives_up_after_many_rejected_steps_and_names_the_samples() -> None:
    trainer = SimpleNamespace(
        progress=Progress(), config=load_config(["--data.shards", "x", "--trainer.max_rejected", "6"])
    )
    good, bad = (decide([Report(float(finite), 1.0, 0, 0, 0)], math.inf) for finite in (True, False))

    def step(decision: StepDecision, number: int) -> None:
        Trainer._count(trainer, decision, number * 64)  # type: ignore[arg-type]
        Trainer._give_up_if_hopeless(trainer, Losses(first=number * 64, decision=decision))  # type: ignore[arg-type]

    for number in range(5):
        step(bad, number)
    step(good, 0)
    assert trainer.progress.rejected_in_a_row == 0 and trainer.progress.rejected == 5
    with pytest.raises(NotFiniteError, match="on rank 0; it used the samples 320 to 383"):
        for number in range(6):
            step(bad, number)


@pytest.mark.parametrize("warmup", [0.001, 0.05])
def test_warm_up_never_exceeds_the_rate(warmup: float) -> None:
    config = load_config(["--data.shards", "x", "--trainer.samples", "9000", "--trainer.warmup", str(warmup)])
    assert max(rate(config.trainer, position) for position in range(0, 9000, 64)) <= config.trainer.learning_rate


@pytest.mark.slow
@pytest.mark.alone  # two threads of its own for a minute: beside others it ran out of time
def test_losses_fall_with_resnet50_at_full_size(run_ranks: Callable[..., list[str]]) -> None:
    """200 samples at 128² with the default backbone: every loss of the reconstruction and the segmentation is lower
    over the last third of the steps than over the first."""
    printed = run_ranks("resnet50.py", 1)[0]
    print(printed)
    for name in ("total", "dissimilarity", "mse", "focal"):
        first, last = (float(v) for v in re.search(rf"^{name} (\S+) -> (\S+)", printed, re.MULTILINE).groups())  # type: ignore[union-attr]
        assert math.isfinite(last) and last < first, name


def test_a_lone_rank_has_nothing_to_share_and_a_checkpoint_keeps_its_stage(tmp_path: Path) -> None:
    """At ZeRO-1 it copied its gradients for nobody; and what a stage has saved no other can load."""
    config = load_config(["--trainer.deepspeed", "configs/deepspeed/zero1.json"])
    assert (zero_stage(None, 1), zero_stage(None, 2)) == (0, None)
    (tmp_path / "progress.json").write_text(json.dumps({"zero_stage": 1}))
    assert (zero_stage(tmp_path, 1), zero_stage(tmp_path, 2)) == (1, 1)
    assert "has nothing to share (stage 1 of" in str(stage_note(config.trainer, 0, resumed=False))
    assert "ZeRO-0, as its checkpoint has it, and not stage 1 of" in str(stage_note(config.trainer, 0, resumed=True))
    assert stage_note(config.trainer, None, resumed=False) is None
    assert stage_note(config.trainer, 1, resumed=True) is None
