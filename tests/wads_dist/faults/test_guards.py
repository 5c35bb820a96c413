"""Rows 9, 10 and 12 of the fault table: a NaN, a spike, a slow rank and a hung rank in one run of two
ranks; then nothing but NaN. That a skipped step leaves nothing behind is shown bitwise in ``test_engines.py``."""

import json
from pathlib import Path

import pytest

from tests.support.launching import BATCH, CATEGORY, events, launched, summary, unlaunched
from wads_dist.common.errors import ExitCode

pytestmark = [pytest.mark.fault, pytest.mark.slow]
PROGRAM = "tests/wads_dist/programs/faulty_train.py"
NAN, SPIKE, SLOW, HANG = 6, 9, range(12, 16), 18
SETTINGS = "--trainer.spike_window 4 --trainer.max_rejected 6 --trainer.hang_timeout 25".split()


@pytest.fixture(scope="module")
def run(module_path: Path) -> Path:
    return module_path / "run"


def start(shards: Path, run: Path, faults: list[tuple[str, int, int, int]]) -> tuple[int, str]:
    """Exit code and output of the run with faulty workers."""
    arguments = unlaunched(shards, run, *SETTINGS, program=PROGRAM)
    log = run.parent / "log"
    with launched(run, arguments, log, FAULTS=json.dumps(faults), BATCH=str(BATCH)) as faulty:
        code, _ = faulty.ended(500)
    return code, log.read_text()


@pytest.fixture(scope="module")
def first_life(demo_shards: Path, run: Path) -> tuple[int, str]:
    return start(
        demo_shards,
        run,
        [
            ("nan", 1, NAN, NAN + 1),
            ("spike", 0, SPIKE, SPIKE + 1),
            ("slow", 1, SLOW.start, SLOW.stop),
            ("hang", 1, HANG, HANG + 1),
        ],
    )


def skipped(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / CATEGORY / "rejected.jsonl").read_text().splitlines()]


def test_a_nan_and_a_spike_are_skipped_and_their_samples_written_down(first_life: tuple[int, str], run: Path) -> None:
    nan, spike = events(run, "rejected")
    print(nan, spike, *skipped(run), sep="\n")
    half = BATCH // 2
    assert (nan["step"], nan["reason"], nan["ranks"], nan["loss"]) == (NAN + 1, "not finite", [1], None)
    assert nan["samples"] == list(range(NAN * BATCH + half, (NAN + 1) * BATCH))  # the second half is rank 1's
    assert (spike["step"], spike["reason"], spike["ranks"]) == (SPIKE + 1, "spike", [0])
    assert spike["samples"] == list(range(SPIKE * BATCH, SPIKE * BATCH + half))
    assert spike["loss"] > 20 * spike["threshold"]  # the threshold is five times the usual
    for line, event in zip(skipped(run), (nan, spike), strict=True):
        images = line["samples"]
        assert isinstance(images, dict) and [int(i) for i in images] == event["samples"]
        assert all(image.startswith("train-000000.tar/") for image in images.values())
    assert events(run, "step")[-1]["rejected"] == 2  # and no other step


def test_the_slow_rank_has_a_score(first_life: tuple[int, str], run: Path) -> None:
    # A step's own time is known at the next one; the scores of the slow steps together, because the machine may be busy.
    scores = [event["slowness"] for event in events(run, "step") if SLOW.start + 2 <= event["step"] <= SLOW.stop + 1]
    print(f"slowness of ranks 0 and 1 while rank 1 is slow: {scores}")
    assert len(scores) == len(SLOW)
    assert sum(score[1] for score in scores) > 1.5 * sum(score[0] for score in scores)


def test_the_hung_rank_is_named(first_life: tuple[int, str], run: Path) -> None:
    code, text = first_life
    (hung,) = events(run, "hung")
    print(hung["problem"])
    assert code == ExitCode.RANK_LOST and summary(run)["failed"] == {CATEGORY: ExitCode.RANK_LOST}
    assert hung["problem"].startswith("rank 1 on host ") and f"no progress since step {HANG} for" in hung["problem"]
    assert f"waiting for it: rank 0 (step {HANG}, " in hung["problem"] and hung["problem"] in text
    stacks = [(run / CATEGORY / f"stacks-rank-0000{rank}.txt").read_text() for rank in range(2)]
    assert "faulty_batch" in stacks[1] and "backward" in stacks[0]


def test_nothing_but_nan_is_given_up_and_the_samples_are_named(
    first_life: tuple[int, str], demo_shards: Path, run: Path
) -> None:
    code, text = start(demo_shards, run, [("nan", 0, HANG + 1, 10_000)])
    resumed = events(run, "resume")[-1]
    saved = resumed["step"]
    assert 0 < saved <= HANG  # the same command has gone on from before the hang
    first = HANG + 1  # the step that hung is fine now
    print(text[text.index("6 steps in a row") :][:400])
    assert code == ExitCode.NOT_FINITE and summary(run)["failed"] == {CATEGORY: ExitCode.NOT_FINITE}
    last = (first + 6) * BATCH
    assert "6 steps in a row were skipped" in text and f"it used the samples {last - BATCH} to {last - 1}" in text
    assert [e["step"] for e in events(run, "rejected")[2:]] == list(range(first + 1, first + 7))
