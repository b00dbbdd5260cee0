"""Convolutions that the tests of conv_argmax share: sizes, strides, paddings, groups, and operands for them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unitvis_kernels.geometry import ConvGeometry


class Case(NamedTuple):
    x: tuple[int, int, int, int]
    out: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def geometry(self) -> ConvGeometry:
        return ConvGeometry(self.stride, self.padding, self.dilation, self.groups)


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


def operands(case: Case, dtype: torch.dtype, exact: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """x (channels_last), weight and bias; `exact`: small multiples of 1/4, whose sums float32 holds exactly."""
    g = torch.Generator().manual_seed(sum(case.x))
    shapes = case.x, (case.out, case.x[1] // case.groups, *case.kernel), (case.out,)
    if exact:
        x, weight, bias = (torch.randint(-9, 10, shape, generator=g) / 4 for shape in shapes)
    else:
        x, weight, bias = (torch.randn(shape, generator=g) for shape in shapes)
    return x.to(dtype).contiguous(memory_format=torch.channels_last), weight.to(dtype), bias * 8
