"""Cutting patches from the original pictures, in this process or in others."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unitvis.decoding.contents import Contents, digest
from unitvis.decoding.geometry import ResizeCrop
from unitvis.decoding.mosaic import Encoding, cell_scan
from unitvis.decoding.options import Decoding, check_packed
from unitvis.errors import UnitvisError
from unitvis.files import replacing

Box = tuple[int, int, int, int]  # left, top, right, bottom in model-input pixels, half-open
FILL = (204, 204, 204)  # colour of a patch outside the model's input, where the network had padding
# Pictures that are this many times as large as the patch are first reduced by a whole number, which shows no difference
# and takes a fraction of the time; see `PIL.Image.Image.resize`.
_REDUCING_GAP = 3.0
_WHOLE_QUALITY = 80  # of JPEG files
_WHOLE_FILTER = Image.Resampling.HAMMING  # reduces large pictures in about half of the time that bicubic takes


class Cut(NamedTuple):
    """A patch that is cut from a picture, and what is made of it."""

    box: Box
    size: int  # pixels that the patch is wide and high
    pixels: int | None  # pixels that it is wide and high when it is handed back, reduced if fewer; None: it is not
    cell: Encoding | None  # how it is encoded as a cell of a JPEG; None: it is not


class Cuts(NamedTuple):
    """What is made of one picture."""

    patches: Sequence[Cut]
    whole: int | None = None  # pixels of the longer side of what the model sees, at most, if that is wanted
    model_input: bool = False  # whether the pixels that the model gets are wanted


class Piece(NamedTuple):
    """What was made of one patch."""

    pixels: NDArray[np.uint8] | None  # [pixels, pixels, 3]
    scan: bytes | None  # of a JPEG cell, see `mosaic.cell_scan`


class Pieces(NamedTuple):
    """What was made of one picture."""

    patches: list[Piece]
    whole: bytes | None = None  # a JPEG file of what the model sees, with the picture's own pixels and proportions
    model_input: NDArray[Any] | None = None  # uint8 [H, W, 3], or float32 [C, H, W], already normalised


@dataclass(frozen=True)
class Cutter:
    """Reads image files and cuts them; it can be sent to other processes.

    input_size: (height, width) of the model's input. grey: the model takes one channel.
    """

    contents: Contents
    decoding: Decoding
    geometry: ResizeCrop
    input_size: tuple[int, int]
    grey: bool

    def __call__(
        self, place: Any, hashed: str | None, cuts: Cuts, packed: NDArray[np.uint8] | None = None
    ) -> Pieces | None:
        """Cut the file at a place; None if its content has another hash.

        packed: pixels [H, W, 3] that the file must give as the model's input. Raises ImageError if it gives others, or
        cannot be read.
        """
        data = self.contents.read(place)
        if hashed is not None and digest(data).hex() != hashed:
            return None
        if packed is None and not cuts.model_input:
            picture, pixels = self.decoding.picture(data), None
        else:
            picture, pixels = self.decoding.picture_and_pixels(data, self.geometry)
            if packed is not None:
                check_packed(pixels, packed)
                pixels = packed
        to_picture = partial(self.geometry.to_source, width=picture.width, height=picture.height)
        found = pieces(as_seen(picture, grey=self.grey), to_picture, self.input_size, cuts)
        return found._replace(model_input=pixels if cuts.model_input else None)


def pieces(picture: Image.Image, to_picture: Callable[[Any], Any], input_size: tuple[int, int], cuts: Cuts) -> Pieces:
    """Cut one picture; to_picture: maps a box in model-input pixels to one in the picture."""
    patches = []
    for box, size, pixels, cell in cuts.patches:
        patch = cut(picture, to_picture, box, input_size, size)
        scan = None if cell is None else cell_scan(patch, cell)
        if pixels is not None and pixels != size:
            patch = patch.resize((pixels, pixels), Image.Resampling.BICUBIC)
        patches.append(Piece(None if pixels is None else np.asarray(patch), scan))
    if cuts.whole is None:
        return Pieces(patches)
    left, upper, right, lower = seen = to_picture((0, 0, input_size[1], input_size[0]))
    scale = min(1.0, cuts.whole / max(right - left, lower - upper))
    extent = max(1, round((right - left) * scale)), max(1, round((lower - upper) * scale))
    whole = io.BytesIO()
    _resized(picture, extent, seen, _WHOLE_FILTER).save(whole, "JPEG", quality=_WHOLE_QUALITY)
    return Pieces(patches, whole.getvalue())


def save(pixels: NDArray[np.uint8], path: str, kind: str, options: dict[str, Any]) -> None:
    """Write pixels [H, W, 3] as a picture, which is there when it is whole; options: see `PIL.Image.Image.save`."""
    with replacing(Path(path)) as target:
        Image.fromarray(pixels).save(target, kind, **options)


def cut(
    picture: Any,
    to_picture: Any,
    box: Box,
    input_size: tuple[int, int],
    size: int,
    fill: tuple[int, int, int] = FILL,
) -> Image.Image:
    """Cut a box from the original picture and resize it (bicubic) to `size` x `size` pixels.

    to_picture: maps a box in model-input pixels to one in the picture. Pixels outside the model's input are `fill`,
    also where the picture goes on, because the network did not get them.
    """
    left, upper, right, lower = box
    scale = size / max(right - left, lower - upper, 1)  # a neuron with padding as its only input has an empty box
    width, height = max(1, round((right - left) * scale)), max(1, round((lower - upper) * scale))
    canvas = Image.new("RGB", (size, size), fill)
    inside = max(left, 0), max(upper, 0), min(right, input_size[1]), min(lower, input_size[0])
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        return canvas
    x, y = (size - width) // 2, (size - height) // 2  # a box that is not square is centred
    start = x + round((inside[0] - left) * scale), y + round((inside[1] - upper) * scale)
    stop = x + round((inside[2] - left) * scale), y + round((inside[3] - upper) * scale)
    extent = max(1, stop[0] - start[0]), max(1, stop[1] - start[1])
    canvas.paste(_resized(picture, extent, to_picture(inside)), start)
    return canvas


def whole_input(picture: Any, to_picture: Any, input_size: tuple[int, int], size: int) -> Image.Image:
    """Cut the model's whole input from the original picture, resized to `size` pixels on the longer side."""
    height, width = input_size
    scale = size / max(height, width)
    extent = max(1, round(width * scale)), max(1, round(height * scale))
    return _resized(picture, extent, to_picture((0, 0, width, height)))


def as_seen(picture: Image.Image, *, grey: bool) -> Image.Image:
    """A picture in the colours that a model sees; grey: it takes one channel."""
    return picture.convert("L").convert("RGB") if grey else picture


def _resized(
    picture: Any,
    extent: tuple[int, int],
    box: tuple[float, ...],
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """Resize a box of the picture, which it may leave by a rounding error; UnitvisError if nothing of it is inside."""
    size = picture.size
    clamped = max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(size[0])), min(box[3], float(size[1]))
    if clamped[0] >= clamped[2] or clamped[1] >= clamped[3]:
        raise UnitvisError(
            f"a patch lies outside of its picture of {size[0]} x {size[1]} pixels, so the transform or the images are "
            "not those of the scan; scan again"
        )
    return picture.resize(extent, resample, box=clamped, reducing_gap=_REDUCING_GAP)
