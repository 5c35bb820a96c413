"""One training step whose synthesis and objective are Triton kernels, interpreted, against the PyTorch reference's step."""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
sys.path.insert(0, str(Path(__file__).parent))
import torch
from common import join, leave, small_trainer
from torch import Tensor

from wads_dist.common.ranks import Ranks
from wads_dist.training import engines

OVERRIDES = "--trainer.global_batch_size 2 --trainer.learning_rate 1.0 --trainer.kernels".split()


def parameters_after_one_step(ranks: Ranks, backend: str) -> dict[str, Tensor]:
    trainer = small_trainer(ranks, *OVERRIDES, backend)
    trainer.step(4)
    return {name: value for engine in trainer.both for name, value in engines.full_state(engine, {}).items()}


def main() -> None:
    ranks = join()
    # Plain SGD at rate 1: a parameter's change is its gradient.
    engines.adam = lambda module, rate, betas: torch.optim.SGD(module.parameters(), rate)  # type: ignore[assignment]
    reference, ours = (parameters_after_one_step(ranks, backend) for backend in ("torch", "triton"))
    worst = max(
        ((ours[k] - v).norm() / v.norm().clamp_min(1e-2 * v.numel() ** 0.5)).item() for k, v in reference.items()
    )
    assert worst < 1e-5, worst
    print(f"triton and reference: worst relative difference {worst:.1e}", flush=True)
    leave()


if __name__ == "__main__":
    main()
