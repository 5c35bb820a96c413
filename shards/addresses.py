"""Addresses of data sets, and the credentials in them: `https://USER:PASSWORD@HOST/PATH?TOKEN`.

What is recorded, shown, logged or handed to a child is an address without them. They stay in the environment of the process
and its children, under `WADS_CREDENTIALS`, which may be set by hand as well: addresses that hold credentials, separated by
spaces. Such an address is for its host (for s3, its bucket); of several, the one whose path is the most like. For http(s),
`~/.netrc` does too.
"""

import os
import re
from collections.abc import Mapping
from itertools import takewhile

VARIABLE = "WADS_CREDENTIALS"
# The user part also of an address that is wrong because its password holds a separator: up to the last @.
_PARTS = (
    r"(?P<scheme>[a-z][a-z0-9+.-]+:{slashes})"
    r"(?P<user>{u}*@|[^{s}/?#@:\[]*:(?!\d*[/?#]){any}*@)?"
    r"(?P<path>{p}*)(?P<query>[?#]{q}*)?"
)
_IN_TEXT = re.compile(
    _PARTS.format(slashes="/+", s=r"\s", u=r"[^\s/?#]", any=r"\S", p=r'[^\s?#"<>]', q=r'[^\s"<>]'), re.IGNORECASE
)
_WHOLE = re.compile(_PARTS.format(slashes="//", s="", u="[^/?#]", any=".", p="[^?#]", q="."), re.IGNORECASE | re.DOTALL)


def public(text: str) -> str:
    """`text` without the credentials of any address in it: user, password, and whatever stands behind a question mark."""
    return _IN_TEXT.sub(lambda found: found["scheme"] + found["path"], text)


def is_remote(location: str) -> bool:
    """Whether a location is an address, and no folder."""
    return _parts(location) is not None


def address_problem(location: str) -> str | None:
    """Why a location cannot be used; says nothing of what may be a secret."""
    parts = _parts(location)
    if "\0" in location:
        return "a location holds a zero byte; leave it out"
    if parts is None:
        return None
    if not location.replace(" ", "").isprintable():
        return f"{parts['scheme']}…: the address holds control characters; write them as %0A and the like"
    spaced = " " in location and (parts["scheme"].startswith("http") or parts["user"] or parts["query"])
    return f"{parts['scheme']}…: the address holds a space; write it as %20" if spaced else None


def take_credentials(location: str) -> str:
    """The location without its credentials, which go to the environment; a folder is returned as it is."""
    parts = _parts(location)
    if parts and (parts["user"] or parts["query"]):
        others = [address for address in _known() if bare(address) != bare(location)]
        os.environ[VARIABLE] = " ".join([*others, location])
    return bare(location)


def bare(location: str) -> str:
    """As `public`, of a location that is all of the text; a folder is returned as it is."""
    parts = _parts(location)
    return location if parts is None else parts["scheme"] + parts["path"]


def with_credentials(address: str) -> str:
    """An address below one that credentials are known for, with them: only for who fetches it."""
    parts = _parts(address)
    if parts is None:
        return address

    mine = parts["path"].split("/")

    def likeness(other: Mapping[str, str]) -> tuple[int, int]:
        theirs = other["path"].split("/")
        same = list(takewhile(lambda pair: pair[0] == pair[1], zip(mine, theirs, strict=False)))
        return len(same), -len(theirs)

    known = [other for text in _known() if (other := _parts(text))]
    best = max((other for other in known if _host(other) == _host(parts)), key=likeness, default=None)
    if best is None:
        return address
    return parts["scheme"] + best["user"] + parts["path"] + best["query"]


def _host(parts: Mapping[str, str]) -> tuple[str, str]:
    return parts["scheme"], parts["path"].partition("/")[0]


def _known() -> list[str]:
    return os.environ.get(VARIABLE, "").split()


def _parts(location: str) -> dict[str, str] | None:
    """Scheme in small letters, user with its @, path without a slash at its end, query with its question mark."""
    found = _WHOLE.fullmatch(location)
    if found is None or found["scheme"].lower() == "file://":
        return None
    parts = {name: text or "" for name, text in found.groupdict().items()}
    return parts | {"scheme": parts["scheme"].lower(), "path": parts["path"].rstrip("/")}
