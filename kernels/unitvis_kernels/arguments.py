"""A check that all operators share: that their arguments are tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def require_tensors(operator: str, **arguments: object) -> None:
    """Raise TypeError that names an argument which is no tensor (or None); arguments: by name."""
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Tensor):
            how = "torch.from_numpy" if type(value).__name__ == "ndarray" else "torch.tensor"
            raise TypeError(f"{operator} takes {name} as a tensor, not {type(value).__name__}; convert it: {how}(...)")


def check_floor(x: Tensor, floor: Tensor | None) -> None:
    """Raise ValueError unless floor is None or float32, one a channel of x [N, C, H, W]."""
    if floor is not None and (floor.shape != x.shape[1:2] or floor.dtype != torch.float32):
        raise ValueError(f"floor must be float32 [{x.shape[1]}], not {floor.dtype} {list(floor.shape)}")
