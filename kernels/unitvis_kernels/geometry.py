"""The geometry of a 2-D convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


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


def _pair(name: str, value: int | tuple[int, int], minimum: int) -> tuple[int, int]:
    if isinstance(value, str):
        raise ValueError(f"{name} must be numbers, not {value!r}: 'valid' is 0, 'same' is dilation * (kernel - 1) / 2")
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < minimum:
        raise ValueError(f"{name} must be a number or a pair of at least {minimum}, not {value}")
    return pair[0], pair[1]
