"""Score images with a trained or exported model: ``python launch/predict.py --model RUN/CATEGORY INPUT... --out DIR``."""

import argparse
import sys
from collections.abc import Sequence

from wads_dist.deploy.defaults import OVERLAP
from wads_dist.launch.command import run_command
from wads_dist.shards.arguments import Parser, local, local_path


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Scores images and shows where they are anomalous.\n\n"
        "For every image, at its own resolution, below DIR and named after the image's path:\n"
        "  NAME.scores.png   anomaly probability, 16-bit grey\n"
        "  NAME.heat.png     the same in colours\n"
        "  NAME.overlay.png  heat map over the image, outline of the mask\n"
        "  NAME.mask.png     anomalous pixels white (if there is a threshold)\n"
        "and for all of them DIR/results.csv and DIR/results.jsonl: path, width, height, score, decision, thresholds\n"
        "and where they came from, anomalous fraction of the area, the box x y width height around it, and the problem\n"
        "of a file that was skipped. An image is turned upright by its EXIF orientation, as for training; results and\n"
        "pictures are of what viewers show.",
        epilog="Exit code 0: all images are scored; 1: results cannot be written, or the model's numbers are not finite;\n"
        "2: bad arguments, or no usable model; 3: some files were skipped, each named with its problem (the others are\n"
        "scored); 130: interrupted (also by SIGTERM), what was finished is there and listed.",
    )
    add = parser.add_argument
    add("input", nargs="+", type=local, metavar="INPUT", help="image, folder (searched recursively) or pattern")
    add("--model", required=True, type=local_path, metavar="MODEL", help="RUN/CATEGORY, or an exported model.onnx")
    add("--out", required=True, type=local_path, metavar="DIR", help="folder for the results")
    add("--threshold", type=float, metavar="X", help="score from which an image is anomalous (default: the one saved with "
        "the model)")  # fmt: skip
    add("--pixel-threshold", type=float, metavar="X", help="probability from which a pixel is anomalous (default: "
        "likewise)")  # fmt: skip
    add("--tile", action="store_true", help="score images larger than a tile in overlapping tiles, for models whose training "
        "images showed as much as one tile does; without this, images are resized as in training. The score is that of the "
        "highest tile: the threshold saved with the model, chosen for whole images, calls far more normal ones anomalous; "
        "give a --threshold from the scores of tiled normal images")  # fmt: skip
    add("--tile-size", type=int, metavar="SIDE", help="side of a tile in pixels of the image (default: data.image_size of "
        "the training); implies --tile")  # fmt: skip
    add("--overlap", type=float, default=OVERLAP, metavar="F", help="fraction of a tile shared with its neighbours, 0 to 0.9 "
        "(default: %(default)s)")  # fmt: skip
    add("--batch-size", default="auto", metavar="auto|N", help="images at a time (default: auto); halved while they do not "
        "fit into memory")  # fmt: skip
    add("--max-pixels", type=int, metavar="N", help="skip images of more pixels, before they are decoded (default: Pillow's "
        "limit, 178 million)")  # fmt: skip
    add("--device", metavar="NAME", help="cpu, cuda, ... (default: the accelerator that torch finds, or else cpu)")
    add("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(argv)
    for name in ("threshold", "pixel_threshold"):
        if (value := getattr(given, name)) is not None and not 0 <= value <= 1:
            parser.error(f"argument --{name.replace('_', '-')}: {value} must be from 0 to 1")
    if not 0 <= given.overlap <= 0.9:
        parser.error(f"argument --overlap: {given.overlap} must be from 0 to 0.9")
    if given.batch_size != "auto" and not (given.batch_size.isdecimal() and int(given.batch_size)):
        parser.error(f"argument --batch-size: {given.batch_size!r} must be auto or at least 1")
    if given.tile_size is not None and given.tile_size < 8:
        parser.error(f"argument --tile-size: {given.tile_size} must be at least 8")
    if given.max_pixels is not None and given.max_pixels < 1:
        parser.error(f"argument --max-pixels: {given.max_pixels} must be at least 1")
    if given.out.exists() and not given.out.is_dir():
        parser.error(f"argument --out: {given.out} is a file")
    return given


def predict(given: argparse.Namespace) -> int:
    # These import torch; a misspelled option is told before.
    import warnings

    from PIL import Image
    from rich.console import Console

    from wads_dist.deploy.predict import load
    from wads_dist.deploy.predict_files import predict_command

    batch_size = None if given.batch_size == "auto" else int(given.batch_size)
    detector = load(given.model, given.threshold, given.pixel_threshold, batch_size, given.device)
    tile = given.tile_size or (detector.description.image_size if given.tile else None)
    if tile and given.threshold is None and detector.thresholds.image is not None:
        text = (
            "The saved threshold was chosen for whole images; the score of a tiled one is that of its highest tile, so that "
            "far more normal images are called anomalous. Give a --threshold from the scores of tiled normal images."
        )
        Console(stderr=True).print(text, style="yellow", soft_wrap=True)
    if given.max_pixels:
        Image.MAX_IMAGE_PIXELS = -(-given.max_pixels // 2)  # Pillow refuses more than twice this
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # which it prints for more than half of the limit
    return predict_command(detector, given.input, given.out, tile, given.overlap, given.json)


def main(argv: Sequence[str] | None = None) -> int:
    given = parse(argv)
    return run_command(lambda _: predict(given), [], resumes=False)


if __name__ == "__main__":
    sys.exit(main())
