"""Rows 1, 2, 5, 6, 7 and 14 of the fault table, and kills at random moments. Real processes on CPU, two ranks.

The programs print what they did and found; ``pytest -s`` shows it.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, environment
from tests.support.launching import BATCH, CATEGORY, STEPS, events, launched, unlaunched, wait_for
from wads_dist.common.errors import ExitCode
from wads_dist.shards.demo import demo
from wads_dist.training.checkpoint_files import main as checkpoint_command

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(1800)]


def program(name: str, *arguments: object, timeout: float = 1500) -> str:
    """What ``programs/NAME`` printed; it must succeed. Its ranks are its own children."""
    script = REPOSITORY / "tests/wads_dist/programs" / name
    process = subprocess.Popen(
        [sys.executable, script, *map(str, arguments)],
        env=environment(PYTHONWARNINGS="ignore"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        printed, errors = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    print(printed)
    assert process.returncode == 0, printed[-2000:] + errors[-4000:]
    return printed + errors


def test_rows_1_and_2_stopped_and_resumed_by_as_many_ranks_and_by_others(tmp_path: Path) -> None:
    printed = program("exact_resume.py", tmp_path, "0,1,2,3,3g")
    assert printed.count("numbers of rank 0 bitwise equal after the resume") == 5
    assert printed.count("2 -> 1 -> 2 ranks, same samples, same state") == 4


@pytest.fixture(scope="module")
def rows(module_path: Path) -> str:
    """One program for four rows: each start of Python and DeepSpeed costs more than a row."""
    return program("checkpoint_faults.py", module_path, "5,6,7,14")


@pytest.mark.parametrize(("row", "findings"), [(5, 8), (6, 10), (7, 1), (14, 1)])
def test_rows_5_6_7_and_14(rows: str, row: int, findings: int) -> None:
    """Kills at each stage of a save; damage; a full disk; other data."""
    assert f"row {row}: passed" in rows, rows[-6000:]
    assert rows.count(f"row {row}: ") - 1 >= findings


@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=[pytest.mark.long, pytest.mark.timeout(12_000)])])
def test_killed_at_random_moments_again_and_again(tmp_path: Path, kills: int) -> None:
    printed = program("random_kills.py", tmp_path, kills, 1, timeout=max(1500, 60 * kills))
    assert f"{kills} kills: " in printed and "each once" in printed


def test_the_same_command_goes_on_with_another_number_of_ranks_and_past_damage(
    demo_shards: Path, tmp_path: Path
) -> None:
    """Rows 2, 6 and 14 as a person meets them."""
    run, other = tmp_path / "run", tmp_path / "shards"
    checkpoints = run / CATEGORY / "checkpoints"

    def saves() -> int:
        return len(events(run, "checkpoint"))

    with launched(run, unlaunched(demo_shards, run), tmp_path / "1.log") as start:
        wait_for(lambda: saves() >= 3 or start.process.poll() is not None, "three checkpoints are written")
        start.kill(signal.SIGKILL, "worker", 1)
        assert start.ended(120)[0] != 0
    shown = checkpoint_command(["verify", str(run)])
    assert shown == 0  # whole, whatever the worker was doing

    with launched(run, unlaunched(demo_shards, run, "--trainer.seed", "1"), tmp_path / "2.log") as start:
        assert start.ended(120)[0] == ExitCode.REFUSED_RESUME
        assert "trainer.seed: 0 → 1" in start.text()
    demo(other, categories=1, seed=5, size=64, train=8, good=3, per_defect=1, workers=1, progress=False)
    with launched(run, unlaunched(other, run), tmp_path / "3.log") as start:
        assert start.ended(120)[0] == ExitCode.REFUSED_RESUME
        assert "was trained on other data" in start.text() and "train-000000.tar: other content" in start.text()

    newest, *older = sorted((path for path in checkpoints.glob("step-*")), reverse=True)
    shard = newest / "generator-segmenter/state/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 4
    shard.write_bytes(data)
    assert checkpoint_command(["verify", str(run)]) == 3
    before = saves()
    with launched(run, unlaunched(demo_shards, run, ranks=1), tmp_path / "4.log") as start:
        wait_for(lambda: saves() > before or start.process.poll() is not None, "a checkpoint of one rank is written")
        start.kill(signal.SIGKILL, "worker", 0)
        assert start.ended(120)[0] != 0
        assert "DAMAGED CHECKPOINT" in start.text() and "(SHA-256)" in start.text()
    assert (checkpoints / "quarantine" / newest.name).is_dir()
    (event,) = events(run, "quarantine")
    assert event["checkpoint"] == newest.name and "optim_states.pt has other bytes" in event["problems"][0]

    with launched(run, unlaunched(demo_shards, run), tmp_path / "5.log") as start:
        assert start.ended(600)[0] == 0, start.text()[-3000:]
    starts = events(run, "start", "resume")
    assert [(event["world_size"], event["zero_stage"]) for event in starts] == [(2, 1), (1, 1), (2, 1)]
    assert starts[1]["step"] == int(older[0].name.removeprefix("step-"))
    assert [event["ranks"] for event in events(run, "reshard")] == [[2, 1], [1, 2]]
    assert not list(checkpoints.glob(".*"))  # nothing half written, nothing converted
    taken: list[int] = []
    for event in events(run, "start", "resume", "step"):
        if event["event"] == "step":
            taken.append(event["samples"])
        else:
            taken = [samples for samples in taken if samples <= event["samples"]]
    assert taken == [BATCH * (i + 1) for i in range(STEPS)]
    print("resumed at samples", [event["samples"] for event in starts], "on 2, 1 and 2 ranks; no step is missing")
