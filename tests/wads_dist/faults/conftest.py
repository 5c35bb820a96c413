"""The run that nothing happened to, with which the others are compared."""

from pathlib import Path

import pytest

from tests.wads_dist.faults.launching import command, launched, summary


@pytest.fixture(scope="session")
def unbroken(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    run = folder / "run"
    with launched(run, command(demo_shards, run), folder / "log") as start:
        code, seconds = start.ended(600)
        assert code == 0, start.text()[-3000:]
    assert summary(run)["complete"]
    print(f"unbroken run: two ranks, {seconds:.0f} s")
    return run
