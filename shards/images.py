"""Decoding images and masks to the arrays that the framework computes with.

Choices that decide pixels, made once here:
- Transparent pixels are composited on white, the usual backdrop of cut-out product photographs.
- 16-bit images are divided by 257 (65535 becomes 255); floating-point images are refused.
- EXIF orientation is ignored: masks are drawn on the stored pixel grid and carry no EXIF of their own.
- A mask marks the pixels at or above half of its format's range; where none reaches that (masks of 0 and 1, or of small
  class numbers) it marks all that are not 0. So the noise of JPEG masks and soft edges do not count as defect.
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from shards.errors import DataError

_TRANSPARENT = ("RGBA", "LA", "PA", "La", "RGBa")


def load_image(data: bytes, too_large: str = "make it smaller") -> Image.Image:
    """Decode every pixel of an encoded image, in its own mode.

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
        image.load()
    except Image.DecompressionBombError as error:  # "Image size (N pixels) exceeds limit of M pixels, could be…"
        raise DataError(f"is too large: {str(error).partition(',')[0]}; {too_large}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        # Pillow names the buffer, by its address, when it does not know the format.
        why = "no image format that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"is truncated or unreadable ({why or type(error).__name__}); replace the file") from error
    return image


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
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    stream = io.BytesIO()
    image.save(stream, format="PNG", compress_level=3)
    return stream.getvalue()


def decode_image(data: bytes, size: int) -> NDArray[np.uint8]:
    """Decode an image of any mode and shape, whole, to a square.

    Args:
        data: the encoded image.
        size: side in pixels; the image is resized (its aspect is not kept) with Pillow's antialiased bilinear filter.

    Returns:
        uint8 [3, size, size], RGB, contiguous.

    Raises:
        DataError: it is truncated, unreadable, or has floating-point pixels.
    """
    image = to_rgb(load_image(data))
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def decode_mask(data: bytes, size: int) -> NDArray[np.bool_]:
    """Decode a mask to bool [size, size], by nearest neighbour, True where defective.

    Raises:
        DataError: it is truncated or unreadable.
    """
    return resize_mask(mask_pixels(load_image(data)), size)


def resize_mask(mask: NDArray[np.bool_], size: int) -> NDArray[np.bool_]:
    """Nearest neighbour (the pixel under each target pixel's centre): bool [height, width] to bool [size, size]."""
    if mask.shape == (size, size):
        return mask
    image = Image.fromarray(mask.astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)
    return np.asarray(image) > 0
