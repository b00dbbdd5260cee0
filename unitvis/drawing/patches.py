"""From a winner to its pixels: which box is drawn, and cutting it out of the original picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from unitvis.errors import UnitvisError
from unitvis.results.arrays import LayerArrays
from unitvis.results.data import RunData

Box = tuple[int, int, int, int]

CROPS = ("rf", "effective", "image")
FILL = (204, 204, 204)  # what lies outside the image: the network saw its padding there, not a colour


def default_crop(info: Mapping[str, Any], input_size: tuple[int, int]) -> str:
    """The crop a layer is drawn with unless one is asked for: the receptive field while it is at most half as wide and
    high as the image, else the effective box, which shows what a neuron really looked at; the image without either.
    """
    height, width = info["receptive_field"]["size"]
    if 2 * height <= input_size[0] and 2 * width <= input_size[1]:
        return "rf"
    return "effective" if info["effective_box"] else "image"


def crop_of(run: RunData, layer: str, crop: str | None) -> str:
    """The crop as asked for, or the layer's default."""
    info = run[layer].info
    if crop is None:
        return default_crop(info, run.input_size)
    if crop not in CROPS:
        raise UnitvisError(f"crop must be one of {', '.join(CROPS)}, not {crop!r}")
    if crop == "effective" and not info["effective_box"]:
        raise UnitvisError(f"layer {layer!r} has no effective box (none of its winners has a gradient); use crop='rf'")
    return crop


def drawn_box(top: LayerArrays, unit: int, rank: int, crop: str, size: tuple[int, int]) -> Box:
    """Left, top, right, bottom, in model-input pixels, of what is drawn of a winner; it may leave the image."""
    left, upper, right, lower = top.boxes[unit, rank].tolist()
    if crop == "image":
        return 0, 0, size[1], size[0]
    if crop == "effective":
        side = top.info["effective_box"]
        left, upper = (left + right - side) // 2, (upper + lower - side) // 2
        return left, upper, left + side, upper + side
    return left, upper, right, lower


def cut(
    picture: Any,
    to_picture: Any,
    box: Box,
    input_size: tuple[int, int],
    size: int,
    fill: tuple[int, int, int] = FILL,
) -> Image.Image:
    """`size` x `size` pixels of a box in model-input pixels, cut from the original picture (bicubic).

    What lies outside the model's input is `fill`, also where the photograph goes on: the network never saw it.
    """
    left, upper, right, lower = box
    scale = size / max(right - left, lower - upper, 1)  # a neuron that sees only padding has an empty box
    width, height = max(1, round((right - left) * scale)), max(1, round((lower - upper) * scale))
    canvas = Image.new("RGB", (size, size), fill)
    seen = max(left, 0), max(upper, 0), min(right, input_size[1]), min(lower, input_size[0])
    if seen[0] >= seen[2] or seen[1] >= seen[3]:
        return canvas
    x, y = (size - width) // 2, (size - height) // 2  # a box that is not square is centred
    start = x + round((seen[0] - left) * scale), y + round((seen[1] - upper) * scale)
    stop = x + round((seen[2] - left) * scale), y + round((seen[3] - upper) * scale)
    extent = max(1, stop[0] - start[0]), max(1, stop[1] - start[1])
    region = _inside(to_picture(seen), picture.size)
    canvas.paste(picture.resize(extent, Image.Resampling.BICUBIC, box=region), start)
    return canvas


def whole(picture: Any, to_picture: Any, input_size: tuple[int, int], size: int) -> Image.Image:
    """All that the model sees of a picture, cut from the original, `size` pixels on its longer side."""
    height, width = input_size
    scale = size / max(height, width)
    extent = max(1, round(width * scale)), max(1, round(height * scale))
    region = _inside(to_picture((0, 0, width, height)), picture.size)
    return picture.resize(extent, Image.Resampling.BICUBIC, box=region)


def _inside(box: tuple[float, ...], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The box without the rounding error by which it may leave the picture."""
    return max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(size[0])), min(box[3], float(size[1]))


def places(run: RunData, layer: str, units: Iterable[int]) -> dict[int, list[tuple[int, int]]]:
    """The (unit, rank) pairs to draw, by image; blanks and what did not fire have no patch."""
    top = run[layer]
    fired = top.fired
    by_image: dict[int, list[tuple[int, int]]] = {}
    for unit in units:
        for rank in np.flatnonzero(fired[unit]).tolist():
            by_image.setdefault(int(top.images[unit, rank]), []).append((unit, rank))
    return by_image


def patches(run: RunData, wanted: dict[str, tuple[list[int], str, int]]) -> Iterator[tuple[str, int, int, Image.Image]]:
    """Cut patches, each picture opened once: {layer: (units, crop, size)} -> (layer, unit, rank, patch), any order."""
    per_layer = {layer: places(run, layer, units) for layer, (units, _, _) in wanted.items()}
    for image, picture, to_picture in pictures(run, sorted(set().union(*per_layer.values()))):
        for layer, by_image in per_layer.items():
            _, crop, size = wanted[layer]
            for unit, rank in by_image.get(image, []):
                box = drawn_box(run[layer], unit, rank, crop, run.input_size)
                yield layer, unit, rank, cut(picture, to_picture, box, run.input_size, size)


def pictures(run: RunData, images: list[int]) -> Iterator[tuple[int, Any, Any]]:
    """(image, picture, where a box of model-input pixels lies in it) for each of these; see `Source.picture`.

    Raises UnitvisError where an image file is no longer the one that was scanned.
    """
    shown = _value_range(run) if images else (0.0, 1.0)
    for image in images:
        if image in run.records:
            run.source.check(run.records[image])
        yield image, *run.source.picture(image, shown)


def _value_range(run: RunData) -> tuple[float, float]:
    """What black and white are where the source has normalised floats only: one range for the whole run."""
    if not run.source.rereadable:
        raise UnitvisError(
            f"the images came from a {run.source.kind}, which cannot be read again to cut patches from; give the same "
            f"images as a folder, array or dataset: unitvis.load(RUN, images=...) or recorder.result(images=...)"
        )
    sample = run.winners[:64].tolist()
    return run.source.value_range(sample) if run.source.read(sample[0]).is_floating_point() else (0.0, 1.0)
