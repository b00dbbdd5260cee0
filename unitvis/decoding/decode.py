"""Decode the bytes of an image file to upright 8-bit RGB, or raise ImageError with a reason of one line."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from numbers import Real
from threading import Condition
from typing import Any, Protocol, TypeVar

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    features,
)
from PIL import __version__ as PILLOW

from unitvis.errors import ImageError

try:
    from PIL.AvifImagePlugin import AvifImageFile
except ImportError:  # Pillow before 11.3
    AvifImageFile = None  # type: ignore[assignment, misc]

_GLOBALS = (
    (Image, "MAX_IMAGE_PIXELS"),
    (ImageFile, "LOAD_TRUNCATED_IMAGES"),
    (PngImagePlugin, "MAX_TEXT_CHUNK"),
    (PngImagePlugin, "MAX_TEXT_MEMORY"),
)
Size = tuple[int, int]  # width, height
_Result = TypeVar("_Result")

MAX_PIXELS = 89_478_485  # Pillow's limit for decompression bombs (268 MB of RGB); larger headers are refused
MAX_SCANS = 500  # of a progressive JPEG, which has about ten; thousands would keep the decoder busy for hours

# Accepted formats: (name, first bytes, Pillow plugin). A hostile file must not reach other decoders (PostScript, PDF,
# camera and game formats). The first bytes choose the decoder, never the file's name.
_FORMATS: tuple[tuple[str, re.Pattern[bytes], type[ImageFile.ImageFile] | None], ...] = (
    ("JPEG", re.compile(rb"\xff\xd8\xff"), JpegImagePlugin.JpegImageFile),
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    ("WebP", re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImagePlugin.WebPImageFile),
    ("BMP", re.compile(rb"BM"), BmpImagePlugin.BmpImageFile),
    ("GIF", re.compile(rb"GIF8[79]a"), GifImagePlugin.GifImageFile),
    ("TIFF", re.compile(rb"II[*+]\0|MM\0[*+]"), TiffImagePlugin.TiffImageFile),
    ("PPM", re.compile(rb"P[1-6]\s"), PpmImagePlugin.PpmImageFile),
    # the brand comes first, or after mif1 (an image file of some codec) among the compatible brands
    ("AVIF", re.compile(rb"....ftyp(avi[fs]|m(if|sf)1....(....){0,16}?avi[fs])", re.DOTALL), AvifImageFile),
)
_OPTIONAL = {"AVIF": "avif", "WebP": "webp"}  # formats that Pillow may be built without, and its names for them
_UNREADABLE = (  # formats that Pillow does not decode, named in the reason
    ("HEIC", re.compile(rb"....ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)", re.DOTALL)),
    ("JPEG XL", re.compile(rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n")),
)

_TURN_UPRIGHT = {  # EXIF orientation -> how to turn the pixels
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = {_TURN_UPRIGHT[orientation] for orientation in (5, 6, 7, 8)}  # width and height are exchanged
_ORIENTATION, _BITS, _PHOTOMETRIC, _PLANAR, _TILE_WIDTH, _TILE_HEIGHT = 274, 258, 262, 284, 322, 323  # TIFF tags


def decode(data: bytes, *, allow_truncated: bool = False) -> Image.Image:
    """Decode an image file to mode RGB, turned upright by its EXIF orientation, transparency over white.

    Of 16-bit channels the high byte is kept, of an animation the first frame; colour profiles are not applied (as in
    torchvision and timm). allow_truncated: decode a file that ends early; the missing part is grey (JPEG) or black (a
    truncated WebP or compressed TIFF still fails). Raises ImageError for any bytes that cannot be decoded.
    """
    return decode_sized(data, lambda picture, _: picture, allow_truncated=allow_truncated)


def decode_sized(
    data: bytes,
    use: Callable[[Image.Image, Size], _Result],
    *,
    allow_truncated: bool = False,
    simplejpeg: bool = False,
    wanted_size: Callable[[int, int], Size] | None = None,
) -> _Result:
    """Decode as `decode` does, and return use(image, (width, height) of the whole image, upright).

    simplejpeg: decode JPEG files of one or three colours with simplejpeg. wanted_size: function of an image's (width,
    height) that gives the (height, width) it is resized to; a JPEG is then decoded at 1/2, 1/4 or 1/8 of its size if
    that is no smaller. `use` runs inside the memory budget.
    """
    with _open_image(data, allow_truncated) as image:
        turn = _TURN_UPRIGHT.get(_orientation(image)) if image.format == "JPEG" else None
        whole = wanted = image.size
        if wanted_size is not None:
            height, width = wanted_size(*_swapped(whole, turn in _SWAPS_SIDES))
            wanted = _swapped((width, height), turn in _SWAPS_SIDES)  # as stored, before the turn
        fast = image.format == "JPEG" and simplejpeg and image.mode in ("L", "RGB")
        if image.format == "JPEG" and not fast and wanted != whole:
            image.draft(None, wanted)
        with memory_budget.take(_decoding_bytes(image)):
            if fast:
                picture = _by_simplejpeg(data, whole, wanted, allow_truncated)
            else:
                _load_pixels(image, allow_truncated)
                picture = to_rgb(image)
                if image.format != "JPEG":  # in a PNG it may come after the pixels
                    turn = _TURN_UPRIGHT.get(_orientation(image))
            picture = picture if turn is None else picture.transpose(turn)
            return use(picture, _swapped(whole, turn in _SWAPS_SIDES))


def pillow_globals() -> dict[str, Any]:
    """Settings of Pillow that a user may have changed, and that decide what is decoded."""
    return {name: getattr(module, name) for module, name in _GLOBALS}


# Pillow's own values since version 11, written out: a program may change them before it imports this module.
_DEFAULTS = {
    "MAX_IMAGE_PIXELS": MAX_PIXELS,
    "LOAD_TRUNCATED_IMAGES": False,
    "MAX_TEXT_CHUNK": 2**20,
    "MAX_TEXT_MEMORY": 2**26,
}


def changed_globals() -> dict[str, Any]:
    """Those of Pillow's settings that are not Pillow's own and change what is decoded.

    A higher MAX_IMAGE_PIXELS, or none, changes nothing, since MAX_PIXELS is a limit beside it.
    """
    found = {name: _as_json(value) for name, value in pillow_globals().items() if value != _DEFAULTS[name]}
    limit = found.get("MAX_IMAGE_PIXELS", 0)
    if limit is None or limit > MAX_PIXELS:
        del found["MAX_IMAGE_PIXELS"]
    return found


def _as_json(value: Any) -> Any:
    """A setting as JSON can hold it: 10**8 for 1e8, None for infinity, which is no limit either."""
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    try:
        number = float(value)
    except OverflowError:  # of an integer that no float holds
        return None
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() else number


def restore_globals(values: Mapping[str, Any]) -> None:
    """Set Pillow's settings to those of another process."""
    for module, name in _GLOBALS:
        setattr(module, name, values[name])


class Budget(Protocol):
    """Limit on the bytes of pixels that are held at once."""

    def take(self, need: int) -> AbstractContextManager[None]:
        """Hold `need` bytes while the block runs; a need above the whole limit takes all of it."""


class MemoryBudget:
    """Limit on the bytes of pixels that all threads hold at once: a thread waits until its share is free."""

    def __init__(self, size: int) -> None:
        self._total = self._free = size
        self._freed = Condition()

    @contextmanager
    def take(self, need: int) -> Iterator[None]:
        """Hold `need` bytes while the block runs; a need above the whole limit takes all of it."""
        need = min(need, self._total)
        with self._freed:
            self._freed.wait_for(lambda: self._free >= need)
            self._free -= need
        try:
            yield
        finally:
            with self._freed:
                self._free += need
                self._freed.notify_all()


BUDGET = 48_000_000 * max(4, os.cpu_count() or 1)  # bytes; 12 megapixels for each core
memory_budget: Budget = MemoryBudget(BUDGET)  # a worker process puts one in its place that all of them share


def _decoding_bytes(image: Image.Image) -> int:
    """Estimate the bytes needed to decode an image: 4 a pixel, and two copies more if its mode is converted."""
    return image.size[0] * image.size[1] * (4 if image.mode == "RGB" else 12)


def _swapped(size: Size, turned: bool) -> Size:
    """Exchange the two sides if the image is turned by a quarter."""
    return (size[1], size[0]) if turned else size


def _by_simplejpeg(data: bytes, whole: Size, wanted: Size, allow_truncated: bool) -> Image.Image:
    """Decode a JPEG with simplejpeg; whole: (width, height) that Pillow read; wanted: the least that is needed."""
    from simplejpeg import decode_jpeg, decode_jpeg_header  # optional package

    height, width = decode_jpeg_header(data, strict=not allow_truncated)[:2]
    if (width, height) != whole:  # the limit on pixels was checked with Pillow's size
        raise ImageError(f"broken JPEG: two sizes, {whole[0]} x {whole[1]} and {width} x {height}")
    pixels = decode_jpeg(data, "RGB", min_width=wanted[0], min_height=wanted[1], strict=not allow_truncated)
    return Image.fromarray(pixels)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to 8-bit RGB, transparency over white; ImageError if the range of values is unknown."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _high_byte(image)
    elif image.mode == "F":
        raise ImageError("floating-point pixels have no known range; convert the image to 8 bits")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    clear = image.info.get("transparency")
    if isinstance(clear, tuple) and max(clear) > 255:  # 16-bit PNG: Pillow kept the high byte of its pixels
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    layers = image if image.mode == "RGBA" else image.convert("RGBA")
    picture = Image.new("RGB", image.size, "white")
    picture.paste(layers, mask=layers)
    return picture


def _high_byte(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey (12-bit in some TIFF files) to 8 bits; Pillow's own conversion clips the values."""
    if image.mode == "I" and image.format != "PPM":  # Pillow scales a deep PGM to 0..65535
        raise ImageError("32-bit or signed pixels have no known range; convert the image to 8 bits")
    tags = getattr(image, "tag_v2", {})
    grey = np.asarray(image) >> (tags.get(_BITS, (16,))[0] - 8)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero
        grey = 255 - grey
    if (clear := image.info.get("transparency")) is not None:
        grey = np.where(np.asarray(image) == clear, 255, grey)
    return Image.fromarray(grey.astype(np.uint8))


@contextmanager
def _open_image(data: bytes, allow_truncated: bool = False) -> Iterator[ImageFile.ImageFile]:
    """Open an image and read its header; whatever Pillow raises while the block runs becomes ImageError."""
    if not data:
        raise ImageError("empty file")
    name, plugin = next(((name, plugin) for name, magic, plugin in _FORMATS if magic.match(data)), ("", None))
    if not name:
        if other := next((name for name, magic in _UNREADABLE if magic.match(data)), None):
            raise ImageError(f"{other}, which is not decoded; convert it to JPEG or PNG")
        raise ImageError("not an image (JPEG, PNG, WebP, AVIF, BMP, GIF, TIFF or PPM)")
    if plugin is None or (name in _OPTIONAL and not features.check(_OPTIONAL[name])):
        wanted = "pillow>=11.3" if plugin is None else f"one that was built with {name}"
        raise ImageError(f"{name}, which this Pillow ({PILLOW}) cannot decode; install {wanted}")
    try:
        many = name == "JPEG" and data.count(b"\xff\xda") > MAX_SCANS  # counted with what is none, but fast
        if many and jpeg_scans(data, MAX_SCANS + 1) > MAX_SCANS:
            raise ImageError(f"more than {MAX_SCANS} JPEG scans; such a file is refused")
        if name == "JPEG" and allow_truncated:
            data += b"\xff\xd9"  # end marker that a truncated file lacks: libjpeg then fills the rest
        image = plugin(io.BytesIO(data), "")
        _refuse_bomb(image)
        yield image
    except ImageError:
        raise
    except Exception as error:  # Pillow may raise anything for a hostile file
        text = re.sub(r"<[^<>]* at 0x[0-9a-fA-F]+>", "the data", " ".join(str(error).split())) or type(error).__name__
        too_large = isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning)
        raise ImageError(text if too_large else f"broken {name}: {text[:200]}") from error


# A marker: 0xff, any number of times, and a byte that is neither 0 (which stands for 0xff in coded data) nor 0xff.
_MARKER = re.compile(rb"\xff+([^\x00\xff])")
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
# Markers of segments that every decoder skips by their length: frames, tables, scans, application data, comments. Of
# any other marker no length is believed: it could hide scans.
_WITH_LENGTH = frozenset((*range(0xC0, 0xC8), *range(0xC9, 0xD0), *range(0xDA, 0xDE), *range(0xE0, 0xF0), 0xFE))


def jpeg_scans(data: bytes, most: int) -> int:
    """Number of scans of a JPEG up to its end of image, or `most`; what follows, or is a preview in EXIF, is none."""
    scans, place = 0, 2
    while scans < most and (found := _MARKER.search(data, place)):
        marker, place = found[1][0], found.end()
        if marker == _END_OF_IMAGE:
            break
        scans += marker == _START_OF_SCAN
        if marker in _WITH_LENGTH:
            place += int.from_bytes(data[place : place + 2], "big")
    return scans


def _refuse_bomb(image: ImageFile.ImageFile) -> None:
    """Raise ImageError if the header promises more than MAX_PIXELS, or a TIFF that Pillow reads wrongly."""
    sizes = [image.size]
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        if tags.get(_PLANAR) == 2 and max(tags.get(_BITS, (8,))) > 8:
            raise ImageError("a TIFF of 16 bits with its colours in separate planes; Pillow reads it wrongly")
        sizes.append((tags.get(_TILE_WIDTH, 1), tags.get(_TILE_HEIGHT, 1)))  # libtiff allocates a whole tile
    for width, height in sizes:
        if width * height > MAX_PIXELS:
            raise ImageError(f"{width} x {height} pixels; more than {MAX_PIXELS:,} are refused")


def _load_pixels(image: ImageFile.ImageFile, allow_truncated: bool) -> None:
    """Decode the pixels; allow_truncated: keep the rows decoded before the file ended."""
    try:
        image.load()
    except OSError as error:
        if not allow_truncated or "truncated" not in str(error).lower():
            raise
        image.tile = []  # keep the decoded rows (Pillow's own switch for this is global to all threads)
        image.load()


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 (upright) if there is none."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a broken EXIF tag is no reason to refuse the pixels
        return 1
