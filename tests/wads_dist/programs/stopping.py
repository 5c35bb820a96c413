"""Held-out scores on real ranks; arguments are shards and an empty folder. Prints "SCORES" and their JSON.

The run without scores, bit by bit, is the run with them; and one that was saved after some and restored goes on to the same
scores, the same best weights, and stops at the same step.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
from common import join, leave, small_config
from exact_resume import assert_same
from lives import DATA

from shards.source import Dataset
from wads_dist import checkpoint
from wads_dist.config import Config
from wads_dist.data import TrainingData
from wads_dist.stopping import HeldOutScore, is_due
from wads_dist.trainer import Trainer

OPTIONS = (
    "--stopping.every 16 --stopping.patience 2 --trainer.samples 96 --trainer.ema 0.5 --trainer.learning_rate 3e-3 "
    "--evaluation.batch_size 48 --trainer.kernels torch"
)


def trained(trainer: Trainer, held_out: HeldOutScore | None, until: int = 1000) -> Trainer:
    trainer.gs.train()
    trainer.d.train()
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

    def new(config: Config = config) -> Trainer:
        return Trainer(config, ranks, data)

    whole = trained(new(), held_out)
    without = trained(new(), None, whole.progress.step)
    assert_same(whole.inference_state(), without.inference_state(), "without scores")
    half = trained(new(), held_out, 5)
    assert len(half.progress.scores) == 2
    assert checkpoint.save(half, folder, DATA).path
    resumed = new()
    assert checkpoint.resume(resumed, folder, DATA)
    trained(resumed, held_out)
    assert_same(whole.progress.scores, resumed.progress.scores, "scores")
    assert resumed.progress.step == whole.progress.step
    assert (whole.best is None) == (not ranks.is_first)
    if ranks.is_first:
        assert_same(whole.best, resumed.best, "best weights")
        print("SCORES", json.dumps(whole.progress.scores), flush=True)
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
