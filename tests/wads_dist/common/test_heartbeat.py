"""Who stands still, from what the ranks tell; a pipe between two processes in the fault tests."""

import json
import os
import time

import pytest
import torch

from wads_dist.common.heartbeat import Heartbeat, Listener, WorkerState, stalled
from wads_dist.training.timing import OwnTime


def worker_state(tick: int, phase: str = "backward", still: float = 0.0, silent: float = 0.0) -> WorkerState:
    return WorkerState(tick, tick // 5, phase, still, silent, host=f"h{tick}")


def test_the_rank_that_is_behind_is_named_and_the_others_wait_for_it() -> None:
    problem = stalled(
        {0: worker_state(13, still=9.0), 1: worker_state(11, "data", still=9.5), 2: worker_state(13, still=9.0)}, 9
    )
    assert problem is not None
    assert problem.startswith("rank 1 on host h11: no progress since step 2 for 10 s (data)")
    assert "waiting for it: rank 0 (step 2, backward), rank 2 (step 2, backward)" in problem


def test_a_frozen_process_is_named_even_if_it_is_not_behind() -> None:
    problem = stalled({0: worker_state(13, still=20.0), 1: worker_state(13, still=20.0, silent=12.0)}, 10)
    assert problem is not None and problem.startswith("rank 1 on host h13") and "its process is frozen" in problem


def test_when_none_is_behind_that_is_said() -> None:
    problem = stalled({0: worker_state(13, still=20.0), 1: worker_state(13, still=20.0)}, 10)
    assert problem is not None and problem.startswith("no rank makes progress, and none is behind")


def test_progress_and_loading_are_no_hang() -> None:
    assert stalled({0: worker_state(13, still=5.0), 1: worker_state(13, still=5.0)}, 10) is None
    assert stalled({0: worker_state(0, "load", still=1000.0)}, 10) is None
    assert stalled({0: worker_state(13, still=1000.0, silent=1000.0)}, 0) is None
    assert stalled({}, 10) is None


def test_a_listener_hears_the_last_line_and_ages_it_when_nothing_more_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    listener = Listener(reader, "here")
    lines = [
        json.dumps({"tick": tick, "step": 1, "phase": "data", "still": 0.5, "silent": 0, "host": ""}) for tick in (3, 4)
    ]
    os.write(writer, "\n".join(lines).encode() + b"\n" + b'{"tick": 5')
    heard = listener.worker_state()
    assert (heard.tick, heard.host, heard.still) == (4, "here", 0.5)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 60)
    aged = listener.worker_state()
    assert aged.silent >= 60 and aged.still >= 58


def test_a_heartbeat_counts_the_phases_entered() -> None:
    heartbeat = Heartbeat()
    heartbeat.enter("data", 7)
    heartbeat.enter("forward", 7)
    assert heartbeat._state[:3] == (2, 7, "forward")


def test_own_time_adds_up_what_lies_inside_and_starts_anew_when_taken() -> None:
    own = OwnTime("cpu")
    for _ in range(2):
        with own:
            time.sleep(0.01)
    assert own.take() >= 0.02 and own.take() == 0


@pytest.mark.gpu
def test_own_time_on_a_gpu_is_the_streams() -> None:
    own, x = OwnTime("cuda"), torch.ones(4096, 4096, device="cuda")
    with own:
        for _ in range(20):
            x = x @ x / 4096
    torch.cuda.synchronize()
    assert own.take() > 5e-3 and own.take() == 0  # 2.7 TFLOP; launching them takes a tenth of that
