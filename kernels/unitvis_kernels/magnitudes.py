"""magnitudes: how large the numbers of each image of a network's input are, at several scales."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unitvis_kernels import cpu
from unitvis_kernels._triton import HAS_TRITON, Launch, jit, tl
from unitvis_kernels.arguments import require_normalizable, require_tensors, three
from unitvis_kernels.normalize import normalized, of_channel

SCALES = 5  # single numbers, blocks of 4 x 4, 16 x 16 and 64 x 64 pixels, the whole image

# A program takes one channel of one image, in tiles of 64 x 256 pixels: a lane adds up a block of 4 x 4, and a tile
# holds whole blocks of 64 x 64. Sums are written out as pairs of pairs instead of left to `tl.sum`, whose order depends
# on how lanes are laid out: the same bits come out of every batch, and out of `naive`.


@jit
def _row_of_four(p, m, columns, x_w, mean, std, PIXELS: tl.constexpr):
    """(sum, largest) of four numbers in a row from p on, of which `columns` lie in the map, where m holds."""
    v0 = _magnitude(p, m & (columns > 0), mean, std, PIXELS)
    v1 = _magnitude(p + x_w, m & (columns > 1), mean, std, PIXELS)
    v2 = _magnitude(p + 2 * x_w, m & (columns > 2), mean, std, PIXELS)
    v3 = _magnitude(p + 3 * x_w, m & (columns > 3), mean, std, PIXELS)
    return (v0 + v1) + (v2 + v3), tl.maximum(tl.maximum(v0, v1), tl.maximum(v2, v3))


@jit
def _magnitude(p, m, mean, std, PIXELS: tl.constexpr):
    v = tl.load(p, mask=m, other=0).to(tl.float32)
    if PIXELS:
        v = tl.where(m, normalized(v, mean, std), 0.0)
    return tl.where(v != v, float("inf"), tl.abs(v))


@jit
def _sums_of_four(x, A: tl.constexpr, B: tl.constexpr):
    """[B / 4, A]: sums of four neighbours in the rows of x [A, B], which become columns."""
    even, odd = tl.split(tl.reshape(x, [A, B // 4, 2, 2]))
    first, second = tl.split(even + odd)
    return tl.trans(first + second)


@jit
def _inside(size, count: tl.constexpr):
    """How many of the 4 rows (or columns) of each block lie in the map, [count], at least 1."""
    return tl.minimum(tl.maximum(size - 4 * tl.arange(0, count), 1), 4)


@jit
def _block_means(x, rows, columns, A: tl.constexpr, B: tl.constexpr):
    """[A / 4, B / 4]: means of the blocks of x [A, B], of which rows x columns lie in the map and others are 0."""
    sums = _sums_of_four(_sums_of_four(x, A, B), B // 4, A)
    count = _inside(rows, A // 4)[:, None] * _inside(columns, B // 4)[None, :]
    return tl.div_rn(sums, count.to(tl.float32))


@jit
def _store_largest(p, x):
    """Raise the float32 at p, at least 0, to the largest of x: as an integer, in which numbers >= 0 sort alike."""
    tl.atomic_max(p, tl.max(tl.max(x, 1), 0).to(tl.int32, bitcast=True), sem="relaxed")


@jit
def _magnitudes_kernel(
    x,  # [N, C, H, W] in any strides: uint8 with PIXELS, else floats
    y,  # [N, 5] int32: bits of float32, all 0 before
    C,
    height,
    width,
    x_n,
    x_c,
    x_h,
    x_w,
    mean0,
    mean1,
    mean2,
    std0,
    std1,
    std2,
    PIXELS: tl.constexpr,
):
    i_n, i_c = (tl.program_id(0) // C).to(tl.int64), tl.program_id(0) % C
    x += i_n * x_n + i_c.to(tl.int64) * x_c
    mean, std = of_channel(i_c, mean0, mean1, mean2), of_channel(i_c, std0, std1, std2)
    height1, width1 = (height + 3) // 4, (width + 3) // 4  # in blocks of 4 x 4
    height2, width2 = (height1 + 3) // 4, (width1 + 3) // 4
    height3, width3 = (height2 + 3) // 4, (width2 + 3) // 4
    tiles_in_a_row = (width + 255) // 256
    largest, largest1 = tl.zeros([16, 64], tl.float32), tl.zeros([16, 64], tl.float32)
    largest2 = tl.zeros([4, 16], tl.float32)
    largest3, total = tl.zeros([1, 4], tl.float32), tl.zeros([1, 4], tl.float32)
    for i in range(height3 * tiles_in_a_row):
        row, column = i // tiles_in_a_row * 16, i % tiles_in_a_row * 64  # in blocks of 4 x 4
        h = 4 * (row + tl.arange(0, 16))[:, None]
        w = 4 * (column + tl.arange(0, 64))[None, :]
        p, columns = x + (h * x_h + w * x_w), width - w
        s0, l0 = _row_of_four(p, h < height, columns, x_w, mean, std, PIXELS)
        s1, l1 = _row_of_four(p + x_h, h + 1 < height, columns, x_w, mean, std, PIXELS)
        s2, l2 = _row_of_four(p + 2 * x_h, h + 2 < height, columns, x_w, mean, std, PIXELS)
        s3, l3 = _row_of_four(p + 3 * x_h, h + 3 < height, columns, x_w, mean, std, PIXELS)
        largest = tl.maximum(largest, tl.maximum(tl.maximum(l0, l1), tl.maximum(l2, l3)))
        count = _inside(height - 4 * row, 16)[:, None] * _inside(width - 4 * column, 64)[None, :]
        means = tl.div_rn((s0 + s1) + (s2 + s3), count.to(tl.float32))
        largest1 = tl.maximum(largest1, means)
        means2 = _block_means(means, height1 - row, width1 - column, 16, 64)
        largest2 = tl.maximum(largest2, means2)
        means3 = _block_means(means2, height2 - row // 4, width2 - column // 4, 4, 16)
        largest3 = tl.maximum(largest3, means3)
        total += means3
    whole = _sums_of_four(total, 1, 4)
    whole = tl.div_rn(whole, tl.zeros_like(whole) + (height3 * width3).to(tl.float32))
    y += i_n * 5
    _store_largest(y, largest)
    _store_largest(y + 1, largest1)
    _store_largest(y + 2, largest2)
    _store_largest(y + 3, largest3)
    _store_largest(y + 4, whole)


def plan(x: Tensor, mean: Sequence[float], std: Sequence[float], y: Tensor) -> Launch | None:
    """The launch that raises y, int32 [N, 5] of zeros, to the magnitudes of x; None where there is no kernel for x."""
    maps = x.permute(0, 3, 1, 2) if mean else x
    N, C, H, W = maps.shape
    if not N or (H + 63) * abs(maps.stride(2)) + (W + 255) * abs(maps.stride(3)) >= 2**31:
        return None  # offsets inside a channel are int32
    args = (maps, y, C, H, W, *maps.stride(), *three(mean or (0.0,)), *three(std or (1.0,)))
    options: dict[str, Any] = {"PIXELS": bool(mean), "num_warps": 4, "num_stages": 1}
    return Launch(_magnitudes_kernel, (N * C,), args, options)


@torch.library.custom_op("unitvis::magnitudes", mutates_args=())
def _magnitudes(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    return cpu.magnitudes(x, mean, std)


@_magnitudes.register_fake
def _(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    return x.new_empty((x.shape[0], SCALES), dtype=torch.float32)


def launch(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """float32 [N, 5] by the kernel; in PyTorch where there is none."""
    y = x.new_zeros((x.shape[0], SCALES), dtype=torch.int32)
    planned = plan(x, mean, std, y)
    if planned is None:
        return cpu.magnitudes(x, mean, std)
    planned.run()
    return y.view(torch.float32)


if HAS_TRITON:
    _magnitudes.register_kernel("cuda")(launch)


def magnitudes(x: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Tensor:
    """The largest magnitude of each image at five scales, float32 [N, 5]; infinite where a number is NaN.

    Of magnitudes, then of means over blocks of 4 x 4, 16 x 16 and 64 x 64 pixels, and over the whole image: the largest
    of all channels. A mean is one of the means at the scale before; blocks at the lower and right border may be
    smaller. Sums are in float32, in one order whatever the batch.

    x: floats [N, C, H, W], or pixels, uint8 [N, H, W, 3 or 1], with one mean and one std a channel: the magnitudes are
    those of `normalize`. On a GPU one pass in any strides. Raises ValueError for anything else.
    """
    require_tensors("magnitudes", x=x)
    if (mean is None) != (std is None):
        raise ValueError("magnitudes takes mean and std together, for uint8 pixels")
    if mean is not None and std is not None:
        require_normalizable("magnitudes", x, mean, std)
    elif x.ndim != 4 or not x.dtype.is_floating_point:
        raise ValueError(
            f"magnitudes takes float [N, C, H, W], or uint8 pixels with mean and std, not {x.dtype} {tuple(x.shape)}"
        )
    if not all(x.shape[1:]):
        raise ValueError(f"magnitudes needs images of at least one pixel, not {tuple(x.shape)}")
    return _magnitudes(x, mean or [], std or [])
