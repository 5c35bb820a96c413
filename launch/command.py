"""What every command under ``launch/`` does around its one function: read the settings, and turn errors into exit codes."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from wads_dist.common.errors import EXPLAINED, ConfigError, RankLostError, exit_code
from wads_dist.common.files import PACKAGE
from wads_dist.config.load import load_config
from wads_dist.config.schema import Config
from wads_dist.shards.addresses import public
from wads_dist.shards.names import printable

SAY_SECONDS = 10.0


def check_program(program: Path) -> None:
    """Raises ConfigError if ``program`` is of another checkout than what was imported."""
    beside, ours = program.resolve().parent, Path(__file__).resolve().parent
    if program.is_file() and beside.name == ours.name and (beside / "wads.py").is_file() and beside != ours:
        raise ConfigError([f"{program} belongs to another copy of WADS-dist than {PACKAGE}, which this Python imports; install "
            f"its own (pip install -e {beside.parent}), or start {PACKAGE / 'launch' / program.name}"])  # fmt: skip


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _let_the_first_rank_say_it() -> None:
    """Every rank finds what is wrong with the configuration by itself, and a launcher ends them all as soon as one has left: by
    then the first, which may be slower, must have told the user. The launcher's signal ends the wait."""
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(SAY_SECONDS)


def run_command(action: Callable[[Config], int], argv: Sequence[str] | None = None, *, resumes: bool = True) -> int:
    """Reads the configuration, calls ``action``, and returns the exit code (README lists them).

    Args:
        resumes: ``action`` has checkpoints, from which an interrupted command goes on.
    """
    first = os.environ.get("RANK", "0") == "0"
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)  # a scheduler's way of saying Ctrl-C: children are ended, not left
    try:
        check_program(Path(sys.argv[0]))
        return action(load_config(argv))
    except EXPLAINED as error:
        if first or isinstance(error, RankLostError):  # the first rank may be the one that is gone
            advice = "; the same command goes on from the last checkpoint" if resumes else ""
            text = printable(public(str(error))) or f"interrupted{advice}"
            console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
            console.print(text, style="red")
            if isinstance(error, ConfigError) and error.hint:
                console.print("", error.hint, sep="\n")
        elif isinstance(error, ConfigError):
            _let_the_first_rank_say_it()
        return exit_code(error)
