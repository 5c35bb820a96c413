"""Addresses of data sets, and the credentials in them: `https://USER:PASSWORD@HOST/PATH?TOKEN`.

What is recorded, shown, logged or handed to a child is an address without them. They stay in the environment of the process
and its children, under `WADS_CREDENTIALS`, which may be set by hand as well: addresses that hold credentials, separated by
spaces. Such an address is for its host; of several, the one whose path is the most like. `~/.netrc` does too.

All that is of http(s). Drivers of object storage have ways of their own (AWS's environment and files): a password in such an
address is refused, and a user, a question mark or a number sign is a part of the place, as in `abfs://container@account/x`.
"""

import os
import re
from collections.abc import Mapping
from itertools import takewhile

VARIABLE = "WADS_CREDENTIALS"
# The user part also of an address that is wrong because its password holds a separator: up to the last @.
_PASSWORD = r"[^{s}/?#@:\[]*:(?!\d*[/?#]){any}*@"
_PARTS = (
    r"(?P<scheme>(?:https?|(?P<other>[a-z][a-z0-9+.-]{n})):{slashes})"
    rf"(?P<user>(?(other){{u}}*:{{u}}*@|{{u}}*@)|{_PASSWORD})?"
    r"(?P<path>(?(other){rest}|{p}*))(?P<query>(?(other)|[?#]{q}*))?"
)
_IN_TEXT = re.compile(
    _PARTS.format(
        n="{1,30}",  # or a long word costs the square of its length
        slashes="/+",
        s=r"\s",
        u=r"[^\s/?#]",
        any=r"\S",
        rest="",
        p=r'(?:(?![a-z][a-z0-9+.-]{1,30}:/)[^\s?#"<>])',
        q=r'[^\s"<>]',
    ),
    re.IGNORECASE,
)
_WHOLE = re.compile(
    _PARTS.format(n="+", slashes="//", s="", u="[^/?#]", any=".", rest=".*", p="[^?#]", q="."),
    re.IGNORECASE | re.DOTALL,
)
# What no reader takes, and what would be taken for a folder: simplecache::https://…, https:/….
_NEARLY = re.compile(
    r"(?:.*::)?(?P<one>[a-z][a-z0-9+.-]+):/(?!/)|.*::[a-z][a-z0-9+.-]+://|file://[^/]*@", re.IGNORECASE | re.DOTALL
)
_ANYWHERE = re.compile(r"[\"'\[(]{0,3}([a-z][a-z0-9+.-]{1,30}:/+).*", re.IGNORECASE | re.DOTALL)
_OTHERS = "give credentials of {} by the environment or the files of its own tools (for s3: AWS's)"
_UNSAFE = {" ": "a space", '"': "a quotation mark", "<": "an angle bracket", ">": "an angle bracket"}


def public(text: str) -> str:
    """`text` without the credentials of any address in it: a password with its user; of http(s), any user, and whatever
    stands behind a question mark."""
    return _IN_TEXT.sub(lambda found: found["scheme"] + found["path"], text)


def without_addresses(text: str) -> str:
    """`text` up to the first address in it, of which only the scheme is left. Errors show with it what somebody has typed where
    no address belongs: `public` cannot tell where one ends whose password or token holds a space or a quotation mark."""
    return _ANYWHERE.sub(r"\1… (an address)", text)


def is_remote(location: str) -> bool:
    """Whether a location is an address, and no folder."""
    return _parts(location) is not None


def looks_like_address(location: str) -> bool:
    """Whether a location is an address, or is nearly one and no folder that anybody has."""
    location = location.strip()
    return is_remote(location) or bool(re.match(r"file://|" + _NEARLY.pattern, location, _NEARLY.flags))


def address_problem(location: str) -> str | None:
    """Why a location cannot be used; says nothing of what may be a secret."""
    stripped = location.strip()  # or an address behind a space would be taken for a folder, whose name errors show
    parts = _parts(stripped)
    if "\0" in location:
        return "a location holds a zero byte; leave it out"
    if nearly := _NEARLY.match(stripped):
        if nearly["one"]:
            return (
                f"{nearly['one']}:/…: neither a folder nor an address, which has two slashes; write {nearly['one']}://…"
            )
        return "a chain of addresses (::), or a file:// of another machine, is not read; give http(s)://, s3:// or a folder"
    if parts is None:
        return None
    shown = f"{parts['scheme']}…: the address holds"
    if not location.replace(" ", "").isprintable():
        return f"{shown} control characters; write them as %0A and the like"
    if not _is_http(parts):
        scheme = parts["scheme"].removesuffix("://")
        return f"{shown} a password; {_OTHERS.format(scheme)}, not in the address" if parts["user"] else None
    if unsafe := next((char for char in ' "<>' if char in location), None):
        return f"{shown} {_UNSAFE[unsafe]}; write it as %{ord(unsafe):02X}"
    return None


def take_credentials(location: str) -> str:
    """The location without its credentials, which go to the environment; a folder is returned as it is."""
    parts = _parts(location)
    if parts and _is_http(parts) and (parts["user"] or parts["query"]):
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
    if parts is None or not _is_http(parts):
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


def _is_http(parts: Mapping[str, str]) -> bool:
    return parts["scheme"] in ("http://", "https://")


def _host(parts: Mapping[str, str]) -> tuple[str, str]:
    return parts["scheme"], parts["path"].partition("/")[0]


def _known() -> list[str]:
    return os.environ.get(VARIABLE, "").split()


def _parts(location: str) -> dict[str, str] | None:
    """Scheme in small letters, user with its @, path without a slash at its end, query with its question mark."""
    found = _WHOLE.fullmatch(location)
    if found is None or found["scheme"].lower() == "file://":
        return None
    parts = {name: text or "" for name, text in found.groupdict().items() if name != "other"}
    return parts | {"scheme": parts["scheme"].lower(), "path": parts["path"].rstrip("/")}
