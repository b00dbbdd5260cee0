"""Response maps of a run's winners, computed while their patches are cut."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from unitvis.drawing.colours import heat_levels
from unitvis.drawing.patches import fired_winners
from unitvis.network.bits import computing_threads
from unitvis.network.forward import COMPUTE_BATCH
from unitvis.network.network import Network
from unitvis.results.data import RunData

MAX_MAP_SIDE = 56  # cells of the longer side of a response map; larger maps are reduced to the maxima of square blocks
# Below so many images one thread computes: to find out whether more give the same bits takes as long as 60 batches.
_MIN_IMAGES_FOR_THREADS = 1024


def has_map(info: Mapping[str, Any]) -> bool:
    """Whether response maps of a layer are drawn: those of channels, if there is more than one position to compare."""
    return info["unit"] == "channel" and info["height"] * info["width"] > 1


def map_size(info: Mapping[str, Any]) -> tuple[int, int, int]:
    """Rows and columns of a layer's maps as they are drawn, and the side of the block of neurons in a cell.

    info: the layer's entry in the manifest.
    """
    block = math.ceil(max(info["height"], info["width"]) / MAX_MAP_SIDE)
    return math.ceil(info["height"] / block), math.ceil(info["width"] / block), block


class ResponseMaps:
    """Context that computes the maps of units' winners, in compute batches of images as they come.

    layers: of channels.
    """

    def __init__(self, network: Network, run: RunData, layers: Sequence[str]) -> None:
        self._network, self._layers, self._shape = network, list(layers), tuple(run.manifest["input"])
        self._winners = [fired_winners(run, layer, range(len(run[layer]))) for layer in layers]
        self._sizes = [map_size(run[layer].info) for layer in layers]
        # [units, k, rows, columns], see `heat_levels`
        self._levels = [
            np.zeros((*run[layer].values.shape, *size[:2]), np.uint8)
            for layer, size in zip(layers, self._sizes, strict=True)
        ]
        self._images = set().union(*self._winners)
        self._waiting: list[tuple[int, NDArray[Any]]] = []
        self._threads = 1 if len(self._images) < _MIN_IMAGES_FOR_THREADS else torch.get_num_threads()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._network.evaluating())
            self._pass = stack.enter_context(self._network.reading_maps(self._layers, self._shape))
            self._contexts = stack.pop_all()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._contexts.__exit__(*raised)

    def __contains__(self, image: int) -> bool:
        """Whether an image is a winner of any of the layers."""
        return image in self._images

    def add(self, image: int, pixels: NDArray[Any]) -> None:
        """Take a winning image, uint8 [H, W, 3] or normalised float32 [C, H, W]."""
        self._waiting.append((image, pixels))
        if len(self._waiting) == COMPUTE_BATCH:
            self._compute()

    def finish(self) -> Iterator[tuple[str, NDArray[np.uint8]]]:
        """Yield the layers in which a unit fired, each with its maps' levels [units, k, rows, columns]."""
        if self._waiting:
            self._compute()
        for layer, winners, levels in zip(self._layers, self._winners, self._levels, strict=True):
            if winners:
                yield layer, levels

    def _compute(self) -> None:
        ids, pixels = zip(*self._waiting, strict=True)
        self._waiting = []
        with computing_threads(self._threads):
            self._pass.maps(torch.from_numpy(np.stack(pixels)), lambda index, maps: self._read(ids, index, maps))

    def _read(self, ids: Iterable[int], index: int, maps: Tensor) -> None:
        """Keep the maps of the images' winners; maps: [n, C, H, W] of one layer."""
        winners, block = self._winners[index], self._sizes[index][2]
        found = [(slot, *winner) for slot, image in enumerate(ids) for winner in winners.get(image, [])]
        if not found:
            return
        slots, units, ranks = (list(column) for column in zip(*found, strict=True))
        chosen = maps[slots, units][:, None]  # [n, 1, H, W]
        if block > 1:
            chosen = F.max_pool2d(chosen, block, ceil_mode=True)
        self._levels[index][units, ranks] = heat_levels(chosen[:, 0].cpu().numpy())
