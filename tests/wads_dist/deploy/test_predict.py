import csv
import io
import itertools
import json
import os
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.conftest import REPOSITORY, environment
from tests.support.narrow import NARROW
from wads_dist.common.errors import ConfigError, ExitCode, ModelFileError, WadsError
from wads_dist.config.load import load_config
from wads_dist.config.schema import Config
from wads_dist.data.images import TestImages
from wads_dist.deploy.predict import Description, Detector, Thresholds, load, load_weights, read_image
from wads_dist.deploy.predict_files import _batches, find_images, predict_files
from wads_dist.evaluation.metrics import image_score
from wads_dist.evaluation.scoring import predict as evaluation_predict
from wads_dist.evaluation.thresholds import Threshold
from wads_dist.launch.predict import parse
from wads_dist.launch.predict import predict as predict_from_command_line
from wads_dist.model.networks import Wads
from wads_dist.model.weights import save_weights, trained_config
from wads_dist.runs.folder import WEIGHTS
from wads_dist.shards.errors import DataError
from wads_dist.shards.source import Dataset

SIZE = 64
THRESHOLD = Threshold(0.25, 0.5, "normal images held out of training", 9, 0.01, 0.05, {})


@pytest.fixture(scope="module")
def config() -> Config:
    """Stored at twice the training size, as real runs are: both steps of the resizing count."""
    return load_config(f"--data.shards x {NARROW} --data.store_size 128".split())


@pytest.fixture(scope="module")
def model(config: Config) -> Wads:
    """Random weights, steep enough that scores differ from image to image."""
    torch.manual_seed(0)
    model = Wads(config.model, SIZE).eval()
    with torch.no_grad():
        last = model.segmenter.head[-1]
        last.weight.mul_(20)
        last.bias.zero_()
    return model


def saved(model: Wads, folder: Path, config: Config, threshold: Threshold | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(
        {k: v.contiguous() for k, v in model.state_dict().items()},
        folder,
        config,
        "nut",
        threshold.to_json() if threshold else None,
    )
    return folder


@pytest.fixture(scope="module")
def run(model: Wads, config: Config, module_path: Path) -> Path:
    return saved(model, module_path / "nut", config)


def brightness(batch_size: int = 4) -> Detector:
    """A detector whose map is the image's brightness: what it must say of an image is plain to see."""

    def network(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        probability = images.float().mean(1) / 255
        return probability, image_score(probability, 5)

    return Detector(network, Description("nut", SIZE, SIZE, 5), Thresholds(0.5, 0.5, "given"), batch_size)


def photograph(width: int = 90, height: int = 70, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def png_of_size(width: int, height: int) -> bytes:
    """A well-formed header of any size, for the price of a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def rows_of(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=300)


# --- scores ------------------------------------------------------------------------------------------------------


def test_scores_and_maps_are_those_of_the_evaluation(
    model: Wads, config: Config, run: Path, demo_shards: Path, tmp_path: Path
) -> None:
    dataset, category = Dataset.open(demo_shards), "demo_biscuit"
    test = TestImages.load(dataset, category, config.data, slice(None))
    maps = evaluation_predict(model, test.images, 4, torch.device("cpu")).probability
    expected = image_score(maps, config.evaluation.score_window)
    assert expected.max() - expected.min() > 1e-3  # else the comparison would show nothing
    detector = load(run, device="cpu")
    for i, (shard, sample) in enumerate(dataset.manifest(category).samples("test")):
        path = tmp_path / f"{i}.png"
        path.write_bytes(dataset.read(category, shard, sample.image))
        result = detector.predict(path)
        assert result.score == pytest.approx(expected[i].item(), abs=1e-6)
        assert result.image.size == (SIZE, SIZE) and np.abs(result.probability - maps[i].numpy()).max() < 1e-5


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGB", (200, 100, 30), (200, 100, 30)),
        ("L", 90, (90, 90, 90)),
        ("1", 1, (255, 255, 255)),
        ("P", 1, (10, 200, 30)),
        ("LA", (100, 51), (224, 224, 224)),  # a fifth of it, four fifths white
        ("RGBA", (200, 100, 30, 51), (244, 224, 210)),
        ("CMYK", (55, 155, 225, 0), (200, 100, 30)),
        ("I;16", 90 * 257, (90, 90, 90)),
        ("YCbCr", (90, 128, 128), (90, 90, 90)),
    ],
)
def test_images_of_every_mode_are_scored(
    mode: str, colour: float | tuple[int, ...], expected: tuple[int, ...], tmp_path: Path
) -> None:
    image = Image.new(mode, (90, 70), colour)
    if mode == "P":
        image.putpalette([0, 0, 0, 10, 200, 30])
    path = tmp_path / ("image.tif" if mode in ("CMYK", "YCbCr") else "image.png")
    image.save(path)
    result = brightness().predict(path)
    assert result.image.mode == "RGB" and result.image.getcolors() == [(90 * 70, expected)]
    assert result.probability.shape == (70, 90)
    assert result.probability == pytest.approx(sum(expected) / 3 / 255, abs=1e-5)
    assert result.score == pytest.approx(sum(expected) / 3 / 255, abs=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (SIZE, SIZE), (333, 17), (SIZE - 1, SIZE + 1)])
@pytest.mark.parametrize("tile", [None, SIZE])
def test_images_of_every_shape_keep_their_resolution(size: tuple[int, int], tile: int | None) -> None:
    result = brightness().predict(photograph(*size), tile)
    assert result.probability.shape == size[::-1] and result.mask is not None and result.mask.shape == size[::-1]
    assert {picture.size for picture in result.pictures().values()} == {size}


def test_an_image_of_the_training_size_scores_the_same_in_tiles_as_whole(run: Path) -> None:
    detector, image = load(run, device="cpu"), photograph(SIZE, SIZE)
    whole, tiled = detector.predict(image), detector.predict_tiles(image, SIZE, 0.25)
    assert whole.score == tiled.score and np.abs(whole.probability - tiled.probability).max() < 1e-6


def test_tiles_find_what_resizing_loses() -> None:
    """A bright spot of 12 pixels in a dark image of 640: one pixel once the image is resized to 64."""
    image = Image.new("RGB", (640, 640))
    image.paste((255, 255, 255), (300, 400, 312, 412))
    whole, tiled = brightness().predict(image), brightness().predict(image, SIZE)
    assert whole.score < 0.1 and whole.decision == "normal"
    assert tiled.score > 0.9 and tiled.decision == "anomalous" and tiled.box == [300, 400, 12, 12]
    assert tiled.area == pytest.approx(144 / 640**2)


@pytest.mark.parametrize("kind", ["jpg", "png", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_results_are_of_the_image_as_viewers_show_it(tmp_path: Path, orientation: int, kind: str) -> None:
    """A bright corner is found where it is seen, and the pictures are upright by themselves."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = Image.new("RGB", (90, 70))
    image.paste((255, 255, 255), (0, 0, 45, 35))
    image.save(tmp_path / f"turned.{kind}", exif=exif)
    with Image.open(tmp_path / f"turned.{kind}") as file:
        seen = np.asarray(ImageOps.exif_transpose(file).convert("L")) > 127
    predict_files(brightness(), find_images([str(tmp_path)]), tmp_path / "out", None, 0.25, quiet())
    for what in ("scores", "heat", "overlay", "mask"):
        with Image.open(tmp_path / "out" / f"turned.{kind}.{what}.png") as picture:
            assert picture.size == seen.shape[::-1] and ExifTags.Base.Orientation not in picture.getexif()
    with Image.open(tmp_path / "out" / f"turned.{kind}.mask.png") as picture:
        assert (np.asarray(picture).astype(bool) == seen).mean() > 0.95
    row = json.loads((tmp_path / "out/results.jsonl").read_text())
    assert (row["height"], row["width"]) == seen.shape
    with Image.open(tmp_path / f"turned.{kind}") as opened:  # the same, given to the Python API by a program
        assert np.array_equal(brightness().predict(opened).mask, brightness().predict(tmp_path / f"turned.{kind}").mask)


def test_batches_that_do_not_fit_are_halved_until_they_do() -> None:
    detector, sizes = brightness(batch_size=16), []
    network = detector.network

    def small(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(len(images))
        if len(images) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return network(images)

    stored = torch.randint(0, 256, (7, 3, SIZE, SIZE), dtype=torch.uint8)
    expected = detector.score(stored)
    detector.network = small
    got = detector.score(stored)
    assert sizes == [7, 7, 4, 2, 2, 2, 1] and detector.batch_size == 2
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_other_errors_of_the_network_are_not_taken_for_a_lack_of_memory() -> None:
    def broken(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        replace(brightness(), network=broken).predict(photograph())


def test_scores_that_are_not_finite_are_no_verdict() -> None:
    """NaN is below every threshold: it would pass for normal."""

    def damaged(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images[:, 0].float(), torch.full((len(images),), torch.nan)

    with pytest.raises(WadsError, match="not finite"):
        replace(brightness(), network=damaged).predict(photograph())


# --- models ------------------------------------------------------------------------------------------------------


def test_thresholds_are_the_models_own_unless_others_are_given(model: Wads, config: Config, tmp_path: Path) -> None:
    folder = saved(model, tmp_path, config, THRESHOLD)
    own = load(folder).thresholds
    assert (own.image, own.pixel) == (0.5, 0.25) and "normal images held out of training" in own.source
    given = load(folder, threshold=0.7, pixel_threshold=0.1).thresholds
    assert (given.image, given.pixel, given.source) == (0.7, 0.1, "given")


def test_a_threshold_given_for_images_or_pixels_leaves_the_other_as_it_is(
    model: Wads, config: Config, run: Path, tmp_path: Path
) -> None:
    folder = saved(model, tmp_path, config, THRESHOLD)
    own = "saved with the model: normal images held out of training"
    assert load(folder, threshold=0.7).thresholds == Thresholds(0.7, 0.25, f"image given; pixel {own}")
    assert load(folder, pixel_threshold=0.1).thresholds == Thresholds(0.5, 0.1, f"image {own}; pixel given")
    none = load(run, pixel_threshold=0.1).thresholds
    assert (none.image, none.pixel) == (None, 0.1) and "image none: the model has no threshold" in none.source


def test_an_edited_threshold_file_is_what_counts_and_is_named(model: Wads, config: Config, tmp_path: Path) -> None:
    folder = saved(model, tmp_path, config, THRESHOLD)
    file = folder / "threshold.json"
    file.write_text(THRESHOLD.to_json())
    assert load(folder).thresholds == Thresholds(0.5, 0.25, f"saved with the model: {THRESHOLD.source}")
    file.write_text(replace(THRESHOLD, image=0.9).to_json())
    assert load(folder).thresholds == Thresholds(0.9, 0.25, f"saved with the model: {file}, edited")


@pytest.mark.parametrize(
    "text", ["", "[]", '{"image": 0.5}', '{"image": "0.5", "pixel": 0.5}', '{"image": NaN, "pixel": 1}']
)
def test_a_threshold_file_without_thresholds_is_refused_by_its_name(
    text: str, model: Wads, config: Config, tmp_path: Path
) -> None:
    """NaN is reached by no score: everything would pass for normal."""
    folder = saved(model, tmp_path, config, THRESHOLD)
    (folder / "threshold.json").write_text(text)
    with pytest.raises(ModelFileError, match=r"threshold\.json: holds no thresholds"):
        load(folder)


def test_weights_of_before_skip_connections_have_none(run: Path, tmp_path: Path) -> None:
    with safe_open(run / WEIGHTS, "pt") as weights:
        header = weights.metadata()
    assert header["config"].count("skips = false\n") == 1
    header["config"] = header["config"].replace("skips = false\n", "")
    save_file(load_file(run / WEIGHTS), tmp_path / WEIGHTS, header)
    assert not load_weights(tmp_path)[0].generator.skips and not trained_config(tmp_path).model.skips


def test_weights_that_name_a_setting_of_before_are_read(run: Path, tmp_path: Path) -> None:
    with safe_open(run / WEIGHTS, "pt") as weights:
        header = weights.metadata()
    header["config"] = header["config"].replace("[evaluation]\n", '[evaluation]\nthreshold = "normal"\n')
    save_file(load_file(run / WEIGHTS), tmp_path / WEIGHTS, header)
    assert load_weights(tmp_path)[1] == load_weights(run)[1] and trained_config(tmp_path) == trained_config(run)


def test_a_model_without_a_threshold_scores_and_does_not_decide(run: Path, tmp_path: Path) -> None:
    photograph().save(tmp_path / "a.png")
    prediction = predict_files(load(run), find_images([str(tmp_path)]), tmp_path / "out", None, 0.25, quiet())
    (row,) = rows_of(tmp_path / "out")
    assert row["score"] is not None and row["decision"] is None and row["anomalous_area"] is None
    assert "no threshold" in str(row["threshold_source"]) and not prediction.decisions and prediction.exit_code == 0
    assert not (tmp_path / "out/a.png.mask.png").exists() and (tmp_path / "out/a.png.heat.png").exists()


def test_settings_that_this_version_does_not_know_do_no_harm_where_they_do_not_matter(
    model: Wads, config: Config, tmp_path: Path
) -> None:
    toml = config.to_toml().replace("[trainer]", "[trainer]\nfrom_another_version = 1")
    assert toml != config.to_toml()
    save_file(model.state_dict(), tmp_path / "weights.safetensors", {"category": "nut", "config": toml})
    assert load(tmp_path).description.category == "nut"


@pytest.mark.parametrize("name", ["absent", "weights.safetensors", "other.safetensors", "model.onnx", "absent.onnx"])
def test_what_is_no_model_is_named(name: str, tmp_path: Path) -> None:
    if name.startswith("other"):
        save_file({"a": torch.zeros(1)}, tmp_path / name)
    elif not name.startswith("absent"):
        (tmp_path / name).write_text("nothing")
    if name.endswith(".onnx"):
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the extra `export`)")
    with pytest.raises(ModelFileError, match=name) as caught:
        load(tmp_path / name)
    assert caught.value.exit_code == ExitCode.BAD_CONFIG


def test_a_result_is_plotted(tmp_path: Path) -> None:
    brightness().predict(photograph()).plot(tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width == 1200 and len(set(picture.convert("L").tobytes())) > 50


# --- the command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "warned"),
    [("--tile", True), ("--tile-size 32 --pixel-threshold 0.5", True), ("--tile --threshold 0.5", False), ("", False)],
)
def test_tiles_and_a_threshold_saved_for_whole_images_are_warned_of_once(
    options: str, warned: bool, model: Wads, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(2):
        photograph(seed=i).save(tmp_path / f"{i}.png")
    folder, out = saved(model, tmp_path / "nut", config, THRESHOLD), tmp_path / "out"
    given = parse(
        [str(tmp_path / "*.png"), "--model", str(folder), "--out", str(out), "--device", "cpu", *options.split()]
    )
    assert predict_from_command_line(given) == 0
    assert capsys.readouterr().err.count("threshold was chosen for whole images") == warned


def test_what_a_model_has_no_threshold_for_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photograph().save(tmp_path / "a.png")
    arguments = [str(tmp_path / "a.png"), "--model", str(run), "--out", str(tmp_path / "out"), "--device", "cpu"]
    for options, said in (([], (True, True)), (["--pixel-threshold", "0.5"], (True, False))):
        assert predict_from_command_line(parse([*arguments, *options])) == 0
        told = capsys.readouterr().err
        assert ("no threshold for images" in told, "no threshold for pixels" in told) == said


def test_what_saved_thresholds_cannot_do_is_said_where_they_decide(
    model: Wads, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = saved(model, tmp_path / "nut", config)
    few = {
        "image": 0.5,
        "pixel": 0.5,
        "source": "normal images",
        "warning": "With 4 images held out, 0.2 of normal images",
    }
    (run / "threshold.json").write_text(json.dumps(few))
    photograph().save(tmp_path / "a.png")
    arguments = [str(tmp_path / "a.png"), "--model", str(run), "--out", str(tmp_path / "out"), "--device", "cpu"]
    for options, said in (([], True), (["--threshold", "0.5", "--pixel-threshold", "0.5"], False)):
        assert predict_from_command_line(parse([*arguments, *options])) == 0
        assert ("With 4 images held out" in capsys.readouterr().err) == said


def test_an_input_that_names_nothing_leaves_earlier_results_as_they_are(run: Path, tmp_path: Path) -> None:
    photograph().save(tmp_path / "a.png")
    arguments = ["--model", str(run), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert predict_from_command_line(parse([str(tmp_path / "a.png"), *arguments])) == 0
    before = (tmp_path / "out/results.csv").read_bytes()
    with pytest.raises(DataError, match=r"typo\.png: no such file or folder"):
        predict_from_command_line(parse([str(tmp_path / "typo.png"), *arguments]))
    assert (tmp_path / "out/results.csv").read_bytes() == before


def test_images_of_too_many_pixels_are_skipped_and_can_be_allowed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photograph(90, 70).save(tmp_path / "a.png")
    arguments = [str(tmp_path / "a.png"), "--model", str(run), "--out", str(tmp_path / "out"), "--device", "cpu"]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # restored at the end; Pillow refuses twice as many
    assert predict_from_command_line(parse(arguments)) == ExitCode.BAD_DATA
    (row,) = rows_of(tmp_path / "out")
    assert all(word in str(row["problem"]) for word in ("6300 pixels", "2000 pixels", "--max-pixels"))
    assert "truncated" not in str(row["problem"])
    assert predict_from_command_line(parse([*arguments, "--max-pixels", "6298"])) == ExitCode.BAD_DATA
    assert predict_from_command_line(parse([*arguments, "--max-pixels", "6300"])) == ExitCode.OK


# --- files -------------------------------------------------------------------------------------------------------


def names(inputs: list[Path | str], out: Path | None = None) -> list[str]:
    return [item.name for item in find_images([str(i) for i in inputs], out)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("a/x.png", "b/x.png", "b/x.jpg", "b/deep/x.TIFF", "b/notes.txt", "b/.hidden.png"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "tree"


def test_files_are_found_in_folders_by_pattern_and_by_name_and_namesakes_keep_apart(tree: Path) -> None:
    everything = ["a/x.png", "b/x.jpg", "b/x.png", "b/deep/x.TIFF"]
    assert names([tree]) == everything
    assert names([tree / "b", tree / "a"]) == [*everything[1:], everything[0]]
    assert names([tree / "*/x.png"]) == ["a/x.png", "b/x.png"]
    assert names([tree / "**/x.*"]) == sorted(everything)
    assert names([tree / "b/notes.txt", tree / "b/x.png"]) == ["notes.txt", "x.png"]  # as told


def test_a_file_named_twice_counts_once(tree: Path) -> None:
    assert names([tree / "a", tree / "a/x.png", tree / "b/../a"]) == ["x.png"]


def test_a_name_that_looks_like_a_pattern_is_a_name(tree: Path) -> None:
    (tree / "a/[1].png").touch()
    assert names([tree / "a/[1].png"]) == ["[1].png"]


def test_results_of_an_earlier_run_are_not_scored(tree: Path) -> None:
    assert names([tree], tree / "b") == ["a/x.png"]


@pytest.mark.parametrize(("given", "out"), [("b", "."), ("b", "b"), ("b/x.png", "b"), ("b/*.png", "."), (".", ".")])
def test_an_input_inside_the_output_folder_is_a_problem_that_says_so(given: str, out: str, tree: Path) -> None:
    (item,) = find_images([str(tree / given)], tree / out)
    assert item.problem is not None and "inside --out" in item.problem and str(tree / out) in item.problem
    (item,) = find_images([str(tree / "b/absent.png")], tree / "b")
    assert item.problem is not None and "no such file or folder" in item.problem


def test_links_are_followed_and_a_circle_of_them_ends(tree: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "y.png").touch()
    (tree / "a/link").symlink_to(elsewhere)
    (elsewhere / "circle").symlink_to(tree / "a")
    assert names([tree / "a"]) == ["x.png", "link/y.png"]


def test_an_input_that_names_nothing_is_a_problem(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    items = find_images([str(tree / "a"), str(tmp_path / "empty"), str(tree / "z.png"), str(tree / "*.bmp")])
    problems = {Path(item.path).name: item.problem for item in items if item.problem}
    assert list(problems) == ["empty", "z.png", "*.bmp"]
    prediction = predict_files(brightness(), items[1:], tmp_path / "out", None, 0.25, quiet())
    assert prediction.exit_code == ExitCode.BAD_DATA and len(prediction.skipped) == 3


def test_a_file_name_that_is_not_utf8_is_listed_as_it_is(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path / "in") + b"/caf\xe9.png")
    (tmp_path / "in").mkdir()
    photograph().save(path)
    Path(path).with_suffix(".jpg").touch()
    prediction = predict_files(brightness(), find_images([str(tmp_path / "in")]), tmp_path / "out", None, 0.25, quiet())
    assert prediction.images == 1 and len(prediction.skipped) == 1
    assert b"caf\xe9.png" in (tmp_path / "out/results.csv").read_bytes()
    assert [row["path"] for row in rows_of(tmp_path / "out")][1] == path


def test_both_tables_say_the_same_and_pictures_are_what_they_say(tmp_path: Path) -> None:
    image = Image.new("RGB", (100, 80))
    image.paste((255, 255, 255), (20, 30, 60, 70))
    image.save(tmp_path / "a.png")
    predict_files(brightness(), find_images([str(tmp_path / "a.png")]), tmp_path / "out", None, 0.25, quiet())
    (row,) = rows_of(tmp_path / "out")
    with (tmp_path / "out/results.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert (row["width"], row["height"], row["decision"], row["threshold"]) == (100, 80, "anomalous", 0.5)
    assert row["score"] == pytest.approx(1.0, abs=0.01) and row["threshold_source"] == "given"
    assert row["anomalous_area"] == pytest.approx(1600 / 8000, abs=0.01) and row["problem"] is None
    assert line["box"] == " ".join(map(str, row["box"])) and float(line["score"]) == row["score"]
    assert {k: v for k, v in line.items() if k not in ("box",)} == {
        k: "" if v is None else str(v) for k, v in row.items() if k != "box"
    }
    pictures = {kind: Image.open(tmp_path / f"out/a.png.{kind}.png") for kind in ("scores", "heat", "overlay", "mask")}
    scores, mask = np.asarray(pictures["scores"]), np.asarray(pictures["mask"])
    assert scores.dtype == np.uint16 and scores[50, 40] > 65000 and scores[10, 80] < 500
    assert set(np.unique(mask)) == {0, 255} and (mask > 0).mean() == row["anomalous_area"]
    overlay = np.asarray(pictures["overlay"])
    assert (overlay[10, 80] < 5).all() and (overlay == (0, 255, 255)).all(-1).any()  # untouched where normal; outlined


def test_only_images_larger_than_a_tile_are_scored_in_tiles(tmp_path: Path) -> None:
    large = Image.new("RGB", (640, 640))
    large.paste((255, 255, 255), (300, 400, 312, 412))
    for name, image in {"a": photograph(SIZE, 50), "b": large, "c": photograph(30, SIZE, 1)}.items():
        image.save(tmp_path / f"{name}.png")
    for out, tile in (("whole", None), ("tiled", SIZE)):
        items = find_images([str(tmp_path / f"{name}.png") for name in "abc"])
        predict_files(brightness(), items, tmp_path / out, tile, 0.25, quiet())
    whole, tiled = rows_of(tmp_path / "whole"), rows_of(tmp_path / "tiled")
    assert [a == b for a, b in zip(whole, tiled, strict=True)] == [True, False, True]
    assert tiled[1]["box"] == [300, 400, 12, 12] and tiled[1]["decision"] == "anomalous"


def test_a_run_that_is_broken_off_lists_exactly_what_is_finished(tmp_path: Path) -> None:
    for i in range(10):
        photograph(seed=i).save(tmp_path / f"{i}.png")
    detector, calls = brightness(batch_size=2), 0
    network = detector.network

    def interrupted(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return network(images)

    detector.network, out = interrupted, tmp_path / "out"
    prediction = predict_files(detector, find_images([str(tmp_path)], out), out, None, 0.25, quiet())
    assert prediction.interrupted and prediction.exit_code == ExitCode.INTERRUPTED
    written = {path.name.removesuffix(".overlay.png") for path in out.glob("*.overlay.png")}
    assert {str(row["pictures"]) for row in rows_of(out)} == written and {"0.png", "1.png"} <= written < {
        f"{i}.png" for i in range(10)
    }
    assert not list(out.rglob(".*"))


def test_a_picture_that_cannot_be_written_leaves_no_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photograph().save(tmp_path / "a.png")
    save = Image.Image.save

    def full(self: Image.Image, path: Path, **options: object) -> None:
        save(self, path, **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        predict_files(brightness(), find_images([str(tmp_path / "a.png")]), tmp_path / "out", None, 0.25, quiet())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.csv", "results.jsonl"]
    assert rows_of(tmp_path / "out") == []


def test_a_name_too_long_for_its_pictures_is_a_problem_of_that_file(tmp_path: Path) -> None:
    """File systems allow 255 bytes; ``NAME.scores.png`` of this name would still have them."""
    images = tmp_path / "images"
    images.mkdir()
    long = "n" * 240 + ".png"
    for name in ("a.png", long, "z.png"):
        photograph().save(images / name)
    prediction = predict_files(brightness(), find_images([str(images)]), tmp_path / "out", None, 0.25, quiet())
    assert prediction.images == 2 and prediction.exit_code == ExitCode.BAD_DATA
    assert list(prediction.skipped) == [str(images / long)] and "too long" in prediction.skipped[str(images / long)]
    assert len(list((tmp_path / "out").rglob("*.png"))) == 8  # none of the long name, of which some would fit


def test_images_are_read_ahead_no_further_than_the_memory_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many cores; and every file comes, in order, while the next ones are decoded."""
    for i in range(10, 30):
        photograph(seed=i).save(tmp_path / f"{i}.png")
    (tmp_path / "15.png").write_text("no image")
    read, lock = 0, threading.Lock()

    def counted(path: str) -> Image.Image:
        nonlocal read
        with lock:
            read += 1
        return read_image(path)

    monkeypatch.setattr("wads_dist.deploy.predict_files.read_image", counted)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("wads_dist.deploy.predict_files.MAX_PIXELS", 6 * 90 * 70)
    items, taken = find_images([str(tmp_path)]), []
    with ThreadPoolExecutor(1) as pool:
        for batch in _batches(pool, brightness(batch_size=32), items, None):
            pool.submit(int).result()  # the only thread has read all that it was told to
            taken += batch
            assert read - len(taken) + len(batch) <= 7 and (read > len(taken) or read == 20)
            assert sum(item.image is not None for item in batch) <= 3
    assert taken == items and sum(item.image is not None for item in taken) == 19


def test_large_images_do_not_wait_for_a_full_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(4):
        photograph(seed=i).save(tmp_path / f"{i}.png")
    detector, sizes = brightness(batch_size=4), []
    network = detector.network

    def counted(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(len(images))
        return network(images)

    detector.network = counted
    monkeypatch.setattr("wads_dist.deploy.predict_files.MAX_PIXELS", 2 * 2 * 90 * 70)
    predict_files(detector, find_images([str(tmp_path)]), tmp_path / "out", None, 0.25, quiet())
    assert sizes == [2, 2]


@pytest.mark.parametrize("at", range(0, 100, 9))
def test_damage_anywhere_in_a_file_is_a_problem_of_that_file(at: int, tmp_path: Path) -> None:
    """Pillow's readers raise many kinds of exception; none but DataError may come out."""
    for suffix in ("png", "jpg", "tif", "bmp"):
        photograph().save(tmp_path / f"a.{suffix}")
        data = bytearray((tmp_path / f"a.{suffix}").read_bytes())
        at_byte = len(data) * at // 100
        data[at_byte : at_byte + 20] = bytes(np.random.default_rng(at).integers(0, 256, 20, dtype=np.uint8))
        (tmp_path / f"a.{suffix}").write_bytes(data)
        try:
            brightness().predict(tmp_path / f"a.{suffix}")
        except DataError as error:
            assert str(tmp_path / f"a.{suffix}") in str(error)


FORMATS = {
    "png": ("RGB", "L", "RGBA", "P", "I;16", "1"),
    "jpg": ("RGB", "L"),
    "tif": ("RGB", "L", "RGBA", "P", "I;16", "1"),
    "bmp": ("RGB", "L", "P", "1"),
    "webp": ("RGB", "RGBA"),
}


@pytest.mark.slow
def test_the_command_scores_95_of_100_mixed_files_and_names_the_five_bad_ones(run: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    kinds = itertools.cycle((suffix, mode) for suffix, modes in FORMATS.items() for mode in modes)
    for i, (suffix, mode) in enumerate(itertools.islice(kinds, 95)):
        folder = images / ("left" if i % 2 else "right")
        folder.mkdir(parents=True, exist_ok=True)
        image = photograph(20 + i, 30, i)
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        image.convert(mode).save(folder / f"{i // 2}.{suffix}")
    photograph().save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (images / "left/truncated.jpg").write_bytes(data[: len(data) // 2])
    (images / "empty.png").touch()
    (images / "text.png").write_text("no image")
    (images / "folder.png").mkdir()
    (images / "bomb.png").write_bytes(png_of_size(60_000, 60_000))
    out = tmp_path / "out"
    command = [sys.executable, REPOSITORY / "launch/predict.py", "--model", run, images, "--out", out, "--json"]
    ended = subprocess.run(
        [*map(str, command), "--threshold", "0.5", "--pixel-threshold", "0.5"],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert ended.returncode == 3, ended.stderr
    summary = json.loads(ended.stdout)
    problems = {Path(path).name: problem for path, problem in summary["skipped"].items()}
    words = {
        "truncated.jpg": "truncated",
        "empty.png": "empty",
        "text.png": "no image format",
        "folder.png": "folder",
        "bomb.png": "3600000000 pixels",
    }
    assert problems.keys() == words.keys() and all(word in problems[name] for name, word in words.items())
    assert all(f"skipped {path}: " in ended.stderr for path in summary["skipped"])
    assert summary["images"] == 95 and sum(summary["decisions"].values()) == 95 and summary["exit_code"] == 3
    assert len(rows_of(out)) == 100 and len(list(out.rglob("*.png"))) == 4 * 95 and not list(out.rglob(".*"))


@pytest.mark.slow
def test_predicting_does_not_import_deepspeed() -> None:
    """Its log lines go to standard output, where --json prints."""
    code = "import sys, wads_dist.deploy.predict_files, wads_dist.deploy.export; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment()).returncode == 0


@pytest.mark.parametrize("device", ["cuda", "cudaa", "cuda:9", "\x1b[2J", ""])
def test_a_device_that_is_not_here_is_named_with_those_that_are(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    with pytest.raises(ConfigError, match=r"device: torch has no .* here; there is cpu"):
        load("model", device=device)
