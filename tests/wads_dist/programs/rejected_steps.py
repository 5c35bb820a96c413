"""A batch with a NaN, then one with a loss a hundred times the usual, each on one rank: no rank's engines step, and the next
step is that of engines which never saw it."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import join, leave, small_trainer

from wads_dist.training import engines
from wads_dist.training.losses import Losses
from wads_dist.training.trainer import Trainer


def everything(trainer: Trainer) -> list[torch.Tensor]:
    state = [
        *engines.full_state(trainer.generator_engine, dict(trainer.generator_engine.module.named_buffers())).values()
    ]
    return [*state, *engines.full_state(trainer.discriminator_engine, {}).values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def skip(hurt: Trainer, first: int, stage: str) -> Losses:
    before = everything(hurt)
    losses = hurt.step(first)
    assert same(before, everything(hurt)), f"zero{stage} stepped"
    assert hurt.progress.next_sample == first + 8
    return losses


def main() -> None:
    ranks = join()
    last = ranks.world_size - 1
    for stage in sys.argv[1].split(","):
        overrides = [
            "--trainer.deepspeed",
            f"configs/deepspeed/zero{stage}.json",
            "--trainer.micro_batch_size",
            sys.argv[2],
        ]
        overrides += ["--trainer.spike_window", "2"]
        # Samples 12 to 15 and 28 to 31 are the last rank's; the first of them is in its first micro-batch.
        hurt = small_trainer(ranks, *overrides, bad=frozenset({12}), loud=frozenset({28}))
        whole = small_trainer(ranks, *overrides)
        for trainer in (hurt, whole):
            trainer.step(0)
        decision = skip(hurt, 8, stage).decision
        assert decision is not None and (decision.rejected, decision.ranks) == ("not finite", (last,)), decision
        for trainer in (hurt, whole):
            trainer.step(16)
        assert same(everything(hurt), everything(whole)), f"zero{stage}: the NaN left something behind"
        decision = skip(hurt, 24, stage).decision
        assert decision is not None and (decision.rejected, decision.ranks) == ("spike", (last,)), decision
        times = decision.loss / hurt.progress.recent[-1]
        assert times > 100, times
        for trainer in (hurt, whole):
            trainer.step(32)
        assert same(everything(hurt), everything(whole)), f"zero{stage}: the spike left something behind"
        assert (hurt.progress.rejected, hurt.progress.spikes, whole.progress.rejected) == (2, 1, 0)
        if ranks.is_first:
            print(
                f"zero{stage}: NaN and a spike of {times:.0f} times rejected on all ranks, nothing left behind",
                flush=True,
            )
    leave()


if __name__ == "__main__":
    main()
