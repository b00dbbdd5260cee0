"""Patches: choosing the box that is drawn of a winner, and cutting it from the original picture."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from unitvis.choices import CROPS
from unitvis.errors import UnitvisError
from unitvis.results.arrays import LayerArrays
from unitvis.results.data import RunData

Result = TypeVar("Result")
Box = tuple[int, int, int, int]  # left, top, right, bottom in model-input pixels, half-open
Wanted = Mapping[str, tuple[list[int], str, int]]  # {layer: (units, crop, pixels of a patch)}

MAX_OPEN_PICTURES = 16  # at once, however many cores there are: a large photograph takes 100 MB
FILL = (204, 204, 204)  # colour of a patch outside the model's input, where the network had padding


def default_crop(info: Mapping[str, Any], input_size: tuple[int, int]) -> str:
    """The crop of a layer if none is given, from its entry in the manifest.

    The receptive field while it is at most half as wide and high as the image, else the effective box; the image where
    the layer has none.
    """
    height, width = info["receptive_field"]["size"]
    if 2 * height <= input_size[0] and 2 * width <= input_size[1]:
        return "rf"
    return "effective" if info["effective_box"] else "image"


def crop_of(run: RunData, layer: str, crop: str | None) -> str:
    """The crop that is given, or the layer's default; raises UnitvisError for one that the layer does not have."""
    info = run[layer].info
    if crop is None:
        return default_crop(info, run.input_size)
    if crop not in CROPS:
        raise UnitvisError(f"crop must be one of {', '.join(CROPS)}, not {crop!r}")
    if crop == "effective" and not info["effective_box"]:
        raise UnitvisError(f"layer {layer!r} has no effective box; use crop='rf'")
    return "image" if crop == "rf" and info["receptive_field"]["method"] == "unknown" else crop


def drawn_box(top: LayerArrays, unit: int, rank: int, crop: str, size: tuple[int, int]) -> Box:
    """The box that is drawn of a winner; it may leave the image. size: (height, width) of the model's input."""
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
    region = _clamped(to_picture(inside), picture.size)
    canvas.paste(picture.resize(extent, Image.Resampling.BICUBIC, box=region), start)
    return canvas


def whole_input(picture: Any, to_picture: Any, input_size: tuple[int, int], size: int) -> Image.Image:
    """Cut the model's whole input from the original picture, resized to `size` pixels on the longer side."""
    height, width = input_size
    scale = size / max(height, width)
    extent = max(1, round(width * scale)), max(1, round(height * scale))
    region = _clamped(to_picture((0, 0, width, height)), picture.size)
    return picture.resize(extent, Image.Resampling.BICUBIC, box=region)


def _clamped(box: tuple[float, ...], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Clamp a box to the picture, which it may leave by a rounding error; UnitvisError if nothing is left."""
    clamped = max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(size[0])), min(box[3], float(size[1]))
    if clamped[0] >= clamped[2] or clamped[1] >= clamped[3]:
        raise UnitvisError(
            f"a patch lies outside of its picture of {size[0]} x {size[1]} pixels, so the transform or the images are "
            "not those of the scan; scan again"
        )
    return clamped


def fired_winners(run: RunData, layer: str, units: Iterable[int]) -> dict[int, list[tuple[int, int]]]:
    """List the winners that have a patch, as {image: [(unit, rank)]}: those that are not blank and fired."""
    top = run[layer]
    fired = top.fired
    by_image: dict[int, list[tuple[int, int]]] = {}
    for unit in units:
        for rank in np.flatnonzero(fired[unit]).tolist():
            by_image.setdefault(int(top.images[unit, rank]), []).append((unit, rank))
    return by_image


def cut_patches(run: RunData, wanted: Wanted) -> Iterator[tuple[str, int, int, Image.Image]]:
    """Cut patches and yield (layer, unit, rank, patch) in the order of their images; each picture is opened once."""
    per_layer = {layer: fired_winners(run, layer, units) for layer, (units, _, _) in wanted.items()}

    def patches(image: int, picture: Image.Image, to_picture: Any) -> list[tuple[str, int, int, Image.Image]]:
        found = []
        for layer, by_image in per_layer.items():
            _, crop, size = wanted[layer]
            for unit, rank in by_image.get(image, []):
                box = drawn_box(run[layer], unit, rank, crop, run.input_size)
                found.append((layer, unit, rank, cut(picture, to_picture, box, run.input_size, size)))
        return found

    for found in map_pictures(run, sorted(set().union(*per_layer.values())), patches):
        yield from found


def map_pictures(
    run: RunData, images: Sequence[int], work: Callable[[int, Image.Image, Any], Result]
) -> Iterator[Result]:
    """Yield what `work` makes of each image's picture, in the order of the images.

    work: takes an image id, its picture and a function from model-input boxes to picture boxes (see `Source.picture`);
    where the source has files it runs in threads, a few pictures ahead. Raises UnitvisError where an image file is no
    longer the one that was scanned.
    """
    value_range = _value_range(run) if images else (0.0, 1.0)

    def opened(image: int) -> Result:
        if image in run.records:
            run.source.check(run.records[image])
        picture, to_picture = run.source.picture(image, value_range)
        return work(image, as_seen(picture, run.manifest["input"][0]), to_picture)

    quiet = True if sys.stderr is None else None  # None: a bar on a terminal only, and only for what takes long
    images = tqdm(images, desc="draw", unit=" images", delay=2, disable=quiet, leave=False)
    if not run.source.has_files:  # a data set of the user's may not expect threads
        yield from map(opened, images)
        return
    with ThreadPoolExecutor(threads := min(os.cpu_count() or 1, MAX_OPEN_PICTURES)) as pool:
        ahead: deque[Future[Result]] = deque()
        try:
            for image in images:
                ahead.append(pool.submit(opened, image))
                if len(ahead) > threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def as_seen(picture: Image.Image, channels: int) -> Image.Image:
    """A picture in the colours that a model with so many input channels sees: grey for one."""
    return picture.convert("L").convert("RGB") if channels == 1 else picture


def _value_range(run: RunData) -> tuple[float, float]:
    """The values drawn as black and white, one range for the run: measured for normalised floats, else (0, 1)."""
    if not run.source.rereadable:
        raise UnitvisError(
            f"the images came from a {run.source.kind}, which cannot be read again to cut patches from; give the same "
            f"images as a folder, array or dataset: unitvis.load(RUN, images=...) or recorder.result(images=...)"
        )
    sample = run.winners[:64].tolist()
    return run.source.value_range(sample) if run.source.read(sample[0]).is_floating_point() else (0.0, 1.0)
