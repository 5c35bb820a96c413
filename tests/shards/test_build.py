"""Promises of the builder: equal bytes, original bytes, resuming after a kill, and what WebDataset reads."""

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from tests.shards.conftest import make_category, picture, save, square_mask
from wads_dist.shards.build import CategoryPlan, Overwrite, build, build_textures
from wads_dist.shards.errors import DataProblems
from wads_dist.shards.images import decode_image, decode_mask, fitted_image, fitted_mask, load_image, mask_pixels
from wads_dist.shards.manifest import VERSION
from wads_dist.shards.masks import fit_mask
from wads_dist.shards.samples import FileSample
from wads_dist.shards.source import Dataset
from wads_dist.shards.verify import verify

CHECKOUT = Path(__file__).parents[2]


def shards(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shards", *map(str, arguments)]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_builds_are_equal_to_the_byte(root: Path, tmp_path: Path) -> None:
    build(root, tmp_path / "a", workers=1, progress=False)
    build(root, tmp_path / "b", workers=2, progress=False)  # in worker processes, in whatever order
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert verify(tmp_path / "a") == []


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_original_bytes_are_kept(tmp_path: Path, kind: str) -> None:
    folder = make_category(tmp_path / "nut")
    source = save(picture(77), folder / "train/good" / f"zz.{kind}")
    build(folder, tmp_path / "out", workers=1, progress=False)
    dataset = Dataset.open(tmp_path / "out")
    shard, sample = dataset.manifest("nut").samples("train")[-1]
    assert sample.image.name == f"train/good/zz.{kind}"
    assert dataset.read("nut", shard, sample.image) == source.read_bytes()


@pytest.mark.parametrize(("mode", "kind"), [("RGB", "bmp"), ("L", "png"), ("RGBA", "png"), ("L", "jpg"), ("P", "bmp")])
def test_modes_and_formats_survive(tmp_path: Path, mode: str, kind: str) -> None:
    folder = make_category(tmp_path / "nut")
    source = save(picture(5, (33, 17), mode), folder / "train/good" / f"zz.{kind}")
    build(folder, tmp_path / "out", workers=1, progress=False)
    dataset = Dataset.open(tmp_path / "out")
    shard, sample = dataset.manifest("nut").samples("train")[-1]
    assert (sample.width, sample.height) == (33, 17)
    stored = dataset.read("nut", shard, sample.image)
    assert np.array_equal(decode_image(stored, 16), decode_image(source.read_bytes(), 16))


def orientation_tag(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def save_tagged(image: Image.Image, path: Path, orientation: int) -> Path:
    image.save(path, exif=orientation_tag(orientation))
    return path


TAGGED = [(orientation, kind) for orientation in range(1, 9) for kind in ("jpg", "png", "tiff")]


@pytest.mark.parametrize("resize", [None, 16])
def test_orientations_are_obeyed(tmp_path: Path, resize: int | None) -> None:
    """Image, mask and the size in the manifest are those that a viewer shows; every other mask has a tag of its own."""
    folder, seen = make_category(tmp_path / "nut"), {}
    for i, (orientation, kind) in enumerate(TAGGED):
        name = f"z{orientation}{kind}"
        source = save_tagged(picture(5, (33, 17)), folder / f"test/scratch/{name}.{kind}", orientation)
        path = folder / f"ground_truth/scratch/{name}_mask.png"
        with Image.open(source) as opened:
            shown = ImageOps.exif_transpose(opened).convert("RGB")
        if i % 2:
            with Image.open(save_tagged(square_mask((33, 17)), path, orientation)) as opened:
                mask = ImageOps.exif_transpose(opened)
        else:
            save(mask := square_mask(shown.size), path)
        seen[f"test/scratch/{name}"] = (source, shown, mask)
    build(folder, tmp_path / "out", resize=resize, workers=1, progress=False)
    assert verify(tmp_path / "out") == []
    dataset = Dataset.open(tmp_path / "out")
    samples = [entry for entry in dataset.manifest("nut").samples("test") if entry[1].key in seen]
    assert len(samples) == len(TAGGED)
    for shard, sample in samples:
        source, shown, mask = seen[sample.key]
        image, assigned = (dataset.read("nut", shard, member) for member in (sample.image, sample.mask) if member)
        assert (sample.width, sample.height) == (shown.size if resize is None else (16, 16))
        assert np.array_equal(decode_image(image, 16), fitted_image(shown, 16))
        assert np.array_equal(decode_mask(assigned, 16), fit_mask(np.asarray(mask) > 0, 16).pixels)
        assert ExifTags.Base.Orientation not in Image.open(io.BytesIO(assigned)).getexif()
        if resize is None and source.suffix != ".tiff":
            assert image == source.read_bytes()


def test_a_mask_drawn_on_the_picture_before_it_was_turned_is_refused(tmp_path: Path) -> None:
    folder = make_category(tmp_path / "nut")
    save_tagged(picture(5, (33, 17)), folder / "test/scratch/zz.png", 6)
    save(square_mask((33, 17)), folder / "ground_truth/scratch/zz_mask.png")
    with pytest.raises(DataProblems) as caught:
        build(folder, tmp_path / "out", workers=1, progress=False)
    assert caught.value.problems == [
        "nut/ground_truth/scratch/zz_mask.png: mask is 33×17 but its image nut/test/scratch/zz.png is 17×33, turned as their "
        "EXIF orientation says (image by 6); draw it on the image as viewers show it, or take the tag out"
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_build_says_how_many_images_were_turned_whose_masks_were_not(
    tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those may have been drawn on the picture as it is stored, which of a square one or a mirrored one cannot be seen."""
    folder, square = make_category(tmp_path / "nut"), (20, 20)
    for name, image, mask in (("a", 6, 1), ("b", 3, 1), ("c", 8, 8), ("d", 1, 1)):
        save_tagged(picture(5, square), folder / f"test/scratch/{name}.jpg", image)
        save_tagged(square_mask(square), folder / f"ground_truth/scratch/{name}_mask.png", mask)
    save_tagged(picture(5, square), folder / "train/good/zz.jpg", 6)  # has no mask
    build(folder, tmp_path / "out", workers=workers)
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "nut: 2 images were turned by their EXIF orientation and their masks were not: masks are taken as drawn on"
        in said
    )


def test_a_build_of_images_that_nothing_turned_does_not_speak_of_it(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(root, tmp_path / "out", workers=1)
    assert "turned" not in capsys.readouterr().err


def test_resize_keeps_thin_defects_and_remembers_how_many(tmp_path: Path) -> None:
    folder = make_category(tmp_path / "nut")
    mask = np.zeros((400, 400), np.uint8)
    mask[100, 50:350] = mask[200:300, 200:300] = mask[380, 10] = 255
    save(picture(5, (400, 400)), folder / "test/scratch/zz.png")
    save(Image.fromarray(mask), folder / "ground_truth/scratch/zz_mask.png")
    build(folder, tmp_path / "out", resize=40, workers=1, progress=False)
    dataset = Dataset.open(tmp_path / "out")
    shard, sample = dataset.manifest("nut").samples("test")[-1]
    assert sample.mask is not None
    stored = load_image(dataset.read("nut", shard, sample.mask))
    assert np.array_equal(mask_pixels(stored), fit_mask(mask > 0, 40).pixels) and mask_pixels(stored).sum() == 131
    assert [fitted_mask(stored, size).small for size in (40, 20)] == [2, 2]


@pytest.mark.parametrize(
    ("resize", "said"), [(None, "1 cover no pixel by half at 128²"), (40, "2 cover no pixel by half at 40²")]
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_build_says_how_many_defects_cover_no_pixel_by_half(
    tmp_path: Path, resize: int | None, said: str, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_category(tmp_path / "nut")
    mask = np.zeros((400, 400), np.uint8)
    mask[100:102, 50:350] = mask[380, 10] = 255  # 0.64 and 0.2 of a pixel wide
    save(picture(5, (400, 400)), folder / "test/scratch/zz.png")
    save(Image.fromarray(mask), folder / "ground_truth/scratch/zz_mask.png")
    build(folder, tmp_path / "out", resize=resize, workers=workers)
    assert f"of its marked components, {said}" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("resize", "up_to_date"), [(None, True), (16, False)])
def test_only_shards_that_were_resized_by_nearest_are_to_be_built_anew(resize: int | None, up_to_date: bool) -> None:
    content = [VERSION, "nut", "images", 64, resize, []]  # what a plan's digest was of, before masks went by area
    before = hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
    assert (CategoryPlan("nut", "images", [], resize=resize).digest() == before) == up_to_date


def test_resize_stores_squares(root: Path, tmp_path: Path) -> None:
    build(root, tmp_path / "out", ["nut"], resize=16, workers=1, progress=False)
    dataset = Dataset.open(tmp_path / "out")
    for shard, sample in dataset.manifest("nut").samples():
        assert (sample.width, sample.height) == (16, 16) and sample.image.name.endswith(".png")
        source = root / json.loads(read_sidecar(dataset, shard.name, sample.key))["source"]
        stored = decode_image(dataset.read("nut", shard, sample.image), 16)
        assert np.array_equal(stored, decode_image(source.read_bytes(), 16))
    assert verify(tmp_path / "out") == []


def read_sidecar(dataset: Dataset, shard: str, key: str) -> bytes:
    import tarfile

    with tarfile.open(Path(dataset.location) / "nut" / shard) as tar:
        stream = tar.extractfile(f"{key}.json")
        assert stream is not None
        return stream.read()


def test_shards_have_the_stated_size(tmp_path: Path) -> None:
    folder = make_category(tmp_path / "nut", train=1)
    noise = np.random.default_rng(0)
    for index in range(7):
        save(
            Image.fromarray(noise.integers(0, 255, (400, 300, 3), dtype=np.uint8)), folder / f"train/good/n{index}.png"
        )
    build(folder, tmp_path / "out", shard_mb=1, workers=1, progress=False)
    names = [shard.name for shard in Dataset.open(tmp_path / "out").manifest("nut").shards]
    assert names == [*(f"train-{number:06d}.tar" for number in range(4)), "test-000000.tar"]  # 360 KB an image
    # The payload is bounded by 1 MiB; headers and the tar's end come on top.
    assert max(path.stat().st_size for path in (tmp_path / "out/nut").glob("*.tar")) < (1 << 20) + 30_000


def test_plain_webdataset_reads_the_same_bytes(root: Path, tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    build(root, tmp_path / "out", ["nut"], workers=1, progress=False)
    dataset = Dataset.open(tmp_path / "out")
    manifest = dataset.manifest("nut")
    for shard in manifest.shards:
        url = str(dataset.shard("nut", shard))
        read = list(wds.WebDataset(url, shardshuffle=False, empty_check=False))
        assert [sample["__key__"] for sample in read] == [sample.key for sample in shard.samples]
        for raw, sample in zip(read, shard.samples, strict=True):
            assert raw[sample.image.name.rsplit(".", 1)[1]] == dataset.read("nut", shard, sample.image)
            assert json.loads(raw["json"])["defect"] == sample.defect
            assert ("mask.png" in raw) == (sample.mask is not None)
            if sample.mask is not None:
                assert raw["mask.png"] == dataset.read("nut", shard, sample.mask)
                assert decode_mask(raw["mask.png"], 20).any()


def test_up_to_date_is_skipped_and_other_input_refused(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(root, out, ["nut"], workers=1, progress=False)
    before = {path: path.stat().st_mtime_ns for path in (out / "nut").iterdir()}
    build(root, out, ["nut"], workers=1, progress=False)
    assert before == {path: path.stat().st_mtime_ns for path in (out / "nut").iterdir()}

    save(picture(50), root / "nut/train/good/zz.png")
    with pytest.raises(DataProblems, match="other input or options; pass --overwrite"):
        build(root, out, ["nut"], workers=1, progress=False)
    assert before == {path: path.stat().st_mtime_ns for path in (out / "nut").iterdir()}
    build(root, out, ["nut"], workers=1, overwrite=True, progress=False)
    assert Dataset.open(out).manifest("nut").counts["train/good"] == 5
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "nut"]


@pytest.mark.parametrize("overwrite", [True, "outdated", False])
def test_what_was_stored_unturned_is_not_up_to_date(tmp_path: Path, overwrite: Overwrite) -> None:
    """A run mends what an earlier version built of such input by itself."""
    folder, out = make_category(tmp_path / "nut"), tmp_path / "out"
    phone = {"format": "MPO", "save_all": True, "append_images": [picture(6, (33, 17))]}  # which is stored as PNG
    picture(5, (33, 17)).save(folder / "train/good/zz.jpg", exif=orientation_tag(6), **phone)
    with pytest.MonkeyPatch.context() as before:
        before.setattr("wads_dist.shards.images.upright", lambda image: image)
        before.setattr("wads_dist.shards.samples.FileSample.stored_turned", lambda sample: False)
        build(folder, out, workers=1, progress=False)
    with contextlib.nullcontext() if overwrite else pytest.raises(DataProblems, match="other input or options"):
        build(folder, out, workers=1, overwrite=overwrite, progress=False)
    sample = Dataset.open(out).manifest("nut").samples("train")[-1][1]
    assert (sample.width, sample.height) == ((17, 33) if overwrite else (33, 17))


@pytest.mark.parametrize(("overwrite", "anew"), [(True, True), ("outdated", False), (False, False)])
def test_overwriting_is_for_what_is_up_to_date_too(tmp_path: Path, overwrite: Overwrite, anew: bool) -> None:
    """Such as after a change of how images are read; a run does not do it at each start."""
    folder, out = make_category(tmp_path / "nut"), tmp_path / "out"
    build(folder, out, workers=1, progress=False)
    before = (out / "nut").stat().st_ino
    build(folder, out, workers=1, overwrite=overwrite, progress=False)
    assert ((out / "nut").stat().st_ino != before) == anew


@pytest.mark.parametrize("overwrite", [False, "outdated", True])
def test_a_texture_bank_does_not_replace_a_category_of_its_name(tmp_path: Path, overwrite: Overwrite) -> None:
    folder, out = make_category(tmp_path / "textures"), tmp_path / "out"
    build(folder, out, workers=1, progress=False)
    with pytest.raises(DataProblems, match="holds images, which textures do not replace"):
        build_textures(folder / "train", out, workers=1, overwrite=overwrite, progress=False)
    assert Dataset.open(out).manifest("textures").kind == "images"


def late_tag(png: bytes) -> bytes:
    """A PNG whose EXIF block comes behind its pixels, as some tools write it."""
    start = png.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(png[start : start + 4], "big")
    trailer = png.index(b"IEND") - 4
    return png[:start] + png[end:trailer] + png[start:end] + png[trailer:]


def test_only_what_is_stored_anew_and_turned_is_to_be_built_again(tmp_path: Path) -> None:
    """The plan of any other category stays what it was, so that nothing else is built again."""
    phone = {"format": "MPO", "save_all": True, "append_images": [picture(6)]}
    masked = {"key": "zz", "split": "test", "defect": "scratch", "root": tmp_path}
    picture(5).save(tmp_path / "phone.jpg", exif=orientation_tag(3), **phone)
    picture(5).save(tmp_path / "upright.jpg", exif=orientation_tag(1), **phone)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    save(picture(5), tmp_path / "plain.bmp")
    for kind in ("jpg", "png", "tiff"):
        save_tagged(square_mask(), tmp_path / f"tagged.{kind}", 3)
    (tmp_path / "late.png").write_bytes(late_tag((tmp_path / "tagged.png").read_bytes()))
    for image, mask, anew in (
        ("phone.jpg", None, True),
        *((f"{name}", None, False) for name in ("upright.jpg", "broken.jpg", "plain.bmp")),
        *((f"tagged.{kind}", None, False) for kind in ("jpg", "png", "tiff")),  # kept, or turned by Pillow ever since
        *(("plain.bmp", name, True) for name in ("tagged.jpg", "tagged.png", "late.png", "phone.jpg")),
        *(("plain.bmp", name, False) for name in ("tagged.tiff", "plain.bmp")),
    ):
        sample = FileSample(source=image, mask=mask, **masked)
        content = [VERSION, "nut", "images", 64, None, [sample.identity()]]
        before = hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
        assert (CategoryPlan("nut", "images", [sample]).digest() != before) == anew, (image, mask)


def test_the_command_overwrites_what_is_up_to_date(root: Path, tmp_path: Path) -> None:
    command = ["build", "--root", root, "--category", "nut", "--out", tmp_path / "out", "--workers", 1]
    assert shards(*command).returncode == 0
    before = (tmp_path / "out/nut").stat().st_ino
    assert shards(*command).returncode == 0 and (tmp_path / "out/nut").stat().st_ino == before
    assert shards(*command, "--overwrite").returncode == 0 and (tmp_path / "out/nut").stat().st_ino != before


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A category of many shards of 1 MiB, so that a build can be caught in the middle."""
    folder = make_category(tmp_path / "nut", train=1)
    pixels = np.random.default_rng(0).integers(0, 255, (640, 512, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for index in range(24):
        image.save(folder / f"train/good/n{index:02d}.png", compress_level=1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_build_resumes_from_its_finished_shards(
    large: Path, tmp_path: Path, how: signal.Signals
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "shards", "build", "--root", large, "--out", out, "--shard-mb", "1"]
    process = subprocess.Popen(
        list(map(str, [*command, "--workers", "2"])), cwd=CHECKOUT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 50
    while len(list(out.glob(".building-nut/train-*.json"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, "the build ended before it could be interrupted"
        time.sleep(0.005)
    process.send_signal(how)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    if how == signal.SIGINT:
        assert "the same command resumes" in errors and "Traceback" not in errors
        assert not list(out.glob(".building-nut/.*.tmp"))
    assert not (out / "nut").exists() and not (out / "manifest.json").exists()

    finished = {path.stem: path.stat().st_ino for path in out.glob(".building-nut/train-*.json")}
    build(large, out, shard_mb=1, workers=2, progress=False)
    # A shard that was finished before is the same file still, not a new one of equal content.
    tars = {name: (out / "nut" / f"{name}.json").stat().st_ino for name in finished}
    assert tars == finished
    build(large, tmp_path / "whole", shard_mb=1, workers=2, progress=False)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_damaged_finished_shard_is_written_again(large: Path, tmp_path: Path) -> None:
    build(large, tmp_path / "whole", shard_mb=1, workers=1, progress=False)
    out = tmp_path / "out"
    out.mkdir()
    building = out / ".building-nut"
    (tmp_path / "whole/nut").rename(building)
    plan = json.loads((building / "manifest.json").read_text())["plan"]
    (building / "plan").write_text(plan)
    good = (building / "train-000003.tar").read_bytes()
    (building / "train-000003.tar").write_bytes(good[:-1000])
    build(large, out, shard_mb=1, workers=1, progress=False)
    assert (out / "nut/train-000003.tar").read_bytes() == good
    assert verify(out) == []


def test_a_link_in_the_way_of_one_category_ends_no_other(root: Path, tmp_path: Path) -> None:
    (tmp_path / "away").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.building-bolt").symlink_to(tmp_path / "away")
    with pytest.raises(DataProblems) as caught:
        build(root, tmp_path / "out", workers=1, progress=False)
    assert len(caught.value.problems) == 1 and ".building-bolt: leads out of" in caught.value.problems[0]
    assert Dataset.open(tmp_path / "out").categories == ["nut"] and not list((tmp_path / "away").iterdir())


def test_two_builds_at_once_are_kept_apart(root: Path, tmp_path: Path) -> None:
    from wads_dist.shards.files import locked

    building = tmp_path / "out/.building-nut"
    building.mkdir(parents=True)
    with locked(building, wait=False), pytest.raises(DataProblems, match="another build is writing it"):
        build(root, tmp_path / "out", ["nut"], workers=1, progress=False)


@pytest.mark.slow
def test_command_line(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = shards("build", "--root", root, "--out", out, "--textures", root / "nut/train", "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert "3 categories" in done.stdout
    assert shards("verify", out).returncode == 0
    described = shards("describe", out, "--json")
    assert [entry["category"] for entry in json.loads(described.stdout)] == ["bolt", "nut", "textures"]
    assert shards("build", "--out", out).returncode == 2
    assert shards("verify", tmp_path / "nowhere").returncode == 3

    (root / "nut/ground_truth/scratch/000_mask.png").unlink()
    failed = shards("build", "--root", root, "--out", tmp_path / "other", "--workers", 1)
    assert failed.returncode == 3 and "defect without mask" in failed.stderr
    broken = shards("verify", "--json", out / "nut")
    assert broken.returncode == 3 and len(json.loads(broken.stdout)) == 1


def test_building_and_verifying_need_no_torch(root: Path, tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "from wads_dist.shards.build import build\n"
        "from wads_dist.shards.textures import procedural_textures\n"
        "from wads_dist.shards.verify import verify\n"
        "root, out = map(pathlib.Path, sys.argv[1:])\n"
        "build(root, out, workers=1, progress=False)\n"
        "assert verify(out) == []\n"
        "procedural_textures(2, 16)\n"
        "assert 'torch' not in sys.modules and 'webdataset' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, root, tmp_path / "out"], cwd=CHECKOUT, check=True, timeout=60)


@pytest.mark.skipif("WADS_REAL_DATA" not in os.environ, reason="WADS_REAL_DATA names no folder of real data sets")
def test_real_data_builds(tmp_path: Path) -> None:
    build(Path(os.environ["WADS_REAL_DATA"]), tmp_path / "out", progress=False)
    assert len(Dataset.open(tmp_path / "out").categories) >= 1
    assert verify(tmp_path / "out") == []
