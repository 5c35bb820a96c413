from pathlib import Path

import pytest
import torch

from shards.errors import DataError
from shards.source import Dataset
from wads_dist.config import Config, load_config
from wads_dist.data import TestImages
from wads_dist.distributed import Ranks
from wads_dist.errors import WadsError
from wads_dist.evaluate import Predictions, evaluate, load_model, predict, reconstruction_report, save_weights, score
from wads_dist.figures import chosen_rows, save_samples
from wads_dist.models import Wads

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(
        "--data.shards x --data.image_size 64 --data.store_size 64 --model.backbone resnet18 --model.width 8 "
        "--model.fpn_width 32 --model.latent 16".split()
    )


def images(count: int, defects: list[str] | None = None) -> TestImages:
    generator = torch.Generator().manual_seed(0)
    defects = defects or ["good"] * count
    masks = torch.zeros(count, 32, 32, dtype=torch.bool)
    for i, defect in enumerate(defects):
        masks[i, :4, :4] = defect not in ("good", "unmasked")
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    x = torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear")
    return TestImages(x, masks, [d != "unmasked" for d in defects], [str(i) for i in range(count)], defects)


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


def test_a_defect_without_a_mask_counts_for_the_image_only() -> None:
    test = images(4, ["good", "good", "cut", "unmasked"])
    probability = torch.zeros(4, 32, 32)
    probability[2, :4, :4] = 1.0
    probability[3] = 0.9  # would spoil the pixel metrics
    metrics = score(probability, test, 3)
    assert metrics["pixel_auroc"] == 1.0 and metrics["image_auroc"] == 1.0


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


@pytest.mark.parametrize("world_size", [2, 4])
def test_scores_do_not_depend_on_how_the_images_are_shared(config: Config, demo_shards: Path, world_size: int) -> None:
    """Ranks played one after the other: each scores its part, and the parts are put together as ``gather`` would."""
    torch.manual_seed(0)
    model, dataset = Wads(config.model, 64).eval(), Dataset.open(demo_shards)
    alone = evaluate(model, config, dataset, "demo_biscuit", Ranks(0, 1, 0, 1, CPU))
    parts = []

    class Played(Ranks):
        def gather(self, value):  # type: ignore[no-untyped-def]
            parts.append(value)
            return parts[-world_size:] if len(parts) >= world_size else [value]

    for rank in range(world_size):
        together = evaluate(model, config, dataset, "demo_biscuit", Played(rank, world_size, 0, 1, CPU))
    assert len(parts) == world_size
    for key in ("pixel_auroc", "pixel_ap", "image_auroc"):
        assert together.metrics[key] == pytest.approx(alone.metrics[key], abs=1e-6)
    assert together.test.keys == alone.test.keys


def test_a_category_without_test_images_is_an_error(config: Config, tmp_path: Path) -> None:
    from shards.demo import demo

    demo(tmp_path / "out", categories=1, size=64, train=2, good=0, per_defect=0, workers=1, progress=False)
    with pytest.raises(DataError, match="no test images"):
        evaluate(Wads(config.model, 64), config, Dataset.open(tmp_path / "out"), "demo_biscuit", Ranks(0, 1, 0, 1, CPU))


def test_the_figure_shows_a_normal_image_and_every_kind_of_defect(
    config: Config, demo_shards: Path, tmp_path: Path
) -> None:
    assert chosen_rows(["good", "a", "a", "b", "good", "b"], 4) == [0, 1, 3, 2]
    model = Wads(config.model, 64).eval()
    evaluation = evaluate(model, config, Dataset.open(demo_shards), "demo_biscuit", Ranks(0, 1, 0, 1, CPU))
    save_samples(tmp_path / "samples.png", "demo_biscuit", evaluation)
    assert (tmp_path / "samples.png").stat().st_size > 10_000 and [p.name for p in tmp_path.iterdir()] == [
        "samples.png"
    ]
