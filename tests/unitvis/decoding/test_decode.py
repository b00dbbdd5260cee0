"""Every format, mode, depth and orientation is decoded to the RGB pixels that were stored."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from support.encoded import pixels, png, stored, tiff
from unitvis.decoding.decode import decode, to_rgb
from unitvis.errors import ImageError

H, W = 6, 10


GREY = (np.arange(H * W).reshape(H, W) * 4).astype(np.uint8)  # [H, W]
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], axis=2)  # [H, W, 3]
ALPHA = (np.arange(H * W).reshape(H, W) * 255 // (H * W - 1)).astype(np.uint8)
DEEP = (np.arange(H * W).reshape(H, W) * 1111 % 65536).astype(np.uint16)


def grey(values):
    return np.repeat(np.asarray(values, int)[..., None], 3, axis=2)


def over_white(colour, alpha):
    share = np.asarray(alpha, float)[..., None] / 255
    return colour * share + 255 * (1 - share)


LOSSLESS = [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("PPM", {}), ("WEBP", {"lossless": True})]


@pytest.mark.parametrize(("kind", "options"), LOSSLESS)
def test_colour_comes_out_as_it_went_in(kind, options):
    assert (pixels(stored(Image.fromarray(COLOUR), kind, **options)) == COLOUR).all()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF"])
def test_grey_becomes_three_equal_channels(kind):
    assert (pixels(stored(Image.fromarray(GREY), kind)) == grey(GREY)).all()


def test_jpeg_grey_and_colour():
    smooth = np.full((32, 32), 90, np.uint8)
    assert (pixels(stored(Image.fromarray(smooth), "JPEG", quality=100)) == grey(smooth)).all()
    colour = np.broadcast_to(np.array([200, 30, 90], np.uint8), (32, 32, 3))
    assert np.abs(pixels(stored(Image.fromarray(colour), "JPEG", quality=100)) - colour).max() <= 2


def test_one_bit():
    bits = GREY > 120
    for kind in ("PNG", "BMP", "TIFF", "PPM"):
        assert (pixels(stored(Image.fromarray(bits), kind)) == grey(bits * 255)).all(), kind


def palette_image():
    image = Image.new("P", (W, H))
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    image.putdata([i % 4 for i in range(H * W)])
    colours = np.array([[10, 20, 30], [200, 0, 0], [0, 200, 0], [0, 0, 200]])
    return image, colours[np.arange(H * W).reshape(H, W) % 4]


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF"])
def test_palette(kind):
    image, colours = palette_image()
    assert (pixels(stored(image, kind)) == colours).all()


def test_palette_with_one_clear_entry():
    image, colours = palette_image()
    index = np.arange(H * W).reshape(H, W) % 4
    expected = np.where((index == 2)[..., None], 255, colours)
    for kind in ("PNG", "GIF"):
        assert (pixels(stored(image, kind, transparency=2)) == expected).all(), kind


def test_palette_with_half_clear_entries():
    image, colours = palette_image()
    index = np.arange(H * W).reshape(H, W) % 4
    expected = over_white(colours, np.array([0, 64, 128, 255])[index])
    assert np.abs(pixels(stored(image, "PNG", transparency=bytes([0, 64, 128, 255]))) - expected).max() <= 1


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})])
def test_alpha_lies_over_white(kind, options):
    image = Image.fromarray(np.dstack([COLOUR, ALPHA]))
    assert np.abs(pixels(stored(image, kind, **options)) - over_white(COLOUR, ALPHA)).max() <= 1


def test_grey_with_alpha_lies_over_white():
    image = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])
    assert np.abs(pixels(stored(image, "PNG")) - over_white(grey(GREY), ALPHA)).max() <= 1


def test_one_clear_colour_of_a_png():
    clear = tuple(int(value) for value in COLOUR[2, 3])
    expected = np.where((clear == COLOUR).all(axis=2, keepdims=True), 255, COLOUR)
    assert (pixels(stored(Image.fromarray(COLOUR), "PNG", transparency=clear)) == expected).all()


def test_cmyk_jpeg_of_adobe_is_inverted_once():
    ink = Image.new("CMYK", (16, 16), (10, 200, 60, 40))
    data = stored(ink, "JPEG", quality=100)
    assert b"Adobe" in data
    expected = [(255 - c) * (255 - 40) / 255 for c in (10, 200, 60)]
    assert np.abs(pixels(data)[8, 8] - expected).max() <= 3


def test_ycck_jpeg():
    """A CMYK JPEG whose Adobe marker says that its first three channels are YCbCr of the inverted inks."""
    y, cb, cr, key = 120, 90, 170, 30
    data = stored(Image.new("CMYK", (16, 16), (255 - y, 255 - cb, 255 - cr, key)), "JPEG", quality=100)
    at = data.index(b"Adobe") + 11
    assert data[at] == 0
    data = data[:at] + b"\x02" + data[at + 1 :]
    red = y + 1.402 * (cr - 128)
    green = y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128)
    blue = y + 1.772 * (cb - 128)
    stored_inks = 255 - np.array([red, green, blue])  # what YCCK holds: C = 255 - R; Adobe's file has it inverted
    inks = 255 - stored_inks
    expected = [(255 - c) * (255 - key) / 255 for c in inks]
    assert np.abs(pixels(data)[8, 8] - expected).max() <= 4


def test_cmyk_tiff():
    data = stored(Image.new("CMYK", (16, 16), (10, 200, 60, 40)), "TIFF")
    assert np.abs(pixels(data)[8, 8] - [(255 - c) * (255 - 40) / 255 for c in (10, 200, 60)]).max() <= 1


def test_grey_of_16_bits_is_scaled_not_clipped():
    expected = grey(DEEP >> 8)
    assert (pixels(png(W, H, 16, 0, DEEP.astype(">u2").view(np.uint8).reshape(H, -1))) == expected).all()
    assert (pixels(stored(Image.fromarray(DEEP), "PNG")) == expected).all()
    for order in "<>":
        raw = DEEP.astype(order + "u2").tobytes()
        assert (pixels(tiff(order, [raw], H, W, [16], 1)) == expected).all(), order
    assert (pixels(tiff("<", [DEEP.astype("<u2").tobytes()], H, W, [16], 0)) == 255 - expected).all()  # white is zero
    pgm = b"P5 %d %d 65535\n" % (W, H) + DEEP.astype(">u2").tobytes()
    assert (pixels(pgm) == expected).all()


def test_grey_of_10_bits_in_a_pgm():
    values = DEEP.astype(int) % 1024
    data = pixels(b"P5 %d %d 1023\n" % (W, H) + values.astype(">u2").tobytes())
    assert np.abs(data - grey(values * 255 / 1023)).max() <= 1


def test_grey_of_12_bits_in_a_tiff():
    values = DEEP.astype(int) % 4096
    bits = "".join(f"{value:012b}" for value in values.ravel())
    packed = int(bits, 2).to_bytes(len(bits) // 8, "big")
    assert (pixels(tiff("<", [packed], H, W, [12], 1)) == grey(values >> 4)).all()


def test_a_clear_value_of_16_bit_grey():
    clear = int(DEEP[3, 4])
    data = png(W, H, 16, 0, DEEP.astype(">u2").view(np.uint8).reshape(H, -1), [(b"tRNS", struct.pack(">H", clear))])
    assert (pixels(data) == grey(np.where(clear == DEEP, 255, DEEP >> 8))).all()


def test_colour_of_16_bits():
    deep = np.stack([DEEP, DEEP[::-1], 65535 - DEEP], axis=2)
    assert (pixels(png(W, H, 16, 2, deep.astype(">u2").view(np.uint8).reshape(H, -1))) == deep >> 8).all()
    for order in "<>":
        raw = deep.astype(order + "u2").tobytes()
        assert (pixels(tiff(order, [raw], H, W, [16] * 3, 2)) == deep >> 8).all(), order


def test_colour_of_16_bits_with_a_clear_colour():
    deep = np.stack([DEEP, DEEP[::-1], 65535 - DEEP], axis=2)
    clear = struct.pack(">HHH", *deep[2, 3].tolist())
    data = png(W, H, 16, 2, deep.astype(">u2").view(np.uint8).reshape(H, -1), [(b"tRNS", clear)])
    expected = np.where((deep == deep[2, 3]).all(axis=2, keepdims=True), 255, deep >> 8)
    assert (pixels(data) == expected).all()


def test_planes_of_a_tiff():
    planes = [COLOUR[..., c].tobytes() for c in range(3)]
    assert (pixels(tiff("<", planes, H, W, [8] * 3, 2, planar=2)) == COLOUR).all()
    deep = [DEEP.tobytes()] * 3
    with pytest.raises(ImageError, match="separate planes"):
        decode(tiff("<", deep, H, W, [16] * 3, 2, planar=2))


def test_pixels_without_a_known_range_are_refused():
    real = Image.fromarray(np.zeros((H, W), np.float32))
    with pytest.raises(ImageError, match="floating-point pixels have no known range"):
        decode(stored(real, "TIFF"))
    with pytest.raises(ImageError, match="32-bit or signed pixels have no known range"):
        decode(stored(Image.fromarray(np.zeros((H, W), np.int32)), "TIFF"))


def test_first_frame_of_an_animation():
    frames = [Image.fromarray(np.full((H, W), value, np.uint8)) for value in (40, 80, 120)]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        data = stored(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (pixels(data) == 40).all(), kind


# EXIF orientation: where the picture's own first row and first column lie in the stored file
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_every_orientation_is_turned_upright(kind, orientation):
    block = np.kron(COLOUR[:2, :3] // 128 * 255, np.ones((16, 16, 1), np.uint8)).astype(np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    data = stored(Image.fromarray(np.ascontiguousarray(STORED[orientation](block))), kind, exif=exif, **options)
    assert np.abs(pixels(data) - block).max() <= (6 if kind == "JPEG" else 0)


def test_orientation_after_the_pixels_of_a_png():
    exif = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    data = png(W, H, 8, 2, COLOUR.reshape(H, -1))
    late = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    data = data[:-12] + late + data[-12:]
    assert (pixels(data) == np.rot90(COLOUR, -1)).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_tag_does_not_cost_the_picture():
    data = stored(Image.fromarray(COLOUR), "WEBP", lossless=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert (pixels(data) == COLOUR).all()


def test_pillow_s_own_images():
    """A dataset may hand over any mode."""
    rgb = Image.fromarray(COLOUR)
    assert to_rgb(rgb) is rgb
    for mode in ("HSV", "YCbCr", "CMYK", "RGBX"):
        assert np.abs(np.asarray(to_rgb(rgb.convert(mode))).astype(int) - COLOUR).max() <= 12, mode
    assert (np.asarray(to_rgb(Image.fromarray(DEEP))) == grey(DEEP >> 8)).all()
    premultiplied = Image.fromarray(np.dstack([COLOUR, np.full_like(GREY, 255)])).convert("RGBa")
    assert (np.asarray(to_rgb(premultiplied)) == COLOUR).all()
