"""The gallery's pictures: a sprite of patches, one of projections and one of response maps for each unit.

A sprite holds one cell for each winner, in the order of a tile: strongest first, row by row. Each winning image is
drawn once.
"""

from __future__ import annotations

import math
from functools import partial
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
from unitvis.bars import bar
from unitvis.drawing import sheets
from unitvis.drawing.colours import heat, heat_levels, signed
from unitvis.drawing.hands import Hands
from unitvis.drawing.patches import crop_of, cut_layers, drawn_box, fired_winners
from unitvis.drawing.sheets import PATCH_SIZE, tile_columns
from unitvis.files import file_name, make_folder, unoccupied
from unitvis.network.forward import COMPUTE_BATCH
from unitvis.network.network import Network
from unitvis.results.arrays import LayerArrays
from unitvis.results.data import RunData

Device = torch.device | str | None
MAX_MAP_SIDE = 56  # cells of the longer side of a response map; larger maps are reduced to the maxima of square blocks


def layer_folder(folder: Path, layer: str) -> Path:
    """The folder of a layer's pictures, which is created."""
    path = folder / layer_path(layer)
    for above in (path.parent, path):
        make_folder(above)
    return path


def layer_path(layer: str) -> Path:
    """The folder of a layer's pictures, relative to the gallery's folder."""
    return Path("gallery", "layers", file_name(layer))


def sprite_shape(k: int) -> tuple[int, int]:
    """Width and height in pixels of a sprite of k cells."""
    columns = tile_columns(k)
    return columns * PATCH_SIZE, math.ceil(k / columns) * PATCH_SIZE


def draw_patches(run: RunData, folder: Path, crop: str | None, *, with_sheets: bool = False) -> list[Path]:
    """Write gallery/layers/LAYER/UNIT.jpg, and each winning image's model input as gallery/images/ID.jpg.

    with_sheets: write the layers' sheets as well, see `sheets.render`; returns their paths.
    """
    images = folder / "gallery" / "images"
    make_folder(images)
    sheet_paths: list[Path] = []
    for group in sheets.memory_groups(run, crop):
        wanted = {layer: (list(range(len(run[layer]))), crop_of(run, layer, crop), PATCH_SIZE) for layer in group}
        with Hands(run, sheets.images_of(run, group)) as hands:
            for layer, cells in cut_layers(run, wanted, hands, whole=partial(_write_image, images)):
                if with_sheets:
                    sheet_paths += sheets.write_sheet(run, layer, folder, wanted[layer][1], cells, hands)
                sprites = _Sprites(run[layer], layer_folder(folder, layer), ".jpg", quality=82)
                for (unit, rank), patch in cells.items():
                    sprites.put(unit, rank, patch)
    return sheet_paths


def _write_image(folder: Path, image: int, jpeg: bytes) -> None:
    """Write an image's model input."""
    unoccupied(folder / f"{image}.jpg").write_bytes(jpeg)


class _Sprites:
    """Writes one sprite for each unit of a layer, as soon as it has all of the unit's cells.

    ending: of the file names, after the unit's number. options: for saving, see `PIL.Image.Image.save`.
    """

    def __init__(self, top: LayerArrays, folder: Path, ending: str, **options: Any) -> None:
        self._top, self._folder, self._ending, self._options = top, folder, ending, options
        self._cells: dict[int, dict[int, Image.Image]] = {}
        for unit in np.flatnonzero(~top.fired.any(axis=1)).tolist():
            self._save(unit, {})

    def put(self, unit: int, rank: int, image: Image.Image) -> None:
        """Add the cell of one winner that fired."""
        cells = self._cells.setdefault(unit, {})
        cells[rank] = image
        if len(cells) == int(self._top.fired[unit].sum()):
            self._save(unit, self._cells.pop(unit))

    def _save(self, unit: int, cells: dict[int, Image.Image]) -> None:
        k = self._top.values.shape[1]
        columns = tile_columns(k)
        sprite = Image.new("RGB", sprite_shape(k), sheets.EMPTY)
        for rank in range(k):
            cell = cells.get(rank) or sheets.placeholder(self._top, unit, rank, PATCH_SIZE)
            sprite.paste(cell, (rank % columns * PATCH_SIZE, rank // columns * PATCH_SIZE))
        sprite.save(unoccupied(self._folder / f"{unit}{self._ending}"), **self._options)


def draw_projections(model: nn.Module, run: RunData, folder: Path, crop: str | None, device: Device) -> dict[str, str]:
    """Write gallery/layers/LAYER/UNIT-projections.jpg, cut to the patches' boxes; returns {layer: method in words}."""
    methods = {}
    for layer in run:
        kind, top = crop_of(run, layer, crop), run[layer]
        # No chroma subsampling, because projections consist of single coloured pixels.
        sprites = _Sprites(top, layer_folder(folder, layer), "-projections.jpg", quality=85, subsampling=0)
        for projection in project(model, run, layer, device=device):
            unit, rank = projection.unit, projection.rank
            assert rank is not None  # noqa: S101 - for mypy: projections of a run have a rank
            box = drawn_box(top, unit, rank, kind, run.input_size)
            sprites.put(unit, rank, projection.picture(box, PATCH_SIZE))
            methods[layer] = projection.method
    return methods


def draw_responses(model: nn.Module, run: RunData, folder: Path, device: Device) -> dict[str, tuple[int, int, int]]:
    """Write gallery/layers/LAYER/UNIT-responses.png: the unit's response maps to its winners, as heat maps.

    Returns {layer: (rows, columns, side of the block of neurons that a cell stands for)}; empty for ranked neurons.
    """
    tops = {layer: top for layer, top in run.tops.items() if top.info["unit"] == "channel"}
    winners = {layer: fired_winners(run, layer, range(len(top))) for layer, top in tops.items()}
    images = sorted(set().union(*winners.values()))
    levels_of: dict[str, NDArray[np.uint8]] = {}  # [units, k, rows, columns]
    blocks = {n: math.ceil(max(top.info["height"], top.info["width"]) / MAX_MAP_SIDE) for n, top in tops.items()}
    names = list(tops)

    def read(index: int, maps: Tensor) -> None:
        layer = names[index]
        found = [(slot, *winner) for slot, image in enumerate(ids) for winner in winners[layer].get(image, [])]
        if not found:
            return
        slots, units, ranks = (list(column) for column in zip(*found, strict=True))
        chosen = maps[slots, units][:, None]  # [n, 1, H, W]
        if blocks[layer] > 1:
            chosen = F.max_pool2d(chosen, blocks[layer], ceil_mode=True)
        levels = heat_levels(chosen[:, 0].cpu().numpy())
        shape = (*tops[layer].values.shape, *levels.shape[1:])
        levels_of.setdefault(layer, np.zeros(shape, np.uint8))[units, ranks] = levels

    network = Network(model, device=device, transform=run.source.transform)
    shape = tuple(run.manifest["input"])
    with network.evaluating(), network.reading_maps(names, shape) as canonical, bar(len(images), "maps") as counted:
        for batch in run.source.batches(COMPUTE_BATCH, ids=images):
            ids = batch.ids.tolist()
            canonical.maps(batch.pixels, read)
            counted.update(len(ids))
    for layer, levels in levels_of.items():
        for unit in np.flatnonzero(tops[layer].fired.any(axis=1)).tolist():
            _save_heat(levels[unit], layer_folder(folder, layer) / f"{unit}-responses.png")
    return {layer: (*levels.shape[2:], blocks[layer]) for layer, levels in levels_of.items()}


def _save_heat(levels: NDArray[np.uint8], path: Path) -> None:
    """Write the heat levels [k, H, W] of a unit's response maps as one sprite."""
    k, height, width = levels.shape
    columns = tile_columns(k)
    sprite = np.zeros((math.ceil(k / columns) * height, columns * width), np.uint8)
    for rank in range(k):
        row, column = rank // columns * height, rank % columns * width
        sprite[row : row + height, column : column + width] = levels[rank]
    image = heat(sprite)
    image.save(unoccupied(path), "PNG", bits=4, transparency=image.info["transparency"])


def draw_filters(model: nn.Module, run: RunData, folder: Path) -> list[str]:
    """Write gallery/layers/LAYER/UNIT-filter.png for the first convolution, if the run has it; returns its layers."""
    found = first_filters(model, run)
    for layer, weights in found.items():
        if run[layer].info["unit"] != "channel":
            return []
        target = layer_folder(folder, layer)
        for unit, weight in enumerate(weights):
            signed(weight).save(unoccupied(target / f"{unit}-filter.png"))
    return list(found)
