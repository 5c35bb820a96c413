"""Steps of both engines at every ZeRO stage against a plain PyTorch loop on the same global batch; fails by assertion."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from common import Samples, join, leave, small_config, small_trainer

from wads_dist.kernels.objective import ObjectiveWeights, objective
from wads_dist.model.networks import Discriminator, Wads
from wads_dist.training import engines
from wads_dist.training.trainer import Trainer

STEPS = 3


class PlainLoop:
    """The same networks, trained by an independent loop without DeepSpeed.

    BatchNorm sees each of ``parts`` parts of the global batch on its own, as it does on ranks; their gradients are averaged.
    """

    def __init__(self, adam: bool, parts: int, overrides: list[str]) -> None:
        self.config, self.parts = small_config(*overrides), parts
        torch.manual_seed(self.config.trainer.seed)
        self.wads = Wads(self.config.model, 64)
        self.discriminator = Discriminator(64, self.config.model.width)
        self.nets = nn.ModuleDict({"wads": self.wads, "d": self.discriminator})
        self.data = Samples(self.config)
        rate, betas = self.config.trainer.learning_rate, self.config.trainer.betas
        self.optimizers = [
            torch.optim.Adam(net.parameters(), rate, betas) if adam else torch.optim.SGD(net.parameters(), rate)
            for net in (self.wads, self.discriminator)
        ]

    def parameters(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.nets.named_parameters()}

    def step(self, first: int) -> None:
        wads, d, w, parts = self.wads, self.discriminator, self.config.objective, self.parts
        self.nets.zero_grad()
        for ids in torch.arange(first, first + 8).chunk(parts):
            batch = self.data.batch(ids)
            x_hat, logits, z, z_hat = wads(batch.clean, batch.anomalous, True)
            weights = ObjectiveWeights(reconstruction=w.reconstruction.weight, focal=w.focal.weight, kl=w.kl.weight)
            loss = objective(batch.clean, x_hat, logits, batch.mask, weights, backend="torch").total
            loss = loss + w.latent.weight * F.mse_loss(z_hat, z)
            target = torch.sigmoid(d(batch.clean)[0]).detach()
            loss = loss + w.adversarial.weight * F.binary_cross_entropy_with_logits(d(x_hat)[0], target)
            grads = torch.autograd.grad(loss, list(wads.parameters()))
            for p, g in zip(wads.parameters(), grads, strict=True):
                p.grad = g / parts if p.grad is None else p.grad + g / parts
            real, fake = d(torch.cat([batch.clean, x_hat.detach()]))[1].chunk(2)
            bce = F.binary_cross_entropy_with_logits
            (0.5 * (bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))) / parts).backward()
        for optimizer in self.optimizers:
            optimizer.step()

    def moments(self) -> list[dict[str, Tensor]]:
        """Adam's state of every parameter."""
        return [optimizer.state[p] for optimizer in self.optimizers for p in optimizer.param_groups[0]["params"]]


def relative_error(a: Tensor, b: Tensor) -> float:
    """Of a parameter tensor, whose size counts as 0.01 an element at least: a bias that starts at zero and has moved by
    1e-4 carries the rounding of the weights around it (a wrong scale would still show as 1e-2)."""
    return ((a - b).norm() / b.norm().clamp_min(1e-2 * b.numel() ** 0.5)).item()


def both_states(trainer: Trainer) -> dict[str, Tensor]:
    return {
        f"{prefix}.{name}": value
        for prefix, engine in (("wads", trainer.generator_engine), ("d", trainer.discriminator_engine))
        for name, value in engines.full_state(engine, {}).items()
    }


def main() -> None:
    stages, accumulation = sys.argv[1].split(","), int(sys.argv[2])
    ranks = join()
    micro = 8 // ranks.world_size // accumulation
    for adam in (False, True):
        # Plain SGD at rate 1 shows a wrong scale that Adam would hide.
        overrides = ["--trainer.learning_rate", "1e-3" if adam else "1.0"]
        if adam:
            engines.adam = lambda module, rate, betas: torch.optim.Adam(module.parameters(), rate, betas)
        else:
            engines.adam = lambda module, rate, betas: torch.optim.SGD(module.parameters(), rate)  # type: ignore[assignment]
        for stage in stages:
            json = f"configs/deepspeed/zero{stage}.json"
            trainer = small_trainer(
                ranks, *overrides, "--trainer.deepspeed", json, "--trainer.micro_batch_size", str(micro)
            )
            plain = PlainLoop(adam, ranks.world_size * accumulation, overrides)
            worst = 0.0
            for step in range(STEPS):
                # Each step from the engines' own weights: rounding would grow a hundredfold in three steps of SGD at this
                # rate, and under Adam a weight whose gradient is noise moves either way. Adam's moments are never copied.
                parameters = plain.parameters()
                for name, value in both_states(trainer).items():
                    parameters[name].copy_(value)
                trainer.step(step * 8)
                plain.step(step * 8)
                for name, value in both_states(trainer).items():
                    error = relative_error(value, parameters[name])
                    worst = max(worst, error)
                    # Adam divides by √v: where a gradient is rounding noise, so is its step (1e-3). Its moments tell more.
                    assert error < (1e-2 if adam else 1e-5), (stage, step, name, error)
            if adam:
                check_moments(trainer, plain.moments(), stage)
            if ranks.is_first:
                print(f"zero{stage} {'adam' if adam else 'sgd'}: worst relative difference {worst:.1e}", flush=True)
    leave()


def check_moments(trainer: Trainer, moments: list[dict[str, Tensor]], stage: str) -> None:
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
