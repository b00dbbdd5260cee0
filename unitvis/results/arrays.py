"""LayerArrays: the top-k of one layer's units as arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from unitvis.errors import printable

SEPARATED, TIED, UNSEPARATED = "separated", "tied", "unseparated"  # a unit's status
STATUSES = {  # what a status other than `separated` says of a unit's winners
    TIED: "at least one more image has the same response as the last winner",
    UNSEPARATED: "the scan in half precision could not decide all winners; a scan with --precision fp32 does",
}
ARRAYS = ("values", "images", "positions", "boxes", "status")  # names of a layer's arrays in top.npz


def extent_text(field: Mapping[str, Any], size: str) -> str:
    """How much of the image a neuron sees: `size`, "the whole image" or, where its boxes are unknown, "unknown".

    field: the layer's receptive field in the manifest.
    """
    if field["method"] == "unknown":
        return "unknown"
    return "the whole image" if field["whole_image"] else size


def map_text(info: Mapping[str, Any]) -> str:
    """The size of a layer's map and, if that is less, of the part of it that was ranked. info: see `LayerArrays`."""
    top, bottom, left, right = info.get("inside", (0, info["height"], 0, info["width"]))
    whole, part = f"{info['height']} x {info['width']}", f"{bottom - top} x {right - left}"
    return f"map {whole}" if part == whole else f"map {whole}, ranked the {part} positions inside the image"


def winners_of(tops: Iterable[LayerArrays]) -> NDArray[np.int64]:
    """Ids of all images that are a winner of some unit, ascending: int64 [n]."""
    ids = np.unique(np.concatenate([np.zeros(0, np.int64), *(top.images.ravel() for top in tops)]))
    return ids[ids >= 0]


@dataclass(frozen=True, repr=False)
class LayerArrays:
    """The top-k of one layer's units."""

    name: str
    values: NDArray[np.float32]  # [units, k], descending; NaN where blank
    images: NDArray[np.int64]  # [units, k]; -1 where blank
    positions: NDArray[np.int32]  # [units, k, 2]: row, column; -1 where blank
    boxes: NDArray[np.int32]  # [units, k, 4]: left, top, right, bottom in model-input pixels; 0 where blank
    status: NDArray[np.str_]  # [units]: separated | tied | unseparated
    info: Mapping[str, Any]  # the layer's entry in the manifest

    @property
    def separated(self) -> NDArray[np.bool_]:
        """Bool [units]: the k winners are exactly those of brute force."""
        return self.status == SEPARATED

    @cached_property
    def fired(self) -> NDArray[np.bool_]:
        """Bool [units, k]: the winner is not blank, and above 0 if only ReLUs use the layer's output."""
        floor = 0.0 if self.info["feeds_relu"] else -np.inf
        return (self.images >= 0) & ((self.values > floor) | (floor < 0))

    @cached_property
    def dead(self) -> NDArray[np.bool_]:
        """Bool [units]: there are responses, but the ReLU that follows turns even the strongest one into 0."""
        return (self.images[:, 0] >= 0) & ~self.fired[:, 0]

    def strongest(self, count: int) -> Self:
        """The first `count` winners of every unit."""
        kept = {name: getattr(self, name)[:, :count] for name in ARRAYS if name != "status"}
        return replace(self, **kept)

    def count(self) -> dict[str, int]:
        """Count the dead units and those of each status but separated, without those that do not occur."""
        counts = {"dead": int(self.dead.sum())} | {name: int((self.status == name).sum()) for name in STATUSES}
        return {name: number for name, number in counts.items() if number}

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        units = f"{len(self)} {self.info['unit']}s, top {self.values.shape[1]}"
        words = [units, map_text(self.info), *(f"{number} {name}" for name, number in self.count().items())]
        return f"<layer {printable(self.name)}: {', '.join(words)}>"
