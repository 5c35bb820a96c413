"""What a command says when it is broken off, or cannot begin."""

import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from wads_dist.common.errors import ExitCode
from wads_dist.config.load import HOW_TO_START, load_config
from wads_dist.config.schema import Config
from wads_dist.launch import command as commands
from wads_dist.launch.command import run_command
from wads_dist.launch.evaluate import arguments
from wads_dist.launch.train import train


def interrupted(config: Config) -> int:
    raise KeyboardInterrupt


@pytest.mark.parametrize("resumes", [True, False])
def test_only_what_has_checkpoints_promises_to_go_on_from_one(
    resumes: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(interrupted, [], resumes=resumes) == ExitCode.INTERRUPTED
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
    monkeypatch.setattr(commands, "run_command", recorded)
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


@pytest.mark.parametrize("given", [[], ["--data.categories", "all"]])
def test_without_data_one_screen_says_how_to_start(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(train, given) == ExitCode.BAD_CONFIG
    told = capsys.readouterr().err
    assert told.startswith("data: nothing to train on; give --data.root DIR") and HOW_TO_START in told
    assert len(told.splitlines()) <= 20


@pytest.mark.parametrize("command", re.findall(r"launch/train\.py (--config.*)", HOW_TO_START.replace("\\\n", " ")))
def test_what_it_says_to_type_is_a_configuration(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    load_config(shlex.split(command)).require_data()


def test_a_rank_that_is_sooner_leaves_it_to_the_first_to_say_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A launcher ends all ranks when one has left; the first had then not spoken yet."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    assert run_command(train, []) == ExitCode.BAD_CONFIG and not capsys.readouterr().err
    assert waited == [commands.SAY_SECONDS]


def test_a_rank_that_the_launcher_ends_meanwhile_has_the_same_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", interrupted)
    monkeypatch.setenv("RANK", "1")
    assert run_command(train, []) == ExitCode.BAD_CONFIG


def test_a_script_of_another_copy_is_refused_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An interpreter imports one copy: another's script would run with code that is not its own."""
    (tmp_path / "launch").mkdir()
    for name in ("train.py", "wads.py", "command.py"):
        (tmp_path / "launch" / name).touch()
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    for program, code in (
        ("launch/train.py", ExitCode.BAD_CONFIG),
        (str(tmp_path / "launch" / "train.py"), ExitCode.BAD_CONFIG),
        (str(REPOSITORY / "launch" / "train.py"), ExitCode.OK),
        (str(REPOSITORY / "wads_dist" / "launch" / "train.py"), ExitCode.OK),
        ("wads train", ExitCode.OK),
        ("command.py", ExitCode.OK),
        ("-c", ExitCode.OK),
    ):
        monkeypatch.setattr(sys, "argv", [program])
        assert run_command(lambda _: ExitCode.OK, []) == code, program
    assert capsys.readouterr().err.count("belongs to another copy of WADS-dist") == 2
