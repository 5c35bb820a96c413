"""The exported moving average at ZeRO-3 is that of ZeRO-0, and training goes on unharmed after an export."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import join, leave, small_trainer

from wads_dist import engines

SMALL_STEPS = ["--objective.reconstruction.weight", "1", "--objective.latent.weight", "0.1"]


def main() -> None:
    ranks = join()
    # SGD, because Adam turns rounding into whole steps where a gradient is nearly zero.
    engines.adam = lambda module, rate, betas: torch.optim.SGD(module.parameters(), rate)  # type: ignore[assignment]
    exported = {}
    for stage in ("0", "3"):
        json = ["--trainer.deepspeed", f"configs/deepspeed/zero{stage}.json", "--trainer.ema", "0.9"]
        trainer = small_trainer(ranks, *json, "--trainer.learning_rate", "1e-2", *SMALL_STEPS)
        for step in range(3):
            trainer.step(step * 8)
        average, raw = trainer.inference_state(), engines.full_state(trainer.gs, {})
        trainer.step(24)
        exported[stage] = (average, raw, engines.full_state(trainer.gs, {}))
    distance = {n: (exported["0"][0][n] - exported["0"][1][n]).norm() for n in exported["0"][1]}
    for what, (a, b) in zip(("average", "raw", "after"), zip(*exported.values(), strict=True), strict=True):
        for name, apart in distance.items():
            # The two stages differ by rounding, average and raw weights by whole steps.
            error = (a[name] - b[name]).norm()
            assert error <= 0.1 * apart + 1e-6, (what, name, error.item(), apart.item())
    assert sum(apart > 1e-4 for apart in distance.values()) > len(distance) / 2
    print("averaged alike", flush=True)
    leave()


if __name__ == "__main__":
    main()
