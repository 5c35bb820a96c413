"""The report of a run as one HTML file: ``python launch/report.py RUN [--out FILE] [--json]``."""

import sys
from collections.abc import Sequence

from wads_dist.reporting.report import show_report
from wads_dist.shards.arguments import Parser, local_path


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        description="Writes what a run has come to as one HTML file that holds everything itself: scores beside the paper's, "
        "pictures, curves, losses, times and settings. Training writes the same at its end; a run that goes on, or has "
        "failed, can be reported at any time.",
        epilog="Exit code 0: written; 1: it cannot be written; 2: bad arguments; 3: no run in this folder.",
    )
    parser.add_argument("run", type=local_path, metavar="RUN", help="the run's folder (run.dir)")
    parser.add_argument("--out", type=local_path, metavar="FILE", help="the file to write (default: RUN/report.html)")
    parser.add_argument(
        "--json", action="store_true", help="print the numbers as one JSON object; a file only with --out"
    )
    given = parser.parse_args(argv)
    return show_report(given.run, given.out, given.json)


if __name__ == "__main__":
    sys.exit(main())
