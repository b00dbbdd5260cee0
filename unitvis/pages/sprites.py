"""Sprites: pictures with the tiles of a block of units, so that a gallery of thousands of units has few files.

The tiles of a sprite are units that follow each other, row by row. A tile has a cell for each of the unit's winners,
strongest first, row by row. A sprite is named by what it shows and by its first unit, as patches-36.jpg.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unitvis.decoding.mosaic import Encoding, cell_scan, joined
from unitvis.drawing import sheets
from unitvis.drawing.colours import heat
from unitvis.drawing.patches import Scans
from unitvis.drawing.sheets import PATCH_SIZE, tile_columns
from unitvis.files import file_name, make_folder, unoccupied
from unitvis.results.arrays import LayerArrays

MAX_SIDE = 2048  # pixels of a sprite of patches: what a browser decodes in some hundredths of a second
PATCHES, PROJECTIONS, RESPONSES, FILTERS = "patches", "projections", "responses", "filters"
_ENDINGS = {PATCHES: ".jpg", PROJECTIONS: ".jpg", RESPONSES: ".png", FILTERS: ".png"}
BY_MODEL = (PROJECTIONS, RESPONSES, FILTERS)  # what only the model can draw
PATCH_CELL = Encoding(82, subsampled=True)
PROJECTION_CELL = Encoding(85, subsampled=False)  # because projections consist of single coloured pixels
_NO_UNIT = -1  # in the place of a unit's tile


class Place(NamedTuple):
    """Where the tile of a unit is in its sprite, in tiles."""

    first: int  # unit of the sprite
    columns: int  # of the sprite
    rows: int
    column: int  # of the tile
    row: int


def layer_folder(folder: Path, layer: str) -> Path:
    """The folder of a layer's pictures, which is created."""
    path = folder / layer_path(layer)
    for above in (path.parent, path):
        make_folder(above)
    return path


def layer_path(layer: str) -> Path:
    """The folder of a layer's pictures, relative to the gallery's folder."""
    return Path("gallery", "layers", file_name(layer))


def tile_cells(k: int) -> tuple[int, int]:
    """Columns and rows of the cells of a unit's tile."""
    columns = tile_columns(k)
    return columns, math.ceil(k / columns)


def sprite_tiles(k: int) -> tuple[int, int]:
    """Columns and rows of the tiles of a sprite, at most; the same for all kinds of sprites of a run."""
    columns, rows = (max(1, MAX_SIDE // (count * PATCH_SIZE)) for count in tile_cells(k))
    return columns, rows


def place_of(unit: int, units: int, k: int) -> Place:
    """Where a unit of so many is shown."""
    wide, high = sprite_tiles(k)
    first = unit - unit % (wide * high)
    count = min(wide * high, units - first)
    columns = min(wide, count)
    row, column = divmod(unit - first, columns)
    return Place(first, columns, math.ceil(count / columns), column, row)


def sprite_name(kind: str, first: int) -> str:
    """The name of a sprite's file; kind: what it shows."""
    return f"{kind}-{first}{_ENDINGS[kind]}"


def sprite_names(kind: str, units: int, k: int) -> list[str]:
    """The names of the files of a layer with so many units."""
    return [sprite_name(kind, first) for first in range(0, units, math.prod(sprite_tiles(k)))]


def write_patches(top: LayerArrays, folder: Path, scans: Scans) -> None:
    """Write a layer's sprites of patches, given as cells; placeholders are drawn of winners that did not fire."""
    for first, block in _blocks(top):
        unoccupied(folder / sprite_name(PATCHES, first)).write_bytes(_tiles(top, block, scans, PATCH_CELL))


def write_projections(top: LayerArrays, folder: Path, scans: Scans) -> None:
    """Write those of a layer's sprites of projections in which a unit has any; the tiles of other units are empty."""
    projected = {unit for unit, _ in scans}
    for first, block in _blocks(top):
        if own := projected.intersection(block):
            places = [unit if unit in own else _NO_UNIT for unit in block]
            data = _tiles(top, places, scans, PROJECTION_CELL)
            unoccupied(folder / sprite_name(PROJECTIONS, first)).write_bytes(data)


def write_strip(top: LayerArrays, folder: Path, units: Sequence[int], scans: Scans) -> None:
    """Write strip.jpg, with the patches of a few units that the first page shows; nothing without units."""
    if units:
        unoccupied(folder / "strip.jpg").write_bytes(_tiles(top, units, scans, PATCH_CELL))


def projections_of(top: LayerArrays, unit: int, scans: Scans) -> bytes:
    """Make a JPEG file of the tile of one unit's projections, given as cells."""
    return _tiles(top, [unit], scans, PROJECTION_CELL)


def _blocks(top: LayerArrays) -> Iterator[tuple[int, range]]:
    """The units of each sprite of a layer, with the first of them."""
    units, k = top.values.shape
    step = math.prod(sprite_tiles(k))
    for first in range(0, units, step):
        yield first, range(first, min(first + step, units))


def _tiles(top: LayerArrays, units: Sequence[int], scans: Scans, encoding: Encoding) -> bytes:
    """Make a JPEG file of the tiles of some units, each a number or `_NO_UNIT`, with placeholders."""
    k = top.values.shape[1]
    across, down = tile_cells(k)
    columns = min(sprite_tiles(k)[0], len(units))
    places = [*units, *[_NO_UNIT] * (-len(units) % columns)]
    cells = _with_placeholders(top, [unit for unit in units if unit != _NO_UNIT], scans, encoding)
    empty = cell_scan(Image.new("RGB", (PATCH_SIZE, PATCH_SIZE), sheets.EMPTY), encoding)
    rows = [
        [cells.get((unit, row * across + column), empty) for unit in line for column in range(across)]
        for line in np.reshape(places, (-1, columns)).tolist()
        for row in range(down)
    ]
    return joined(rows, PATCH_SIZE, encoding)


def _with_placeholders(top: LayerArrays, units: Sequence[int], scans: Scans, encoding: Encoding) -> Scans:
    """Cells of all winners of some units, with placeholders for those that have none: they did not fire."""
    drawn: dict[bool, bytes] = {}  # by whether there is an image
    cells: Scans = {}
    for unit, rank in product(units, range(top.values.shape[1])):
        if (unit, rank) in scans:
            cells[unit, rank] = scans[unit, rank]
            continue
        if (exists := bool(top.images[unit, rank] >= 0)) not in drawn:
            drawn[exists] = cell_scan(sheets.placeholder(top, unit, rank, PATCH_SIZE), encoding)
        cells[unit, rank] = drawn[exists]
    return cells


def write_responses(levels: NDArray[np.uint8], folder: Path) -> None:
    """Write a layer's sprites of response maps; levels: [units, k, H, W], see `colours.heat_levels`."""
    k = levels.shape[1]
    step = math.prod(sprite_tiles(k))
    for first in range(0, len(levels), step):
        image = heat(_tiled(levels[first : first + step], *tile_cells(k), sprite_tiles(k)[0]))
        path = unoccupied(folder / sprite_name(RESPONSES, first))
        image.save(path, "PNG", bits=4, transparency=image.info["transparency"])


def write_filters(filters: NDArray[np.uint8], k: int, folder: Path) -> None:
    """Write a layer's sprites of filters [units, H, W, 3], in tiles of one cell; k: of the run."""
    step = math.prod(sprite_tiles(k))
    for first in range(0, len(filters), step):
        pixels = _tiled(filters[first : first + step, None], 1, 1, sprite_tiles(k)[0])
        Image.fromarray(pixels).save(unoccupied(folder / sprite_name(FILTERS, first)))


def _tiled(cells: NDArray[np.uint8], across: int, down: int, columns: int) -> NDArray[np.uint8]:
    """Put cells [units, k, H, W, ...] together to a picture of tiles, each of `across` columns and `down` rows."""
    units, k = cells.shape[:2]
    columns = min(columns, units)
    rows = math.ceil(units / columns)
    room = np.zeros((rows * columns, down * across, *cells.shape[2:]), np.uint8)
    room[:units, :k] = cells
    height, width, *colours = cells.shape[2:]
    room = room.reshape(rows, columns, down, across, height, width, *colours)
    order = (0, 2, 4, 1, 3, 5, *range(6, room.ndim))  # rows, down, height, columns, across, width
    return room.transpose(order).reshape(rows * down * height, columns * across * width, *colours)
