"""Train every run of a grid and its seeds, here or through Slurm: ``python launch/sweep.py --out SWEEP [--grid FIELD=A,B]
[--variants FILE] [--seeds N] [--slurm] [--config FILE] [--SECTION.FIELD VALUE ...]``."""

import argparse
from collections.abc import Sequence

from wads_dist.common.processes import leave
from wads_dist.config.schema import Config
from wads_dist.launch.command import run_command
from wads_dist.shards.arguments import Parser, local_path

DESCRIPTION = (
    "Trains every run of a grid and its seeds, each over all of its categories: here, one run after the other, or as a Slurm "
    "job array with a task for each category of each run. The same command goes on with what is not done."
)


def parse(
    argv: Sequence[str] | None = None, *, description: str = DESCRIPTION, grid: bool = True
) -> tuple[argparse.Namespace, list[str]]:
    """The options of the sweep, and the rest: settings that all of its runs share. Without ``grid``, that is none of them."""
    parser = Parser(
        usage="%(prog)s --out SWEEP [options] [--config FILE] [--SECTION.FIELD VALUE ...]",
        description=description,
        epilog="Settings are those of wads train (see its --help). Exit code 0: all is done; 2: the configuration is "
        "wrong; 3: the data is; 4: categories have failed; 5: the folder holds another sweep; 7: stopped; 130: interrupted.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--out", type=local_path, required=True, metavar="SWEEP", help="folder of the sweep, with a folder for each run"
    )
    if grid:
        add("--grid", action="append", metavar="SECTION.FIELD=A,B,...", help="values of a setting, one run for each; several "
            "--grid multiply. Values that hold commas are separated by semicolons")  # fmt: skip
        add("--variants", type=local_path, metavar="FILE", help="TOML file with a table of settings for each of several "
            "variants; every point of the grid in each of them")  # fmt: skip
        add("--only", metavar="A,B,...", help="these of the variants; to add others later, name them beside these")
    parser.set_defaults(grid=[], variants=None, only=None)
    add("--seeds", type=int, metavar="N", help="N runs for each point of the grid, trainer.seed counting up")
    add("--ranks", type=int, metavar="N", help="processes of a launch (default: one for each accelerator)")
    add("--dry-run", action="store_true", help="print the plan (and the job script), and write nothing")
    add("--no-watch", action="store_true", help="no table; with --slurm, return once all is submitted")
    add("--json", action="store_true", help="print the summary (of --dry-run: the plan) as one JSON object")
    add("--task", type=int, help=argparse.SUPPRESS)  # what the job script calls: train one category of one run
    group = parser.add_argument_group("Slurm")
    group.add_argument("--slurm", action="store_true", help="submit a job array, and watch it")
    asked = [
        group.add_argument("--array-limit", type=int, metavar="K", help="tasks that may run at the same time"),
        group.add_argument("--time", help="time limit of a task, such as 04:00:00; it saves before, and goes on in a next one"),
        group.add_argument("--partition", metavar="P"),
        group.add_argument("--gpus", type=int, metavar="N", help="GPUs of a task, with a rank on each"),
        group.add_argument("--cpus", type=int, metavar="N", help="CPUs of a task"),
        group.add_argument("--signal-before", type=int, default=120, metavar="S",
                           help="seconds before the time limit at which a task saves (default: 120)"),
        group.add_argument("--sbatch", action="append", default=[], metavar="OPTION",
                           help='a further option of sbatch: --sbatch="--account=x"'),
    ]  # fmt: skip
    given, rest = parser.parse_known_args(argv)
    for action in asked:
        if not given.slurm and getattr(given, action.dest) != action.default:
            parser.error(f"argument {action.option_strings[0]}: goes with --slurm")
    if given.only and not given.variants:
        parser.error("argument --only: goes with --variants")
    for name in ("seeds", "ranks", "array_limit", "gpus", "cpus", "signal_before"):
        if (value := getattr(given, name)) is not None and value < 1:
            parser.error(f"argument --{name.replace('_', '-')}: {value} must be at least 1")
    if given.ranks and given.gpus:
        parser.error("argument --ranks: with --gpus there is a rank on each; give one of them")
    return given, rest


def main(argv: Sequence[str] | None = None) -> int:
    given, settings = parse(argv)

    def run(_: Config) -> int:
        from wads_dist.sweep.run import sweep  # imports DeepSpeed; a misspelled option is told before

        return sweep(given, settings)

    # Without settings of its own: those of a sweep are read with the grid's, so that all problems are said at once.
    return run_command(run, [])


if __name__ == "__main__":
    leave(main())
