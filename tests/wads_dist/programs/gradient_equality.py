"""Steps of both engines at every ZeRO stage against a plain PyTorch loop on the same global batch; fails by assertion."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from common import Samples, join, leave, small_config, small_trainer

from kernels.objective import ObjectiveWeights, objective
from wads_dist import engines
from wads_dist.models import Discriminator, Wads
from wads_dist.trainer import CODE_SAMPLES, to_channels_last

# Plain SGD at rate 1 shows a wrong scale that Adam would hide. The weights keep steps of that size from exploding, which
# would turn fp32 rounding into differences.
SGD_WEIGHTS = [
    *("--objective.reconstruction.weight", "0.003", "--objective.focal.weight", "0.01"),
    *("--objective.adversarial.weight", "0.003", "--objective.latent.weight", "0.003"),
]
STEPS = 3


def plain_training(
    adam: bool, parts: int, overrides: list[str]
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Parameters after each step, and Adam's first and second moments after the last, of an independent loop.

    BatchNorm sees each of ``parts`` parts of the global batch on its own, as it does on ranks; their gradients are averaged.
    """
    config = small_config(*overrides)
    torch.manual_seed(config.trainer.seed)
    wads, d = Wads(config.model, 64), Discriminator(64, config.model.width)
    wads.generator.standardise_code(Samples(config).batch(torch.arange(CODE_SAMPLES)).clean)
    nets = nn.ModuleDict({"wads": wads, "d": d})
    w = config.objective
    if adam:
        rate, betas = config.trainer.learning_rate, config.trainer.betas
        optimizers = [torch.optim.Adam(net.parameters(), rate, betas) for net in (wads, d)]
    else:
        optimizers = [torch.optim.SGD(net.parameters(), config.trainer.learning_rate) for net in (wads, d)]
    data, history = Samples(config), []
    for step in range(STEPS):
        nets.zero_grad()
        for ids in torch.arange(step * 8, step * 8 + 8).chunk(parts):
            # The memory format decides which convolution kernel runs, and with it the rounding.
            batch = to_channels_last(data.batch(ids))
            x_hat, logits, z, z_hat = wads(batch.clean, batch.anomalous, True)
            weights = ObjectiveWeights(reconstruction=w.reconstruction.weight, focal=w.focal.weight, kl=w.kl.weight)
            loss = objective(batch.clean, x_hat, logits, batch.mask, weights).total
            loss = loss + w.latent.weight * F.mse_loss(z_hat, z)
            target = torch.sigmoid(d(batch.clean)[0]).detach()
            loss = loss + w.adversarial.weight * F.binary_cross_entropy_with_logits(d(x_hat)[0], target)
            grads = torch.autograd.grad(loss, list(wads.parameters()))
            for p, g in zip(wads.parameters(), grads, strict=True):
                p.grad = g / parts if p.grad is None else p.grad + g / parts
            real, fake = d(torch.cat([batch.clean, x_hat.detach()]))[1].chunk(2)
            bce = F.binary_cross_entropy_with_logits
            (0.5 * (bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))) / parts).backward()
        for optimizer in optimizers:
            optimizer.step()
        history.append({name: p.detach().clone() for name, p in nets.named_parameters()})
    moments = [o.state[p] for o in optimizers for p in o.param_groups[0]["params"]] if adam else []
    return history, moments


def relative_error(a: Tensor, b: Tensor) -> float:
    """Of a parameter tensor, whose size counts as 0.01 an element at least: a bias that starts at zero and has moved by
    1e-4 carries the rounding of the weights around it (a wrong scale would still show as 1e-2)."""
    return ((a - b).norm() / b.norm().clamp_min(1e-2 * b.numel() ** 0.5)).item()


def main() -> None:
    stages, accumulation = sys.argv[1].split(","), int(sys.argv[2])
    ranks = join()
    micro = 8 // ranks.world_size // accumulation
    for adam in (False, True):
        overrides = ["--trainer.learning_rate", "1e-3"] if adam else ["--trainer.learning_rate", "1.0", *SGD_WEIGHTS]
        history, moments = plain_training(adam, ranks.world_size * accumulation, overrides)
        if not adam:
            engines.adam = lambda module, rate, betas: torch.optim.SGD(module.parameters(), rate)  # type: ignore[assignment]
        else:
            engines.adam = lambda module, rate, betas: torch.optim.Adam(module.parameters(), rate, betas)
        for stage in stages:
            json = f"configs/deepspeed/zero{stage}.json"
            trainer = small_trainer(
                ranks, *overrides, "--trainer.deepspeed", json, "--trainer.micro_batch_size", str(micro)
            )
            worst = 0.0
            for step in range(STEPS):
                trainer.step(step * 8)
                for prefix, engine in (("wads", trainer.gs), ("d", trainer.d)):
                    state = engines.full_state(engine, {})
                    for name, value in state.items():
                        expected = history[step][f"{prefix}.{name}"]
                        error = relative_error(value, expected)
                        worst = max(worst, error)
                        # Adam divides by √v: where a gradient is rounding noise, so is its step.
                        assert error < (1e-5 if not adam else 2e-3), (stage, step, name, error)
            if adam:
                check_moments(trainer, moments, stage)
            if ranks.is_first:
                print(f"zero{stage} {'adam' if adam else 'sgd'}: worst relative difference {worst:.1e}", flush=True)
    leave()


def check_moments(trainer, moments: list[dict[str, Tensor]], stage: str) -> None:  # type: ignore[no-untyped-def]
    """Adam's moments over everything this rank holds have the norm of the plain loop's (ZeRO keeps them flat, in parts)."""
    for key in ("exp_avg", "exp_avg_sq"):
        plain = sum(m[key].double().pow(2).sum() for m in moments)
        own = torch.zeros((), dtype=torch.float64)
        for engine in trainer.both:
            base = engine.optimizer if stage == "0" else engine.optimizer.optimizer
            for state in base.state.values():
                own += state[key].double().pow(2).sum()
        if stage != "0" and trainer.ranks.world_size > 1:
            torch.distributed.all_reduce(own)
        error = abs(own.sqrt() - plain.sqrt()) / plain.sqrt()
        assert error < 1e-4, (stage, key, error.item())


if __name__ == "__main__":
    main()
