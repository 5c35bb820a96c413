"""Decoding images and masks to the arrays that the framework computes with.

Choices that decide pixels, made once here:
- Transparent pixels are composited on white, the usual backdrop of cut-out product photographs.
- 16-bit images are divided by 257 (65535 becomes 255); floating-point images are refused.
- An image and its mask are turned as the EXIF orientation of each says, as viewers and annotation tools show them; of a
  broken EXIF block there is none. An orientation in XMP alone is not obeyed: hardly a viewer does.
- A mask marks the pixels at or above half of its format's range; where none reaches that (masks of 0 and 1, or of small
  class numbers) it marks all that are not 0. So the noise of JPEG masks and soft edges do not count as defect.
- A mask is brought to another size by area, and no component of it is lost (`shards/masks.py`).
"""

import io
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, PngImagePlugin, UnidentifiedImageError

from .errors import DataError
from .masks import MaskRule, ResizedMask, fit_mask

_TRANSPARENT = ("RGBA", "LA", "PA", "La", "RGBa")
_SMALL = "components that cover no pixel by half"  # of a stored mask that was made smaller: how many there were
_TURNED = "EXIF orientation"  # of an image that was turned upright by it
_EXIF = ("exif", "Raw profile type exif")  # where Pillow keeps the block; the latter is ImageMagick's, of PNG
_XMP = ("xmp", "XML:com.adobe.xmp")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(data: bytes, too_large: str = "make it smaller") -> Image.Image:
    """Decode every pixel of an encoded image, in its own mode, and turn it ``upright``.

    Args:
        too_large: what to do about an image of more pixels than Pillow decodes (twice ``Image.MAX_IMAGE_PIXELS``).

    Raises:
        DataError: the data is no image, ends before the last pixel, or is too large; the message is a predicate ("is
            truncated or…") for the caller to put the file's name before.
    """
    # Another library may have switched this on for the whole process; a half grey image must never pass for a product.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        image = Image.open(io.BytesIO(data))
        for name in _XMP:
            image.info.pop(name, None)  # else Pillow, which turns a TIFF as it loads it, would turn it by this as well
        image.load()
    except Image.DecompressionBombError as error:  # "Image size (N pixels) exceeds limit of M pixels, could be…"
        raise DataError(f"is too large: {str(error).partition(',')[0]}; {too_large}") from error
    except MemoryError:  # no fault of the file
        raise
    except Exception as error:  # Pillow's readers let many kinds out of a damaged file
        # Pillow names the buffer, by its address, when it does not know the format.
        why = "no image format that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"is truncated or unreadable ({why or type(error).__name__}); replace the file") from error
    return upright(image)


def upright(image: Image.Image) -> Image.Image:
    """A decoded image as viewers show it, turned by its EXIF orientation (of a TIFF, Pillow has done it); the tag is gone."""
    image.info.pop(_TURNED, None)  # a file may call a text of its own so
    # Not ImageOps.exif_transpose: it writes the rest of the block anew, which fails for some that cameras write.
    orientation = _orientation(image)
    if orientation is None:
        return image
    turned = image.transpose(_UPRIGHT[orientation])
    turned.format = image.format
    for name in (*_EXIF, *_XMP):
        turned.info.pop(name, None)
    turned.info[_TURNED] = orientation
    return turned


def _orientation(image: Image.Image) -> int | None:
    """What its EXIF block turns an opened image by, if anything."""
    try:
        block = Image.Image()  # of the image itself, Pillow would take XMP's orientation as well
        block.info = {name: image.info[name] for name in _EXIF if name in image.info}
        tag: Any = block.getexif().get(ExifTags.Base.Orientation)
        return int(tag) if tag in _UPRIGHT else None
    except Exception:  # Pillow's reader lets many kinds out of a broken block, which is as good as none
        return None


def will_be_turned(path: Path, kept: Collection[str] = ()) -> bool:
    """Whether `upright` will turn the image of a file, unless its format is one of those kept, from its header alone.

    Of a file that is no image it is false: who decodes it says what is wrong."""
    try:
        with Image.open(path) as image:
            if image.format in kept:
                return False
            # The block of a PNG may come behind the pixels. Masks are small files; hardly one has to be decoded for it.
            if image.format == "PNG" and any(mark in path.read_bytes() for mark in (b"eXIf", _EXIF[1].encode())):
                image.load()
            return _orientation(image) is not None
    except Exception:  # as in `load_image`
        return False


def was_turned(image: Image.Image) -> bool:
    """Whether `upright` turned it."""
    return _TURNED in image.info


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an upright image before it was turned."""
    return image.size[::-1] if image.info.get(_TURNED, 1) >= 5 else image.size


def turned_alone(image: Image.Image, mask: Image.Image) -> bool:
    """Whether `upright` turned an image and not its mask, and the size that they share is also that before turning: then
    nothing tells whether the mask was drawn on the image as viewers show it."""
    return was_turned(image) and not was_turned(mask) and stored_size(image) == image.size


def size_difference(mask: Image.Image, image: Image.Image, name: str) -> str | None:
    """Why an upright mask does not fit its upright image, which is called so; None if it does."""
    if mask.size == image.size:
        return None
    turned = [f"{what} by {of.info[_TURNED]}" for what, of in (("mask", mask), ("image", image)) if _TURNED in of.info]
    how = f", turned as their EXIF orientation says ({', '.join(turned)})" if turned else ""
    do = "draw it on the image as viewers show it, or take the tag out" if turned else "export the mask again"
    return f"mask is {mask.width}×{mask.height} but its image {name} is {image.width}×{image.height}{how}; {do}"


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB as stated in the module's docstring.

    Raises:
        DataError: floating-point pixels, whose range nobody knows.
    """
    if image.mode == "F":
        raise DataError("has floating-point pixels of unknown range; convert it to an 8- or 16-bit image")
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64)
        return Image.fromarray(((wide.clip(0, 65535) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        return _composite(image, "white")
    return image.convert("RGB")


def _composite(image: Image.Image, colour: str) -> Image.Image:
    foreground = image.convert("RGBA")
    background = Image.new("RGBA", image.size, colour)
    return Image.alpha_composite(background, foreground).convert("RGB")


def mask_pixels(image: Image.Image) -> NDArray[np.bool_]:
    """Marked pixels of a decoded mask of any mode, bool [height, width]."""
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        image = _composite(image, "black")
    elif image.mode in ("1", "P", "CMYK", "YCbCr"):
        image = image.convert("RGB")
    values = np.asarray(image)
    if values.ndim == 3:
        values = values.max(axis=2)
    half = 128 if values.dtype == np.uint8 else 32768
    return values >= half if values.size and values.max() >= half else values > 0


def encode_png(pixels: NDArray[np.uint8] | Image.Image) -> bytes:
    """PNG bytes of an image, or of uint8 [height, width] or [height, width, 3]; no metadata: equal for equal pixels."""
    return _png(pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels))


def encode_mask(mask: ResizedMask) -> bytes:
    """PNG bytes of a mask to be stored, which remember how many of its components covered no pixel by half."""
    text = PngImagePlugin.PngInfo()
    if mask.small:
        text.add_text(_SMALL, str(mask.small))
    return _png(Image.fromarray(mask.pixels.astype(np.uint8) * 255), text)


def _png(image: Image.Image, text: PngImagePlugin.PngInfo | None = None) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG", compress_level=3, pnginfo=text)
    return stream.getvalue()


def decode_image(data: bytes, size: int) -> NDArray[np.uint8]:
    """Decode an image of any mode and shape, whole and upright, to a square.

    Args:
        data: the encoded image.
        size: side in pixels; the image is resized (its aspect is not kept) with Pillow's antialiased bilinear filter.

    Returns:
        uint8 [3, size, size], RGB, contiguous.

    Raises:
        DataError: it is truncated, unreadable, or has floating-point pixels.
    """
    return fitted_image(load_image(data), size)


def fitted_image(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """`decode_image` of a decoded one."""
    image = to_rgb(image)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def decode_mask(data: bytes, size: int, rule: MaskRule = "area") -> NDArray[np.bool_]:
    """Decode a mask to bool [size, size] by the rule, True where defective.

    Raises:
        DataError: it is truncated or unreadable.
    """
    return fitted_mask(load_image(data), size, rule).pixels


def fitted_mask(image: Image.Image, size: int, rule: MaskRule = "area") -> ResizedMask:
    """`decode_mask` of a decoded one, with the number of components that are too small for the rule (`ResizedMask`).

    Of a mask that was made smaller when it was stored (`shards build --resize`) some may have covered no pixel by half then.
    They have stored pixels of their own and may be too small again: the larger of both numbers is given.
    """
    mask = fit_mask(mask_pixels(image), size, rule)
    before = str(image.info.get(_SMALL, ""))
    return ResizedMask(mask.pixels, max(mask.small, int(before) if re.fullmatch("[0-9]{1,9}", before) else 0))
