"""A group's way through the queue, with a stand-in for the workers."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from wads_dist.common.errors import ExitCode, RankLostError
from wads_dist.common.files import python_path
from wads_dist.common.signals import StopRequest
from wads_dist.config.load import load_config
from wads_dist.config.schema import Config
from wads_dist.runs.folder import METRICS
from wads_dist.runs.leases import Lease, Queue, attempts_of
from wads_dist.scheduler import categories as module
from wads_dist.scheduler.categories import Plan, work
from wads_dist.scheduler.plan import RankInfo
from wads_dist.scheduler.rendezvous import Launch
from wads_dist.scheduler.supervisor import WORKER, Cores, Task, Worked

Supervise = Callable[[str, int], int]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[str], StopRequest]]:
    """Runs ``work`` on one rank; a worker ends as ``ends(category, attempt)`` says, and writes its numbers if with 0."""

    def run(names: list[str], ends: Supervise, *options: str, groups: int = 1) -> tuple[list[str], StopRequest]:
        taken: list[str] = []

        def supervise(config: Config, group: object, stop: object, location: str, task: Task, *_: object) -> Worked:
            taken.append(task.category)
            code = ends(task.category, task.attempt)
            if code == ExitCode.OK:
                (config.run.dir / task.category).mkdir(exist_ok=True)
                (config.run.dir / task.category / METRICS).write_text("{}")
            return Worked(code, 2.0, 0.5, time.monotonic())

        monkeypatch.setattr(module, "supervise", supervise)
        config = load_config(["--data.shards", "none", "--run.dir", str(tmp_path), *options])
        stop = StopRequest(lambda code: None)
        plan = Plan("launch", "none", names, [(0,)] * groups, [RankInfo.here("127.0.0.1")])
        work(config, plan, Launch(), stop, lambda: False)
        return taken, stop

    return run


def test_categories_are_taken_in_order_and_each_rank_says_what_it_did(train: Callable, tmp_path: Path) -> None:
    taken, _ = train(["b", "a"], lambda category, attempt: 0)
    assert taken == ["b", "a"]
    lines = [json.loads(line) for line in (tmp_path / "log/launch/rank-00000.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["launch", "worked", "worked", "over"]
    assert lines[0]["groups"] == [[0]] and lines[0]["categories"] == ["b", "a"]
    assert (lines[1]["category"], lines[1]["code"], lines[1]["startup"], lines[1]["seconds"]) == ("b", 0, 0.5, 2.0)


def test_what_is_done_already_is_not_trained_again(train: Callable, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / METRICS).write_text("{}")
    assert train(["a", "b"], lambda category, attempt: 0)[0] == ["b"]


def test_a_category_that_dies_is_tried_again_and_given_up_at_last(train: Callable, tmp_path: Path) -> None:
    taken, _ = train(["a", "b"], lambda category, attempt: 137 if category == "a" else 0, "--parallel.attempts", "2")
    assert taken == ["a", "b", "a"]  # what has failed comes last
    assert [attempt.end.code for attempt in attempts_of(tmp_path, "a") if attempt.end] == [137, 137]


def test_a_category_that_mends_is_tried_until_it_does(train: Callable) -> None:
    assert train(["a"], lambda category, attempt: 0 if attempt == 3 else 1)[0] == ["a"] * 3


def test_bad_data_is_not_tried_again(train: Callable) -> None:
    assert train(["a"], lambda category, attempt: ExitCode.BAD_DATA)[0] == ["a"]


def test_a_success_without_numbers_is_a_failure(train: Callable, tmp_path: Path) -> None:
    """Otherwise it would be tried for ever."""
    write = Path.write_text

    def refuse(path: Path, text: str, **options: object) -> int:
        return 0 if path.name == METRICS else write(path, text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_text", refuse)
        taken, _ = train(["a"], lambda category, attempt: 0, "--parallel.attempts", "2")
    assert taken == ["a", "a"]
    assert [attempt.end.code for attempt in attempts_of(tmp_path, "a") if attempt.end] == [ExitCode.CRASHED] * 2


def test_a_worker_that_was_asked_to_stop_stops_the_launch(train: Callable, tmp_path: Path) -> None:
    taken, stop = train(["a", "b"], lambda category, attempt: ExitCode.PREEMPTED)
    assert taken == ["a"] and stop.requested
    (attempt,) = attempts_of(tmp_path, "a")
    assert attempt.end and attempt.end.code == ExitCode.PREEMPTED


def test_an_error_of_a_group_ends_the_lease_and_is_raised(train: Callable, tmp_path: Path) -> None:
    def ends(category: str, attempt: int) -> int:
        raise RankLostError("rank 1 is gone")

    with pytest.raises(RankLostError, match="rank 1 is gone"):
        train(["a"], ends)
    (attempt,) = attempts_of(tmp_path, "a")
    assert attempt.end and attempt.end.code == ExitCode.RANK_LOST and attempt.end.reason == "rank 1 is gone"


def test_two_categories_at_a_time(train: Callable) -> None:
    both = threading.Barrier(2, timeout=20)

    def ends(category: str, attempt: int) -> int:
        both.wait()
        return 0

    assert sorted(train(list("abcd"), ends, "--parallel.categories_per_gpu", "2")[0]) == list("abcd")


def test_a_group_in_which_everything_dies_leaves_the_queue_to_others(train: Callable, tmp_path: Path) -> None:
    """Two groups, here on one rank: the first has a broken device, which must not use up every category's tries."""
    bad: list[str] = []

    def ends(category: str, attempt: int) -> int:
        if threading.current_thread().name == "g0":
            bad.append(category)
            return 1
        time.sleep(0.05)
        return 0

    taken, _ = train([f"c{i:02d}" for i in range(15)], ends, groups=2)
    assert len(bad) == 2 == len(set(bad)) and len(taken) == 17
    assert len(list(tmp_path.glob(f"*/{METRICS}"))) == 15


def test_the_reason_that_a_worker_gave_is_kept(train: Callable, tmp_path: Path) -> None:
    def ends(category: str, attempt: int) -> int:
        (tmp_path / category).mkdir()
        line = {"event": "failed", "time": time.time(), "rank": 1, "reason": "train-000000.tar is cut"}
        (tmp_path / category / "events.jsonl").write_text(json.dumps(line) + "\n")
        return ExitCode.BAD_DATA

    train(["a"], ends)
    (attempt,) = attempts_of(tmp_path, "a")
    assert attempt.end and attempt.end.reason == "train-000000.tar is cut"


def test_time_without_work_is_idle_unless_nothing_is_left(
    train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Queue.take

    def slow(queue: Queue) -> Lease | None:
        time.sleep(0.5)
        return take(queue)

    monkeypatch.setattr(Queue, "take", slow)
    train(["a"], lambda category, attempt: 0)
    lines = [json.loads(line) for line in (tmp_path / "log/launch/rank-00000.jsonl").read_text().splitlines()]
    (worked,) = (line for line in lines if line["event"] == "worked")
    assert worked["waited"] >= 0.5 and worked["nothing_left"] == 0


def test_a_full_disk_or_a_closed_terminal_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "supervise", lambda *_: time.sleep(0.5) or Worked(3, 0.5, 0.1, time.monotonic()))
    config = load_config(["--data.shards", "none", "--run.dir", str(tmp_path)])
    errors = iter([OSError(28, "No space left on device"), SystemExit(1)])
    asked = []

    def on_tick() -> bool:
        asked.append(1)
        if error := next(errors, None):
            raise error
        return False

    monkeypatch.setattr(module, "TICK_SECONDS", 0.1)
    plan = Plan("launch", "none", ["a"], [(0,)], [RankInfo.here("127.0.0.1")])
    work(config, plan, Launch(), StopRequest(lambda code: None), on_tick)
    assert len(asked) >= 2 and attempts_of(tmp_path, "a")[0].end


def shared(options: list[str], local_rank: int, local_ranks: int, slot: int) -> Cores:
    config = load_config(options)
    return Cores.share(config.parallel, config.trainer.threads, local_rank, local_ranks, slot)


@pytest.mark.parametrize(("slot", "expected"), [(0, (4, 5)), (1, (6, 7))])
def test_the_cores_of_a_node_are_shared_by_its_workers(
    slot: int, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    options = ["--parallel.categories_per_gpu", "2", "--parallel.pin_cores", "true"]
    assert shared(options, 1, 2, slot) == Cores(2, expected)
    assert shared(options[:2], 1, 2, slot) == Cores(2)
    assert shared([*options, "--trainer.threads", "1"], 1, 2, slot) == Cores(1, expected)


def test_the_cores_that_a_launcher_has_given_a_rank_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3} if pid == 0 else set(range(8)))
    assert shared(["--parallel.pin_cores", "true"], 1, 4, 0) == Cores(2, (2, 3))


def test_a_worker_imports_nothing_from_the_working_folder(tmp_path: Path) -> None:
    for name in ("wads_dist/__init__.py", "queue.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('imported from the working folder')")
    asked = subprocess.run(
        [*WORKER, "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
    )
    assert asked.returncode == 0 and "--category" in asked.stdout, asked.stderr
