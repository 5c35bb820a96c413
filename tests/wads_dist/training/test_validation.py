"""The figure that is drawn during training, and that it changes nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.support.narrow import NARROW
from wads_dist.common.ranks import Ranks
from wads_dist.config.load import load_config
from wads_dist.config.schema import Config
from wads_dist.data.images import decode_entries
from wads_dist.data.training import TrainingData, TrainingSplit
from wads_dist.model.networks import Wads
from wads_dist.model.weights import separate_model
from wads_dist.shards.source import Dataset
from wads_dist.training.progress import Progress
from wads_dist.training.validation import COUNT, ValidationSamples, validation_figure

CPU = torch.device("cpu")
Run = Callable[..., list[str]]


@pytest.mark.slow
def test_a_run_with_the_figure_is_bitwise_the_run_without_also_at_zero_3(run_ranks: Run, tmp_path: Path) -> None:
    printed = run_ranks("validation_figure.py", 2, str(tmp_path))
    print(printed[0])
    assert all(text.count("bitwise those of a run without figures") == 2 for text in printed)


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(f"--data.shards x {NARROW} --trainer.kernels torch --evaluation.holdout 0".split())


@pytest.fixture(scope="module")
def data(config: Config, demo_shards: Path) -> TrainingData:
    return TrainingData(config, Dataset.open(demo_shards), "demo_biscuit", CPU)


def noise() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def samples(data: TrainingData) -> ValidationSamples:
    return ValidationSamples.synthesised(data, noise(), "noise")


def trainer(config: Config, state: dict[str, torch.Tensor], rank: int = 0) -> SimpleNamespace:
    ranks = Ranks(rank, 2, rank, 2, CPU)
    return SimpleNamespace(config=config, ranks=ranks, inference_state=lambda: state, progress=Progress())


def test_samples_are_few_and_anomalous_and_always_the_same(data: TrainingData, samples: ValidationSamples) -> None:
    batch = samples.batch
    assert len(batch.mask) == COUNT and batch.mask.flatten(1).any(1).all()
    assert not torch.equal(batch.clean, batch.anomalous)
    again = ValidationSamples.synthesised(data, noise(), "noise").batch
    assert torch.equal(again.anomalous, batch.anomalous) and torch.equal(again.mask, batch.mask)


def test_settings_under_which_no_mask_has_a_pixel_still_give_a_figure(config: Config, data: TrainingData) -> None:
    bare = SimpleNamespace(**vars(data) | {"settings": replace(data.settings, threshold=0.999)})
    samples = ValidationSamples.synthesised(bare, noise(), "noise")  # type: ignore[arg-type]
    assert not samples.batch.mask.any()
    assert validation_figure(trainer(config, Wads(config.model, 64).state_dict()), samples) is not None  # type: ignore[arg-type]


def test_their_masks_are_none_that_training_draws(data: TrainingData, samples: ValidationSamples) -> None:
    trained = {mask.numpy().tobytes() for ids in torch.arange(512).split(64) for mask in data.batch(ids).mask}
    assert not trained & {mask.numpy().tobytes() for mask in samples.batch.mask}


def test_they_are_of_images_held_out_and_say_whose_they_are(tmp_path: Path, config: Config) -> None:
    from wads_dist.shards.demo import demo

    demo(tmp_path, categories=1, size=64, train=20, good=1, per_defect=0, workers=1, progress=False)
    dataset, sources = Dataset.open(tmp_path), []
    for fraction in (0.3, 0.0):
        evaluation = config.evaluation.model_copy(update={"holdout": fraction})
        with_some = config.model_copy(update={"evaluation": evaluation})
        held_out = TrainingSplit.of(dataset, "demo_biscuit", with_some).held_out
        data = TrainingData(with_some, dataset, "demo_biscuit", CPU)
        assert len(held_out) == 20 * fraction and not {s.key for _, s in held_out} & {s.key for _, s in data.entries}
        found = ValidationSamples.of(with_some, dataset, "demo_biscuit", data)
        sources.append(found.source)
        whose = decode_entries(dataset, "demo_biscuit", (held_out or data.entries)[:COUNT], 64)
        assert torch.equal(found.batch.clean, ValidationSamples.synthesised(data, whose, "").batch.clean)
    assert sources == ["normal images held out", "images of the training"]


def test_the_separate_model_is_the_network_and_draws_no_random_number(config: Config) -> None:
    torch.manual_seed(0)
    model = Wads(config.model, 64)
    model.segmenter.stem[1].running_mean.uniform_()  # type: ignore[union-attr]
    before = torch.random.get_rng_state()
    copy = separate_model(config, {name: value.clone() for name, value in model.state_dict().items()})
    assert torch.equal(torch.random.get_rng_state(), before)
    image = torch.rand(2, 3, 64, 64)
    for expected, found in zip(model.eval().predict(image)[:3], copy.predict(image)[:3], strict=True):
        assert torch.equal(expected, found)


def test_the_figure_is_the_first_ranks_and_shows_what_the_network_has_learnt(
    config: Config, samples: ValidationSamples
) -> None:
    state = Wads(config.model, 64).state_dict()
    # Nothing is anomalous; everything is.
    states = [state | {"segmenter.head.2.bias": torch.tensor([bias])} for bias in (-20.0, 20.0)]
    assert validation_figure(trainer(config, states[0], rank=1), samples) is None  # type: ignore[arg-type]
    dark, bright = (validation_figure(trainer(config, state), samples) for state in states)  # type: ignore[arg-type]
    assert dark is not None and bright is not None and dark.dtype == "uint8" and dark.shape == bright.shape
    column = dark.shape[1] // 5
    predictions = slice(None, -10), slice(3 * column + 10, -10)
    assert bright[predictions].mean() - dark[predictions].mean() > 100
