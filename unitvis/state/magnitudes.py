"""How large the numbers of a network's input are, at several scales, and the images where they are largest.

The rounding errors of half precision grow with the numbers that it rounds. A faint pattern on a bright image is lost
in them, however small the response, so that the image is no candidate of any unit: it is found by its brightness.
"""

from __future__ import annotations

import torch
from torch import Tensor

import unitvis_kernels as uk
from unitvis.state.topk import TopK

SCALES = 5  # those of `uk.magnitudes`
KEPT = 256  # images at each scale


def ranked_magnitudes(device: torch.device, *, kept: bool = True) -> TopK:
    """A top-k of images by each of `uk.magnitudes`, without images. kept: False: of nothing, as float32 needs it."""
    return TopK.empty(SCALES if kept else 0, KEPT, device)


def merge_magnitudes(largest: TopK, values: Tensor, ids: Tensor) -> None:
    """Fold magnitudes, float32 [N, SCALES], of images with ids, int64 [N], into what `ranked_magnitudes` made."""
    largest.merge(uk.pack(values, torch.zeros_like(values, dtype=torch.int64)), ids)
