"""Export a trained category to ONNX and torch.export: ``python launch/export.py RUN/CATEGORY [--out DIR]``."""

import argparse
import math
import sys
from collections.abc import Sequence

from wads_dist.common.errors import ExitCode
from wads_dist.config.schema import Config
from wads_dist.deploy.defaults import FILES, MAX_IMAGES, TOLERANCE
from wads_dist.launch.command import run_command
from wads_dist.shards.arguments import Parser, local_path


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        description=f"Writes {', '.join(FILES.values())} and model.json (preprocessing, thresholds, versions, parity). "
        "Each takes images float32 [N, 3, H, H] in [0, 1] (of a model with a frozen network as they are stored, [N, 3, S, S]) "
        "and gives reconstruction, probability map and image score.",
        epilog=f"Exit code 0: exported; 1: the files cannot be written; 2: bad arguments, no usable model, or packages that "
        f"are missing; 3: no image in --images can be read; {ExitCode.EXPORT_DIFFERS:d}: an export differs from the "
        "checkpoint by more than --tolerance, and nothing is written; 130: interrupted.",
    )
    add = parser.add_argument
    add("model", type=local_path, metavar="RUN/CATEGORY", help="folder of a category that has finished training")
    add("--out", type=local_path, metavar="DIR", help="default: RUN/CATEGORY/export")
    add(
        "--format",
        choices=(*FILES, "both"),
        default="both",
        help="default: both; onnx needs `pip install onnx onnxscript onnxruntime`; the other's file of an earlier export is "
        "removed",
    )
    add(
        "--images",
        type=local_path,
        metavar="DIR",
        help=f"images on which the exports are compared with the checkpoint, at most {MAX_IMAGES} (default: random ones)",
    )
    add(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="X",
        help="largest difference allowed (default: %(default)g)",
    )
    add("--json", action="store_true", help="print the content of model.json")
    given = parser.parse_args(argv)
    if not (math.isfinite(given.tolerance) and given.tolerance >= 0):
        parser.error(f"argument --tolerance: {given.tolerance} must be finite and at least 0")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    given = parse(argv)

    def export(_: Config) -> int:
        from wads_dist.deploy.export import export_command  # imports torch; a misspelled option is told before

        formats = list(FILES) if given.format == "both" else [given.format]
        return export_command(given.model, given.out, formats, given.images, given.tolerance, given.json)

    return run_command(export, [], resumes=False)


if __name__ == "__main__":
    sys.exit(main())
