"""Decoding: any mode to RGB, masks by their own rule, and nothing decoded in part."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile, ImageOps, PngImagePlugin

from wads_dist.shards.errors import DataError
from wads_dist.shards.images import decode_image, decode_mask, fitted_mask, load_image, stored_size, to_rgb, upright


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


# --- EXIF orientation --------------------------------------------------------------------------------------------


def tagged(image: Image.Image, orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stream = io.BytesIO()
    image.save(stream, format=kind, exif=exif, quality=95)
    return stream.getvalue()


def corner(width: int = 40, height: int = 24) -> Image.Image:
    """Black, but for one corner, so that each of the eight orientations is another picture."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[: height // 2, : width // 4] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_and_mask_are_what_a_viewer_shows(orientation: int, kind: str) -> None:
    data = tagged(corner(), orientation, kind)
    seen = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    image = load_image(data)
    assert np.array_equal(np.asarray(image), seen) and image.format == kind
    assert np.array_equal(upright(image), image)  # once, not twice
    expected = encode(Image.fromarray(seen).convert("RGB"))
    assert np.array_equal(decode_image(data, 16), decode_image(expected, 16))
    assert np.array_equal(decode_mask(data, 16), decode_mask(expected, 16))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_of_a_picture_are_other_pictures(orientation: int) -> None:
    """Else the test above would show nothing."""
    pictures = [load_image(tagged(corner(), other, "PNG")) for other in range(1, 9)]
    same = [np.array_equal(picture, pictures[orientation - 1]) for picture in pictures]
    assert same == [other == orientation for other in range(1, 9)]


XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def with_xmp(kind: str, orientation: int | None) -> bytes:
    """`corner` with orientation 6 in its XMP, and one in its EXIF block (of a TIFF, its tag) unless that is None."""
    stream, image = io.BytesIO(), corner()
    exif = Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    if kind == "PNG":
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", XMP)
        image.save(stream, format=kind, pnginfo=text, exif=exif)
    elif kind == "TIFF":
        image.save(stream, format=kind, tiffinfo={700: XMP.encode(), **dict(exif)})
    else:
        image.save(stream, format=kind, xmp=XMP.encode(), exif=exif, quality=95, lossless=True)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [None, 1, 3])
def test_an_orientation_in_xmp_is_not_obeyed(kind: str, orientation: int | None) -> None:
    """Viewers go by the EXIF block alone; Pillow would turn this by XMP where that has none."""
    data = with_xmp(kind, orientation)
    if orientation is None:
        assert ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size == (24, 40)  # else this shows nothing
    expected = corner().transpose(Image.Transpose.ROTATE_180) if orientation == 3 else corner()
    image = load_image(data)
    assert image.size == (40, 24) and np.array_equal(np.asarray(image.convert("L")) > 127, np.asarray(expected) > 127)
    opened = upright(Image.open(io.BytesIO(data))) if kind != "TIFF" else image  # as `predict` takes pictures
    assert opened.size == (40, 24)


def test_a_palette_keeps_its_transparency_when_turned() -> None:
    image = Image.new("P", (4, 2), 0)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((0, 0), 1)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    stream = io.BytesIO()
    image.save(stream, format="PNG", exif=exif, transparency=0)
    assert np.asarray(to_rgb(load_image(stream.getvalue())))[1].tolist() == [[255] * 3] * 3 + [[10, 20, 30]]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Tag data larger")
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_broken_exif_block_is_as_good_as_none(kind: str) -> None:
    """Cut anywhere, or with one byte changed, the block never costs the picture; where it can be read, it is obeyed."""
    whole = Image.Exif()
    whole[ExifTags.Base.Orientation] = 6
    block, seen = whole.tobytes(), set()
    broken = [block[:cut] for cut in range(len(block))]
    broken += [block[:at] + bytes([block[at] ^ 255]) + block[at + 1 :] for at in range(len(block))]
    for exif in broken:
        stream = io.BytesIO()
        corner().save(stream, format=kind, exif=exif)
        seen.add(load_image(stream.getvalue()).size)
    assert (40, 24) in seen and seen <= {(40, 24), (24, 40)}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tiff_whose_tags_are_broken_is_refused_by_name() -> None:
    """Each byte of its directory changed, in a format in which the orientation is one tag of many that decoding needs."""
    data, refused = tagged(corner(), 6, "TIFF"), 0
    for at in range(8, 200):
        for value in (0, 2, 11, 12, 255):
            try:
                load_image(data[:at] + bytes([value]) + data[at + 1 :])
            except DataError:
                refused += 1
    assert refused


def test_a_text_in_a_file_does_not_pass_for_what_the_software_notes() -> None:
    text = PngImagePlugin.PngInfo()
    for name in ("EXIF orientation", "components that cover no pixel by half"):
        text.add_text(name, "six")
    stream = io.BytesIO()
    corner().save(stream, format="PNG", pnginfo=text)
    image = load_image(stream.getvalue())
    assert stored_size(image) == image.size and fitted_mask(image, 8).small == 0


@pytest.mark.parametrize("value", [0, 9, 255, 65535])
def test_an_orientation_that_does_not_exist_is_none(value: int) -> None:
    assert np.array_equal(load_image(tagged(corner(), value, "PNG")), corner())


def test_floating_point_images_are_refused() -> None:
    image = Image.fromarray(np.zeros((8, 8), dtype=np.float32))
    with pytest.raises(DataError, match="floating-point"):
        decode_image(encode(image, "TIFF"), 8)
