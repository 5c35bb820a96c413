import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.wads_dist.scheduler.test_run import command
from wads_dist.common.errors import ExitCode
from wads_dist.config.load import load_config
from wads_dist.evaluation.evaluate import save_threshold
from wads_dist.launch.command import run_command
from wads_dist.model.networks import Wads
from wads_dist.model.weights import save_weights, trained_config
from wads_dist.scheduler.rescore import evaluate_run, scoring_settings
from wads_dist.shards.source import Dataset


def test_evaluating_what_has_not_been_trained_is_explained(
    demo_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(evaluate_run, command(demo_shards, tmp_path)) == ExitCode.BAD_CONFIG
    assert "no category has finished training" in capsys.readouterr().err
    assert (
        run_command(evaluate_run, command(demo_shards, tmp_path, "--data.categories", "demo_biscuit"))
        == ExitCode.BAD_CONFIG
    )
    assert "the category has not finished training" in capsys.readouterr().err


def trained(shards: Path, run: Path, **metrics: object) -> Path:
    """The folder of a category with weights and the numbers of an earlier evaluation."""
    folder, config = run / "demo_biscuit", load_config(command(shards, run))
    folder.mkdir(parents=True)
    state = {k: v.contiguous() for k, v in Wads(config.model, 64).state_dict().items()}
    save_weights(state, folder, config, "demo_biscuit")
    fingerprint = Dataset.open(str(shards)).manifest("demo_biscuit").fingerprint
    lasting = {"fingerprint": fingerprint, "samples": 48, "images_per_second": 1.0}
    (folder / "metrics.json").write_text(json.dumps(lasting | metrics))
    return folder


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (("--trainer.seed", "5"), "trainer.seed: 0 → 5"),
        (("--evaluation.holdout", "0.5"), "evaluation.holdout: 0.1 → 0.5"),
        (("--model.latent", "8"), "model.latent: 16 → 8"),
    ],
)
def test_what_decides_model_or_split_cannot_be_changed_for_scoring(
    demo_shards: Path, tmp_path: Path, setting: tuple[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images that a model was trained on would pass for held out."""
    folder = trained(demo_shards, tmp_path)
    before = (folder / "metrics.json").read_text()
    assert run_command(evaluate_run, command(demo_shards, tmp_path, *setting)) == ExitCode.REFUSED_RESUME
    assert said in capsys.readouterr().err and (folder / "metrics.json").read_text() == before


def test_how_a_model_is_scored_can_be_changed(demo_shards: Path, tmp_path: Path) -> None:
    folder = trained(demo_shards, tmp_path, undefined={"pixel": "x"}, bounds={"pixel_auroc": [0, 1]}, no_threshold="y")
    before = trained_config(folder)
    options = "--evaluation.score_window 5 --evaluation.batch_size 3 --evaluation.image_false_positive_rate 0.5"
    assert run_command(evaluate_run, command(demo_shards, tmp_path, *options.split())) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["samples"] == 48 and metrics["pixel_auroc"] is not None and "too few" in metrics["no_threshold"]
    assert not {"undefined", "bounds"} & metrics.keys()  # this evaluation has none
    after = trained_config(folder)
    assert (after.evaluation.score_window, after.evaluation.batch_size) == (5, 3)
    assert after == before.model_copy(update={"evaluation": after.evaluation})
    assert (tmp_path / "report.html").is_file()


def test_a_model_whose_batch_was_found_is_scored_as_any_other(demo_shards: Path, tmp_path: Path) -> None:
    """The run says that it is to be found, the model what was found."""
    asked = load_config(command(demo_shards, tmp_path, "--trainer.find_batch_size", "true"))
    found = {"find_batch_size": False, "micro_batch_size": 8}
    trained_with = asked.model_copy(update={"trainer": asked.trainer.model_copy(update=found)})
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors", {"config": trained_with.to_toml()})
    assert scoring_settings(tmp_path, asked) == trained_with


def test_a_model_from_before_images_were_held_out_has_none(demo_shards: Path, tmp_path: Path) -> None:
    config = load_config(command(demo_shards, tmp_path))
    header = "".join(line for line in config.to_toml().splitlines(True) if not line.startswith("holdout"))
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors", {"config": header})
    scored = scoring_settings(tmp_path, config)
    assert scored.evaluation.holdout == 0
    save_threshold(tmp_path, None, scored.evaluation)  # the header says 0 from now on
    assert scoring_settings(tmp_path, config).evaluation.holdout == 0


def test_a_model_from_before_eq_3_6_had_a_direction_is_scored_as_it_was(demo_shards: Path, tmp_path: Path) -> None:
    before = load_config(command(demo_shards, tmp_path, "--objective.kl.direction", "reverse"))
    header = "".join(line for line in before.to_toml().splitlines(True) if not line.startswith("direction"))
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors", {"config": header})
    assert scoring_settings(tmp_path, before) == before and trained_config(tmp_path) == before


@pytest.mark.parametrize("given", [None, "area", "nearest"])
@pytest.mark.parametrize("was", [None, "area", "nearest"])
def test_masks_are_resized_as_they_were_unless_a_person_says_how(
    demo_shards: Path, tmp_path: Path, was: str | None, given: str | None
) -> None:
    """Before the setting existed, it was by nearest."""
    header = load_config(command(demo_shards, tmp_path, *(("--evaluation.mask_rule", was) if was else ()))).to_toml()
    if was is None:
        header = "".join(line for line in header.splitlines(True) if not line.startswith("mask_rule"))
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors", {"config": header})
    (tmp_path / "config.toml").write_text(header)
    setting = ("--evaluation.mask_rule", given) if given else ()
    expected = given or was or "nearest"
    config = load_config(command(demo_shards, tmp_path, *setting))
    assert scoring_settings(tmp_path, config).evaluation.mask_rule == expected
    of_run = load_config(["--config", str(tmp_path / "config.toml"), *setting])  # `launch/evaluate.py RUN`
    assert scoring_settings(tmp_path, of_run).evaluation.mask_rule == expected
