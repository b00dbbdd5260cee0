"""The gallery's pictures: for each unit one file with its patches, one with its projections, one with its response
maps; and each winning image once. Places follow each other as in a tile: strongest first, row by row.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from unitvis.attribution.deconvnet import project
from unitvis.attribution.filters import first_filters
from unitvis.drawing import sheets
from unitvis.drawing.colours import heat, heat_levels, signed
from unitvis.drawing.patches import crop_of, cut, drawn_box, pictures, places, whole
from unitvis.files import file_name
from unitvis.network.forward import COMPUTE_BATCH
from unitvis.network.network import Network
from unitvis.results.arrays import LayerArrays
from unitvis.results.data import RunData

Device = torch.device | str | None
PATCH = 112  # pixels of a patch: a multiple of 16, so that JPEG's blocks do not reach across patches
WHOLE = 256  # at most, of the longer side of a whole image
CELLS = 56  # at most, of a response map's side; larger ones are kept as the maxima of equal blocks


def across(k: int) -> int:
    """Places in a row."""
    return math.ceil(math.sqrt(k))


def layer_folder(folder: Path, layer: str) -> Path:
    """Where a layer's pictures are."""
    path = folder / "gallery" / "layers" / file_name(layer)
    path.mkdir(parents=True, exist_ok=True)
    return path


def draw_patches(run: RunData, folder: Path, crop: str | None) -> None:
    """gallery/layers/LAYER/UNIT.jpg, and gallery/images/ID.jpg: all that the model sees of an image."""
    images = folder / "gallery" / "images"
    images.mkdir(parents=True, exist_ok=True)
    size = run.input_size
    shown: set[int] = set()
    for group in sheets.grouped(run, dict.fromkeys(run, PATCH)):
        crops = {layer: crop_of(run, layer, crop) for layer in group}
        wanted = {layer: places(run, layer, range(len(run[layer]))) for layer in group}
        units = {layer: _Sprites(run[layer], layer_folder(folder, layer), ".jpg", quality=82) for layer in group}
        for image, picture, to_picture in pictures(run, sorted(set().union(*wanted.values()))):
            if image not in shown:
                shown.add(image)
                left, upper, right, lower = to_picture((0, 0, size[1], size[0]))
                side = min(WHOLE, round(max(right - left, lower - upper)))
                whole(picture, to_picture, size, side).save(images / f"{image}.jpg", quality=80)
            for layer, by_image in wanted.items():
                for unit, rank in by_image.get(image, []):
                    box = drawn_box(run[layer], unit, rank, crops[layer], size)
                    units[layer].put(unit, rank, cut(picture, to_picture, box, size, PATCH))


class _Sprites:
    """A layer's units, each put together and saved as soon as all its places are there."""

    def __init__(self, top: LayerArrays, folder: Path, ending: str, **options: Any) -> None:
        self._top, self._folder, self._ending, self._options = top, folder, ending, options
        self._cells: dict[int, dict[int, Image.Image]] = {}
        for unit in np.flatnonzero(~top.fired.any(axis=1)).tolist():
            self._save(unit, {})

    def put(self, unit: int, rank: int, image: Image.Image) -> None:
        cells = self._cells.setdefault(unit, {})
        cells[rank] = image
        if len(cells) == int(self._top.fired[unit].sum()):
            self._save(unit, self._cells.pop(unit))

    def _save(self, unit: int, cells: dict[int, Image.Image]) -> None:
        k = self._top.values.shape[1]
        columns = across(k)
        sprite = Image.new("RGB", (columns * PATCH, math.ceil(k / columns) * PATCH), sheets.EMPTY)
        for rank in range(k):
            cell = cells.get(rank) or sheets.not_there(self._top, unit, rank, PATCH)
            sprite.paste(cell, (rank % columns * PATCH, rank // columns * PATCH))
        sprite.save(self._folder / f"{unit}{self._ending}", **self._options)


def draw_projections(model: nn.Module, run: RunData, folder: Path, crop: str | None, device: Device) -> dict[str, str]:
    """gallery/layers/LAYER/UNIT-projections.jpg, each cut as its patch is; {layer: the method, in words}."""
    methods = {}
    for layer in run:
        kind, top = crop_of(run, layer, crop), run[layer]
        # Whole chroma: single coloured pixels are what a projection is made of.
        sprites = _Sprites(top, layer_folder(folder, layer), "-projections.jpg", quality=85, subsampling=0)
        for one in project(model, run, layer, device=device):
            assert one.rank is not None  # noqa: S101 - for the type checker: it comes from a run
            box = drawn_box(top, one.unit, one.rank, kind, run.input_size)
            sprites.put(one.unit, one.rank, one.picture(box, PATCH))
            methods[layer] = one.method
    return methods


def draw_responses(model: nn.Module, run: RunData, folder: Path, device: Device) -> dict[str, tuple[int, int, int]]:
    """gallery/layers/LAYER/UNIT-responses.png: the unit's response maps of its winners, in levels of heat.

    {layer: (height, width, neurons a cell and side)} of the maps as they are kept. Of a run that ranks neurons none.
    """
    tops = {layer: top for layer, top in run.tops.items() if top.info["unit"] == "channel"}
    found = {layer: places(run, layer, range(len(top))) for layer, top in tops.items()}
    order = sorted(set().union(*found.values()))
    kept: dict[str, NDArray[np.uint8]] = {}
    blocks = {n: math.ceil(max(top.info["height"], top.info["width"]) / CELLS) for n, top in tops.items()}
    names = list(tops)

    def read(index: int, maps: Tensor) -> None:
        layer = names[index]
        spots = [(slot, *one) for slot, image in enumerate(ids) for one in found[layer].get(image, [])]
        if not spots:
            return
        slots, units, ranks = (list(part) for part in zip(*spots, strict=True))
        chosen = maps[slots, units][:, None]  # [n, 1, H, W]
        if blocks[layer] > 1:
            chosen = F.max_pool2d(chosen, blocks[layer], ceil_mode=True)
        levels = heat_levels(chosen[:, 0].cpu().numpy())
        shape = (*tops[layer].values.shape, *levels.shape[1:])
        kept.setdefault(layer, np.zeros(shape, np.uint8))[units, ranks] = levels

    network = Network(model, device=device, transform=run.source.transform)
    with network.evaluating(), network.reading_maps(names) as canonical:
        for batch in run.source.batches(COMPUTE_BATCH, ids=order):
            ids = batch.ids.tolist()
            canonical.maps(batch.pixels, read)
    for layer, levels in kept.items():
        for unit in np.flatnonzero(tops[layer].fired.any(axis=1)).tolist():
            _save_heat(levels[unit], layer_folder(folder, layer) / f"{unit}-responses.png")
    return {layer: (*levels.shape[2:], blocks[layer]) for layer, levels in kept.items()}


def _save_heat(levels: NDArray[np.uint8], path: Path) -> None:
    """Maps [k, h, w] side by side."""
    k, height, width = levels.shape
    columns = across(k)
    sprite = np.zeros((math.ceil(k / columns) * height, columns * width), np.uint8)
    for rank in range(k):
        row, column = rank // columns * height, rank % columns * width
        sprite[row : row + height, column : column + width] = levels[rank]
    image = heat(sprite)
    image.save(path, "PNG", bits=4, transparency=image.info["transparency"])


def draw_filters(model: nn.Module, run: RunData, folder: Path) -> list[str]:
    """gallery/layers/LAYER/UNIT-filter.png for the first layer, whose name is returned: grey is 0, one scale each."""
    found = first_filters(model, run)
    for layer, weights in found.items():
        if run[layer].info["unit"] != "channel":
            return []
        for unit, weight in enumerate(weights):
            signed(weight).save(layer_folder(folder, layer) / f"{unit}-filter.png")
    return list(found)


def projections_of(run: RunData, layer: str, unit: int, crop: str) -> list[Image.Image] | None:
    """A unit's projections, [k], `PATCH` pixels wide, as they were drawn in the run's own folder; None: not so cut."""
    drawn = _drawn(run, layer)
    if run.folder is None or not drawn.get("projections") or drawn["crop"] != crop:
        return None
    with Image.open(layer_folder(run.folder, layer) / f"{unit}-projections.jpg") as sprite:
        columns = across(k := run.manifest["k"])
        corners = [(rank % columns * PATCH, rank // columns * PATCH) for rank in range(k)]
        return [sprite.crop((x, y, x + PATCH, y + PATCH)) for x, y in corners]


def filter_of(run: RunData, layer: str, unit: int) -> Image.Image | None:
    """A first layer's filter as it was drawn in the run's own folder, one pixel a weight."""
    if run.folder is None or not _drawn(run, layer).get("filters"):
        return None
    with Image.open(layer_folder(run.folder, layer) / f"{unit}-filter.png") as image:
        return image.convert("RGB")


def _drawn(run: RunData, layer: str) -> dict[str, Any]:
    return read_drawn(run.folder).get("layers", {}).get(layer, {}) if run.folder else {}


def read_drawn(folder: Path) -> dict[str, Any]:
    """What was drawn into a gallery's folder: {"run": of which run, "layers": {layer: what}}; empty: nothing."""
    try:
        return json.loads((folder / "gallery" / "drawn.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
