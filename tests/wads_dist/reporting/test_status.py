"""What a run's folder tells, written here by hand in the formats that launches write."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.conftest import REPOSITORY, environment
from wads_dist.launch.status import main
from wads_dist.reporting import status as module
from wads_dist.reporting.status import Live, news, status_table
from wads_dist.runs import events
from wads_dist.runs.events import Tail
from wads_dist.runs.reader import CategoryStatus, RunReader, RunStatus, launches, rank_times, read_status

STEP = {"dissimilarity": 0.2031, "focal": 0.0123, "adversarial": 0.69, "discriminator": 0.7, "slowness": [1.0, 1.1]}


class Run:
    """Writes a run's folder. Times are seconds ago."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now = folder, time.time()
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text("[trainer]\nsamples = 1800\n[parallel]\nlease_seconds = 60.0\n")

    def lines(self, path: str, *objects: dict[str, Any]) -> Path:
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        with (self.folder / path).open("a") as stream:
            stream.writelines(json.dumps(line) + "\n" for line in objects)
        return self.folder / path

    def attempt(self, category: str, number: int = 1, *, beat: float = 1, began: float = 100, **lease: Any) -> None:
        owner = {
            "launch": "a",
            "group": "g0",
            "ranks": [0, 1],
            "host": "node-a",
            "machine": "m:1",
            "pid": 1,
            "started": "1",
        }
        lease = owner | {"attempt": number, "time": self.now - began} | lease
        path = self.lines(f"queue/{category}/{number:03d}.json", lease)
        os.utime(path, (self.now - beat, self.now - beat))

    def ended(self, category: str, number: int = 1, *, code: int = 0, reason: str = "") -> None:
        end = {"code": code, "reason": reason, "time": self.now - 1, "seconds": 12.3}
        self.lines(f"queue/{category}/{number:03d}.ended.json", end)

    def event(self, category: str, event: str, samples: int, ago: float = 5, **values: Any) -> Path:
        line = {"event": event, "time": self.now - ago, "step": samples // 8, "samples": samples} | values
        return self.lines(f"{category}/events.jsonl", line)

    def step(self, category: str, samples: int, ago: float = 5, rate: float = 41.0, **values: Any) -> Path:
        return self.event(category, "step", samples, ago, images_per_second=rate, total=4.5, **STEP | values)

    def done(self, category: str, auroc: float = 0.98) -> None:
        self.attempt(category)
        self.step(category, 1800)
        self.ended(category)
        metrics = {"pixel_auroc": auroc, "samples": 1800, "images_per_second": 40.0}
        (self.folder / category / "metrics.json").write_text(json.dumps(metrics, indent=1))

    def launch(self, name: str, categories: list[str], ago: float = 200) -> None:
        line = {"event": "launch", "time": self.now - ago, "ranks": 2, "groups": [[0, 1]], "categories": categories}
        self.lines(f"log/{name}/rank-00000.jsonl", line)

    def summary(self, **values: Any) -> None:
        (self.folder / "summary.json").write_text(json.dumps({"failed": {}, "exit_code": None} | values))

    def only(self) -> CategoryStatus:
        (category,) = read_status(self.folder).categories
        return category


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def fill(run: Run, count: int) -> None:
    """A run of ``count`` categories in which everything occurs, with the longest texts there are."""
    names = [f"product_line_{i:02d}" for i in range(count)]
    run.launch("a", names)
    for name in names[: count // 3]:
        run.done(name)
    starting, running, failed, stopped, lost = names[count // 3 : count // 3 + 5]
    run.attempt(starting)
    run.attempt(running, 3, host="ip-10-0-12-134.eu-west-1.compute.internal", group="g12.3")
    run.step(running, 900, rate=12345.6)
    run.attempt(failed)
    run.ended(
        failed, code=137, reason="the worker of rank 3 was ended by SIGKILL, as the kernel does when memory is short"
    )
    run.attempt(stopped)
    run.ended(stopped, code=7)
    run.attempt(lost, beat=7200)


def text_of(status: RunStatus, width: int = 80, height: int | None = None) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(status_table(status, height))
    return str(console.file.getvalue())  # type: ignore[attr-defined]


# --- reading -----------------------------------------------------------------------------------------------------


def waiting(run: Run) -> None:
    run.launch("a", ["c"])


def running(run: Run) -> None:
    run.attempt("c", beat=100)


def silent(run: Run) -> None:
    run.attempt("c", beat=130)


def silent_but_for_events(run: Run) -> None:
    run.attempt("c", beat=130)
    run.step("c", 8, ago=100)


def done(run: Run) -> None:
    run.done("c")


def failed(run: Run) -> None:
    run.attempt("c")
    run.ended("c", code=3, reason="c-000.tar is damaged")


def failed_without_an_attempt(run: Run) -> None:
    run.summary(failed={"c": 3}, missing=["c"])


def stopped(run: Run) -> None:
    run.attempt("c")
    run.ended("c", code=7)


def tried_again(run: Run) -> None:
    failed(run)
    run.attempt("c", 2)


def taken_over(run: Run) -> None:
    run.attempt("c", beat=500)
    run.attempt("c", 2)


@pytest.mark.parametrize(
    ("write", "state"),
    [
        (waiting, "waiting"),
        (running, "running"),
        (silent, "lost"),
        (silent_but_for_events, "running"),
        (done, "done"),
        (failed, "failed"),
        (failed_without_an_attempt, "failed"),
        (stopped, "stopped"),
        (tried_again, "running"),
        (taken_over, "running"),
    ],
)
def test_the_state_of_a_category(run: Run, write: Callable[[Run], None], state: str) -> None:
    write(run)
    assert run.only().state == state


def test_a_running_category_shows_its_newest_step(run: Run) -> None:
    run.attempt("c", 2, beat=4, host="node-b", group="g1.0")
    run.event("c", "start", 0, ago=50)
    run.step("c", 8)
    run.step("c", 16, ago=2, rate=43.5)
    c = run.only()
    assert (c.attempt, c.host, c.group) == (2, "node-b", "g1.0")
    assert (c.step, c.samples, c.total_samples, c.images_per_second, c.loss) == (2, 16, 1800, 43.5, 4.5)
    assert c.quiet == pytest.approx(2, abs=1)


def test_a_failure_has_its_code_and_reason(run: Run) -> None:
    failed(run)
    assert (run.only().code, run.only().reason) == (3, "c-000.tar is damaged")


def test_a_done_category_has_the_numbers_of_its_metrics(run: Run) -> None:
    run.done("c", auroc=0.97)
    assert (run.only().pixel_auroc, run.only().images_per_second, run.only().samples) == (0.97, 40.0, 1800)


def test_an_earlier_attempts_speed_is_not_that_of_one_that_starts(run: Run) -> None:
    run.step("c", 160, ago=150)
    run.attempt("c", 2, began=100)
    c = run.only()
    assert (c.samples, c.images_per_second, c.loss, c.last_step) == (160, None, None, {})


def test_going_on_from_a_checkpoint_takes_samples_back(run: Run) -> None:
    run.attempt("c")
    run.step("c", 160)
    run.event("c", "resume", 80)
    assert (run.only().samples, run.only().images_per_second) == (80, None)


def test_categories_are_the_newest_launchs_in_its_order_then_the_others(run: Run) -> None:
    run.launch("z", ["old"], ago=500)
    run.launch("a", ["large", "small"], ago=200)
    run.done("finished")
    run.attempt("claimed")
    assert [c.name for c in read_status(run.folder).categories] == ["large", "small", "claimed", "finished"]
    assert list(launches(run.folder)) == ["z", "a"]


def test_a_folder_that_is_not_there_yet_is_a_run_that_waits(tmp_path: Path) -> None:
    reader = RunReader(tmp_path / "run", ["c"])
    assert [c.state for c in reader.read().categories] == ["waiting"]
    run = Run(tmp_path / "run")
    run.attempt("c")
    run.step("c", 8)
    (c,) = reader.read().categories
    assert (c.state, c.samples, c.total_samples) == ("running", 8, 1800)


def test_time_goes_on_for_what_is_not_read_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.done("c")
    reader = RunReader(run.folder)
    first = reader.read().categories[0].quiet
    monkeypatch.setattr(time, "time", lambda: run.now + 1000)
    later = reader.read().categories[0].quiet
    assert first is not None and later is not None and later - first == pytest.approx(1000, abs=10)


def test_a_half_written_line_is_read_when_it_is_whole(run: Run) -> None:
    path = run.step("c", 8)
    tail = Tail(path)
    whole = path.read_bytes()
    with path.open("ab") as stream:
        stream.write(whole[:30])
        stream.flush()
        tail.read()
        assert tail.last["samples"] == 8 and tail.offset == len(whole)
        stream.write(whole[30:].replace(b'"samples": 8', b'"samples": 9'))
    tail.read()
    assert tail.last["samples"] == 9


def test_a_line_that_a_crash_has_cut_is_passed_over(run: Run) -> None:
    path = run.step("c", 8)
    with path.open("ab") as stream:
        stream.write(b'{"event": "step", "sam\xc3' + path.read_bytes())
    run.step("c", 16)
    tail = Tail(path)
    tail.read()
    assert tail.last["samples"] == 16


def test_of_a_long_file_only_the_end_is_read(run: Run) -> None:
    run.step("c", 8)
    run.lines("c/events.jsonl", *[{"event": "checkpoint", "samples": 8}] * (events.TAIL_BYTES // 30))
    tail = Tail(run.folder / "c/events.jsonl")
    tail.read()
    assert tail.last == {}
    run.step("c", 16)
    tail.read()
    assert tail.last["samples"] == 16


def test_a_file_that_was_begun_anew_is_read_anew(run: Run) -> None:
    for samples in (8, 16):
        path = run.step("c", samples)
    tail = Tail(path)
    tail.read()
    path.unlink()
    run.step("c", 4)
    tail.read()
    assert tail.last["samples"] == 4


def test_what_ranks_did_with_their_time(run: Run) -> None:
    worked = {"event": "worked", "category": "c", "attempt": 1, "group": "g0", "slot": 0, "code": 0}
    run.launch("a", ["c", "d"])
    run.lines(
        "log/a/rank-00000.jsonl",
        worked | {"waited": 1.0, "startup": 10.0, "seconds": 60.0},
        worked | {"waited": 2.0, "startup": None, "seconds": 7.0, "code": 137},  # died before its first step
        {"event": "over", "code": 0, "nothing_left": 30.0},
    )
    run.lines("log/a/rank-00001.jsonl", worked | {"waited": 0.0, "startup": 10.0, "seconds": 90.0})
    times = rank_times(run.folder, "a")
    first = times[0]
    assert (first.worked, first.startup, first.waited, first.nothing_left) == (50.0, 17.0, 3.0, 30.0)
    assert first.idle == pytest.approx(0.03) and times[1].idle == 0
    assert rank_times(run.folder) == times


def test_ranks_of_a_run_without_a_launch(run: Run) -> None:
    assert rank_times(run.folder) == {}


# --- over or not -------------------------------------------------------------------------------------------------


def test_nothing_is_over_between_two_categories(run: Run) -> None:
    run.launch("a", ["c", "d"])
    run.done("c")
    run.summary()
    assert not read_status(run.folder).over


def test_a_launch_that_has_ended_is_over(run: Run) -> None:
    run.launch("a", ["c"])
    stopped(run)
    run.summary(exit_code=7)
    assert read_status(run.folder).over


def test_a_run_is_not_over_while_another_launch_works_on_it(run: Run) -> None:
    run.launch("a", ["c", "d"])
    stopped(run)
    run.attempt("d", launch="b")
    run.summary(exit_code=7)
    assert not read_status(run.folder).over


def test_a_launch_that_was_killed_is_over_once_it_was_silent_for_long(run: Run) -> None:
    run.launch("a", ["c", "d"])
    run.summary()
    run.attempt("c", beat=100)
    assert not read_status(run.folder).over
    run.attempt("c", 2, beat=130)
    assert read_status(run.folder).over


# --- the table ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [15, 60])
def test_the_table_fits_80_columns_and_names_every_category(run: Run, count: int) -> None:
    fill(run, count)
    status = read_status(run.folder)
    text = text_of(status)
    assert max(map(len, text.splitlines())) <= 80
    assert all(c.name in text for c in status.categories)
    assert f"{count // 3} of {count} done" in text and "1 running" not in text and "2 running" in text


def test_states_can_be_read_without_colour(run: Run) -> None:
    fill(run, 15)
    text = text_of(read_status(run.folder), 100)
    for words in (
        "done",
        "starting",
        "running  ",
        "failed (137)",
        "stopped",
        "lost 120 min",
        "waiting",
        "12,346 img/s",
    ):
        assert words in text
    assert "the worker of rank 3 was ended by SIGKILL" in " ".join(text.split())


@pytest.mark.parametrize("height", [16, 24, 40])
def test_on_a_short_terminal_the_done_and_the_waiting_share_lines(run: Run, height: int) -> None:
    fill(run, 60)
    status = read_status(run.folder)
    lines = text_of(status, height=height).splitlines()
    assert height - 4 <= len(lines) < height
    assert all(any(c.name in line for line in lines) for c in status.categories if c.state not in ("done", "waiting"))
    folded = sum(int(line[1 : line.index(" ")]) for line in lines if line.startswith("("))
    assert folded + sum(line.startswith("product") for line in lines) >= 60


def test_a_hosts_name_is_text_not_markup(run: Run) -> None:
    run.attempt("c", host="[bold]h")
    assert "[bold]h" in text_of(read_status(run.folder))


def test_a_name_that_leads_elsewhere_or_steers_a_terminal_is_no_category(run: Run) -> None:
    run.attempt("c")
    for name in (".git", "c\x1b[2J", "c\u202e", "c[red]", "two words"):
        run.attempt(name)
    listed = {"event": "launch", "time": 1.0, "categories": ["../../x", "/etc", 3, "c"]}
    run.lines("log/a/rank-00000.jsonl", listed)
    (run.folder / "summary.json").write_text(json.dumps({"missing": ["../x", "d"]}))
    assert [c.name for c in read_status(run.folder).categories] == ["c", "d"]


# --- live --------------------------------------------------------------------------------------------------------


class Screen:
    """A console that keeps what it shows."""

    def __init__(self, terminal: bool) -> None:
        self.file = io.StringIO()
        self.console = Console(
            file=self.file,
            force_terminal=terminal,
            width=80,
            height=24,
            legacy_windows=False,
            _environ={"TERM": "xterm"},
        )

    def has(self, text: str, count: int = 1) -> None:
        deadline = time.monotonic() + 20
        while self.file.getvalue().count(text) < count:
            assert time.monotonic() < deadline, self.file.getvalue()
            time.sleep(0.005)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REFRESH_SECONDS", 0.01)


def test_a_log_file_gets_a_line_of_the_newest_step(run: Run, quick: None) -> None:
    run.attempt("c")
    screen = Screen(terminal=False)
    with Live(run.folder, ["c"], screen.console):
        run.step("c", 1200, ago=0, slowness=[1.0, 2.1])
        screen.has("\n")
    assert screen.file.getvalue() == (
        "c: 1,200/1,800 samples  41.0 img/s  1-SSIM 0.2031  focal 0.0123  adv 0.6900  disc 0.7000  slowest: rank 1, 2.1 times\n"
    )


def test_lines_keep_their_distance_but_for_the_last(run: Run, quick: None) -> None:
    run.attempt("c")
    run.attempt("d")
    screen = Screen(terminal=False)
    with Live(run.folder, ["c", "d"], screen.console):
        run.step("c", 8)
        screen.has("c: 8/")
        run.step("c", 16)  # too soon
        run.step("d", 8)  # another category's distance is its own; that it was seen, 16 was seen too
        screen.has("d: 8/")
        run.step("c", 1800)
    assert [line.split()[1] for line in screen.file.getvalue().splitlines()] == ["8/1,800", "8/1,800", "1,800/1,800"]


def test_a_line_comes_again_after_a_while(run: Run, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUIET_SECONDS", 0.0)
    run.attempt("c")
    screen = Screen(terminal=False)
    with Live(run.folder, ["c"], screen.console):
        for samples in (8, 16):
            run.step("c", samples)
            screen.has(f"c: {samples}/")


def test_what_an_earlier_launch_did_is_no_news(run: Run) -> None:
    run.done("c")
    run.attempt("d")
    run.step("d", 8)
    screen = Screen(terminal=False)
    with Live(run.folder, ["c", "d"], screen.console):
        pass
    assert screen.file.getvalue() == ""


def test_a_folder_may_come_later(tmp_path: Path, quick: None) -> None:
    screen = Screen(terminal=False)
    with Live(tmp_path / "run", ["c"], screen.console):
        run = Run(tmp_path / "run")
        run.attempt("c")
        run.step("c", 8)
        screen.has("c: 8/1,800")


def test_a_terminal_gets_a_table_that_changes(run: Run, quick: None) -> None:
    run.attempt("c")
    screen = Screen(terminal=True)
    with Live(run.folder, ["c"], screen.console):
        screen.has("starting")
        run.step("c", 900)
        screen.has("50 %")


def test_an_interrupted_terminal_is_left_as_it_was(run: Run, quick: None) -> None:
    streams, threads = (sys.stdout, sys.stderr), threading.active_count()
    screen = Screen(terminal=True)
    with pytest.raises(KeyboardInterrupt), Live(run.folder, ["c"], screen.console):
        screen.has("waiting")
        raise KeyboardInterrupt
    shown = screen.file.getvalue()
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is there
    assert shown.endswith("\x1b[2K")  # and the table is not
    assert (sys.stdout, sys.stderr) == streams and threading.active_count() == threads


def test_a_killed_process_leaves_a_cursor(run: Run) -> None:
    screen = Screen(terminal=True)
    with Live(run.folder, ["c"], screen.console):
        shown = screen.file.getvalue()
        assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_the_end_is_not_waited_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REFRESH_SECONDS", 60.0)
    threads = threading.active_count()
    with Live(run.folder, ["c"], Screen(terminal=False).console):
        assert threading.active_count() == threads + 1
    assert threading.active_count() == threads


@pytest.mark.parametrize("error", [OSError("gone"), RuntimeError("ours"), SystemExit(1)])
@pytest.mark.parametrize("terminal", [False, True])
def test_no_error_reaches_the_block(
    run: Run, quick: None, monkeypatch: pytest.MonkeyPatch, error: BaseException, terminal: bool
) -> None:
    """SystemExit is what rich raises when the other end of its pipe has gone."""
    uncaught: list[object] = []
    monkeypatch.setattr(threading, "excepthook", uncaught.append)
    run.attempt("c")
    screen, raised = Screen(terminal), threading.Event()
    with Live(run.folder, ["c"], screen.console):

        def fail(*_: object, **__: object) -> None:
            raised.set()
            raise error

        monkeypatch.setattr(screen.console, "print", fail)
        run.step("c", 8)
        assert raised.wait(20)
    assert not uncaught


def test_the_thread_survives_a_look_that_fails(run: Run, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([OSError("stale file handle"), OSError("stale file handle")])
    read = RunReader.read

    def unsteady(self: RunReader) -> RunStatus:
        if error := next(looks, None):
            raise error
        return read(self)

    monkeypatch.setattr(RunReader, "read", unsteady)
    run.attempt("c")
    run.step("c", 8)
    screen = Screen(terminal=False)
    with Live(run.folder, ["c"], screen.console):
        screen.has("c: 8/")


# --- launch/status.py --------------------------------------------------------------------------------------------


def all_done(run: Run) -> None:
    run.launch("a", ["c"])
    run.done("c")


def one_failed_one_runs(run: Run) -> None:
    failed(run)
    run.attempt("d")


def one_failed_one_waits(run: Run) -> None:
    run.launch("a", ["c", "d"])
    failed(run)


@pytest.mark.parametrize(
    ("write", "code"),
    [
        (all_done, 0),
        (lambda run: None, 1),
        (running, 1),
        (stopped, 1),
        (silent, 1),
        (one_failed_one_runs, 1),
        (one_failed_one_waits, 4),
    ],
)
def test_exit_codes(run: Run, write: Callable[[Run], None], code: int) -> None:
    write(run)
    assert main([str(run.folder)]) == code


def test_a_folder_without_a_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 3
    assert str(tmp_path) in capsys.readouterr().err


def test_json_for_machines(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    fill(run, 15)
    run.lines("log/a/rank-00000.jsonl", {"event": "over", "code": 0, "nothing_left": 30.0})
    assert main([str(run.folder), "--json"]) == 1
    status = json.loads(capsys.readouterr().out)
    assert status["counts"] == {"done": 5, "running": 2, "failed": 1, "stopped": 1, "lost": 1, "waiting": 5}
    assert status["categories"][6]["images_per_second"] == 12345.6 and status["categories"][7]["code"] == 137
    assert status["ranks"]["0"]["nothing_left"] == 30.0
    assert not status["complete"] and not status["over"]


def test_watching_ends_with_the_run(run: Run, quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    run.launch("a", ["c"])
    run.attempt("c")
    codes: list[int] = []
    watcher = threading.Thread(target=lambda: codes.append(main([str(run.folder), "--watch"])))
    watcher.start()
    run.done("c")
    watcher.join(20)
    assert codes == [0] and "1 of 1 done" in capsys.readouterr().out


def test_an_interrupted_watch_says_so_and_leaves_the_table(run: Run) -> None:
    run.attempt("c")
    master, slave = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "launch/status.py", str(run.folder), "--watch"],
        cwd=REPOSITORY, env=environment(TERM="xterm", COLUMNS="80"), stdin=slave, stdout=slave, stderr=slave,
    )  # fmt: skip
    os.close(slave)
    shown = b""
    while b"starting" not in shown:
        shown += os.read(master, 4096)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    after = os.read(master, 65536)
    os.close(master)
    assert b"starting" in after and b"Traceback" not in after


def test_it_starts_without_torch(run: Run) -> None:
    command = [sys.executable, "-X", "importtime", "launch/status.py", str(run.folder), "--json"]
    ended = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=60)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in ended.stderr.splitlines()}
    assert "rich" in imported and not imported & {"torch", "deepspeed"}


def test_the_news_of_a_category_are_told_once() -> None:
    waiting = CategoryStatus("nut", "waiting")
    resumed = CategoryStatus("nut", "running", 2, last_resume={"samples": 1600, "step": 200})
    failed = CategoryStatus("nut", "failed", 2, code=137, reason="gone")
    again = CategoryStatus("nut", "running", 3)
    done = CategoryStatus(
        "nut", "done", 3, pixel_auroc=0.98765, metrics={"reconstruction": {"ssim": 0.5, "spread": None}}
    )
    assert list(news(waiting, resumed)) == ["nut: resumed at sample 1,600 (step 200)"]
    assert list(news(resumed, failed)) == ["nut: failed with exit code 137: gone"]
    assert list(news(failed, again)) == ["nut: tried again (attempt 3) from its last checkpoint"]
    assert list(news(again, done)) == ["nut: done, pixel AUROC 0.988, ssim 0.500, spread –"]
    assert not [line for status in (waiting, resumed, failed, again, done) for line in news(status, status)]
