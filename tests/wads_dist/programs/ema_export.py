"""The exported moving average at ZeRO-3 is that of ZeRO-0, and training goes on unharmed after an export."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import join, leave, small_trainer

from wads_dist import engines


def main() -> None:
    ranks = join()
    exported = {}
    for stage in ("0", "3"):
        json = ["--trainer.deepspeed", f"configs/deepspeed/zero{stage}.json", "--trainer.ema", "0.9"]
        trainer = small_trainer(ranks, *json, "--trainer.learning_rate", "1e-2")
        for step in range(3):
            trainer.step(step * 8)
        average, raw = trainer.inference_state(), engines.full_state(trainer.gs, {})
        trainer.step(24)
        exported[stage] = (average, raw, engines.full_state(trainer.gs, {}))
    for what, (a, b) in zip(("average", "raw", "after"), zip(*exported.values(), strict=True), strict=True):
        for name in a:
            # Adam's steps are of the size of the rate, 1e-2; between average and raw lie whole steps.
            assert torch.allclose(a[name].float(), b[name].float(), atol=2e-3), (what, name)
    average, raw, _ = exported["3"]
    same = [n for n in raw if average[n].is_floating_point() and torch.equal(average[n], raw[n])]
    assert not same, f"not averaged: {same}"
    print("averaged alike", flush=True)
    leave()


if __name__ == "__main__":
    main()
