"""Rows 11 and 13 of the fault table: two ranks, five categories damaged in five ways and a good one. The
damage itself is tested shard by shard in ``tests/shards/test_verify.py``, whose ways to damage are used here."""

import shutil
import tarfile
from pathlib import Path

import pytest

from tests.shards.test_verify import reseal, rewrite
from tests.support.launching import CATEGORY, events, launched, summary, unlaunched
from wads_dist.common.errors import ExitCode

pytestmark = [pytest.mark.fault, pytest.mark.slow]
TRAIN, TEST = "train-000000.tar", "test-000000.tar"
SHORT = ["--trainer.samples", "16"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six categories as built."""
    from wads_dist.shards.demo import demo

    out = tmp_path_factory.mktemp("whole") / "shards"
    demo(out, categories=6, size=64, train=8, good=3, per_defect=1, workers=1, progress=False)
    return out


def members(shard: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(shard) as tar:
        return tar.getmembers()


def cut(shard: Path, into: int) -> str:
    """Cuts a shard ``into`` bytes into the header of its last image, and returns that sample's key."""
    image = next(m for m in reversed(members(shard)) if m.name.endswith((".png", ".jpg")) and ".mask." not in m.name)
    with shard.open("r+b") as stream:
        stream.truncate(image.offset + into)
    return image.name.rpartition(".")[0]


def damage(out: Path, names: list[str]) -> dict[str, list[str]]:
    """Damages one category in each of five ways; what must be said of each."""
    boundary, header, flip, mask, jpeg = names
    said = {}
    for name, into in ((boundary, 0), (header, 100)):
        key = cut(out / name / TRAIN, into)
        said[name] = [f"{name}/{TRAIN}: tar is cut after", f"{name}/{TRAIN}: {key} is incomplete"]

    shard = out / flip / TRAIN
    data = bytearray(shard.read_bytes())
    data[members(shard)[0].offset_data + 40] ^= 1
    shard.write_bytes(data)
    said[flip] = [f"{flip}/{TRAIN}: SHA-256 is"]

    gone = next(m.name for m in members(out / mask / TEST) if ".mask." in m.name)
    rewrite(out / mask / TEST, lambda name, data: None if name == gone else data)
    said[mask] = [f"{mask}/{TEST}: {gone.partition('.mask.')[0]} is incomplete, {gone} is missing"]

    # Under a right hash, as a tool that does not look at its images would seal it; of equal length, so that offsets hold.
    image = next(m.name for m in members(out / jpeg / TRAIN) if m.name.endswith((".png", ".jpg")))
    rewrite(out / jpeg / TRAIN, lambda name, data: data[:200] + b"\xff" * (len(data) - 200) if name == image else data)
    reseal(out, jpeg)
    said[jpeg] = [f"{jpeg}/{TRAIN}: sample {image.rpartition('.')[0]} is truncated or unreadable"]
    return said


@pytest.mark.parametrize("mode", ["resident", "streaming"])
def test_damaged_data_is_named_and_costs_the_other_categories_nothing(whole: Path, tmp_path: Path, mode: str) -> None:
    shards, run = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(whole, shards)
    names = sorted(path.name for path in shards.iterdir() if path.is_dir())
    assert len(names) == 6 and CATEGORY in names
    said = damage(shards, [name for name in names if name != CATEGORY])
    arguments = unlaunched(shards, run, *SHORT, "--data.mode", mode, "--data.categories", "all")
    with launched(run, arguments, tmp_path / "log") as start:
        code, seconds = start.ended(600)
    text = start.text().replace("\n", "")
    for name, lines in said.items():
        for line in lines:
            assert line in text, f"{line!r} is not said of {name}"
            print(f"{name}: {text[text.index(line) :][:140]}")
        assert not events(run, "step", category=name)
    record = summary(run)
    print(
        f"{mode}: exit code {code} after {seconds:.0f} s; failed: {record['failed']}; done: {list(record['categories'])}"
    )
    assert code == ExitCode.CATEGORY_FAILED and record["failed"] == dict.fromkeys(said, int(ExitCode.BAD_DATA))
    assert list(record["categories"]) == [CATEGORY] and sorted(record["missing"]) == sorted(said)

    if mode == "resident":  # once is enough: the second run trains only what is missing
        mended = next(iter(said))
        shutil.copy(whole / mended / TRAIN, shards / mended / TRAIN)
        metrics = (run / CATEGORY / "metrics.json").read_bytes()
        again = unlaunched(shards, run, *SHORT, "--data.mode", mode, "--data.categories", f"{CATEGORY},{mended}")
        with launched(run, again, tmp_path / "log") as start:
            code, _ = start.ended(600)
        assert code == 0 and f"{CATEGORY}: done already" in start.text()
        # The command has what it asked for; the run still lacks the others.
        record, left = summary(run), sorted(set(said) - {mended})
        assert record["exit_code"] == 0 and record["missing"] == left and not record["complete"]
        assert (run / CATEGORY / "metrics.json").read_bytes() == metrics
        assert len(events(run, "start", category=mended)) == 1 and len(events(run, "start", "resume")) == 1


def test_the_only_category_fails_with_the_code_for_data(whole: Path, tmp_path: Path) -> None:
    shards, run = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(whole, shards)
    key = cut(shards / CATEGORY / TRAIN, 0)
    with launched(run, unlaunched(shards, run, *SHORT), tmp_path / "log") as start:
        code, _ = start.ended(600)
    assert code == ExitCode.BAD_DATA and f"{CATEGORY}/{TRAIN}: {key} is incomplete" in start.text()
