"""A check that all operators share: that their arguments are tensors."""

from __future__ import annotations

from torch import Tensor


def require_tensors(operator: str, **arguments: object) -> None:
    """Raise TypeError that names an argument which is no tensor (or None); arguments: by name."""
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Tensor):
            how = "torch.from_numpy" if type(value).__name__ == "ndarray" else "torch.tensor"
            raise TypeError(f"{operator} takes {name} as a tensor, not {type(value).__name__}; convert it: {how}(...)")
