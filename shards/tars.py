"""What a tar holds by its headers, before a byte of a member is read."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

from .manifest import Member, SampleEntry, ShardEntry
from .names import KEY_BYTES, quoted


class _Headers(io.FileIO):
    """A tar of which headers alone are read: what is longer (a name's length is believed by tarfile) is none."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= 4 * KEY_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size) or b""


def members(path: Path) -> tuple[dict[str, Member], str | None]:
    """Members of a tar as far as it can be read, and why no further.

    That also ends at what the builder never writes and nobody should unpack: compression, a sparse file (of which a header of
    a few bytes may claim terabytes), a link or folder, a name that is there twice.
    """
    found: dict[str, Member] = {}
    end = 0
    try:
        with _Headers(path) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for info in tar:
                if not info.isreg() or info.issparse():
                    return found, f"tar holds {quoted(info.name)}, which is no plain file"
                if info.name in found:
                    return found, f"tar holds {quoted(info.name)} twice"
                found[info.name] = Member.model_construct(name=info.name, offset=info.offset_data, size=info.size)
                end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    # Names of names of names are followed by recursion.
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        return found, f"tar cannot be read after {len(found)} members ({error})"
    with open(path, "rb") as file:  # tarfile takes a cut between members, or in a header, for the end
        file.seek(min(end, 2**62))  # a header may say any size
        if file.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
            return found, f"tar is cut after {len(found)} members (its end mark is missing)"
    return found, None


def differences(shard: ShardEntry, found: dict[str, Member]) -> Iterator[str]:
    """How members differ from what the manifest lists of their shard."""
    known: set[str] = set()
    for sample in shard.samples:
        names = [member.name for member in _listed(sample)] + [f"{sample.key}.json"]
        known.update(names)
        yield from (f"{sample.key} is incomplete, {name} is missing" for name in names if name not in found)
        for member in _listed(sample):
            if member.name in found and found[member.name] != member:
                yield f"{member.name} is not where the manifest says, or not of that size"
    yield from (f"{quoted(name)} is not in the manifest" for name in found if name not in known)


def _listed(sample: SampleEntry) -> list[Member]:
    return [sample.image, *([sample.mask] if sample.mask else [])]
