"""spatial_argmax: the largest response of every channel to every image, and where it is."""

from __future__ import annotations

import torch
from torch import Tensor

from unitvis_kernels import reference
from unitvis_kernels.keys import POSITION_MASK


@torch.library.custom_op("unitvis::spatial_argmax", mutates_args=())
def _spatial_argmax(x: Tensor) -> Tensor:
    return reference.spatial_argmax(x)


@_spatial_argmax.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.int64)


def spatial_argmax(x: Tensor) -> Tensor:
    """Keys, int64 [N, C], of maps [N, C, H, W] in float32, float16 or bfloat16, any strides; see `unpack`.

    Of equal values the lowest flattened position (row * W + column) wins; -0.0 equals +0.0. A map with a NaN gets the
    key `NAN_KEY`. Reads the map once. Raises ValueError for another dtype, rank or an empty map.
    """
    if x.ndim != 4:
        raise ValueError(f"spatial_argmax takes maps [N, C, H, W], not a tensor of shape {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"spatial_argmax takes float32, float16 or bfloat16, not {x.dtype}")
    if not 0 < x.shape[2] * x.shape[3] <= POSITION_MASK:
        raise ValueError(f"spatial_argmax needs 1 to 2^31 - 1 positions, not {x.shape[2]} x {x.shape[3]}")
    return _spatial_argmax(x)
