"""How large the numbers of a network's input are, at several scales, and the images where they are largest.

The rounding errors of half precision grow with the numbers that it rounds. A faint pattern on a bright image is lost
in them, however small the response, so that the image is no candidate of any unit: it is found by its brightness.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import unitvis_kernels as uk
from unitvis.state.topk import TopK

SCALES = 5  # single numbers, means of blocks of 4 x 4, 16 x 16 and 64 x 64, and of the whole image
KEPT = 256  # images at each scale
_SIDE = 4  # of a block, in blocks of the next finer scale


def magnitudes(inputs: Tensor) -> Tensor:
    """The largest magnitude at each scale, float32 [N, SCALES], of inputs [N, C, H, W]; infinite where one is NaN.

    At each scale: of the means of magnitudes over the blocks of a channel, the largest of all channels. Blocks at the
    lower and right border may be smaller. Does not synchronise a GPU.
    """
    blocks = inputs.abs()
    found = [blocks.movedim(1, -1).flatten(1).amax(1)]  # as channels-last memory lies: twice as fast on a CPU
    for _ in range(SCALES - 2):
        blocks = F.avg_pool2d(blocks, _SIDE, ceil_mode=True)
        found.append(blocks.amax((1, 2, 3)))
    found.append(blocks.mean((2, 3)).amax(1))
    return torch.stack(found, 1).float().nan_to_num(torch.inf, torch.inf)


def ranked_magnitudes(device: torch.device, *, kept: bool = True) -> TopK:
    """A top-k of images by each of `magnitudes`, without images yet. kept: False: of nothing, as float32 needs it."""
    return TopK.empty(SCALES if kept else 0, KEPT, device)


def merge_magnitudes(largest: TopK, inputs: Tensor, ids: Tensor) -> None:
    """Fold inputs [N, C, H, W] of the images with ids, int64 [N], into what `ranked_magnitudes` made."""
    values = magnitudes(inputs)
    largest.merge(uk.pack(values, torch.zeros_like(values, dtype=torch.int64)), ids)
