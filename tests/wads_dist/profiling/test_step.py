import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY, environment
from tests.support.narrow import NARROW
from wads_dist.launch.profile_step import parse
from wads_dist.profiling.step import PhaseClock

TINY = f"{NARROW} --trainer.global_batch_size 4 --trainer.threads 1 --model.standardise_code false".split()


def test_phases_add_up_over_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 1.0, 3.0, 10.0, 11.0])
    monkeypatch.setattr("wads_dist.profiling.step.now", lambda on_device: next(moments))
    clock = PhaseClock(torch.device("cpu"))
    for phase in ("data", "forward", "data", "forward"):
        clock.enter(phase, 0)
    assert clock.take() == {"data": 1.0 + 7.0, "forward": 2.0 + 1.0}
    assert clock.marks == []


@pytest.mark.slow
@pytest.mark.alone
def test_the_command_accounts_for_a_step(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    command = [sys.executable, "launch/profile_step.py", "--steps", "2", "--json", "-", "--trace", str(trace), *TINY]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout[done.stdout.index("{") :])
    assert list(result["phases_ms"]) == [
        "data", "forward", "discriminator", "objective", "backward", "agree", "update"
    ]  # fmt: skip
    # What is left is between the steps.
    assert 0.5 * result["step_ms"] < sum(result["phases_ms"].values()) <= result["step_ms"]
    stack = [(3, 8, 32), (8, 16, 16), (16, 32, 8), (32, 64, 4)]  # channels in and out, side of the result
    expected = sum(2 * 16 * i * o * side**2 for i, o, side in stack) / 1e9
    forward = result["forward_gflop_per_sample"]
    assert forward["generator.stack"] == pytest.approx(expected) == forward["discriminator"] - 2 * 16 * 64 / 1e9
    whole = sum(forward.values()) + forward["generator.stack"] + forward["discriminator"]
    # A backward pass of a convolution is two forward passes; Z has none.
    assert 2 * whole < result["gflop_per_sample"] < 3 * whole
    assert result["utilisation"] == pytest.approx(result["tflops"] / result["peak_tflops"])
    assert "aten::convolution_backward" in result["operators"] and "traceEvents" in json.loads(trace.read_text())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", "0"], "--steps: 0 must be at least 1"),
        (
            ["--json", "/no/such/folder/a.json"],
            "--json: '/no/such/folder/a.json' must be a file in a folder that exists",
        ),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(options)
    assert said in capsys.readouterr().err
