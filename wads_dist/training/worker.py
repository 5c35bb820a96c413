"""One rank of one category's training, in a process of its own: ``python -m wads_dist.training.worker``.

DeepSpeed cannot be initialised twice in one process, and a category that dies must take nothing with it.
"""

import argparse
import contextlib
import faulthandler
import os
import signal
import sys

from wads_dist.common.errors import EXPLAINED, ConfigError, ExitCode, PreemptedError, exit_code
from wads_dist.common.heartbeat import Heartbeat
from wads_dist.common.processes import leave
from wads_dist.common.signals import worker_signals
from wads_dist.config.load import load_config
from wads_dist.runs.events import Events
from wads_dist.runs.record import refuse_links
from wads_dist.shards.addresses import public
from wads_dist.shards.arguments import Parser, local_path
from wads_dist.shards.names import category_problem, printable, quoted
from wads_dist.training.loop import CategoryTraining, say


def category(text: str) -> str:
    if problem := category_problem(text):
        raise argparse.ArgumentTypeError(f"{quoted(text)} {problem}")
    return text


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--run", type=local_path, required=True, help="the run's folder")
    parser.add_argument("--category", required=True, type=category)
    parser.add_argument("--shards", required=True, help="location of the shards")
    parser.add_argument("--config", required=True, help="the launch's configuration")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of this rank")
    parser.add_argument("--cores", help="cores this rank may use, separated by commas; none: any")
    parser.add_argument("--lease", type=local_path, help="file that says that the category is this group's")
    parser.add_argument("--heartbeat", type=int, help="descriptor of the pipe on which the supervisor listens")
    arguments = parser.parse_args()
    stop, heartbeat = worker_signals(), Heartbeat()
    if arguments.heartbeat is not None:
        heartbeat.beat(arguments.heartbeat)
    if arguments.cores:
        os.sched_setaffinity(0, {int(core) for core in arguments.cores.split(",")})
    rank = int(os.environ.get("RANK", 0))
    try:
        refuse_links(arguments.run, [arguments.category])
    except ConfigError as error:
        print(f"{arguments.category}, rank {rank}: {error}", file=sys.stderr)
        return exit_code(error)
    folder = arguments.run / arguments.category
    folder.mkdir(parents=True, exist_ok=True)
    stacks = folder / f"stacks-rank-{rank:05d}.txt"
    faulthandler.register(signal.SIGUSR2, stacks.open("w"))  # supervisors send it when a rank hangs
    try:
        config = load_config(["--config", arguments.config])
        training = CategoryTraining(
            config,
            arguments.run,
            arguments.category,
            arguments.shards,
            arguments.threads,
            arguments.lease,
            stop,
            heartbeat,
        )
        training.train()
        training.publish()
    except PreemptedError as error:
        if rank == 0:
            say(f"{arguments.category}: {error}")
        return error.exit_code
    except Exception as error:
        text = printable(public(str(error)))
        with contextlib.suppress(OSError):  # for the lease's end; any rank may be the one that knows
            Events(folder, True).write("failed", rank=rank, reason=text or type(error).__name__)
        if not isinstance(error, EXPLAINED):
            raise
        print(f"{arguments.category}, rank {rank}: {text}", file=sys.stderr)
        return exit_code(error)
    finally:
        stacks.unlink(missing_ok=True)
    return ExitCode.OK


if __name__ == "__main__":
    leave(main())
