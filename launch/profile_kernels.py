"""Profile both kernels beside their peers: ``python launch/profile_kernels.py [--json FILE] [--plot FILE.png] [--help]``."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wads_dist.profiling.names import DTYPES, KERNELS, LAYOUTS
from wads_dist.shards.arguments import Parser, local, local_path

if TYPE_CHECKING:
    from wads_dist.profiling.kernels import Options


def parse(argv: Sequence[str] | None) -> "Options":
    parser = Parser(
        description="Times the objective and the synthesis beside what others would use in their place.",
        epilog="Exit code 0; 1 if one of this checkout's kernels failed (the other results are still written); 2 for bad "
        "arguments.",
    )
    add = parser.add_argument
    add("--batch", type=int, nargs="+", dest="batches", help="batch sizes (default: 64 256 on a GPU, 32 on a CPU)")
    add("--size", type=int, default=128, help="side of the images in pixels (default: 128)")
    add("--dtype", nargs="+", choices=DTYPES, dest="dtypes", help="default: all three on a GPU, fp32 on a CPU")
    add("--kernel", nargs="+", choices=KERNELS, default=KERNELS, dest="kernels", help="default: both")
    add("--only", nargs="+", metavar="NAME", default=(), help="implementations, named as in the table (default: all)")
    add("--seconds", type=float, default=1.0, help="time for each measurement (default: 1); at least 5 readings")
    add("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    add("--layout", nargs="+", choices=LAYOUTS, default=LAYOUTS[:1], dest="layouts", help="of the objective's images (default: "
        "contiguous; training's is channels_last)")  # fmt: skip
    add("--no-compiled", action="store_false", dest="compiled", help="no report on kernels compiled for other devices")
    add("--json", type=local, help="JSON file, written as results come; - for standard output, at the end")
    add(
        "--csv",
        type=local_path,
        help="CSV file, a line for each result with the device's name, written as results come",
    )
    add("--plot", type=local_path, help="roofline plot, a PNG file")
    add("--trace", type=local_path, help="Chrome trace of one call of each")
    given = parser.parse_args(argv)

    # These import torch; a misspelled option is told before.
    import torch

    from wads_dist.kernels.objective import WINDOW
    from wads_dist.profiling.kernels import Options, candidates, cases
    from wads_dist.profiling.peers import IMPLEMENTATIONS

    gpu = torch.cuda.is_available()
    given.device = given.device or ("cuda" if gpu else "cpu")
    on_gpu = given.device == "cuda"
    given.batches = given.batches or ((64, 256) if on_gpu else (32,))
    given.dtypes = given.dtypes or (tuple(DTYPES) if on_gpu else ("fp32",))
    if on_gpu and not gpu:
        parser.error("argument --device: torch sees no GPU here; leave --device out, or say cpu")
    known = dict.fromkeys(i.name for i in IMPLEMENTATIONS)
    if unknown := [name for name in given.only if name not in known]:
        parser.error(f"argument --only: invalid choice: {unknown[0]!r} (choose from {', '.join(known)})")
    if min(given.batches) < 1:
        parser.error(f"argument --batch: {min(given.batches)} must be at least 1")
    if given.size < WINDOW:
        parser.error(f"argument --size: {given.size} must be at least {WINDOW}")
    if not 0 <= given.seconds < 3600:
        parser.error(f"argument --seconds: {given.seconds} must be from 0 to 3600")
    for name in ("json", "csv", "plot", "trace"):
        path = Path(getattr(given, name) or "-")
        if str(path) != "-" and (path.is_dir() or not path.absolute().parent.is_dir()):
            parser.error(f"argument --{name}: '{path}' must be a file in a folder that exists")
    options = Options(**vars(given) | {"device": torch.device(given.device)})
    if not any(candidates(case, options.only) for case in cases(options)):
        parser.error(
            f"none of {', '.join(options.only) or 'the implementations'} can be measured here on {given.device}"
        )
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    from wads_dist.profiling.kernels import profile_kernels

    return profile_kernels(options)


if __name__ == "__main__":
    sys.exit(main())
