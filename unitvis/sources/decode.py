"""From the bytes of an image file to upright 8-bit RGB, or one line that says why not."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition
from typing import TypeVar

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
)

from unitvis.errors import ImageError

Size = tuple[int, int]  # width, height
_Used = TypeVar("_Used")

MAX_PIXELS = 89_478_485  # where Pillow warns of a decompression bomb; 268 MB of RGB, refused from the header alone
MAX_SCANS = 500  # a progressive JPEG has about ten; thousands in a small file would keep a decoder busy for hours

# The formats in which photographs and data sets come, and no other: every further decoder (PostScript, PDF, camera and
# game formats) is one more that a hostile file can reach. The first bytes choose the decoder, never the file's name.
_FORMATS: tuple[tuple[str, re.Pattern[bytes], type[ImageFile.ImageFile]], ...] = (
    ("JPEG", re.compile(rb"\xff\xd8\xff"), JpegImagePlugin.JpegImageFile),
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    ("WebP", re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImagePlugin.WebPImageFile),
    ("BMP", re.compile(rb"BM"), BmpImagePlugin.BmpImageFile),
    ("GIF", re.compile(rb"GIF8[79]a"), GifImagePlugin.GifImageFile),
    ("TIFF", re.compile(rb"II[*+]\0|MM\0[*+]"), TiffImagePlugin.TiffImageFile),
    ("PPM", re.compile(rb"P[1-6]\s"), PpmImagePlugin.PpmImageFile),
)

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED = {_UPRIGHT[orientation] for orientation in (5, 6, 7, 8)}  # width and height change places
_ORIENTATION, _BITS, _PHOTOMETRIC, _PLANAR, _TILE_WIDTH, _TILE_HEIGHT = 274, 258, 262, 284, 322, 323  # TIFF tags


def decode(data: bytes, *, allow_truncated: bool = False) -> Image.Image:
    """The image as a person sees it: mode RGB, turned upright as its EXIF orientation says, over white.

    16 bits a channel become their high byte; of an animation the first frame is taken; colour profiles are not applied
    (as torchvision and timm do not). `allow_truncated` keeps what a file that ends early still holds; the rest is grey
    (JPEG) or black (a WebP or compressed TIFF stays a failure). Raises ImageError, whatever the bytes.
    """
    return decode_sized(data, lambda picture, _: picture, allow_truncated=allow_truncated)


def decode_sized(
    data: bytes,
    use: Callable[[Image.Image, Size], _Used],
    *,
    allow_truncated: bool = False,
    simplejpeg: bool = False,
    smallest: Callable[[int, int], Size] | None = None,
) -> _Used:
    """What `use` makes of the image that `decode` gives and the size of the whole picture, upright.

    simplejpeg: let it decode JPEG files of one or three colours. smallest: (width, height) of a picture -> (height,
    width) that is enough of it; a JPEG is then decoded at 1/2, 1/4 or 1/8 where that is no smaller.
    """
    with _opened(data, allow_truncated) as image:
        turn = _UPRIGHT.get(_orientation(image)) if image.format == "JPEG" else None
        whole = enough = image.size
        if smallest is not None:
            height, width = smallest(*_swapped(whole, turn in _TURNED))
            enough = _swapped((width, height), turn in _TURNED)  # as the file lies
        fast = image.format == "JPEG" and simplejpeg and image.mode in ("L", "RGB")
        if image.format == "JPEG" and not fast:
            image.draft(None, enough)
        with _room.take(_need(image)):
            if fast:
                picture = _by_simplejpeg(data, whole, enough, allow_truncated)
            else:
                _load(image, allow_truncated)
                picture = to_rgb(image)
                turn = _UPRIGHT.get(_orientation(image))  # in a PNG it may come after the pixels
            picture = picture if turn is None else picture.transpose(turn)
            return use(picture, _swapped(whole, turn in _TURNED))


class _Room:
    """So many bytes of pixels for all threads together; who needs more than there are waits until nobody holds any."""

    def __init__(self, size: int) -> None:
        self._size = self._free = size
        self._changed = Condition()

    @contextmanager
    def take(self, need: int) -> Iterator[None]:
        need = min(need, self._size)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= need)
            self._free -= need
        try:
            yield
        finally:
            with self._changed:
                self._free += need
                self._changed.notify_all()


_room = _Room(48_000_000 * max(4, os.cpu_count() or 1))  # a photograph of 12 megapixels for each core


def _need(image: Image.Image) -> int:
    """Bytes while an image is decoded: four a pixel, and two copies where colours or transparency are converted."""
    return image.size[0] * image.size[1] * (4 if image.mode == "RGB" else 12)


def _swapped(size: Size, turned: bool) -> Size:
    return (size[1], size[0]) if turned else size


def _by_simplejpeg(data: bytes, whole: Size, enough: Size, allow_truncated: bool) -> Image.Image:
    from simplejpeg import decode_jpeg, decode_jpeg_header  # only where it was asked for

    height, width = decode_jpeg_header(data, strict=not allow_truncated)[:2]
    if (width, height) != whole:  # what was checked against a bomb is Pillow's reading of the header
        raise ImageError(f"broken JPEG: two sizes, {whole[0]} x {whole[1]} and {width} x {height}")
    pixels = decode_jpeg(data, "RGB", min_width=enough[0], min_height=enough[1], strict=not allow_truncated)
    return Image.fromarray(pixels)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB from any mode of Pillow's, transparency over white; ImageError where the range of values is unknown."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _high_byte(image)
    elif image.mode == "F":
        raise ImageError("floating-point pixels have no known range; convert the image to 8 bits")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    clear = image.info.get("transparency")
    if isinstance(clear, tuple) and max(clear) > 255:  # of a 16-bit PNG, whose pixels Pillow has cut to the high byte
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    layers = image if image.mode == "RGBA" else image.convert("RGBA")
    picture = Image.new("RGB", image.size, "white")
    picture.paste(layers, mask=layers)
    return picture


def _high_byte(image: Image.Image) -> Image.Image:
    """Grey of 16 bits (12 in some TIFF files) as 8: Pillow's own conversion clips or ignores what the file says."""
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
def _opened(data: bytes, allow_truncated: bool = False) -> Iterator[ImageFile.ImageFile]:
    """The image with its header read; whatever Pillow raises until the block ends leaves it as ImageError."""
    if not data:
        raise ImageError("empty file")
    kinds = [(name, plugin) for name, magic, plugin in _FORMATS if magic.match(data)]
    if not kinds:
        raise ImageError("not an image (JPEG, PNG, WebP, BMP, GIF, TIFF or PPM)")
    name, plugin = kinds[0]
    try:
        if name == "JPEG" and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
            raise ImageError(f"{scans} JPEG scans; more than {MAX_SCANS} are refused")
        if name == "JPEG" and allow_truncated:
            data += b"\xff\xd9"  # the end that a cut file lacks: libjpeg then fills the rest
        image = plugin(io.BytesIO(data), "")
        _refuse_bomb(image)
        yield image
    except ImageError:
        raise
    except Exception as error:  # a hostile file makes Pillow raise nearly anything
        text = re.sub(r"<[^<>]* at 0x[0-9a-fA-F]+>", "the data", " ".join(str(error).split())) or type(error).__name__
        too_large = isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning)
        raise ImageError(text if too_large else f"broken {name}: {text[:200]}") from error


def _refuse_bomb(image: ImageFile.ImageFile) -> None:
    sizes = [image.size]
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        if tags.get(_PLANAR) == 2 and max(tags.get(_BITS, (8,))) > 8:
            raise ImageError("a TIFF of 16 bits with its colours in separate planes; Pillow reads it wrongly")
        sizes.append((tags.get(_TILE_WIDTH, 1), tags.get(_TILE_HEIGHT, 1)))  # libtiff allocates a whole tile
    for width, height in sizes:
        if width * height > MAX_PIXELS:
            raise ImageError(f"{width} x {height} pixels; more than {MAX_PIXELS:,} are refused")


def _load(image: ImageFile.ImageFile, allow_truncated: bool) -> None:
    try:
        image.load()
    except OSError as error:
        if not allow_truncated or "truncated" not in str(error).lower():
            raise
        image.tile = []  # the rows decoded so far count as all (Pillow's own switch for this is global to all threads)
        image.load()


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # pixels that decode are not refused for a broken tag
        return 1
