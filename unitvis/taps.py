"""Where responses are read: a layer's output as a map [N, C, H, W], whatever the layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unitvis.errors import UnitvisError


def as_map(name: str, module: nn.Module, output: object) -> Tensor:
    """The layer's output as [N, C, H, W], a view of it.

    [N, C] counts as a 1x1 map. `nn.Linear` and `nn.LayerNorm` put channels last: [N, L, C] becomes one row of L
    positions, [N, H, W, C] a map. Anything else is refused, because its channel axis would be a guess.
    """
    if not isinstance(output, Tensor):
        raise UnitvisError(f"layer {name!r} returns {type(output).__name__}, not a tensor; name a layer inside it")
    if not output.is_floating_point():
        raise UnitvisError(f"layer {name!r} returns {output.dtype}; only floating-point responses can be ranked")
    shape = tuple(output.shape)
    if output.ndim == 2:
        return output[:, :, None, None]
    channels_last = type(module) in (nn.Linear, nn.LayerNorm)
    if channels_last and output.ndim == 3:
        return output.transpose(1, 2)[:, :, None, :]
    if output.ndim == 4:
        return output.permute(0, 3, 1, 2) if channels_last else output
    raise UnitvisError(
        f"layer {name!r} returns a tensor of shape {shape}; a feature map [N, C, H, W] or a vector [N, C] is needed"
    )
