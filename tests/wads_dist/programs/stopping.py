"""Early stopping on real ranks; arguments are shards and an empty folder. Prints "SCORES" and their JSON.

The run without scores, bit by bit, is the run with them. With scores that are given here, training stops where it should, with
the weights of the best; one that was saved behind the best and restored stops there too, with the same.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
from common import join, leave, small_config
from exact_resume import assert_same, everything
from lives import DATA
from torch import Tensor

from wads_dist.data.training import TrainingData
from wads_dist.shards.source import Dataset
from wads_dist.training import checkpoint
from wads_dist.training.progress import is_due
from wads_dist.training.stopping import HeldOutScore
from wads_dist.training.trainer import Trainer

OPTIONS = (
    "--stopping.every 16 --stopping.patience 2 --trainer.samples 96 --trainer.ema 0.5 --trainer.learning_rate 3e-3 "
    "--evaluation.batch_size 48 --trainer.kernels torch"
)


GIVEN = [0.3, 0.5, 0.4, 0.5]
"""The second is the best, the fourth no better: with a patience of 2 the run is over."""


class Given(HeldOutScore):
    """Scores of ``GIVEN``, whatever the network; ``seen`` are the weights that each was asked for."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def measure(self, trainer: Trainer, state: dict[str, Tensor]) -> float:
        self.seen.append(state)
        return GIVEN[len(trainer.progress.scores)]


def trained(trainer: Trainer, held_out: HeldOutScore | None, until: int = 1000) -> Trainer:
    trainer.generator_engine.train()
    trainer.discriminator_engine.train()
    while not trainer.finished and trainer.progress.step < until:
        trainer.step(trainer.progress.next_sample)
        if held_out and is_due(trainer.progress, trainer.config):
            held_out(trainer)
    return trainer


def main(shards: str, folder: Path) -> None:
    ranks = join()
    dataset, config = Dataset.open(shards), small_config(*OPTIONS.split())
    data = TrainingData(config, dataset, "demo_biscuit", ranks.device)
    held_out = HeldOutScore(config, dataset, "demo_biscuit", data, ranks)

    def new() -> Trainer:
        torch.manual_seed(7)
        return Trainer(config, ranks, data)

    torch.backends.cudnn.allow_tf32 = True
    scored, plain = trained(new(), held_out, 4), trained(new(), None, 4)
    assert torch.backends.cudnn.allow_tf32
    scores = scored.progress.scores
    assert [samples for samples, _ in scores] == [16, 32]
    scored.progress.scores = []
    assert_same(everything(scored), everything(plain), "without scores")

    given = Given()
    whole = trained(new(), given)
    assert whole.progress.step == 8 and len(given.seen) == 4  # of the budget's 12
    half = trained(new(), Given(), 7)
    assert checkpoint.save(half, folder, DATA).path
    resumed = new()
    assert checkpoint.resume(resumed, folder, DATA)
    trained(resumed, Given())
    assert whole.progress.scores == resumed.progress.scores and resumed.progress.step == 8
    for trainer in (whole, resumed):
        assert (trainer.best is None) == (not ranks.is_first)
        if trainer.best is not None:
            assert_same(trainer.best, given.seen[1], "the best weights")
    if ranks.is_first:
        print("SCORES", json.dumps(scores), flush=True)
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
