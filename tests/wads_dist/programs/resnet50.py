"""A 200-sample run of the default networks at 128²; prints the first and last losses."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import Samples, join, leave

from wads_dist.config.load import load_config
from wads_dist.shards.textures import procedural_textures
from wads_dist.training.trainer import Trainer


def main() -> None:
    ranks = join()
    torch.set_num_threads(2)
    config = load_config(
        "--data.shards none --trainer.samples 200 --trainer.global_batch_size 8 --model.width 32".split()
    )
    data = Samples(config)
    data.images = torch.from_numpy(procedural_textures(12, size=config.data.store_size))
    trainer = Trainer(config, ranks, data)  # type: ignore[arg-type]
    history = []
    trainer.train(lambda _, losses: history.append(losses.means()))
    third = len(history) // 3
    for name in history[0]:
        values = [step[name] for step in history]
        print(f"{name} {sum(values[:third]) / third:.4f} -> {sum(values[-third:]) / third:.4f}")
    leave()


if __name__ == "__main__":
    main()
