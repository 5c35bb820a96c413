"""What a name may be: of a category, shard, sample, member of a tar, kind of defect. Asked where one is built or read.

Names come from outside (folders, manifests, addresses, command lines, headers) and become parts of paths and addresses, cells
of tables, and text on a terminal. Each question is answered with the reason against a name, None if there is none.
"""

import re
import unicodedata
from pathlib import Path

from .errors import DataError

# What a category's folder lies beside, in a run's folder and in one of shards; "all" is --data.categories' word for every one.
RESERVED = frozenset(
    {
        *("queue", "log", "monitor", "config.toml", "deepspeed.json", "code.json", "summary.json", "report.html"),
        *("manifest.json", "all"),
    }
)
# Of a file's name, of which file systems allow 255; what is written beside it under a longer one must fit too.
NAME_BYTES, KEY_BYTES = 200, 4096
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_CATEGORY = re.compile(r"\w[\w.+-]*")


def text_problem(text: str, most: int = NAME_BYTES) -> str | None:
    """Why `text` cannot be a file's name of at most `most` bytes, nor be shown: the rule that all names share."""
    if not text:
        return "is empty"
    if problem := _length_problem(text, most):
        return problem
    if not is_utf8(text):
        return "is not UTF-8"
    if _hidden(text):
        return "holds control or format characters"
    if "/" in text or "\\" in text:
        return "holds a separator (/ or \\)"
    return "begins with a dot" if text.startswith(".") else None


def category_problem(name: str) -> str | None:
    """Why `name` cannot name a category: a folder of a run and of a data set, a part of an address, a word of a command."""
    if problem := text_problem(name):
        return problem
    if not _CATEGORY.fullmatch(name):
        return "may hold letters, digits and _ . + - only, and begins with a letter, a digit or _"
    # Some file systems know no case, and leave out dots at the end.
    taken = name.casefold().rstrip(".") in RESERVED
    return f"stands for something else already, as do {', '.join(sorted(RESERVED))}" if taken else None


def require_category(name: object) -> None:
    """Raises ValueError if what a file says is a category's name cannot be one."""
    if not isinstance(name, str):
        raise ValueError(f"the category {name!r} is no text")
    if problem := category_problem(name):
        raise ValueError(f"the category {quoted(name)} {problem}")


def shard_problem(name: str) -> str | None:
    """Why `name` cannot name a shard, a tar in its category's folder."""
    if problem := text_problem(name):
        return problem
    return None if _CATEGORY.fullmatch(name) and name.endswith(".tar") else "is not like train-000000.tar"


def defect_problem(name: str) -> str | None:
    """Why `name` cannot name a kind of defect (a label: it may hold spaces and dots)."""
    return text_problem(name, 255)


def key_problem(key: str) -> str | None:
    """Why `key` cannot name a sample: a relative path like train/good/000, of which no part is empty or begins with a dot. The
    last has no dot at all, because WebDataset ends a key there."""
    if problem := _length_problem(key, KEY_BYTES):
        return problem
    problems = (text_problem(part, 255) for part in key.split("/"))
    return next(filter(None, problems), None) or ("has a dot in its last part" if "." in key.split("/")[-1] else None)


def member_problem(name: str, key: str) -> str | None:
    """Why `name` cannot name a file of the sample `key` inside a tar: the key, a dot, and what kind of file it is."""
    kind = name.removeprefix(f"{key}.")
    return None if kind != name and re.fullmatch(r"[A-Za-z0-9.]{1,32}", kind) else f"is not {quoted(key)} and a suffix"


def file_problem(name: str) -> str | None:
    """Why `name` cannot name a file below the folder that lists it: a relative path without empty or dot parts."""
    if problem := _length_problem(name, KEY_BYTES):
        return problem
    return next(filter(None, (text_problem(part, 255) for part in name.split("/"))), None)


def within(folder: Path, *parts: str) -> Path:
    """`folder`/`parts`, a path to write to, once it is known to lie below `folder` however links lead.

    Raises:
        DataError: it does not.
    """
    path = folder.joinpath(*parts)
    try:
        final, top = path.resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{printable(str(path))}: cannot be followed ({error}); remove what stands there") from error
    if not final.is_relative_to(top):
        raise DataError(f"{path}: leads out of {folder}, to {final}, where nothing is written; remove that link")
    return path


def is_utf8(name: str) -> bool:
    """Whether a name was UTF-8 on the disk: what is not comes as lone surrogates."""
    return not any("\ud800" <= char <= "\udfff" for char in name)


def quoted(name: str, most: int = 80) -> str:
    """A name for a message: in quotation marks, what cannot be seen escaped, a long one cut."""
    return repr(name if len(name) <= most else name[:most] + "…")


def printable(text: str) -> str:
    """`text` for a terminal: what would steer it (escapes, controls but new lines and tabs, bidirectional marks) is escaped."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode() if char not in "\n\t" and _hidden(char) else char for char in text
    )


def _length_problem(text: str, most: int) -> str | None:
    # A lone surrogate has three bytes, too; first the characters, because a long name is not worth encoding.
    too_long = len(text) > most or len(text.encode(errors="surrogatepass")) > most
    return f"has more than {most} bytes" if too_long else None


def _hidden(text: str) -> bool:
    return not text.isprintable() and any(unicodedata.category(char) in _HIDDEN for char in text)
