"""Responses to compute again: pairs of an image and a unit, found image by image."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import unitvis_kernels as uk


class Places:
    """Pairs (image, column) sorted by image; `take` notes the canonical response of each as its image is computed.

    column: the unit's, among those of all layers. `known` [pairs]: it was computed; `values` float32 (NaN until then)
    and `positions` int64 (-1).
    """

    def __init__(self, images: NDArray[np.int64], columns: NDArray[np.int64]) -> None:
        self.order = np.argsort(images, kind="stable")  # of what the caller keeps beside the pairs
        self.images, self.columns = images[self.order], columns[self.order]
        self.values = np.full(len(images), np.nan, np.float32)
        self.positions = np.full(len(images), -1, np.int64)
        self.known = np.zeros(len(images), bool)

    def take(self, keys: Tensor, ids: Tensor, start: int = 0) -> None:
        """Note what is asked for of keys [N, columns], from the column `start` on, of images with ids [N]."""
        for image, row in zip(ids.tolist(), keys.cpu(), strict=True):
            pairs = np.arange(np.searchsorted(self.images, image, "left"), np.searchsorted(self.images, image, "right"))
            columns = self.columns[pairs] - start
            inside = (columns >= 0) & (columns < len(row))
            pairs = pairs[inside]
            values, positions = uk.unpack(row[torch.from_numpy(columns[inside])])
            self.values[pairs], self.positions[pairs] = values.numpy(), positions.numpy()
            self.known[pairs] = True
