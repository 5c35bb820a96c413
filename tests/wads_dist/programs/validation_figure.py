"""Two ranks with a validation figure after every step have the state of two ranks without, every bit of it, at ZeRO-1, and
at ZeRO-3, where the weights are sharded and every figure gathers them; and TensorBoard has the figures."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import join, leave, small_trainer
from exact_resume import assert_same, everything
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from wads_dist.common.ranks import Ranks
from wads_dist.training.validation import ValidationSamples, show, wanted

STEPS = 2
OPTIONS = "--trainer.ema 0.9 --trainer.learning_rate 1e-3 --trainer.micro_batch_size 2"


def trained(ranks: Ranks, settings: str, run: Path, figures: bool) -> dict[str, object]:
    """All state of this rank after some steps, but for its padded partitions: ZeRO-3 leaves the padding uninitialised."""
    options = [*OPTIONS.split(), "--trainer.deepspeed", settings, "--run.dir", str(run)]
    trainer = small_trainer(ranks, *options)
    data = trainer.data
    data.textures = data.images  # type: ignore[attr-defined]
    torch.manual_seed(7 + ranks.rank)
    assert wanted(trainer)
    samples = ValidationSamples.synthesised(data, data.images, "random images")  # type: ignore[arg-type]
    for _ in range(STEPS):
        trainer.step(trainer.progress.next_sample)
        if figures:
            show(trainer, samples)
            assert trainer.generator_engine.module.training and all(
                p.requires_grad for p in trainer.generator_engine.module.parameters()
            )
    state = everything(trainer) | {"average": trainer.inference_state()}
    return {name: value for name, value in state.items() if not name.endswith("master weights")}


def main(folder: Path) -> None:
    ranks = join()
    for stage in "13":
        settings = folder / f"zero{stage}.json"
        if ranks.is_first:
            plain = json.loads(Path(f"configs/deepspeed/zero{stage}.json").read_text())
            settings.write_text(json.dumps(plain | {"tensorboard": {"enabled": True}}))
        ranks.barrier()
        without, with_them = (trained(ranks, str(settings), folder / stage, figures) for figures in (False, True))
        count = assert_same(without, with_them, f"zero{stage} rank {ranks.rank}")
        if ranks.is_first:
            images = EventAccumulator(str(folder / stage / "monitor")).Reload().Images("validation")
            assert [image.step for image in images] == [8 * (step + 1) for step in range(STEPS)]
        print(f"zero{stage}: {count:,} numbers are bitwise those of a run without figures", flush=True)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
