"""What every command line does with what a person typed: a path must be one, and an address that stands in its place is never
shown, since it may hold a password."""

import argparse
from pathlib import Path
from typing import NoReturn

from .addresses import looks_like_address, public, without_addresses
from .names import printable


class Parser(argparse.ArgumentParser):
    """An error shows nothing of an address but its scheme, and nothing that steers a terminal."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(public(without_addresses(message))))


def local(text: str) -> str:
    """The ``type`` of an argument that is no address.

    Raises:
        argparse.ArgumentTypeError: it is one, or nearly.
    """
    if looks_like_address(text):
        raise argparse.ArgumentTypeError(f"a folder or file is needed, not {without_addresses(text.strip())}")
    return text


def local_path(text: str) -> Path:
    """As ``local``, of a path."""
    return Path(local(text))
