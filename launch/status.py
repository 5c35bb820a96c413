"""What a run is doing, from its folder alone: ``python launch/status.py RUN [--watch | --json]``."""

import sys
from collections.abc import Sequence

from wads_dist.reporting.status import show_status
from wads_dist.shards.arguments import Parser, local_path


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        description="Shows what a run is doing, from its folder alone; the run may be on another node.",
        epilog="Exit code 0: all categories are done; 1: not yet (running, waiting, stopped or lost); 2: bad arguments; "
        "3: no run in this folder; 4: nothing is running, and categories have failed; 130: interrupted.",
    )
    parser.add_argument("run", type=local_path, metavar="RUN", help="the run's folder (run.dir)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--watch", action="store_true", help="refresh every second until the run is over")
    how.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(argv)
    return show_status(given.run, given.watch, given.json)


if __name__ == "__main__":
    sys.exit(main())
