"""Where the time of a training step goes: ``[deepspeed] launch/profile_step.py [--steps 20] [--json FILE] [--config FILE]
[--SECTION.FIELD VALUE ...]``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from wads_dist.common.processes import leave
from wads_dist.config.schema import Config
from wads_dist.launch.command import run_command
from wads_dist.shards.arguments import Parser, local, local_path


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The options of the measurement, and the rest: the settings of a run."""
    parser = Parser(
        usage="%(prog)s [--steps N] [--json FILE] [--trace FILE] [--config FILE] [--SECTION.FIELD VALUE ...]",
        description="Times the joint training step of a configuration on noise images: phases, operators, FLOPs by module, "
        "utilisation, memory. Alone it is one rank; under deepspeed, all of them.",
        epilog="Settings are those of wads train (see its --help). Exit code 0; 2: the configuration is wrong.",
        allow_abbrev=False,
    )
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="steps to time (default: 20)")
    parser.add_argument(
        "--json", type=local, metavar="FILE", help="also write the numbers to FILE; -: to standard output"
    )
    parser.add_argument("--trace", type=local_path, metavar="FILE", help="a Chrome trace of two steps")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher gives it
    given, settings = parser.parse_known_args(argv)
    if given.steps < 1:
        parser.error(f"argument --steps: {given.steps} must be at least 1")
    for name in ("json", "trace"):
        path = Path(getattr(given, name) or "-")
        if str(path) != "-" and (path.is_dir() or not path.absolute().parent.is_dir()):
            parser.error(f"argument --{name}: '{path}' must be a file in a folder that exists")
    return given, settings


def main(argv: Sequence[str] | None = None) -> int:
    given, settings = parse(argv)

    def run(config: Config) -> int:
        from wads_dist.profiling.step import profile_step
        from wads_dist.scheduler.rendezvous import unless_launched  # imports torch; a misspelled setting is told before

        unless_launched()
        return profile_step(config, given.steps, given.json, given.trace)

    return run_command(run, settings)


if __name__ == "__main__":
    leave(main())
