"""Exit codes and the errors an entry point turns into one message and one of them."""

from collections.abc import Sequence
from enum import IntEnum

from wads_dist.shards.addresses import (
    public,
)
from wads_dist.shards.errors import DataError


class ExitCode(IntEnum):
    """What the commands under ``launch/`` return; README documents them."""

    OK = 0
    CRASHED = 1
    NOT_DONE = 1  # of launch/status.py alone
    BAD_CONFIG = 2
    BAD_DATA = 3
    CATEGORY_FAILED = 4
    REFUSED_RESUME = 5
    NOT_FINITE = 6
    PREEMPTED = 7
    RANK_LOST = 8
    EXPORT_DIFFERS = 9
    INTERRUPTED = 130


def is_out_of_memory(error: Exception) -> bool:
    """Beside torch's own exception for it, its CPU allocator, cuBLAS and onnxruntime have none, and say it in words."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or any(
        sign in words for sign in ("out of memory", "allocate", "alloc_failed")
    )


class WadsError(Exception):
    """An error whose message names the file or field, what was wrong, and what to do."""

    exit_code = ExitCode.CRASHED


class ModelWeightsError(WadsError):
    """Pretrained weights that cannot be had or do not fit."""

    exit_code = ExitCode.BAD_CONFIG


class ModelFileError(WadsError):
    """A trained or exported model's file that is absent, or not one that this version reads."""

    exit_code = ExitCode.BAD_CONFIG


class LaunchError(WadsError):
    """Ranks that cannot form one launch, because another one has their port."""

    exit_code = ExitCode.BAD_CONFIG


class ResumeError(WadsError):
    """A run's folder that belongs to another configuration or data set."""

    exit_code = ExitCode.REFUSED_RESUME


class NotFiniteError(WadsError):
    """Too many steps in a row whose loss or gradients were not finite."""

    exit_code = ExitCode.NOT_FINITE


class PreemptedError(WadsError):
    """Asked to stop by a signal; what could be saved is."""

    exit_code = ExitCode.PREEMPTED


class RankLostError(WadsError):
    """Another launched rank hangs, is gone, or has ended with an exit code of its own, so that this one cannot go on."""

    def __init__(self, message: str, code: int = ExitCode.RANK_LOST) -> None:
        super().__init__(message)
        self.exit_code = ExitCode(code)


class ConfigError(Exception):
    """A configuration that cannot be used. ``problems`` holds one line for each thing that is wrong, ``hint`` what may help."""

    def __init__(self, problems: Sequence[str], hint: str = "") -> None:
        self.problems, self.hint = [public(problem) for problem in problems], hint  # they may show what was typed
        super().__init__("\n".join(self.problems))


EXPLAINED = (WadsError, DataError, ConfigError, KeyboardInterrupt)
"""Errors whose message is enough; any other is a defect of ours and keeps its traceback."""


def exit_code(error: BaseException) -> ExitCode:
    """The exit code for an error that ended a command."""
    if isinstance(error, WadsError):
        return error.exit_code
    if isinstance(error, ConfigError):
        return ExitCode.BAD_CONFIG
    if isinstance(error, DataError):
        return ExitCode.BAD_DATA
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    return ExitCode.CRASHED
