"""Checks of arguments, and forms of them, that operators share."""

from __future__ import annotations

from collections.abc import Sequence

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


def require_normalizable(operator: str, x: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
    """Raise ValueError unless x is uint8 [N, H, W, 3 or 1], with one mean and one std other than 0 a channel."""
    if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[3] not in (1, 3):
        raise ValueError(f"{operator} takes uint8 [N, H, W, 3] or [N, H, W, 1], not {x.dtype} {tuple(x.shape)}")
    if not len(mean) == len(std) == x.shape[3] or not all(std):
        needed = f"{x.shape[3]} means and {x.shape[3]} stds other than 0"
        raise ValueError(f"{operator} needs {needed}, not {list(mean)} and {list(std)}")


def three(values: Sequence[float]) -> Sequence[float]:
    """The constants of three channels as a kernel takes them, where one value stands for all."""
    return values if len(values) == 3 else [*values] * 3
