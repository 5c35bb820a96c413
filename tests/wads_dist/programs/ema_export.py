"""The moving average as exported is that of the raw weights after each step, at ZeRO 0 and 3, and an export harms nothing."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import join, leave, small_trainer

from wads_dist.training import engines


def main() -> None:
    ranks = join()
    for stage in ("0", "3"):
        json = ["--trainer.deepspeed", f"configs/deepspeed/zero{stage}.json", "--trainer.ema", "0.9"]
        trainer = small_trainer(ranks, *json, "--trainer.learning_rate", "1e-2")
        expected = engines.full_state(trainer.generator_engine, {})
        for step in range(3):
            trainer.step(step * 8)
            raw = engines.full_state(trainer.generator_engine, {})
            decay = (2 + step) / (11 + step)  # below 0.9 so early
            expected = {name: decay * value + (1 - decay) * raw[name] for name, value in expected.items()}
        exported = trainer.inference_state()
        for name, value in expected.items():
            assert torch.allclose(exported[name], value, atol=1e-6), (stage, name)
            assert not torch.equal(value, raw[name]), (stage, name)
        again = engines.full_state(trainer.generator_engine, {})
        assert all(torch.equal(again[name], value) for name, value in raw.items()), stage
        trainer.step(24)
        assert trainer.progress.rejected == 0
    print("averaged alike", flush=True)
    leave()


if __name__ == "__main__":
    main()
