"""What an earlier version has written is read as it was meant. ``tests/fixtures/before_2026_12`` is of commit 5fa18f4: a run of
48 samples (preset ``wads_plus``), its shards, and of its weights the header, the tensors' shapes and what a network of theirs
says.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.conftest import REPOSITORY
from wads_dist.common.errors import ExitCode
from wads_dist.config.load import load_config
from wads_dist.deploy.predict import load
from wads_dist.launch.status import main as status
from wads_dist.reporting.report import render
from wads_dist.reporting.report_data import read_run
from wads_dist.runs.folder import WEIGHTS
from wads_dist.shards.__main__ import main as shards
from wads_dist.shards.source import Dataset

OLD = REPOSITORY / "tests" / "fixtures" / "before_2026_12"


def test_a_run_is_shown_and_reported(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(OLD / "run", run)  # a look leaves nothing behind, but a test should not rely on it
    assert status([str(run), "--json"]) == ExitCode.OK
    (shown,) = json.loads(capsys.readouterr().out)["categories"]
    metrics = json.loads((OLD / "run" / "demo_biscuit" / "metrics.json").read_text())
    assert shown["state"] == "done" and shown["metrics"] == metrics
    assert f"{metrics['pixel_auroc']:.3f}" in render(read_run(run))


def test_its_settings_are_those_it_was_trained_with() -> None:
    config = load_config(["--config", str(OLD / "run" / "config.toml")])
    assert (config.preset, config.synthesis.grey, config.experts.error) == ("wads_plus", "auto", 0.5)


def test_its_shards_are_whole_and_the_same_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert shards(["verify", str(OLD / "shards")]) == 0
    metrics = json.loads((OLD / "run" / "demo_biscuit" / "metrics.json").read_text())
    assert Dataset.open(str(OLD / "shards")).manifest("demo_biscuit").fingerprint == metrics["fingerprint"]


def test_its_weights_are_the_same_network(tmp_path: Path) -> None:
    recorded = json.loads((OLD / "weights.json").read_text())
    state = {}
    for seed, (name, shape) in enumerate(sorted(recorded["shapes"].items())):
        generator = torch.Generator().manual_seed(seed)
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(1)
        elif name in recorded["experts"]:
            state[name] = torch.tensor(recorded["experts"][name])
        elif len(shape) > 1:
            state[name] = torch.randn(shape, generator=generator) * (2 / torch.Size(shape[1:]).numel()) ** 0.5
        else:
            state[name] = 0.5 + torch.rand(shape, generator=generator)
    save_file(state, tmp_path / WEIGHTS, metadata=recorded["header"])
    pattern = (np.indices((96, 80)).sum(0) * 7 % 256).astype(np.uint8)
    result = load(tmp_path, device="cpu").predict(Image.fromarray(pattern).convert("RGB"))
    found = result.score, float(result.probability.mean()), float(result.probability.std())
    assert found == pytest.approx([recorded[name] for name in ("score", "mean", "deviation")], abs=1e-5)
