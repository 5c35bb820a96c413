"""Profile both kernels beside their peers: ``python launch/profile_kernels.py [--json FILE] [--plot FILE.png] [--help]``."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from kernels.objective import WINDOW
from wads_dist.entry import check_checkout
from wads_dist.kernel_peers import DTYPES, IMPLEMENTATIONS
from wads_dist.kernel_profile import Options, candidates, cases, profile_kernels

KERNELS = ("objective", "synthesis")


def number(least: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {least}")
        return int(text)

    return convert


def several(convert: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(convert(part.strip()) for part in text.split(","))


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} must be among {', '.join(names)}")
        return text

    return convert


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 3600:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of seconds from 0 to 3600")
    return value


def device(text: str) -> torch.device:
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} must be cpu or cuda")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch sees no GPU here; leave --device out, or say cpu")
    return torch.device(text)


def output(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} must be a file in a folder that exists")
    return path


def parse(argv: Sequence[str] | None) -> Options:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description="Times the objective and the synthesis beside what others would use in their place.",
        epilog="Exit code 0; 1 if one of this checkout's kernels failed (the other results are still written); 2 for bad "
        "arguments. Lists are separated by commas.",
    )
    add = parser.add_argument
    add("--batch", type=several(number(1)), help="batch sizes (default: 64,256 on a GPU, 32 on a CPU)")
    add("--size", type=number(WINDOW), default=128, help="side of the images in pixels (default: 128)")
    add(
        "--dtype", type=several(one_of(list(DTYPES))), help="storage types (default: all three on a GPU, fp32 on a CPU)"
    )
    add("--kernel", type=several(one_of(KERNELS)), default=KERNELS, help="objective, synthesis or both (default)")
    names = list(dict.fromkeys(i.name for i in IMPLEMENTATIONS))
    add("--only", type=several(one_of(names)), default=(), help=f"some of: {', '.join(names)} (default: all)")
    add("--seconds", type=seconds, default=1.0, help="time for each measurement (default: 1); at least 5 readings")
    add("--device", type=device, help="cpu or cuda (default: a GPU if there is one)")
    add("--channels-last", action="store_true", help="images of the objective in the layout that training uses")
    add("--no-compiled", action="store_true", help="leave out the report on the kernels compiled for other devices")
    add("--json", type=lambda text: text if text == "-" else str(output(text)), help="JSON file, - for standard output")
    add("--plot", type=output, help="roofline plot, a PNG file")
    add("--trace", type=output, help="Chrome trace of one call of each")
    given = parser.parse_args(argv)
    chosen = given.device or torch.device("cuda" if gpu else "cpu")
    on_gpu = chosen.type == "cuda"
    options = Options(
        device=chosen,
        batches=given.batch or ((64, 256) if on_gpu else (32,)),
        size=given.size,
        dtypes=given.dtype or (tuple(DTYPES) if on_gpu else ("fp32",)),
        kernels=given.kernel,
        only=given.only,
        seconds=given.seconds,
        channels_last=given.channels_last,
        compiled=not given.no_compiled,
        json=given.json,
        plot=given.plot,
        trace=given.trace,
    )
    if not any(candidates(case, options.only) for case in cases(options)):
        parser.error(
            f"none of {', '.join(options.only) or 'the implementations'} can be measured here on {chosen.type}"
        )
    return options


def main(argv: Sequence[str] | None = None) -> int:
    check_checkout()
    return profile_kernels(parse(argv))


if __name__ == "__main__":
    sys.exit(main())
