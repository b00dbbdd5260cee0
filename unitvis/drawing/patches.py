"""Patches: choosing the box that is drawn of a winner, and cutting it from the original picture."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unitvis.choices import CROPS
from unitvis.decoding.cutting import Box, Cut, Cuts
from unitvis.decoding.mosaic import Encoding
from unitvis.drawing.hands import Hands
from unitvis.errors import UnitvisError
from unitvis.network.receptive_fields.receptive_field import seen_in_part
from unitvis.results.arrays import LayerArrays
from unitvis.results.data import RunData


class LayerCuts(NamedTuple):
    """What is cut of a layer."""

    units: Sequence[int]
    crop: str
    size: int  # pixels that a patch is wide and high when it is cut
    pixels: int | None  # pixels that it is wide and high when it is drawn, reduced if fewer; None: it is not drawn
    drawn: Collection[int] | None = None  # of the units, those whose patches are drawn; None: all
    cell: Encoding | None = None  # how patches are encoded as cells of JPEG pictures; None: they are not


Wanted = Mapping[str, LayerCuts]
Winners = Mapping[int, list[tuple[int, int]]]  # {image: [(unit, rank)]} of a layer
Cells = dict[tuple[int, int], Image.Image]  # {(unit, rank): patch}
Scans = dict[tuple[int, int], bytes]  # {(unit, rank): patch as a cell, see `mosaic.cell_scan`}
# Pixels of a patch on a unit's page, which is at most 18rem wide (gallery.css), on a screen with two pixels a CSS pixel
SHARP_PATCH = 576
# Of the longer side of a whole image, at most: where no patch needs more, and where a small one does
IMAGE_SIDE, MAX_IMAGE_SIDE = 768, 2048


def default_crop(info: Mapping[str, Any], input_size: tuple[int, int]) -> str:
    """The crop of a layer if none is given, from its entry in the manifest.

    The receptive field while it is at most half as wide and high as the image, else the effective box; the image where
    the layer has none, or where all of its positions see the same, as behind global pooling.
    """
    field = info["receptive_field"]
    if seen_in_part(field["size"], input_size):
        return "rf"
    if not info["effective_box"] or field["whole_image"] or info["height"] * info["width"] == 1:
        return "image"
    return "effective"


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
    left, upper, right, lower = drawn_boxes(top, crop, size, (unit, rank)).tolist()
    return left, upper, right, lower


def drawn_boxes(
    top: LayerArrays, crop: str, size: tuple[int, int], which: tuple[Any, Any] = (slice(None), slice(None))
) -> NDArray[np.int32]:
    """The boxes, int32 [..., 4], that are drawn of winners, see `drawn_box`. which: indices of units and ranks."""
    boxes = top.boxes[which]
    if crop == "image":
        return np.broadcast_to(np.array([0, 0, size[1], size[0]], np.int32), boxes.shape)
    if crop == "effective":
        side = top.info["effective_box"]
        first = (boxes[..., :2] + boxes[..., 2:] - side) // 2
        return np.concatenate([first, first + side], axis=-1)
    return boxes


def units_at_the_border(run: RunData, layer: str) -> int:
    """The number of channels most of whose patches show less picture than padding, in the layer's default crop.

    0 where ranking inside the image (`--inside`) is no remedy: for neurons, and where it was asked for already.
    """
    top, size = run[layer], run.input_size
    if top.info["unit"] == "neuron" or "inside" in top.info:
        return 0
    boxes = drawn_boxes(top, crop_of(run, layer, None), size).astype(np.int64)
    inside = np.clip(boxes, 0, [size[1], size[0], size[1], size[0]])
    areas = [np.prod(each[..., 2:] - each[..., :2], axis=-1) for each in (inside, boxes)]  # [units, k]
    padding = top.fired & (2 * areas[0] < areas[1])
    return int((2 * padding.sum(axis=1) > top.fired.sum(axis=1)).sum())


def fired_winners(run: RunData, layer: str, units: Iterable[int]) -> dict[int, list[tuple[int, int]]]:
    """List the winners that have a patch, as {image: [(unit, rank)]}: those that are not blank and fired."""
    top = run[layer]
    fired = top.fired
    by_image: dict[int, list[tuple[int, int]]] = {}
    for unit in units:
        for rank in np.flatnonzero(fired[unit]).tolist():
            by_image.setdefault(int(top.images[unit, rank]), []).append((unit, rank))
    return by_image


class Taker(Protocol):
    """Takes what is made of whole images, while their patches are cut."""

    def wants_input(self, image: int) -> bool:
        """Whether `take` needs the pixels that the model gets of an image."""

    def take(self, image: int, whole: bytes, model_input: NDArray[Any] | None) -> None:
        """Take a JPEG file of all that the model sees, and the pixels that it gets; see `Pieces`."""


def cut_layers(
    run: RunData, wanted: Wanted, hands: Hands, taker: Taker | None = None
) -> Iterator[tuple[str, Cells, Scans]]:
    """Cut the patches of layers, and yield each layer, in their order, as soon as it has all of its patches.

    Pictures are read in the order in which layers need them, each once; a box that several winners share, such as the
    whole image, is cut once.
    """
    winners = {layer: fired_winners(run, layer, cuts.units) for layer, cuts in wanted.items()}
    images = list(dict.fromkeys(image for by_image in winners.values() for image in by_image))
    missing = {layer: len(by_image) for layer, by_image in winners.items()}
    cells: dict[str, Cells] = {layer: {} for layer in wanted}
    scans: dict[str, Scans] = {layer: {} for layer in wanted}
    waiting = deque(wanted)
    boxes = _Boxes(run, wanted, winners)

    def cuts_of(image: int) -> Cuts:
        own = boxes.of(image)
        return Cuts(own) if taker is None else Cuts(own, _side_of_whole(own, run.input_size), taker.wants_input(image))

    for image, pieces in hands.cut(((image, cuts_of(image)) for image in images), len(images)):
        shown = boxes.taken(image)
        patches = [None if pixels is None else Image.fromarray(pixels) for pixels, _ in pieces.patches]
        for layer, unit, rank, number in shown:
            if (patch := patches[number]) is not None:
                cells[layer][unit, rank] = patch
            if (scan := pieces.patches[number].scan) is not None:
                scans[layer][unit, rank] = scan
        for layer in {layer for layer, *_ in shown}:
            missing[layer] -= 1
        if taker is not None and pieces.whole is not None:
            taker.take(image, pieces.whole, pieces.model_input)
        while waiting and not missing[waiting[0]]:
            yield (layer := waiting.popleft()), cells.pop(layer), scans.pop(layer)
    for layer in waiting:  # where no unit fired
        yield layer, cells.pop(layer), scans.pop(layer)


def _side_of_whole(cuts: Sequence[Cut], input_size: tuple[int, int]) -> int:
    """Pixels of an image's longer side, at most, so that the smallest of its patches is sharp on a unit's page."""
    smallest = min(max(right - left, lower - upper, 1) for (left, upper, right, lower), *_ in cuts)
    return min(MAX_IMAGE_SIDE, max(IMAGE_SIDE, SHARP_PATCH * max(input_size) // smallest))


class _Boxes:
    """The boxes of each image that are cut, equal ones once, and which winners show them."""

    def __init__(self, run: RunData, wanted: Wanted, winners: Mapping[str, Winners]) -> None:
        self._wanted, self._winners = wanted, winners
        self._boxes = {layer: drawn_boxes(run[layer], cuts.crop, run.input_size) for layer, cuts in wanted.items()}
        self._drawn = {layer: cuts.drawn and set(cuts.drawn) for layer, cuts in wanted.items()}
        self._shown: dict[int, list[tuple[str, int, int, int]]] = {}  # of images that are being cut

    def of(self, image: int) -> list[Cut]:
        """What is cut of an image."""
        numbers: dict[Cut, int] = {}
        shown = self._shown[image] = []
        for layer, by_image in self._winners.items():
            cuts, boxes, drawn = self._wanted[layer], self._boxes[layer], self._drawn[layer]
            for unit, rank in by_image.get(image, []):
                pixels = cuts.pixels if drawn is None or unit in drawn else None
                cut = Cut(tuple(boxes[unit, rank].tolist()), cuts.size, pixels, cuts.cell)
                shown.append((layer, unit, rank, numbers.setdefault(cut, len(numbers))))
        return list(numbers)

    def taken(self, image: int) -> list[tuple[str, int, int, int]]:
        """(layer, unit, rank, number of its box) of the winners of an image whose boxes were asked for."""
        return self._shown.pop(image)


def patches_by_winner(run: RunData, wanted: Wanted) -> dict[str, Cells]:
    """Cut patches into {layer: {(unit, rank): patch}}."""
    images = set().union(*(fired_winners(run, layer, cuts.units) for layer, cuts in wanted.items()))
    with Hands(run, len(images)) as hands:
        return {layer: cells for layer, cells, _ in cut_layers(run, wanted, hands)}
