"""The memory layout of a map, which a new tensor that replaces it keeps."""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """`channels_last` if x [N, C, H, W] is contiguous in that order and in no other, else `contiguous_format`."""
    only_channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if only_channels_last else torch.contiguous_format
