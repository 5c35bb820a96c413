"""The contact sheet: the samples are training's, the numbers are theirs, and the command writes it or says why not."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import wads_dist.reporting.sample_sheet
from wads_dist.common.errors import ConfigError, ExitCode
from wads_dist.config.load import load_config
from wads_dist.config.schema import Config
from wads_dist.data.images import decode_entries
from wads_dist.data.training import TrainingData
from wads_dist.kernels.synthesis import synthesise
from wads_dist.launch.show_samples import parse
from wads_dist.reporting.sample_sheet import Synthesised, caption, sheet, show_samples
from wads_dist.shards.source import Dataset

CPU = torch.device("cpu")
COUNT, COUNTED = 20, 80


def settings(shards: Path, *more: str) -> Config:
    small = "--data.image_size 64 --data.store_size 64 --trainer.kernels torch --trainer.seed 3"
    return load_config(["--data.shards", str(shards), *small.split(), *more])


def training(config: Config) -> TrainingData:
    return TrainingData(config, Dataset.open(str(config.data.shards)), "demo_biscuit", CPU)


@pytest.fixture(scope="module")
def config(demo_shards: Path) -> Config:
    return settings(demo_shards)


@pytest.fixture(scope="module")
def samples(config: Config) -> Synthesised:
    return Synthesised.first(training(config), COUNT, COUNTED)


def test_the_samples_are_those_that_training_draws(config: Config, samples: Synthesised) -> None:
    """In steps of another size than the sheet is made in."""
    data = training(config)
    for start in range(0, COUNT, 5):
        batch, part = data.batch(torch.arange(start, start + 5)), slice(start, start + 5)
        assert torch.equal(samples.clean[part], batch.clean.movedim(1, -1))
        assert torch.equal(samples.anomalous[part], batch.anomalous.movedim(1, -1))
        assert torch.equal(samples.mask[part], batch.mask.squeeze(1).bool())
    assert len(samples.clean) == COUNT


def test_the_numbers_are_those_of_the_masks(config: Config, samples: Synthesised) -> None:
    batch = training(config).batch(torch.arange(COUNTED))
    mask = batch.mask.bool()
    assert torch.allclose(samples.area, batch.mask.float().mean((1, 2, 3)))
    assert len(samples.change) == COUNTED
    for i in range(COUNTED):
        difference = (batch.anomalous[i] - batch.clean[i]).abs()[mask[i].expand(3, -1, -1)]
        expected = difference.mean().item() if len(difference) else 0.0
        assert samples.change[i].item() == pytest.approx(expected, abs=1e-6)


def test_a_label_names_the_photograph(demo_shards: Path) -> None:
    """The one by which the sample can be drawn again, alone."""
    config = settings(demo_shards)
    data = training(config)
    samples = Synthesised.first(data, 5, 5)
    dataset = Dataset.open(demo_shards)
    entries = {entry.key: (shard, entry) for shard, entry in dataset.manifest("demo_biscuit").samples("train")}
    assert len(set(samples.names)) == 5  # of the 8 there are, each once before any twice
    images = decode_entries(dataset, "demo_biscuit", [entries[name] for name in samples.names], 64)
    again = synthesise(images, data.textures, torch.arange(5), data.seed, data.settings, torch.arange(5), 8, "torch")
    assert torch.equal(again.clean.movedim(1, -1), samples.clean)


def test_every_sample_says_whether_it_is_anomalous(samples: Synthesised) -> None:
    kept = samples.draws.anomalous
    for i in samples.clean_ones:
        assert not samples.mask[i].any() and torch.equal(samples.clean[i], samples.anomalous[i])
        assert samples.label(i).endswith("(empty mask)") == kept[i]
    for i in samples.anomalous_ones:
        assert samples.mask[i].any() and f"area {samples.mask[i].float().mean():.1%}" in samples.label(i)
    assert sorted(samples.clean_ones + samples.anomalous_ones) == list(range(COUNT))


def test_the_caption_gives_the_settings_and_what_they_amount_to(samples: Synthesised) -> None:
    config = load_config(
        "--data.shards x --data.textures bank/dtd --objective.kl.rho 0.07 --synthesis.blend_max 0.6 --trainer.seed 9".split()
    )
    area = torch.tensor([0.0, 0.02, 0.04, 0.0])
    made_up = dataclasses.replace(samples, area=area, change=torch.tensor([0.0, 0.2, 0.2, 0.0]))
    text = "\n".join(caption(config, "nut", made_up, 4))
    for part in ("nut", "seed 9", "U(0, 0.6)", "64 textures, of bank/dtd", "at 128²", "4 more are held out",
                 "first 4 samples 50.0% are clean",
                 "by 51 of 255", "1.5% of all", "3.0% of the anomalous", "KL: 7.0%"):  # fmt: skip
        assert part in text, (part, text)
    none = "\n".join(caption(config, "nut", dataclasses.replace(samples, area=0 * area), 0))
    assert "learn nothing" in none


@pytest.mark.parametrize("clean_fraction", ["0", "0.5", "1"])
def test_a_sheet_is_drawn_of_any_mixture(demo_shards: Path, clean_fraction: str) -> None:
    config = settings(demo_shards, "--synthesis.clean_fraction", clean_fraction)
    samples = Synthesised.first(training(config), 3, 3)
    figure = sheet(samples, caption(config, "demo_biscuit", samples, 0), 0.1)
    tiles = 3 * len(samples.anomalous_ones) + len(samples.clean_ones)
    assert len(figure.axes) == 1 + tiles  # and the histogram


def test_a_photographs_name_is_no_formula(samples: Synthesised, tmp_path: Path) -> None:
    named = dataclasses.replace(samples, names=["$\\no$ 1"] * COUNT)
    sheet(named, ["a$\\no$", "b"], 0.1).savefig(tmp_path / "sheet.png")


def test_the_outline_follows_the_mask(samples: Synthesised) -> None:
    one = samples.anomalous_ones[0]
    figure = sheet(samples, ["title"], 0.1)
    axis = next(axis for axis in figure.axes if axis.collections)
    vertices = np.concatenate([path.vertices for path in axis.collections[0].get_paths()])
    mask = np.pad(samples.mask[one].numpy(), 1).astype(float)
    for x, y in vertices.round(3) + 1:  # each lies between a pixel in and a pixel out
        around = mask[int(np.floor(y)) : int(np.ceil(y)) + 1, int(np.floor(x)) : int(np.ceil(x)) + 1]
        assert around.min() == 0 and around.max() == 1


def test_one_category_is_a_file_and_several_a_folder(
    demo_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wads_dist.reporting.sample_sheet, "COUNTED", 10)
    one = settings(demo_shards, "--data.categories", "demo_biscuit")
    assert show_samples(one, 2, tmp_path / "new" / "one.png") == ExitCode.OK
    assert Image.open(tmp_path / "new" / "one.png").width > 1000
    assert show_samples(settings(demo_shards), 2, tmp_path / "all.jpg") == ExitCode.OK
    names = ["demo_biscuit.jpg", "demo_leafplate.jpg"]
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == names
    printed = capsys.readouterr().out
    assert all(str(tmp_path / "all" / name) in printed for name in names) and "ρ of the sparsity KL" in printed


def test_a_place_that_cannot_be_written_is_named(
    demo_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wads_dist.reporting.sample_sheet, "COUNTED", 10)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--out: cannot write .*file/x\.png"):
        show_samples(settings(demo_shards, "--data.categories", "demo_biscuit"), 1, tmp_path / "file" / "x.png")


def test_a_bank_that_is_not_there_is_said_before_shards_are_built(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    config = load_config(
        ["--data.root", str(tmp_path / "images"), "--data.cache", str(tmp_path / "cache"), "--data.textures", "no/bank"]
    )
    with pytest.raises(Exception, match=r"data\.textures"):
        show_samples(config, 1, tmp_path / "x.png")
    assert not (tmp_path / "cache" / "built").exists()


@pytest.mark.parametrize("arguments", ["--samples 0", "--samples 401", "--out sheet.txt", "--out sheet"])
def test_arguments_that_cannot_be_are_refused(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(arguments.split())
    assert stopped.value.code == 2 and arguments.split()[0] in capsys.readouterr().err


def test_what_is_not_of_the_sheet_is_a_setting() -> None:
    given, rest = parse("--config f.toml --samples 5 --trainer.seed=2 --out a.JPG --data.root d".split())
    assert (given.samples, given.out) == (5, Path("a.JPG"))
    assert rest == "--config f.toml --trainer.seed=2 --data.root d".split()
