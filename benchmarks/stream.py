"""Fill a top-k state as it is, on average, during a long scan of images in random order."""

from __future__ import annotations

import math

import torch
from torch import Tensor

IMAGES = 1_280_000  # of the long scan


def entries(places: int, batch: int) -> float:
    """Expected number of images of a batch that enter a unit's places, averaged over a scan in random order."""
    return min(1.0, places * (1 + math.log(IMAGES / places)) * batch / IMAGES)


def fill(state: Tensor, keys: Tensor) -> float:
    """Fill a state, in place, so that of keys int64 [N, C] only the best enters, in a fraction `entries` of the units.

    Returns that fraction.
    """
    places = (state.shape[1] - 2) // 2
    g = torch.Generator().manual_seed(0)
    share = entries(places, len(keys))
    entered = (torch.rand(keys.shape[1], generator=g) < share).to(keys.device)
    best, second = keys.topk(2, dim=0).values
    state[:, :places] = (((torch.where(entered, second, best) >> 32) + 1) << 32)[:, None]
    state[:, places : 2 * places] = 2**40 + torch.arange(places, device=state.device)
    return share
