"""The gallery's pictures: patches, projections, response maps and filters of units, and whole images.

Each winning image is read once, for the layers' sheets as well.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from unitvis.attribution.filters import first_filters
from unitvis.drawing import sheets
from unitvis.drawing.colours import signed
from unitvis.drawing.hands import Hands
from unitvis.drawing.patches import cut_layers
from unitvis.files import make_folder, unoccupied
from unitvis.network.network import Network
from unitvis.pages import sprites
from unitvis.pages.facts import strip
from unitvis.pages.maps import ResponseMaps, has_map, map_size
from unitvis.results.data import RunData


def draw_run(
    run: RunData, folder: Path, crop: str | None, network: Network | None = None, *, with_sheets: bool = False
) -> tuple[list[Path], dict[str, tuple[int, int, int]]]:
    """Write the sprites of patches, what the model sees of each winning image as gallery/images/ID.jpg, and maps.

    network: computes the response maps; None: none are drawn. with_sheets: write the layers' sheets as well, see
    `sheets.render`. Returns the paths of the sheets, and the `map_size` of the layers whose maps were drawn.
    """
    images = folder / "gallery" / "images"
    make_folder(images)
    sheet_paths: list[Path] = []
    drawn: dict[str, tuple[int, int, int]] = {}
    mapped = [] if network is None else [layer for layer in run if has_map(run[layer].info)]
    cells = {layer: rows * columns for layer in mapped for rows, columns, _ in [map_size(run[layer].info)]}
    for group in sheets.memory_groups(run, crop, cells):
        wanted = {layer: sheets.on_sheet(run, layer, crop) for layer in group}
        for layer, cuts in wanted.items():
            pixels, every = cuts.pixels if with_sheets else None, range(len(run[layer]))
            wanted[layer] = cuts._replace(units=every, pixels=pixels, drawn=cuts.units, cell=sprites.PATCH_CELL)
        with ExitStack() as stack:
            maps = None
            if network is not None and (layers := [layer for layer in group if layer in mapped]):
                maps = stack.enter_context(ResponseMaps(network, run, layers))
            taker = _Taker(images, maps)
            hands = stack.enter_context(Hands(run, sheets.images_of(run, group)))
            for layer, patches, scans in cut_layers(run, wanted, hands, taker):
                if with_sheets:
                    sheet_paths += sheets.write_sheet(run, layer, folder, wanted[layer].crop, patches, hands)
                target = sprites.layer_folder(folder, layer)
                sprites.write_patches(run[layer], target, scans)
                sprites.write_strip(run[layer], target, strip(run[layer]), scans)
            for layer, levels in {} if maps is None else maps.finish():
                sprites.write_responses(levels, sprites.layer_folder(folder, layer))
                drawn[layer] = map_size(run[layer].info)
    return sheet_paths, drawn


class _Taker:
    """Writes what the model sees of each image into a folder, and hands its pixels to what computes response maps."""

    def __init__(self, folder: Path, maps: ResponseMaps | None) -> None:
        self._folder, self._maps = folder, maps

    def wants_input(self, image: int) -> bool:
        return self._maps is not None and image in self._maps

    def take(self, image: int, whole: bytes, model_input: NDArray[Any] | None) -> None:
        unoccupied(self._folder / f"{image}.jpg").write_bytes(whole)
        if self._maps is not None and model_input is not None:
            self._maps.add(image, model_input)


def draw_filters(model: nn.Module, run: RunData, folder: Path) -> list[str]:
    """Write sprites of the first convolution's filters, if the run has it; returns its layers."""
    found = first_filters(model, run)
    for layer, weights in found.items():
        if run[layer].info["unit"] != "channel":
            return []
        filters = np.stack([np.asarray(signed(weight)) for weight in weights])
        sprites.write_filters(filters, run.manifest["k"], sprites.layer_folder(folder, layer))
    return list(found)
