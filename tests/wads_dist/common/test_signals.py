"""What counts as one request to stop, and which ancestors are launchers."""

import signal
import subprocess
import sys
import time

import pytest

from wads_dist.common import signals
from wads_dist.common.errors import ExitCode
from wads_dist.common.signals import StopRequest, is_launcher


@pytest.fixture
def ended() -> list[ExitCode]:
    return []


def test_a_request_outside_of_training_ends_at_once(ended: list[ExitCode]) -> None:
    StopRequest(ended.append).receive(signal.SIGTERM)
    assert ended == [ExitCode.PREEMPTED]


def test_inside_the_first_is_noted_and_the_second_ends(ended: list[ExitCode], monkeypatch: pytest.MonkeyPatch) -> None:
    request = StopRequest(ended.append)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with request.deferred():
        request.receive(signal.SIGUSR1)
        request.receive(signal.SIGTERM)  # the launcher passes on what the scheduler has sent to everyone
        assert request.requested and ended == []
        now += signals.SAME_SECONDS + 0.1
        request.receive(signal.SIGTERM)
        assert ended == [ExitCode.PREEMPTED]


def test_the_first_signal_of_a_rank_that_others_have_asked_to_stop_is_no_second_one(
    ended: list[ExitCode], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    request = StopRequest(ended.append)
    with request.deferred():
        request.request()
        now[0] += 60
        request.receive(signal.SIGTERM)
        assert request.requested and ended == []
        now[0] += 60
        request.receive(signal.SIGTERM)
    assert ended == [ExitCode.PREEMPTED]


def test_an_interrupt_always_ends_at_once(ended: list[ExitCode]) -> None:
    request = StopRequest(ended.append)
    with request.deferred():
        request.receive(signal.SIGINT)
    assert ended == [ExitCode.INTERRUPTED]


@pytest.mark.parametrize(
    ("command", "below", "expected"),
    [
        ("/usr/bin/python3 /venv/bin/deepspeed --num_gpus 2 launch/train.py", True, True),
        ("python -u -m deepspeed.launcher.launch --world_info=x launch/train.py", False, True),
        ("sh -c cd%/x;%python%-u%-m%deepspeed.launcher.launch%--node_rank=1", True, True),
        ("/usr/bin/python3 /venv/bin/torchrun launch/train.py", False, True),
        ("sshd:%root@notty", True, True),
        ("sshd:%root@notty", False, False),
        ("sshd:%/usr/sbin/sshd%-D%[listener]%0%of%10", True, False),
        ("bash", True, False),
        ("bash run.sh deepspeed", False, False),
        ("make demo", True, False),
    ],
)
def test_launchers_are_known_by_their_command(command: str, below: bool, expected: bool) -> None:
    arguments = [part.replace("%", " ") for part in command.split()]
    assert is_launcher(arguments, below) == expected


def test_a_dead_process_that_nobody_has_collected_is_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert signals.start_time(process.pid) is not None
    process.kill()
    deadline = time.monotonic() + 20
    while signals.start_time(process.pid) is not None:
        assert time.monotonic() < deadline
    process.communicate()
    assert signals.start_time(process.pid) is None
