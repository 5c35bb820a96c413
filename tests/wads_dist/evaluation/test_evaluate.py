import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from tests.support.narrow import NARROW
from wads_dist.common.errors import WadsError
from wads_dist.common.ranks import Ranks
from wads_dist.config.load import load_config
from wads_dist.config.schema import Config
from wads_dist.data.images import TestImages
from wads_dist.evaluation import evaluate as evaluation_module
from wads_dist.evaluation.evaluate import (
    MODEL,
    Part,
    evaluate,
    kept,
    reconstruction_report,
    save_threshold,
    score_report,
    trivial_report,
)
from wads_dist.evaluation.histogram import Bounds
from wads_dist.evaluation.metrics import BinaryMetrics, map_metrics
from wads_dist.evaluation.scoring import PixelResult, Predictions, predict
from wads_dist.evaluation.thresholds import Threshold
from wads_dist.model.networks import Scored, Wads
from wads_dist.model.weights import load_model, save_weights, trained_config
from wads_dist.reporting.figures import chosen_rows, save_samples
from wads_dist.shards.build import build
from wads_dist.shards.errors import DataError
from wads_dist.shards.source import Dataset

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 0, 1, CPU)
THRESHOLD = Threshold(
    0.5, 0.25, "normal images held out of training", 6, 0.01, 0.05, {"image_false_positive_rate": 0.0}
)


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(f"--data.shards x {NARROW}".split())


def images(count: int, defects: list[str] | None = None) -> TestImages:
    generator = torch.Generator().manual_seed(0)
    defects = defects or ["good"] * count
    masks = torch.zeros(count, 32, 32, dtype=torch.bool)
    for i, defect in enumerate(defects):
        masks[i, :4, :4] = defect not in ("good", "unmasked")
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    x = torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear")
    return TestImages(
        x, masks, [d != "unmasked" for d in defects], [str(i) for i in range(count)], defects, [0] * count
    )


def test_saved_weights_predict_as_the_model_did(config: Config, tmp_path: Path) -> None:
    model = Wads(config.model, 64).eval()
    save_weights({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path, config, "nut")
    x = torch.rand(3, 3, 64, 64)
    a, b = predict(model, x, 2, CPU), predict(load_model(tmp_path, config, CPU), x, 3, CPU)
    assert torch.allclose(a.probability, b.probability, atol=1e-6) and a.probability.dtype == torch.float32
    (tmp_path / "any other file").touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1  # safetensors' own save_file lets nobody but the owner read


def test_weights_that_are_absent_or_of_another_model_are_named(config: Config, tmp_path: Path) -> None:
    with pytest.raises(WadsError, match="has not finished training"):
        load_model(tmp_path, config, CPU)
    save_weights({"a": torch.zeros(1)}, tmp_path, config, "nut")
    with pytest.raises(WadsError, match=r"weights\.safetensors does not fit"):
        load_model(tmp_path, config, CPU)


def test_the_threshold_is_saved_beside_the_weights_and_in_their_header(config: Config, tmp_path: Path) -> None:
    state = {k: v.contiguous() for k, v in Wads(config.model, 64).state_dict().items()}
    save_weights(state, tmp_path, config, "nut")
    save_threshold(tmp_path, THRESHOLD)
    with safe_open(tmp_path / "weights.safetensors", "pt") as weights:
        header = weights.metadata()
        assert all(weights.get_tensor(name).equal(state[name]) for name in state)
    assert header["category"] == "nut" and header["config"] == config.to_toml()
    assert Threshold.from_json(header["threshold"]) == THRESHOLD
    assert Threshold.from_json((tmp_path / "threshold.json").read_text()) == THRESHOLD

    save_threshold(tmp_path, None)
    assert not (tmp_path / "threshold.json").exists()
    with safe_open(tmp_path / "weights.safetensors", "pt") as weights:
        assert "threshold" not in weights.metadata()


def test_the_settings_that_a_threshold_was_chosen_with_are_saved_with_it(config: Config, tmp_path: Path) -> None:
    """``predict`` takes the window of the image score from the header."""
    save_weights({"a": torch.zeros(1)}, tmp_path, config, "nut")
    other = config.evaluation.model_copy(update={"score_window": 5})
    save_threshold(tmp_path, THRESHOLD, other)
    save_threshold(tmp_path, THRESHOLD)
    assert trained_config(tmp_path) == config.model_copy(update={"evaluation": other})


def test_a_header_that_cannot_be_read_is_named(config: Config, tmp_path: Path) -> None:
    with pytest.raises(WadsError, match="has not finished training"):
        trained_config(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors", {"config": "[trainer]\nno_such = 1\n"})
    with pytest.raises(WadsError, match=r"weights\.safetensors: its header has no settings"):
        trained_config(tmp_path)


class Painter:
    """Stands in for the network: the probability is the image's red."""

    experts, reads_stored = None, False

    def predict(self, x: torch.Tensor, stored: torch.Tensor | None = None) -> Scored:
        return Scored(x, x[:, 0].contiguous(), torch.zeros(len(x), 4))


def painted(config: Config, test: TestImages, red: torch.Tensor, threshold: Threshold | None = None) -> Part:
    """What a rank keeps of ``test``, if the network gave the probabilities ``red``."""
    part = Part(config, ALONE, threshold)
    shown = replace(test, images=red[:, None].expand(-1, 3, -1, -1).contiguous())
    part.add(Painter(), shown, torch.zeros(3, *red.shape[1:]), list(range(len(red))))  # type: ignore[arg-type]
    return part


def test_a_defect_without_a_mask_counts_for_the_image_only(config: Config) -> None:
    test = images(4, ["good", "good", "cut", "unmasked"])
    probability = torch.zeros(4, 32, 32)
    probability[2, :4, :4] = 1.0
    probability[3] = 0.9  # would spoil the pixel metrics
    part = painted(config, test, probability)
    assert part.pixels[MODEL].result(ALONE).metrics.auroc == 1.0
    assert part.anomalous == [False, False, True, True]
    assert part.scores[3] == pytest.approx(0.9, abs=1e-4)  # a mean in float32


def test_decisions_at_the_threshold_are_counted_over_the_test_set(config: Config) -> None:
    probability = torch.zeros(3, 32, 32)
    probability[0, 0, :3] = 0.7  # false alarms of a normal image
    probability[1, :4, :2] = 0.5  # half of the defect, exactly at the threshold
    probability[2] = 0.9  # has no mask
    part = painted(config, images(3, ["good", "cut", "unmasked"]), probability, THRESHOLD)
    rates = part.rates_of_pixels(ALONE)
    assert rates["pixel_f1"] == pytest.approx(2 * 8 / (8 + 3 + 16)) and rates["pixel_iou"] == pytest.approx(8 / 19)
    assert rates["pixel_recall"] == 0.5 and rates["pixel_precision"] == pytest.approx(8 / 11)
    assert rates["pixel_false_positive_rate"] == pytest.approx(3 / (2 * 32 * 32 - 16))
    assert rates["pixel_false_positive_rate_of_normal_images"] == pytest.approx(3 / 32**2)


def test_what_is_not_defined_is_none_with_a_reason() -> None:
    normal = PixelResult(BinaryMetrics(undefined="all are normal"), {})
    report = score_report(normal, BinaryMetrics(undefined="all are normal"))
    assert report["pixel_auroc"] is None and report["image_f1_max"] is None
    assert report["undefined"] == {"pixel": "all are normal", "image": "all are normal"}
    report = score_report(normal, BinaryMetrics(0.9, 0.9, 0.9), "no defect has a mask")
    assert report["undefined"] == {"pixel": "no defect has a mask"}
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, 0, 0] = True
    fine = score_report(PixelResult(map_metrics(torch.rand(2, 4, 4), masks), {}), BinaryMetrics(1.0, 1.0, 1.0, 1.0))
    assert "undefined" not in fine and None not in fine.values()


@pytest.fixture(scope="module")
def thin_shards(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Two defects, each a line of one pixel in 640 that nearest loses at 64²; ``unmasked`` has them without masks."""
    root = tmp_path_factory.mktemp("thin")
    for part in ("thin/train/good", "thin/test/good", "thin/test/bad", "unmasked/good", "unmasked/bad"):
        (root / "data" / part).mkdir(parents=True)
        for i in range(6 if part == "unmasked/good" else 2):  # every fifth of which is tested
            Image.new("RGB", (640, 640), (60, 60, 60)).save(root / "data" / part / f"{i}.png")
    (root / "data/thin/ground_truth/bad").mkdir(parents=True)
    for i in range(2):
        mask = Image.new("L", (640, 640))
        mask.paste(255, (100, 300, 500, 301))
        mask.save(root / f"data/thin/ground_truth/bad/{i}.png")
    build(root / "data", root / "out", workers=1, progress=False)
    return Dataset.open(root / "out")


@pytest.mark.parametrize(
    ("category", "rule", "reason"),
    [
        ("thin", "area", None),
        ("thin", "nearest", "no marked pixel is left at 64×64 by evaluation.mask_rule = nearest"),
        ("unmasked", "area", "no defect has a mask"),
    ],
)
def test_the_metrics_say_by_which_rule_and_what_it_did(
    config: Config, thin_shards: Dataset, category: str, rule: str, reason: str | None
) -> None:
    scored = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"mask_rule": rule})})
    metrics = evaluate(Wads(config.model, 64).eval(), scored, thin_shards, category, ALONE).metrics
    assert metrics["mask_rule"] == rule and metrics["small_components"] == (2 if category == "thin" else 0)
    assert metrics.get("undefined") == (reason and {"pixel": reason})
    assert (metrics["pixel_auroc"] is None) == (reason is not None)


def test_a_report_of_a_histogram_has_its_bounds() -> None:
    intervals = [(0.1, 0.2), (0.3, 0.4), (0.5, 0.6), (0.7, 0.8), (0.8, 0.9)]
    report = score_report(PixelResult(BinaryMetrics(0.15), {}, Bounds(*intervals)), BinaryMetrics(1.0))
    assert report["bounds"] == dict(
        zip(("pixel_auroc", "pixel_ap", "pixel_f1_max", "pixel_iou_max", "pixel_aupro"), intervals, strict=True)
    )


def test_a_model_must_beat_the_better_trivial_score_of_each_metric() -> None:
    report = trivial_report(
        {"blur": BinaryMetrics(0.7, 0.1, aupro=0.5), "mean_image": BinaryMetrics(0.6, 0.3, aupro=0.2)}
    )
    assert (report["pixel_auroc"], report["pixel_ap"], report["pixel_aupro"]) == (0.7, 0.3, 0.5)
    assert report["name"] == "blur" and report["each"]["blur"]["pixel_ap"] == 0.1
    assert trivial_report({"blur": BinaryMetrics(), "mean_image": BinaryMetrics()})["pixel_ap"] is None


def test_a_perfect_reconstruction_follows_and_a_constant_one_does_not() -> None:
    test = images(5)
    code = torch.randn(5, 8)
    good = reconstruction_report(Predictions(torch.zeros(0), test.images, code), test, test.images.mean(0))
    assert good["ssim"] == pytest.approx(1.0) and good["follows_input"] == 1.0 and good["mean_image_ssim"] < 0.9  # type: ignore[operator]
    one = test.images[:1].expand_as(test.images)
    collapsed = reconstruction_report(
        Predictions(torch.zeros(0), one, code[:1].expand(5, 8)), test, test.images.mean(0)
    )
    assert collapsed["follows_input"] == pytest.approx(0.5) and collapsed["code_spread"] == 0


@pytest.fixture(scope="module")
def held_out_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A category large enough for some images to be held out: 24 training images, 3 good and 4 defective test images."""
    from wads_dist.shards.demo import demo

    out = tmp_path_factory.mktemp("held-out") / "shards"
    demo(out, categories=1, size=64, train=24, good=3, per_defect=1, workers=1, progress=False)
    return out


@pytest.mark.slow
def test_numbers_curves_and_threshold_do_not_depend_on_the_number_of_ranks(
    held_out_shards: Path, run_ranks: Callable[..., list[str]]
) -> None:
    """To the last bit, on every rank; and the first rank has all images. More ranks than some of the steps have batches."""
    settings = [
        "exact",
        "histogram",
        "histogram efficientnet_lite0",
        "exact none",
    ]
    outputs = {world: run_ranks("evaluation.py", world, str(held_out_shards), *settings) for world in (1, 2, 3)}
    expected = [json.loads(line) for line in outputs[1][0].splitlines()]
    assert len(expected) == len(settings) and all(e["metrics"]["pixel_auroc"] and e["threshold"] for e in expected)
    for world, printed in outputs.items():
        for rank, text in enumerate(printed):
            found = [json.loads(line) for line in text.splitlines()]
            for of_one, of_many in zip(expected, found, strict=True):
                assert of_many == of_one | {"shown": [] if rank else of_one["shown"]}, (world, rank)


def test_of_a_large_test_set_pictures_are_kept_at_even_distances(
    config: Config, demo_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kept(256) == list(range(256)) and len(set(kept(1000))) == 256 and kept(1000)[:3] == [0, 3, 7]
    monkeypatch.setattr(evaluation_module, "KEPT", 4)
    model, dataset = Wads(config.model, 64).eval(), Dataset.open(demo_shards)
    evaluation = evaluate(model, config, dataset, "demo_biscuit", ALONE)
    keys = [sample.key for _, sample in dataset.manifest("demo_biscuit").samples("test")]
    assert evaluation.test.keys == [keys[i] for i in (0, 1, 3, 5)] and len(evaluation.predictions.code) == 4
    assert evaluation.metrics["test_images"] == 7 == len(keys)


def test_too_few_training_images_give_no_threshold_and_say_so(config: Config, demo_shards: Path) -> None:
    evaluation = evaluate(Wads(config.model, 64).eval(), config, Dataset.open(demo_shards), "demo_biscuit", ALONE)
    assert evaluation.threshold is None and evaluation.metrics["at_threshold"] is None
    assert "8 training images are too few" in evaluation.metrics["no_threshold"]
    assert evaluation.curves.keys() == {"roc", "pr", "pro"}


def test_what_a_threshold_cannot_do_stands_beside_the_metrics(config: Config, held_out_shards: Path) -> None:
    evaluation = evaluate(Wads(config.model, 64).eval(), config, Dataset.open(held_out_shards), "demo_biscuit", ALONE)
    assert evaluation.threshold is not None and "With 4 images held out" in evaluation.metrics["threshold_warning"]


def test_a_category_without_test_images_is_an_error(config: Config, tmp_path: Path) -> None:
    from wads_dist.shards.demo import demo

    demo(tmp_path / "out", categories=1, size=64, train=2, good=0, per_defect=0, workers=1, progress=False)
    with pytest.raises(DataError, match="no test images"):
        evaluate(Wads(config.model, 64), config, Dataset.open(tmp_path / "out"), "demo_biscuit", ALONE)


def test_the_figure_shows_a_normal_image_and_every_kind_of_defect(
    config: Config, demo_shards: Path, tmp_path: Path
) -> None:
    assert chosen_rows(["good", "a", "a", "b", "good", "b"], 4) == [0, 1, 3, 2]
    model = Wads(config.model, 64).eval()
    evaluation = evaluate(model, config, Dataset.open(demo_shards), "demo_biscuit", ALONE)
    save_samples(tmp_path / "samples.png", "demo_biscuit", evaluation)
    assert (tmp_path / "samples.png").stat().st_size > 10_000 and [p.name for p in tmp_path.iterdir()] == [
        "samples.png"
    ]
