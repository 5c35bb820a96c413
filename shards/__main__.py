"""`wads shards build|demo|verify|describe`; also `python -m shards` in a checkout.

Exit codes: 0 all well, 2 wrong usage, 3 problems with the data (listed on stderr), 130 interrupted by Ctrl-C.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from .addresses import looks_like_address, public, without_addresses
from .arguments import Parser, local_path
from .build import build, build_textures
from .demo import demo
from .demo_catalogue import DEMO_CATEGORIES
from .errors import DataError, DataProblems
from .manifest import DatasetManifest
from .names import printable
from .source import Dataset
from .verify import examine

PROBLEMS = 3
INTERRUPTED = 130


def _shown(text: object) -> str:
    """A text for a terminal: without credentials, and without what would steer it."""
    return printable(public(str(text)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="wads shards", description="Build and check WebDataset shards.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("build", help="build shards from image folders, or a texture bank")
    command.add_argument(
        "--root", type=local_path, help="data set in the MVTec AD or good/bad layout, or one category of it"
    )
    command.add_argument(
        "--textures", type=local_path, metavar="DIR", help="folder of textures (such as DTD) to make a bank of"
    )
    command.add_argument(
        "--category", action="append", type=_name, metavar="NAME", help="build this one only; may be repeated"
    )
    _common(command)
    command.add_argument(
        "--shard-mb", type=_positive, default=64, metavar="N", help="MiB per shard (default %(default)s)"
    )
    command.add_argument(
        "--resize", type=_positive, metavar="N", help="store N×N PNG (default: original bytes and size)"
    )

    command = commands.add_parser("demo", help="build the procedural demo data set")
    _common(command)
    command.add_argument(
        "--categories",
        type=_positive,
        default=len(DEMO_CATEGORIES),
        metavar="N",
        choices=range(1, len(DEMO_CATEGORIES) + 1),
        help="how many, from the first on (default %(default)s)",
    )
    command.add_argument("--seed", type=int, default=0, help="another seed gives other images (default %(default)s)")

    command = commands.add_parser("verify", help="check every shard and sample of a built data set")
    _location(command, "print the problems, and notes as 'note: …', as a JSON list")
    command = commands.add_parser("describe", help="say what a built data set holds")
    _location(command, "print the manifests as JSON")
    return parser


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--out", type=local_path, required=True, help="folder for the shards; what it holds already stays"
    )
    command.add_argument("--workers", type=_positive, metavar="N", help="processes (default: one per CPU core)")
    command.add_argument("--overwrite", action="store_true", help="build anew what is there, also what is up to date")


def _location(command: argparse.ArgumentParser, json_help: str) -> None:
    command.add_argument("location", metavar="DIR", help="folder, http(s):// or s3:// address of a built data set")
    command.add_argument("--json", action="store_true", help=json_help)


def _name(text: str) -> str:
    if looks_like_address(text):
        raise argparse.ArgumentTypeError(f"a name is needed, not {without_addresses(text)}")
    return text


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _build(arguments: argparse.Namespace) -> DatasetManifest:
    options = {name: getattr(arguments, name) for name in ("shard_mb", "resize", "workers", "overwrite")}
    problems: list[str] = []
    manifest = None
    # Both are tried, so that one run names the problems of both.
    for make in (
        lambda: build(arguments.root, arguments.out, arguments.category, **options) if arguments.root else None,
        lambda: build_textures(arguments.textures, arguments.out, **options) if arguments.textures else None,
    ):
        try:
            manifest = make() or manifest
        except DataProblems as error:
            problems += error.problems
    if problems:
        raise DataProblems(problems)
    assert manifest is not None  # the parser has seen --root or --textures
    return manifest


def _describe(dataset: Dataset, as_json: bool) -> None:
    manifests = [dataset.manifest(name) for name in dataset.index.categories]
    if as_json:
        print(json.dumps([manifest.model_dump(mode="json") for manifest in manifests], sort_keys=True, indent=1))
        return
    for manifest in manifests:
        size = sum(shard.bytes for shard in manifest.shards) / (1 << 20)
        width, height = manifest.mean_size
        print(
            f"{manifest.category} ({manifest.kind}): {len(manifest.shards)} shards, {size:.1f} MiB, "
            f"mean {width:g}×{height:g}"
        )
        for name, count in manifest.counts.items():
            print(f"  {name}: {count}")
    print(f"fingerprint {dataset.index.fingerprint}")


def _dispatch(arguments: argparse.Namespace) -> int:
    if arguments.command == "describe":
        _describe(Dataset.open(arguments.location), arguments.json)
        return 0
    if arguments.command == "verify":
        found = examine(arguments.location)
        notes = [f"note: {note}" for note in found.notes]
        if arguments.json:
            print(json.dumps([_shown(text) for text in found.problems + notes], indent=1, ensure_ascii=False))
        else:
            for note in notes:
                print(_shown(note), file=sys.stderr)
            if not found.problems:
                print(_shown(f"{arguments.location}: all well"))
        if found.problems:
            raise DataProblems(found.problems)
        return 0
    if arguments.command == "demo":
        manifest = demo(
            arguments.out,
            arguments.categories,
            seed=arguments.seed,
            workers=arguments.workers,
            overwrite=arguments.overwrite,
        )
    else:
        manifest = _build(arguments)
    print(_shown(arguments.out) + f": {len(manifest.categories)} categories, fingerprint {manifest.fingerprint[:12]}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; wrong usage exits with 2 by way of argparse."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command == "build":
        if arguments.root is None and arguments.textures is None:
            parser.error("build needs --root or --textures")
        if arguments.category and arguments.root is None:
            parser.error("--category needs --root")
    try:
        return _dispatch(arguments)
    except DataProblems as error:
        print(f"{len(error.problems)} problems:", *map(_shown, error.problems), sep="\n  ", file=sys.stderr)
        return PROBLEMS
    except DataError as error:
        print(_shown(error), file=sys.stderr)
        return PROBLEMS
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the finished shards", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
