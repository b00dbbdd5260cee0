"""Convolution and argmax by the definition, in float64: shifted copies of a padded array, summed tap by tap."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unitvis_kernels import pack


class Case(NamedTuple):
    x: tuple[int, int, int, int]
    out: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def geometry(self) -> tuple[int, ...]:
        return (*self.stride, *self.padding, *self.dilation, self.groups)


CASES = {
    "3x3": Case((2, 8, 7, 9), 16),
    "padding": Case((2, 16, 9, 7), 8, padding=(1, 1)),
    "stride 2, padding": Case((1, 8, 9, 10), 24, stride=(2, 2), padding=(1, 1)),
    "every pair": Case((2, 4, 13, 12), 5, (2, 4), (2, 1), (0, 3), (3, 2)),
    "dilation": Case((1, 8, 11, 11), 8, padding=(2, 2), dilation=(2, 2)),
    "groups": Case((2, 24, 6, 5), 40, padding=(1, 1), groups=2),
    "depthwise": Case((2, 3, 7, 5), 3, padding=(1, 1), groups=3),
    "depthwise, 3 channels each": Case((1, 2, 6, 6), 6, stride=(2, 2), groups=2),
    "odd channels": Case((2, 13, 8, 6), 11, padding=(1, 1)),
    "1x1": Case((2, 40, 5, 7), 72, (1, 1)),
    "1x1 stride 2": Case((1, 64, 9, 7), 16, (1, 1), (2, 2)),
    "first layer": Case((2, 3, 17, 20), 10, (7, 7), (2, 2), (3, 3)),
    "first layer, 1 channel": Case((1, 1, 13, 12), 4, (5, 5), (3, 3), (2, 2)),
    "a tap a step": Case((1, 64, 6, 6), 20, padding=(1, 1)),
    "padding beyond the kernel": Case((1, 8, 3, 3), 8, (2, 2), padding=(4, 3)),
    "one pixel, odd channels": Case((3, 5, 1, 1), 8, (1, 1)),
    "one neuron": Case((3, 8, 3, 3), 8),
    "tiles of pixels": Case((1, 8, 13, 13), 70, padding=(1, 1)),
    "wide tiles": Case((1, 16, 17, 14), 130, (1, 1)),
}


def convolution(case: Case, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """float64 [N, D, OH, OW]."""
    (SH, SW), (PH, PW), (DH, DW), (KH, KW) = case.stride, case.padding, case.dilation, case.kernel
    padded = np.pad(x.double().numpy(), ((0, 0), (0, 0), (PH, PH), (PW, PW)))
    w = weight.double().numpy()
    OH = (padded.shape[2] - DH * (KH - 1) - 1) // SH + 1
    OW = (padded.shape[3] - DW * (KW - 1) - 1) // SW + 1
    C, D = x.shape[1] // case.groups, case.out // case.groups
    out = np.zeros((x.shape[0], case.out, OH, OW))
    with np.errstate(invalid="ignore"):
        for g, c, i, j in np.ndindex(case.groups, C, KH, KW):
            rows, columns = slice(i * DH, i * DH + SH * OH, SH), slice(j * DW, j * DW + SW * OW, SW)
            pixels = padded[:, None, g * C + c, rows, columns][..., :OH, :OW]
            channels = slice(g * D, g * D + D)
            out[:, channels] += pixels * w[channels, c, i, j][:, None, None]
    return torch.from_numpy(out) + (0 if bias is None else bias.double()[:, None, None])


def keys_of(v: Tensor) -> Tensor:
    """int64 [N, D] of maps [N, D, OH, OW], by a loop."""
    values, positions = [], []
    for channel in v.double().flatten(0, 1).flatten(1).tolist():
        best = max(channel, key=lambda value: (math.isnan(value), value))
        values.append(best)
        positions.append(0 if math.isnan(best) else channel.index(best))  # -0.0 is 0.0 here
    return pack(torch.tensor(values), torch.tensor(positions)).view(v.shape[:2])


def operands(case: Case, dtype: torch.dtype, whole: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """x (channels_last), weight and bias; `whole`: small multiples of 1/4, whose sums float32 holds exactly."""
    g = torch.Generator().manual_seed(sum(case.x))
    shapes = case.x, (case.out, case.x[1] // case.groups, *case.kernel), (case.out,)
    if whole:
        x, weight, bias = (torch.randint(-9, 10, shape, generator=g) / 4 for shape in shapes)
    else:
        x, weight, bias = (torch.randn(shape, generator=g) for shape in shapes)
    return x.to(dtype).contiguous(memory_format=torch.channels_last), weight.to(dtype), bias * 8
