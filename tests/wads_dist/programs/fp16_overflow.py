"""On a GPU in fp16: a loss scale that overflows one engine's gradients skips the step of both, and the scale falls."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import join, leave, small_trainer

from wads_dist.training import engines


def main() -> None:
    ranks = join()
    for stage in ("0", "1", "2", "3"):
        json = ["--trainer.deepspeed", f"configs/deepspeed/zero{stage}.json"]
        for victim in ("generator_engine", "discriminator_engine"):
            trainer = small_trainer(ranks, *json, "--trainer.precision", "fp16")
            trainer.step(0)
            engine = getattr(trainer, victim)
            backward = engine.backward
            # A factor that leaves the loss finite in fp32 and takes the fp16 gradients of this engine alone over 65504.
            engine.backward = lambda loss, backward=backward: backward(loss * 2.0**40)
            before = [p.clone() for e in trainer.both for p in engines.full_state(e, {}).values()]
            scale = trainer.loss_scale.scale
            trainer.step(8)
            engine.backward = backward
            after = [p for e in trainer.both for p in engines.full_state(e, {}).values()]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), (stage, victim)
            assert trainer.loss_scale.scale == scale / 2 and trainer.progress.rejected >= 1
    print("both skipped", flush=True)
    leave()


if __name__ == "__main__":
    main()
