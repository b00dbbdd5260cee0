"""Responses to compute again: pairs of an image and a unit, found image by image."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import unitvis_kernels as uk


class ResponsePairs:
    """Pairs of an image and a unit, sorted by image, whose canonical responses are looked up as images are computed.

    images: ids; columns: each unit's number among those of all layers; both int64 [pairs]. order: int64 [pairs], the
    place that each sorted pair had in the arguments. known: bool [pairs], whether the response was computed; until
    then `values`, float32, are NaN and `positions`, int64 in the flattened map, are -1.
    """

    def __init__(self, images: NDArray[np.int64], columns: NDArray[np.int64]) -> None:
        self.order = np.argsort(images, kind="stable")
        self.images, self.columns = images[self.order], columns[self.order]
        self.values = np.full(len(images), np.nan, np.float32)
        self.positions = np.full(len(images), -1, np.int64)
        self.known = np.zeros(len(images), bool)

    def take(self, keys: Tensor, ids: Tensor, start: int = 0) -> None:
        """Look the pairs up in keys, int64 [N, units], of images with ids [N]; start: the first unit's number."""
        for image, row in zip(ids.tolist(), keys.cpu(), strict=True):
            pairs = np.arange(np.searchsorted(self.images, image, "left"), np.searchsorted(self.images, image, "right"))
            columns = self.columns[pairs] - start
            inside = (columns >= 0) & (columns < len(row))
            pairs = pairs[inside]
            values, positions = uk.unpack(row[torch.from_numpy(columns[inside])])
            self.values[pairs], self.positions[pairs] = values.numpy(), positions.numpy()
            self.known[pairs] = True
