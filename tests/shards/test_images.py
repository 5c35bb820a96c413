"""Decoding: any mode to RGB, masks by their own rule, and nothing decoded in part."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFile

from shards import DataError, decode_image, decode_mask


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=kind, quality=90)
    return stream.getvalue()


def test_rgb_of_the_same_size_is_untouched() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    decoded = decode_image(encode(Image.fromarray(pixels)), 16)
    assert decoded.dtype == np.uint8 and decoded.shape == (3, 16, 16) and decoded.flags.c_contiguous
    assert np.array_equal(decoded, pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "1"])
def test_modes_without_alpha_keep_their_grey(mode: str) -> None:
    decoded = decode_image(encode(Image.new("L", (9, 7), 255).convert(mode)), 8)
    assert (decoded == 255).all()


def test_transparency_is_composited_on_white() -> None:
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    image.putpixel((0, 0), (10, 20, 30, 255))
    decoded = decode_image(encode(image), 8)
    assert decoded[:, 0, 0].tolist() == [10, 20, 30]
    assert (decoded[:, 1:, 1:] == 255).all()


def test_16_bit_is_scaled_to_8() -> None:
    values = np.array([[0, 257, 32768, 65535]] * 4, dtype=np.uint16)
    assert decode_image(encode(Image.fromarray(values)), 4)[0, 0].tolist() == [0, 1, 128, 255]


def test_odd_sizes_become_square_with_antialiasing() -> None:
    stripes = np.zeros((512, 300), dtype=np.uint8)
    stripes[:, ::2] = 255
    decoded = decode_image(encode(Image.fromarray(stripes)), 30)
    assert decoded.shape == (3, 30, 30)
    assert abs(decoded[:, :, 2:-2].astype(int) - 127).max() <= 8  # without antialiasing it would be 0s and 255s


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
def test_truncated_data_is_refused_even_if_pillow_was_told_to_tolerate_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(pixels), kind)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for cut in (10, len(data) // 2, len(data) - 200):
        with pytest.raises(DataError, match="truncated or unreadable"):
            decode_image(data[:cut], 64)
        with pytest.raises(DataError, match="truncated or unreadable"):
            decode_mask(data[:cut], 64)


def test_an_image_of_too_many_pixels_is_not_called_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow refuses twice as many
    with pytest.raises(DataError, match=r"is too large: .*6300 pixels.* 2000 pixels; make it smaller") as caught:
        decode_image(encode(Image.new("RGB", (90, 70))), 8)
    assert "truncated" not in str(caught.value)


@pytest.mark.parametrize(("low", "high", "kind"), [(0, 255, "PNG"), (0, 1, "PNG"), (0, 255, "JPEG")])
def test_masks_of_any_range(low: int, high: int, kind: str) -> None:
    expected = np.zeros((32, 32), dtype=bool)
    expected[8:16, 8:24] = True
    values = np.where(expected, high, low).astype(np.uint8)
    assert np.array_equal(decode_mask(encode(Image.fromarray(values), kind), 32), expected)


def test_masks_are_resized_by_nearest() -> None:
    mask = np.zeros((6, 6), dtype=np.uint8)
    mask[3:, :] = 255
    decoded = decode_mask(encode(Image.fromarray(mask)), 3)
    # Centres of the target pixels lie on source rows 1, 3 (0.5 * 2 = 1, 1.5 * 2 = 3) and 5.
    assert decoded.dtype == np.bool_ and decoded[:, 0].tolist() == [False, True, True]


def test_floating_point_images_are_refused() -> None:
    image = Image.fromarray(np.zeros((8, 8), dtype=np.float32))
    with pytest.raises(DataError, match="floating-point"):
        decode_image(encode(image, "TIFF"), 8)
