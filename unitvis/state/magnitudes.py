"""How large the numbers of a network's input are, at several scales, and the images where they are largest.

The rounding errors of half precision grow with the numbers that it rounds. A faint pattern on a bright image is lost
in them, however small the response, so that the image is no candidate of any unit: it is found by its brightness. Each
channel of the input counts alone, because a layer may read it alone, and another may always be larger.
"""

from __future__ import annotations

import torch
from torch import Tensor

import unitvis_kernels as uk
from unitvis.state.topk import TopK

SCALES = 5  # those of `uk.magnitudes`
KEPT = 256  # images in each channel at each scale


def ranked_magnitudes(channels: int, device: torch.device) -> TopK:
    """A top-k of images, as yet without any, by each of `uk.magnitudes` of an input with so many channels.

    Float32 needs none: 0 channels.
    """
    return TopK.empty(channels * SCALES, KEPT, device)


def shape_of_ranked(channels: int) -> tuple[int, int]:
    """The shape of the tensor of `ranked_magnitudes`."""
    return channels * SCALES, 2 * KEPT + 2


def merge_magnitudes(largest: TopK, values: Tensor, ids: Tensor) -> None:
    """Fold magnitudes, float32 [N, C, SCALES], of images with ids, int64 [N], into what `ranked_magnitudes` made."""
    values = values.flatten(1)
    largest.merge(uk.pack(values, torch.zeros_like(values, dtype=torch.int64)), ids)
