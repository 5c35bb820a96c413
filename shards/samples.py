"""One sample on its way into a shard: where it comes from, and what is stored of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from .errors import DataError, DataProblems
from .images import (
    encode_mask,
    encode_png,
    load_image,
    mask_pixels,
    size_difference,
    to_rgb,
    turned_alone,
    will_be_turned,
)
from .manifest import Split
from .masks import ResizedMask, fit_mask

_KEPT = {"JPEG": "jpg", "PNG": "png"}
_SIDECAR_BYTES = 256
USUAL_SIZE = 128  # pixels; the side that images are trained and scored at by default


@dataclass(frozen=True)
class EncodedSample:
    """What is written of a sample: the members of the tar, and the size of its image in pixels, as viewers show it.

    ``small``: how many components of its mask cover no pixel by half at the size it is stored in with `--resize`, else at
    the `USUAL_SIZE` to be scored in. ``turned_alone``: its image was turned by its EXIF orientation, its mask was not, and
    no size tells whether it should have been."""

    image: bytes
    extension: str
    width: int
    height: int
    mask: bytes | None
    small: int = 0
    turned_alone: bool = False


class SampleSource(Protocol):
    """A sample that a worker process can make; small and picklable. Files and demo samples are its two kinds."""

    @property
    def key(self) -> str: ...
    @property
    def split(self) -> Split: ...
    @property
    def defect(self) -> str: ...
    @property
    def source(self) -> str:
        """Where it came from, the same on every machine."""

    def identity(self) -> list[object]:
        """JSON values that change whenever the sample's content may have changed."""

    def stored_turned(self) -> bool:
        """Whether a build without `resize` turns pixels that it stores anew: such a tag is not in the shard."""

    def payload(self, resize: int | None) -> int:
        """Bytes that it will take at most (an estimate, known before reading), to plan the shards by."""

    def read(self, resize: int | None) -> EncodedSample:
        """Make the sample, its image resized to a square where `resize` says so. Raises DataError."""


def sidecar(sample: SampleSource) -> bytes:
    """The `<key>.json` member."""
    record = {"split": sample.split, "defect": sample.defect, "source": sample.source}
    return json.dumps(record, sort_keys=True, ensure_ascii=False).encode()


@dataclass(frozen=True)
class FileSample:
    """An image file and, for a defect, its mask file. `root` is not part of the identity: data sets move."""

    root: Path
    key: str
    split: Split
    defect: str
    source: str
    mask: str | None

    def identity(self) -> list[object]:
        identity: list[object] = [self.key, self.split, self.defect]
        for name in filter(None, (self.source, self.mask)):
            status = (self.root / name).stat()
            identity += [name, status.st_size, status.st_mtime_ns]
        return identity

    def stored_turned(self) -> bool:
        # The suffix says of most images that they are kept (PNG), have no tag (BMP) or are turned by Pillow (TIFF, which is
        # not new). The multi-picture files of phones are called .jpg; by that alone, every category of JPEGs would be
        # outdated, so the headers of those are read, at 0.1 ms a file. A file of another format than its name is not told.
        jpeg = Path(self.source).suffix.lower() in (".jpg", ".jpeg")
        if jpeg and will_be_turned(self.root / self.source, kept=_KEPT):
            return True
        return self.mask is not None and will_be_turned(self.root / self.mask)  # a mask is always stored anew

    def payload(self, resize: int | None) -> int:
        if resize:
            return resize * resize * (3 if self.mask is None else 4) + _SIDECAR_BYTES
        return sum((self.root / name).stat().st_size for name in (self.source, self.mask) if name) + _SIDECAR_BYTES

    def read(self, resize: int | None) -> EncodedSample:
        """Read, decode and check image and mask; JPEG and PNG bytes are kept as they are.

        Raises:
            DataProblems: unreadable image or mask, mask of another size than its image where both are upright, mask without
                a marked pixel.
        """
        problems: list[str] = []
        data, image = self._load(self.source, problems)
        if self.mask is not None:
            _, mask = self._load(self.mask, problems)
        else:
            mask = None
        if image is not None and mask is not None and (differs := size_difference(mask, image, self.source)):
            problems.append(f"{self.mask}: {differs}")
        marked = mask_pixels(mask) if mask is not None else None
        if marked is not None and not marked.any():
            problems.append(f"{self.mask}: mask is empty; mark the defect, or move {self.source} to test/good")
        rgb: Image.Image | None = None
        if image is not None:
            try:
                rgb = to_rgb(image)
            except DataError as error:
                problems.append(f"{self.source}: {error}")
        if problems or image is None or rgb is None:
            raise DataProblems(problems)

        if resize is not None:
            data, extension = encode_png(rgb.resize((resize, resize), Image.Resampling.BILINEAR)), "png"
        elif image.format in _KEPT:
            extension = _KEPT[image.format]
        else:
            data, extension = encode_png(rgb), "png"
        width, height = (resize, resize) if resize else image.size
        if mask is None or marked is None:
            return EncodedSample(data, extension, width, height, None)
        fitted = fit_mask(marked, resize or USUAL_SIZE)
        stored = fitted if resize else ResizedMask(marked, 0)
        alone = turned_alone(image, mask)
        return EncodedSample(data, extension, width, height, encode_mask(stored), fitted.small, alone)

    def _load(self, name: str, problems: list[str]) -> tuple[bytes, Image.Image | None]:
        try:
            data = (self.root / name).read_bytes()
            return data, load_image(data)
        except DataError as error:
            problems.append(f"{name}: {error}")
        except OSError as error:
            problems.append(f"{name}: cannot be read ({error.strerror}); make it readable")
        return b"", None
