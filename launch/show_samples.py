"""Look at what training is fed: ``python launch/show_samples.py --config FILE [--SECTION.FIELD VALUE ...] [--samples 24]
[--out samples.png]``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from wads_dist.config.schema import Config
from wads_dist.launch.command import run_command
from wads_dist.shards.arguments import Parser, local_path

MOST = 400  # a taller picture is more than matplotlib draws


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The options of the sheet, and the rest: the settings of a run."""
    parser = Parser(
        usage="%(prog)s [--samples N] [--out FILE] [--config FILE] [--SECTION.FIELD VALUE ...]",
        description="Draws a contact sheet of the first training samples of a configuration: the clean crop, the anomalous "
        "image, and the mask's outline on it. They are those that the training draws, to the bit on the same device.",
        epilog="Settings are those of wads train (see its --help). Exit code 0; 2: the configuration is wrong; 3: the "
        "data is; 130: interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("--samples", type=int, default=24, metavar="N", help="how many to draw (default: 24)")
    parser.add_argument("--out", type=local_path, default=Path("samples.png"), metavar="FILE", help="the picture (default: "
        "samples.png); of several categories, a folder of that name without its ending, with a picture of each")  # fmt: skip
    given, settings = parser.parse_known_args(argv)
    if not 1 <= given.samples <= MOST:
        parser.error(f"argument --samples: {given.samples} must be from 1 to {MOST}")
    if given.out.suffix.lower() not in (".png", ".jpg"):
        parser.error(f"argument --out: '{given.out}' must end in .png or .jpg")
    return given, settings


def main(argv: Sequence[str] | None = None) -> int:
    given, settings = parse(argv)

    def show(config: Config) -> int:
        from wads_dist.reporting import sample_sheet  # imports DeepSpeed; a misspelled setting is told before

        return sample_sheet.show_samples(config, given.samples, given.out)

    return run_command(show, settings, resumes=False)


if __name__ == "__main__":
    sys.exit(main())
