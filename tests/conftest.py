"""What tests of several files share: real ranks, and a small data set."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
NOT_INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TRITON_INTERPRET")


def pytest_configure(config: pytest.Config) -> None:
    """Triton decides when it is imported whether kernels are interpreted: always, but for a run of the GPU tests."""
    # A suite that a shell started in the background ignores SIGINT, and so would every program whose Ctrl-C is tested.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    expression = config.option.markexpr
    if "gpu" not in expression or "not gpu" in expression:
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Triton 3.6's interpreter makes integers of arrays in a way that NumPy 2.5 refuses: 26 tests would say so at length."""
    import numpy
    import triton

    versions = [tuple(map(int, module.__version__.split(".")[:2])) for module in (triton, numpy)]
    if (
        versions[0] < (3, 7)
        and versions[1] >= (2, 5)
        and any(i.get_closest_marker("interpreter") for i in session.items)
    ):
        raise pytest.UsageError(
            f"Triton {triton.__version__}'s interpreter does not work with NumPy {numpy.__version__}: install numpy<2.5 or "
            "triton>=3.7, or leave these tests out (-m 'not interpreter'). Only tests interpret kernels"
        )


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child: this checkout's packages, this interpreter's programs, and CPU ranks."""
    inherited = {k: v for k, v in os.environ.items() if k not in NOT_INHERITED}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    # Behind this checkout what the caller's path has: a host that installs nothing may keep its packages there.
    packages = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return inherited | {"PYTHONPATH": packages, "PATH": path, "DS_ACCELERATOR": "cpu"} | extra


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., list[str]]:
    """Runs a program of ``tests/wads_dist/programs`` as ``world`` real ranks; returns what each printed, in rank order.

    ``fork`` is for programs that need nothing else of their environment than CPU ranks while they import.
    """
    from tests.support.forked import Ranks

    def run(program: str, world: int, *arguments: str, accelerator: str = "cpu", fork: bool = True) -> list[str]:
        logs = [tmp_path / f"{program}-{rank}.log" for rank in range(world)]
        for log in logs:
            log.write_text("")
        command = [str(REPOSITORY / "tests/wads_dist/programs" / program), *arguments]
        env = environment(DS_ACCELERATOR=accelerator)
        ranks = Ranks(world, command, env, logs, fork=fork and accelerator == "cpu")
        try:
            ranks.wait(550)  # a little less than pytest waits for a test
        finally:
            ranks.kill()
        printed = [log.read_text() for log in logs]
        assert ranks.codes == [0] * world, "\n".join(
            f"--- rank {r} ended with {ranks.codes[r]}: {text[-3000:]}" for r, text in enumerate(printed)
        )
        return printed

    return run


@pytest.fixture(scope="module")
def module_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for what the tests of one file share, gone after them: the runs of the whole suite would fill a disk."""
    path = tmp_path_factory.mktemp("module")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def demo_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small demo categories: 8 training images, 3 good and 4 defective test images each, 64 pixels."""
    from wads_dist.shards.demo import demo

    out = tmp_path_factory.mktemp("demo") / "shards"
    demo(out, categories=2, size=64, train=8, good=3, per_defect=1, workers=1, progress=False)
    return out


@pytest.fixture(scope="session")
def unbroken(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks that nothing happens to, with which those that were broken off are compared."""
    from tests.support.launching import command, launched, summary

    folder = tmp_path_factory.mktemp("unbroken")
    run = folder / "run"
    with launched(run, command(demo_shards, run), folder / "log") as start:
        code, seconds = start.ended(600)
        assert code == 0, start.text()[-3000:]
    assert summary(run)["complete"]
    print(f"unbroken run: two ranks, {seconds:.0f} s")
    return run
