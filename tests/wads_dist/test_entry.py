"""What a command says when it is broken off."""

import runpy
import sys
from typing import Any

import pytest

import wads_dist.entry
from launch.evaluate import arguments
from tests.conftest import REPOSITORY
from wads_dist.config import Config
from wads_dist.entry import main
from wads_dist.errors import ExitCode


def interrupted(config: Config) -> int:
    raise KeyboardInterrupt


@pytest.mark.parametrize("resumes", [True, False])
def test_only_what_has_checkpoints_promises_to_go_on_from_one(
    resumes: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(interrupted, [], resumes=resumes) == ExitCode.INTERRUPTED
    told = capsys.readouterr().err
    assert told.startswith("interrupted") and ("checkpoint" in told) == resumes


@pytest.mark.parametrize(
    "command",
    [
        "evaluate.py runs/nut",
        "predict.py a.png --model runs/nut --out out",
        "export.py runs/nut",
        "show_samples.py --config a.toml",
    ],
)
def test_commands_without_checkpoints_say_so(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {}

    def recorded(*arguments: object, **options: Any) -> int:
        said.update(options)
        return 0

    program, *given = command.split()
    monkeypatch.setattr(wads_dist.entry, "main", recorded)
    monkeypatch.setattr(sys, "argv", [program, *given])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPOSITORY / "launch" / program), run_name="__main__")
    assert ended.value.code == 0 and said == {"resumes": False}


def test_a_run_is_evaluated_where_it_is_now() -> None:
    """Its settings name the folder in which it was trained."""
    assert arguments(["moved/run", "--evaluation.bins", "32"]) == [
        *("--config", "moved/run/config.toml", "--run.dir", "moved/run"),
        *("--evaluation.bins", "32"),
    ]
    assert arguments(["--config", "a.toml"]) == ["--config", "a.toml"]
