import io
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile

from unitvis.errors import ImageError, UnitvisError
from unitvis.sources import decode as decode_module
from unitvis.sources.decode import MAX_PIXELS, decode, to_rgb
from unitvis.sources.decoding import DECODERS, Decoding
from unitvis.sources.transform import Transform

DEADLINE = 300  # seconds after which what a test waits for is taken to never happen
H, W = 6, 10
GREY = (np.arange(H * W).reshape(H, W) * 4).astype(np.uint8)  # [H, W]
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], axis=2)  # [H, W, 3]
ALPHA = (np.arange(H * W).reshape(H, W) * 255 // (H * W - 1)).astype(np.uint8)
DEEP = (np.arange(H * W).reshape(H, W) * 1111 % 65536).astype(np.uint16)


def stored(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data, **options):
    image = decode(data, **options)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def grey(values):
    return np.repeat(np.asarray(values, int)[..., None], 3, axis=2)


def over_white(colour, alpha):
    share = np.asarray(alpha, float)[..., None] / 255
    return colour * share + 255 * (1 - share)


def png(width, height, depth, kind, rows, chunks=()):
    """A PNG written by hand: `rows` are the raw bytes of each row."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    body = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + b"".join(chunk(*one) for one in chunks)
        + chunk(b"IDAT", body)
        + chunk(b"IEND", b"")
    )


def tiff(order, strips, height, width, bits, photometric, planar=1, tags=()):
    """An uncompressed TIFF written by hand: one strip a plane; `bits` of each sample."""
    start = 8
    offsets = [start + sum(map(len, strips[:i])) for i in range(len(strips))]
    data = b"".join(strips)
    entries = [
        (256, 4, [width]),
        (257, 4, [height]),
        (258, 3, bits),
        (259, 3, [1]),
        (262, 3, [photometric]),
        (273, 4, offsets),
        (277, 3, [len(bits)]),
        (278, 4, [height]),
        (279, 4, [len(strip) for strip in strips]),
        (284, 3, [planar]),
        *tags,
    ]
    ifd = start + len(data)
    extra_at = ifd + 2 + 12 * len(entries) + 4
    table, extra = struct.pack(order + "H", len(entries)), b""
    for tag, kind, values in sorted(entries):
        body = struct.pack(f"{order}{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(body) > 4:
            body, extra = struct.pack(order + "I", extra_at + len(extra)), extra + body
        table += struct.pack(order + "HHI", tag, kind, len(values)) + body.ljust(4, b"\0")
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(order + "I", ifd) + data + table + struct.pack(order + "I", 0) + extra


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


# ------------------------------------------------------------------------------------------------- what is refused


def header(kind, width, height):
    if kind == "PNG":
        return png(width, height, 8, 2, [b"\0" * 30])
    if kind == "BMP":
        return (
            b"BM"
            + struct.pack("<IHHIIiiHHIIiiII", 1000, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
            + bytes(99)
        )
    if kind == "PPM":
        return b"P6 %d %d 255\n" % (width, height) + bytes(99)
    if kind == "GIF":
        return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + stored(Image.new("L", (8, 8)), "GIF")[13:]
    if kind == "TIFF":
        return tiff("<", [bytes(99)], height, width, [8] * 3, 2)
    data = stored(Image.new("RGB", (8, 8)), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "GIF", "TIFF", "JPEG"])
def test_a_bomb_is_refused_with_its_size(kind):
    with pytest.raises(ImageError) as error:
        decode(header(kind, 20_000, 20_000))
    assert str(error.value) == "20000 x 20000 pixels; more than 89,478,485 are refused"
    side = int(MAX_PIXELS**0.5) + 1
    with pytest.raises(ImageError, match=f"{side} x {side} pixels"):  # where Pillow itself only warns
        decode(header(kind, side, side))


def test_a_tiff_whose_tile_is_a_bomb_is_refused():
    with pytest.raises(ImageError, match="20000 x 20000 pixels"):
        decode(tiff("<", [bytes(99)], H, W, [8] * 3, 2, tags=[(322, 4, [20_000]), (323, 4, [20_000])]))


def test_a_jpeg_of_endless_scans_is_refused():
    data = stored(Image.new("L", (8, 8)), "JPEG", progressive=True)
    scan = data[data.index(b"\xff\xda") : -2]
    with pytest.raises(ImageError, match="JPEG scans; more than 500"):
        decode(data[:-2] + scan * 600 + data[-2:])


def test_empty_and_not_an_image():
    with pytest.raises(ImageError, match=r"^empty file$"):
        decode(b"")
    for data in (b"this is a text file named .jpg\n", b"\x89PNG", b"%PDF-1.7", b"%!PS-Adobe-3.0 EPSF", b"\0" * 100):
        with pytest.raises(ImageError, match=r"^not an image \(JPEG, PNG, WebP, BMP, GIF, TIFF or PPM\)$"):
            decode(data)


def photo():
    ramp = np.add.outer(np.arange(200), np.arange(300))[..., None] * np.array([1, 0.5, 0.2])
    return Image.fromarray((ramp % 256).astype(np.uint8))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP"])
@pytest.mark.filterwarnings("ignore:Truncated File Read", "ignore:Corrupt EXIF")
def test_a_truncated_file_is_a_failure(kind):
    data = stored(photo(), kind)
    for share in (0.03, 0.3, 0.6, 0.9):
        with pytest.raises(ImageError, match=r"^(broken|not an image)"):
            decode(data[: int(len(data) * share)])


def test_the_reason_of_a_truncated_jpeg():
    data = stored(photo(), "JPEG")
    with pytest.raises(ImageError, match=r"^broken JPEG: image file is truncated \(\d+ bytes not processed\)$"):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize(("kind", "rest"), [("JPEG", 128), ("PNG", 0), ("PPM", 0)])
def test_allow_truncated_keeps_what_is_there(kind, rest):
    whole = stored(photo(), kind)
    part = pixels(whole[: len(whole) // 2], allow_truncated=True)
    assert part.shape == (200, 300, 3)
    assert (part[:40] == pixels(whole)[:40]).all()
    assert (part[-1, -1] == rest).all()
    assert (pixels(whole, allow_truncated=True) == pixels(whole)).all()


def test_allow_truncated_in_one_thread_does_not_reach_another():
    data = stored(photo(), "PNG")
    data = data[: len(data) // 2]
    stop, taken = threading.Event(), []

    def strict():
        while not stop.is_set():
            try:
                taken.append(decode(data))
            except ImageError:
                taken.append(None)

    thread = threading.Thread(target=strict)
    thread.start()
    tries, deadline = 0, time.monotonic() + DEADLINE
    while thread.is_alive() and (tries < 100 or len(taken) < 100) and time.monotonic() < deadline:
        decode(data, allow_truncated=True)
        tries += 1
    stop.set()
    thread.join()
    assert len(taken) >= 100
    assert all(one is None for one in taken)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.filterwarnings("ignore")
def test_hostile_bytes_give_a_picture_or_one_line():
    """Bit flips, cuts and foreign pieces in all formats: never another exception, never an address or a second line."""
    random = np.random.default_rng(0)
    small = photo().resize((40, 30))
    seeds = [stored(small, kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM", "WEBP")]
    seeds.append(stored(small, "TIFF", compression="tiff_lzw"))
    seeds.append(stored(small, "TIFF", compression="tiff_deflate"))
    seeds.append(stored(small.convert("CMYK"), "JPEG", progressive=True))
    for round_ in range(60):
        for seed in seeds:
            data = bytearray(seed)
            for at in random.integers(0, min(len(data), 400 if round_ % 2 else len(data)), 1 + round_ % 4):
                data[at] = random.integers(0, 256)
            if round_ % 5 == 0:
                del data[random.integers(8, len(data)) :]
            try:
                assert decode(bytes(data), allow_truncated=round_ % 3 == 0).mode == "RGB"
            except ImageError as error:
                text = str(error)
                assert text
                assert "\n" not in text
                assert " at 0x" not in text
                assert len(text) < 300


def test_pillow_s_own_images():
    """A dataset may hand over any mode."""
    rgb = Image.fromarray(COLOUR)
    assert to_rgb(rgb) is rgb
    for mode in ("HSV", "YCbCr", "CMYK", "RGBX"):
        assert np.abs(np.asarray(to_rgb(rgb.convert(mode))).astype(int) - COLOUR).max() <= 12, mode
    assert (np.asarray(to_rgb(Image.fromarray(DEEP))) == grey(DEEP >> 8)).all()
    premultiplied = Image.fromarray(np.dstack([COLOUR, np.full_like(GREY, 255)])).convert("RGBa")
    assert (np.asarray(to_rgb(premultiplied)) == COLOUR).all()


# ------------------------------------------------------------------------------------- other decoders, scaled decoding


def photograph(width, height):
    """A smooth picture, as photographs are: noise would differ between any two ways to scale."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = [np.sin(7 * x + 3 * y), np.cos(5 * y), np.sin(9 * x * y)]
    return Image.fromarray(np.stack([127 + 120 * wave for wave in waves], axis=2).astype(np.uint8))


def orientation_exif(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    return exif


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_scaled_decoding_is_nearly_the_same_and_keeps_the_geometry(decoder, orientation):
    if decoder == "simplejpeg":
        pytest.importorskip("simplejpeg")
    data = stored(photograph(320, 200), "JPEG", quality=95, exif=orientation_exif(orientation))
    size = (200, 320) if orientation == 6 else (320, 200)
    for resize in (24, 50, 99, (30, 70), None):
        transform = Transform(resize=resize, crop=20)
        whole, scaled = (Decoding(decoder, scaled).pixels(data, transform) for scaled in (False, True))
        assert whole[1] == scaled[1] == size
        assert whole[0].shape == scaled[0].shape == (20, 20, 3)
        assert np.abs(whole[0].astype(int) - scaled[0]).mean() < 2
        assert (whole[0] != scaled[0]).any() == (resize is not None)
    assert Decoding(decoder, scaled=True).picture(data).size == size


def test_simplejpeg_gives_the_same_picture_and_leaves_other_formats_to_pillow():
    pytest.importorskip("simplejpeg")
    fast = Decoding("simplejpeg")
    colour, grey = photograph(70, 41), photograph(70, 41).convert("L")
    for image, options in ((colour, {}), (grey, {}), (colour, {"progressive": True}), (colour, {"subsampling": 0})):
        data = stored(image, "JPEG", quality=90, exif=orientation_exif(8), **options)
        assert np.abs(np.asarray(fast.picture(data)).astype(int) - pixels(data)).max() <= 2
    for data in (stored(colour.convert("CMYK"), "JPEG"), stored(colour, "PNG"), stored(colour, "WEBP")):
        assert (np.asarray(fast.picture(data)) == pixels(data)).all()


def test_simplejpeg_refuses_what_pillow_refuses():
    pytest.importorskip("simplejpeg")
    data = stored(photograph(300, 200), "JPEG")
    with pytest.raises(ImageError, match="broken JPEG: "):
        Decoding("simplejpeg").picture(data[: len(data) // 2])
    part = np.asarray(Decoding("simplejpeg", allow_truncated=True).picture(data[: len(data) // 2])).astype(int)
    assert np.abs(part[:60] - pixels(data)[:60]).max() <= 2
    with pytest.raises(ImageError, match="20000 x 20000 pixels"):
        Decoding("simplejpeg").picture(header("JPEG", 20_000, 20_000))


def test_two_sizes_in_one_file_are_refused(monkeypatch):
    simplejpeg = pytest.importorskip("simplejpeg")
    data = stored(photograph(30, 20), "JPEG")
    monkeypatch.setattr(simplejpeg, "decode_jpeg_header", lambda data, strict: (20_000, 20_000, "RGB", "420"))
    with pytest.raises(ImageError, match="broken JPEG: two sizes, 30 x 20 and 20000 x 20000"):
        Decoding("simplejpeg").picture(data)


def test_a_decoder_that_is_not_there(monkeypatch):
    with pytest.raises(UnitvisError, match="decoder='turbo'; it must be one of pillow, simplejpeg"):
        Decoding("turbo")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnitvisError, match=r"simplejpeg is not installed; pip install 'unitvis\[simplejpeg\]'"):
        Decoding("simplejpeg")


def most_at_once(data, expected, monkeypatch):
    """The largest number of six threads that use a picture at the same time, where there is room for `expected`.

    Those that use one wait until so many do and all threads have asked for room; one more would then get in.
    """
    changed, asked, used, too_many, most = threading.Condition(), [], set(), threading.Event(), []
    take = decode_module._MemoryBudget.take

    def asking(room, need):
        with changed:
            asked.append(need)
            changed.notify_all()
        return take(room, need)

    def use(picture, size):
        me = threading.get_ident()
        with changed:
            used.add(me)
            most.append(len(used))
            if len(used) > expected:
                too_many.set()
            changed.notify_all()
            assert changed.wait_for(lambda: max(most) >= expected and len(asked) >= 6, DEADLINE)
        too_many.wait(0.01)  # gives one more the time to come in; what holds does not depend on it
        with changed:
            used.remove(me)

    def work(_):
        for _ in range(5):
            decode_module.decode_sized(data, use)

    monkeypatch.setattr(decode_module._MemoryBudget, "take", asking)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    monkeypatch.setattr(decode_module._MemoryBudget, "take", take)
    assert len(most) == len(asked) == 30
    return max(most)


def test_large_images_wait_for_room(monkeypatch):
    monkeypatch.setattr("unitvis.sources.decode._memory_budget", decode_module._MemoryBudget(4 * 64 * 64 * 2))
    assert most_at_once(stored(Image.new("RGB", (64, 64)), "PNG"), 2, monkeypatch) == 2
    huge = stored(Image.new("RGB", (300, 300)), "PNG")  # needs more than there is, so it is alone
    assert most_at_once(huge, 1, monkeypatch) == 1
