"""A batch with a NaN on one rank: no rank's engines step, and the next step is that of engines which never saw it."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import join, leave, small_trainer

from wads_dist import engines
from wads_dist.trainer import Trainer


def everything(trainer: Trainer) -> list[torch.Tensor]:
    state = [*engines.full_state(trainer.gs, dict(trainer.gs.module.named_buffers())).values()]
    return [*state, *engines.full_state(trainer.d, {}).values()]


def main() -> None:
    ranks = join()
    for stage in sys.argv[1].split(","):
        json = ["--trainer.deepspeed", f"configs/deepspeed/zero{stage}.json", "--trainer.micro_batch_size", sys.argv[2]]
        # Samples 12 to 15 are the last rank's; the first of them is in its first micro-batch.
        hurt = small_trainer(ranks, *json, bad=frozenset({12}))
        whole = small_trainer(ranks, *json)
        for trainer in (hurt, whole):
            trainer.step(0)
        before = everything(hurt)
        hurt.step(8)
        assert all(torch.equal(a, b) for a, b in zip(before, everything(hurt), strict=True)), f"zero{stage} stepped"
        assert hurt.progress.rejected == 1 and hurt.progress.next_sample == 16
        for trainer in (hurt, whole):
            trainer.step(16)
        same = all(torch.equal(a, b) for a, b in zip(everything(hurt), everything(whole), strict=True))
        assert same, f"zero{stage}: the rejected batch left something behind"
        if ranks.is_first:
            print(f"zero{stage}: rejected on all ranks, nothing left behind", flush=True)
    leave()


if __name__ == "__main__":
    main()
