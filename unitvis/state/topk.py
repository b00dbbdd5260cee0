"""The strongest responses of every unit: one int64 tensor, and the only module that knows its columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import unitvis_kernels as uk


class Ranked(NamedTuple):
    """Every unit's places on the host, best first."""

    values: NDArray[np.float32]  # [units, places], descending; NaN where blank
    images: NDArray[np.int64]  # [units, places]; -1 where blank
    positions: NDArray[np.int64]  # [units, places], in the flattened map; -1 where blank
    nan: NDArray[np.int64]  # [units, 2]: how many responses were NaN, and the first image with one

    def of(self, units: slice) -> Ranked:
        """The rows of some units, as views."""
        return Ranked(self.values[units], self.images[units], self.positions[units], self.nan[units])

    @property
    def largest(self) -> NDArray[np.float64]:
        """float64 [units]: the largest magnitude among the finite values of a unit."""
        return np.where(np.isfinite(self.values), np.abs(self.values), 0).max(axis=1).astype(np.float64)

    def largest_of_layers(self, sizes: Sequence[int]) -> NDArray[np.float64]:
        """float64 [units]: the largest magnitude in each unit's layer. sizes: number of units of each layer."""
        return np.repeat(np.maximum.reduceat(self.largest, np.cumsum([0, *sizes[:-1]])), sizes)


class TopK:
    """The strongest responses of every unit so far, at most one an image, in places from best to weakest.

    tensor: int64 [units, 2 * places + 2], laid out as `unitvis_kernels.topk_state` says, on any device. It holds all
    there is, so it can be copied, saved, and captured by a CUDA graph.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @classmethod
    def empty(cls, units: int, places: int, device: torch.device) -> TopK:
        """No responses yet."""
        return cls(uk.topk_state(units, places, device))

    @property
    def units(self) -> int:
        """How many units are ranked."""
        return self.tensor.shape[0]

    @property
    def places(self) -> int:
        """How many responses of each unit are kept."""
        return (self.tensor.shape[1] - 2) // 2

    def of(self, units: slice) -> TopK:
        """The part of some units: a view, so that merging into it merges into the whole."""
        return TopK(self.tensor[units])

    def threshold(self, place: int | None = None) -> Tensor:
        """float32 [units]: the value at a place (the last), which a response must reach to enter; NaN if blank."""
        # Only the high words, and without a mask: a blank's are the bits of a NaN. A GPU does this at every step.
        high = (self.tensor.select(1, self.places - 1 if place is None else place) >> 32).int()
        return (high ^ ((high >> 31) & (2**31 - 1))).view(torch.float32)

    def merge(self, keys: Tensor, ids: Tensor, *, overflows: bool = False, clear: bool = False) -> None:
        """Fold in keys, int64 [N, units], of the images with ids, int64 [N], in place; see `uk.topk_merge_`."""
        uk.topk_merge_(self.tensor, keys, ids, overflows=overflows, clear=clear)

    def merge_all(self, other: TopK) -> None:
        """Fold in what was ranked of other images, in place; see `uk.topk_merge_states_`."""
        uk.topk_merge_states_(self.tensor, other.tensor)

    def to(self, device: torch.device | str) -> TopK:
        """A copy on a device."""
        return TopK(self.tensor.to(device, copy=True))

    def read(self) -> Ranked:
        """Everything, on the host: one copy from the device."""
        tensor = self.tensor.cpu()
        values, images, positions = (part.numpy() for part in uk.topk_read(tensor))
        return Ranked(values, images, positions, tensor[:, -2:].numpy())

    def problem(self, count: int) -> str | None:
        """What cannot come of so many images, each folded in once; None if all can."""
        keys, ranked = self.tensor[:, : self.places].cpu().numpy(), self.read()
        high, ids, blank = keys >> 32, ranked.images, ranked.images == -1
        if (ids < -1).any() or (np.isnan(ranked.values) != blank).any():
            return "a place has a value and no image, or an image and no value"
        descends = (high[:, :-1] > high[:, 1:]) | ((high[:, :-1] == high[:, 1:]) & (ids[:, :-1] < ids[:, 1:]))
        if not (descends | (blank[:, :-1] & blank[:, 1:])).all():  # the high word of a blank is below all others
            return "the places of a unit are not in order"
        ordered = np.sort(ids, axis=1)
        if ((ordered[:, :-1] == ordered[:, 1:]) & (ordered[:, 1:] >= 0)).any():
            return "a unit has an image twice"
        nan = ranked.nan[:, 0]
        if len(wrong := nan[(nan < 0) | (nan > count)]):
            return f"a unit counts {wrong[0]:,} images with NaN, of {count:,}"
        return None

    def images(self, places: int | None = None) -> NDArray[np.int64]:
        """The ids that hold one of the first so many places (None: any), ascending."""
        ids = np.unique(self.read().images[:, :places])
        return ids[ids >= 0]

    def counts_nan(self) -> Tensor:
        """Bool [units]: a response was NaN."""
        return self.tensor[:, -2] > 0
