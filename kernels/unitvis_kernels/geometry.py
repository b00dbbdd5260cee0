"""The geometry of a 2-D convolution, and the layout of a first one's input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class ConvGeometry(NamedTuple):
    """Stride, padding and dilation, each (rows, columns), and groups: in the order in which `F.conv2d` takes them."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @classmethod
    def of(
        cls,
        stride: int | tuple[int, int],
        padding: int | tuple[int, int],
        dilation: int | tuple[int, int],
        groups: int,
    ) -> ConvGeometry:
        """The geometry from a caller's numbers (for both axes) and pairs. Raises ValueError for what is neither."""
        pairs = _pair("stride", stride, 1), _pair("padding", padding, 0), _pair("dilation", dilation, 1)
        return cls(*pairs, groups)

    @classmethod
    def from_ints(cls, ints: Sequence[int]) -> ConvGeometry:
        """The geometry from the seven integers of `as_ints`."""
        SH, SW, PH, PW, DH, DW, groups = ints
        return cls((SH, SW), (PH, PW), (DH, DW), groups)

    def as_ints(self) -> list[int]:
        """Seven integers, which a `torch.library` schema can hold: rows and columns of each pair, then groups."""
        return [*self.stride, *self.padding, *self.dilation, self.groups]

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, int]:
        """(OH, OW) for an input of `size` (H, W) under a `kernel` (KH, KW); below 1 where the kernel does not fit."""
        (H, W), (KH, KW), (SH, SW), (PH, PW), (DH, DW) = size, kernel, self.stride, self.padding, self.dilation
        return (H + 2 * PH - DH * (KH - 1) - 1) // SH + 1, (W + 2 * PW - DW * (KW - 1) - 1) // SW + 1


class Blocks(NamedTuple):
    """A layout of a first convolution's input: each block of pixels, with all their channels, is one pixel.

    Channel (row * block columns + column) * C + c is channel c of that pixel of the block; those beyond are 0, as are
    pixels outside the image. With a block as large as the stride the convolution has a stride of 1, a smaller kernel
    and many input channels (space to depth); with blocks of one pixel only channels are added. Both are what matrix
    units want: they read whole vectors of channels.
    """

    block: tuple[int, int]  # pixels: rows, columns
    padding: tuple[int, int]  # pixels above the image and to its left that belong to the first blocks
    size: tuple[int, int]  # blocks: rows, columns
    used: tuple[int, int]  # pixels of the image that the convolution reads: rows, columns
    channels: int

    @classmethod
    def of(cls, C: int, size: Sequence[int], kernel: Sequence[int], geometry: ConvGeometry) -> Blocks:
        """The layout that suits a convolution of an image [C, H, W] of `size` (H, W) under a `kernel` (KH, KW)."""
        if not _blocked(geometry):
            return cls((1, 1), (0, 0), (size[0], size[1]), (size[0], size[1]), -(-C // 4) * 4)
        out, stride, padding = geometry.output_size(size, kernel), geometry.stride, geometry.padding
        axes = list(zip(out, stride, padding, kernel, size, strict=True))
        rows, columns = (o - 1 + -(-k // s) for o, s, _, k, _ in axes)
        height, width = (min(length, (o - 1) * s + k - p) for o, s, p, k, length in axes)
        return cls(stride, padding, (rows, columns), (height, width), -(-stride[0] * stride[1] * C // 8) * 8)

    @classmethod
    def from_ints(cls, ints: Sequence[int]) -> Blocks:
        """The layout from the nine integers of `as_ints`."""
        BH, BW, top, left, rows, columns, height, width, channels = ints
        return cls((BH, BW), (top, left), (rows, columns), (height, width), channels)

    def as_ints(self) -> list[int]:
        """Nine integers, which a `torch.library` schema can hold."""
        return [*self.block, *self.padding, *self.size, *self.used, self.channels]

    @staticmethod
    def of_weight(weight: Tensor, geometry: ConvGeometry) -> tuple[Tensor, ConvGeometry]:
        """(weight, geometry) of the same convolution [D, C, KH, KW] for an input in the layout of `of`."""
        D, C, KH, KW = weight.shape
        SH, SW = geometry.stride
        if not _blocked(geometry):
            return F.pad(weight, (0, 0, 0, 0, 0, -C % 4)), geometry
        whole = F.pad(weight, (0, -KW % SW, 0, -KH % SH))
        split = whole.view(D, C, whole.shape[2] // SH, SH, whole.shape[3] // SW, SW).permute(0, 3, 5, 1, 2, 4)
        blocks = split.reshape(D, SH * SW * C, *split.shape[4:])
        return F.pad(blocks, (0, 0, 0, 0, 0, -blocks.shape[1] % 8)), ConvGeometry()


def _blocked(geometry: ConvGeometry) -> bool:
    """Whether blocks are larger than a pixel; those of 2 x 2 were slower than four channels on an H200."""
    return min(geometry.stride) > 2


def _pair(name: str, value: int | tuple[int, int], minimum: int) -> tuple[int, int]:
    if isinstance(value, str):
        raise ValueError(f"{name} must be numbers, not {value!r}: 'valid' is 0, 'same' is dilation * (kernel - 1) / 2")
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < minimum:
        raise ValueError(f"{name} must be a number or a pair of at least {minimum}, not {value}")
    return pair[0], pair[1]
