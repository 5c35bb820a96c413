"""Thresholds keep to the rates they are chosen for, on images that training never draws."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.narrow import NARROW
from wads_dist.common.errors import ResumeError
from wads_dist.common.ranks import Ranks
from wads_dist.config.load import load_config
from wads_dist.config.schema import Config
from wads_dist.data.images import whole_entries
from wads_dist.data.training import TrainingData, TrainingSplit, mean_image
from wads_dist.evaluation.scoring import predict
from wads_dist.evaluation.thresholds import (
    Decisions,
    Threshold,
    fit_threshold,
    image_threshold,
    marked_at_most,
    pixel_threshold,
    shortfall,
)
from wads_dist.kernels.philox import shuffled
from wads_dist.model.networks import Scored, Wads
from wads_dist.runs.record import open_run
from wads_dist.shards.source import Dataset

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 0, 1, CPU)


def config(*overrides: str) -> Config:
    return load_config([*f"--data.shards x {NARROW}".split(), *overrides])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One category of 24 training images."""
    from wads_dist.shards.demo import demo

    out = tmp_path_factory.mktemp("thresholds") / "shards"
    demo(out, categories=1, size=64, train=24, good=2, per_defect=1, workers=1, progress=False)
    return out


def keys(entries: list) -> list[str]:  # type: ignore[type-arg]
    return [sample.key for _, sample in entries]


# --- which images are held out ---


@pytest.mark.parametrize(("fraction", "count"), [("0.1", 4), ("0.25", 6), ("0.5", 12), ("0", 0)])
def test_a_fraction_of_the_training_images_is_held_out(shards: Path, fraction: str, count: int) -> None:
    dataset = Dataset.open(shards)
    split = TrainingSplit.of(dataset, "demo_biscuit", config("--evaluation.holdout", fraction))
    assert len(split.held_out) == count
    everything = keys(dataset.manifest("demo_biscuit").samples("train"))
    assert sorted(keys(split.trained) + keys(split.held_out)) == sorted(everything)


def test_of_few_images_none_is_held_out(demo_shards: Path) -> None:
    split = TrainingSplit.of(Dataset.open(demo_shards), "demo_biscuit", config())
    assert len(split.trained) == 8 and split.held_out == []


def test_the_choice_is_that_of_the_seed_and_the_keys(shards: Path) -> None:
    """Every rank and every restart holds out the same images, in whatever order the shards have them."""
    dataset = Dataset.open(shards)
    first = TrainingSplit.of(dataset, "demo_biscuit", config()).held_out
    assert TrainingSplit.of(Dataset.open(shards), "demo_biscuit", config()).held_out == first
    assert TrainingSplit.of(dataset, "demo_biscuit", config("--trainer.seed", "1")).held_out != first
    manifest = dataset.manifest("demo_biscuit")
    reordered = [s.model_copy(update={"samples": s.samples[::-1]}) for s in manifest.shards]
    dataset._manifests["demo_biscuit"] = manifest.model_copy(update={"shards": reordered})
    assert set(keys(TrainingSplit.of(dataset, "demo_biscuit", config()).held_out)) == set(keys(first))


@pytest.mark.parametrize("mode", ["resident", "streaming"])
def test_training_never_draws_an_image_that_is_held_out(shards: Path, mode: str) -> None:
    """A picture of the batches of several epochs, uncropped and unturned, is that of one of the other images."""
    settings = config(
        "--data.mode", mode, "--synthesis.scale", "1,1", "--synthesis.rotation", "0", "--evaluation.holdout", "0.5"
    )
    dataset = Dataset.open(shards)
    split = TrainingSplit.of(dataset, "demo_biscuit", settings)
    data = TrainingData(settings, dataset, "demo_biscuit", CPU)
    assert data.images.count == len(data.entries) == 12 and keys(list(data.entries)) == keys(split.trained)
    trained = whole_entries(dataset, "demo_biscuit", split.trained, settings.data)
    held_out = whole_entries(dataset, "demo_biscuit", split.held_out, settings.data)
    samples = torch.arange(48)
    drawn = data.batch(samples, samples + 48).clean
    index = shuffled(settings.trainer.seed, samples, 12)
    assert torch.allclose(drawn, trained[index], atol=1e-6)
    assert all((drawn - image).abs().amax((1, 2, 3)).min() > 0.05 for image in held_out)


def test_the_mean_image_is_of_those_trained_on(shards: Path) -> None:
    settings, dataset = config("--evaluation.holdout", "0.5"), Dataset.open(shards)
    trained = whole_entries(
        dataset, "demo_biscuit", TrainingSplit.of(dataset, "demo_biscuit", settings).trained, settings.data
    )
    assert torch.allclose(mean_image(dataset, "demo_biscuit", settings), trained.mean(0), atol=1e-5)


def test_a_run_cannot_go_on_with_other_images_held_out(tmp_path: Path) -> None:
    run = ["--run.dir", str(tmp_path)]
    open_run(config(*run), {})
    with pytest.raises(ResumeError, match=r"evaluation\.holdout: 0\.1 → 0\.2"):
        open_run(config(*run, "--evaluation.holdout", "0.2"), {})


# --- rates ---


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rate", [0.001, 0.01, 0.1, 0.5])
def test_the_pixel_threshold_is_the_lowest_that_keeps_to_its_rate(rate: float, tied: bool) -> None:
    scores = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    scores = (scores * 50).round() / 50 if tied else scores
    marked = marked_at_most(rate, len(scores))
    threshold = pixel_threshold(scores.sort(descending=True).values[: marked + 1], marked)
    assert (scores >= threshold).sum() <= marked
    lower = scores[scores < threshold].max()  # the next score that could be marked as well
    assert (scores >= lower).sum() > marked


def test_a_rate_of_a_whole_number_of_pixels_is_not_lost_to_rounding() -> None:
    assert [marked_at_most(rate, 100) for rate in (0.29, 0.57, 0.58)] == [29, 57, 58]


@pytest.mark.parametrize(("n", "rate"), [(5, 0.05), (39, 0.05), (40, 0.05), (30, 0.2)])
def test_another_normal_image_is_called_anomalous_as_often_as_said(n: int, rate: float) -> None:
    """Over many draws of n images and one more, which is what exchangeability promises."""
    rng = np.random.default_rng(0)
    trials, alarms, beyond = 4000, 0, 0
    for scores in rng.normal(size=(trials, n + 1)).astype(np.float32):
        threshold, expected = image_threshold(scores[:-1].tolist(), rate)
        alarms += scores[-1] >= threshold
        # The rate given these n images, which a normal distribution tells exactly.
        beyond += (
            0.5 * torch.erfc(torch.tensor(threshold / 2**0.5)).item()
            > expected["image_false_positive_rate_95_percent_below"]
        )
    promised = expected["image_false_positive_rate_expected"]
    assert promised == max(1, int(rate * (n + 1) + 1e-9)) / (n + 1)
    assert alarms / trials == pytest.approx(promised, abs=0.02)  # four standard errors
    assert beyond / trials == pytest.approx(0.05, abs=0.015)


def test_the_threshold_of_a_network_keeps_to_the_rates_on_the_images_held_out(shards: Path) -> None:
    torch.manual_seed(0)
    settings = config("--evaluation.pixel_false_positive_rate", "0.03", "--evaluation.batch_size", "3")
    model, dataset = Wads(settings.model, 64).eval(), Dataset.open(shards)
    threshold, reason = fit_threshold(model, settings, dataset, "demo_biscuit", ALONE)
    assert threshold is not None and reason is None and threshold.images == 4
    assert threshold.source == "normal images held out of training"
    split = TrainingSplit.of(dataset, "demo_biscuit", settings)
    images = whole_entries(dataset, "demo_biscuit", split.held_out, settings.data)
    probability = predict(model, images, 3, CPU).probability
    marked = (probability >= threshold.pixel).double().mean((1, 2))
    achieved = threshold.achieved
    assert 0.029 < marked.mean() <= 0.03 and achieved["pixel_false_positive_rate"] == pytest.approx(marked.mean())
    assert achieved["pixel_false_positive_rate_standard_error"] == pytest.approx(marked.std() / 2)
    assert achieved["image_false_positive_rate"] == 0 and achieved["image_false_positive_rate_expected"] == 0.2
    assert threshold.warning is not None and threshold.warning.startswith(
        "With 4 images held out, 0.2 of normal images"
    )


@pytest.mark.parametrize(
    ("pixel", "image", "expected", "said"),
    [
        (0.9, 1.0, 0.05, None),
        (0.9, 0.5, 0.2, "0.2 of normal images must be expected to be called anomalous, not 0.05, for which 19"),
        (1.0000001, 0.5, 0.05, "The pixel threshold is above 1, so no pixel is ever anomalous"),
        (0.9, 1.0000001, 0.05, "The image threshold is above 1, so no image is ever anomalous"),
    ],
)
def test_a_threshold_that_cannot_do_what_was_asked_says_so(
    pixel: float, image: float, expected: float, said: str | None
) -> None:
    warning = shortfall(pixel, image, 4, 0.05, expected)
    assert warning is said is None or (warning is not None and said is not None and said in warning)


def test_a_threshold_of_a_network_that_is_always_sure_warns(shards: Path) -> None:
    threshold, _ = fit_threshold(AlwaysSure(), config(), Dataset.open(shards), "demo_biscuit", ALONE)  # type: ignore[arg-type]
    assert threshold is not None and threshold.pixel > 1 and "no pixel is ever anomalous" in (threshold.warning or "")


class AlwaysSure:
    """Stands in for a network that has collapsed: everything is anomalous."""

    experts, reads_stored = None, False

    def predict(self, x: Tensor, stored: Tensor | None = None) -> Scored:
        return Scored(x, torch.ones(len(x), *x.shape[2:]), torch.zeros(len(x), 4))


def test_without_images_held_out_there_is_a_reason(demo_shards: Path, shards: Path) -> None:
    model = Wads(config().model, 64).eval()
    none, reason = fit_threshold(model, config(), Dataset.open(demo_shards), "demo_biscuit", ALONE)
    assert none is None and reason is not None and "too few" in reason
    off = config("--evaluation.holdout", "0")
    none, reason = fit_threshold(model, off, Dataset.open(shards), "demo_biscuit", ALONE)
    assert none is None and reason is not None and "evaluation.holdout is 0" in reason


# --- what becomes of it ---


def test_a_threshold_survives_its_json() -> None:
    threshold = Threshold(float(np.float32(0.1)), 0.2, "normal images held out of training", 7, 0.01, 0.05, {"a": 0.5})
    assert Threshold.from_json(threshold.to_json()) == threshold
    of_an_earlier_version = {key: value for key, value in asdict(threshold).items() if key != "warning"}
    assert Threshold.from_json(json.dumps(of_an_earlier_version)) == threshold


def test_rates_that_are_not_defined_are_none() -> None:
    decisions = Decisions()
    decisions.add(torch.tensor([False, False]), torch.tensor([False, False]))
    rates = decisions.rates("image")
    assert rates["image_false_positive_rate"] == 0
    assert rates["image_f1"] is rates["image_recall"] is rates["image_precision"] is rates["image_iou"] is None
