"""magnitudes: how large the numbers in each channel of a network's input are, at several scales."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unitvis_kernels import cpu
from unitvis_kernels._triton import HAS_TRITON, Launch, jit, tl
from unitvis_kernels.arguments import require_normalizable, require_tensors, three
from unitvis_kernels.normalize import normalized, of_channel

SCALES = 5  # single numbers, blocks of 4 x 4, 16 x 16 and 64 x 64 pixels, the whole image

# A program takes one channel of one image, or all three where a pixel's channels lie side by side, in tiles of
# 256 x 256 pixels. A lane adds up the 16 blocks of 4 x 4 pixels of a block of 16 x 16, so that lanes meet only for
# blocks of 64 x 64. Sums are written out as pairs of pairs instead of left to `tl.sum`, whose order depends on how
# lanes are laid out: the same bits come out of every batch, and out of `naive`. Where a block's rows are whole words of
# memory they are read so, a quarter of the loads.


@jit
def _row_of_block(p, m, columns, x_w, CHANNELS: tl.constexpr, WORD: tl.constexpr):
    """What a block's row holds, from p on, where m holds: `CHANNELS` words of four numbers, or WORD = 0, four numbers.

    WORD: bytes of a word. columns: of the row that lie in the map.
    """
    if WORD == 0:
        a = tl.load(p, mask=m & (columns > 0), other=0)
        b = tl.load(p + x_w, mask=m & (columns > 1), other=0)
        c = tl.load(p + 2 * x_w, mask=m & (columns > 2), other=0)
        d = tl.load(p + 3 * x_w, mask=m & (columns > 3), other=0)
    else:
        m = m & (columns > 0)
        words = p.to(tl.pointer_type(tl.int64 if WORD == 8 else tl.int32), bitcast=True)
        a = tl.load(words, mask=m, other=0)
        b, c, d = a, a, a
        if CHANNELS == 3:
            b = tl.load(words + 1, mask=m, other=0)
            c = tl.load(words + 2, mask=m, other=0)
    return a, b, c, d


@jit
def _magnitude(a, b, c, d, i: tl.constexpr, m, mean, std, WORD: tl.constexpr, TYPE: tl.constexpr):
    """The magnitude of number i, of a type, of what `_row_of_block` read; of pixels 0 where m does not hold."""
    part: tl.constexpr = i if WORD == 0 else i // 4
    v = a if part == 0 else (b if part == 1 else (c if part == 2 else d))
    if WORD == 4:
        v = (v >> (8 * (i % 4))) & 255
    elif WORD == 8:
        v = (v >> (16 * (i % 4))).to(tl.int16).to(TYPE, bitcast=True)
    v = v.to(tl.float32)
    if TYPE.is_int():
        v = tl.where(m, normalized(v, mean, std), 0.0)
    return tl.abs(v)


@jit
def _sum_of_row(
    row, channel: tl.constexpr, CHANNELS: tl.constexpr, m, columns, mean, std, WORD: tl.constexpr, TYPE: tl.constexpr
):
    """(sum, largest) of the magnitudes of a channel in what `_row_of_block` read; a NaN makes the sum NaN."""
    a, b, c, d = row
    v0 = _magnitude(a, b, c, d, channel, m & (columns > 0), mean, std, WORD, TYPE)
    v1 = _magnitude(a, b, c, d, CHANNELS + channel, m & (columns > 1), mean, std, WORD, TYPE)
    v2 = _magnitude(a, b, c, d, 2 * CHANNELS + channel, m & (columns > 2), mean, std, WORD, TYPE)
    v3 = _magnitude(a, b, c, d, 3 * CHANNELS + channel, m & (columns > 3), mean, std, WORD, TYPE)
    return (v0 + v1) + (v2 + v3), tl.maximum(tl.maximum(v0, v1), tl.maximum(v2, v3))


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
def _block_of_channel(
    row0, row1, row2, row3, channel: tl.constexpr, CHANNELS: tl.constexpr, h, columns, height, mean, std,
    WORD: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """(largest, mean) of the magnitudes of a channel in blocks of 4 x 4, whose four rows, from h on, were read."""
    s0, l0 = _sum_of_row(row0, channel, CHANNELS, h < height, columns, mean, std, WORD, TYPE)
    s1, l1 = _sum_of_row(row1, channel, CHANNELS, h + 1 < height, columns, mean, std, WORD, TYPE)
    s2, l2 = _sum_of_row(row2, channel, CHANNELS, h + 2 < height, columns, mean, std, WORD, TYPE)
    s3, l3 = _sum_of_row(row3, channel, CHANNELS, h + 3 < height, columns, mean, std, WORD, TYPE)
    sums, most = (s0 + s1) + (s2 + s3), tl.maximum(tl.maximum(l0, l1), tl.maximum(l2, l3))
    has_nan = sums != sums
    count = tl.minimum(tl.maximum(height - h, 1), 4) * tl.minimum(tl.maximum(columns, 1), 4)
    means = tl.div_rn(tl.where(has_nan, float("inf"), sums), count.to(tl.float32))
    return tl.where(has_nan, float("inf"), most), means


@jit
def _added_to_half(first, second, x, i):
    """Sums of the first two of four numbers, i = 0 to 3, and of the last two, with number i, x, added."""
    return tl.where(i < 2, first + x, first), tl.where(i < 2, second, second + x)


@jit
def _larger_blocks(sums, rows1, columns1, total):
    """(means of 16 x 16 [16, 16], of 64 x 64 [4, 4], `total` [1, 4] with the latter added) of a channel of a tile.

    sums: of the means of 4 x 4 in each block of 16 x 16. rows1, columns1: of blocks of 4 x 4 from the tile's first on
    that lie in the map.
    """
    rows2, columns2 = (rows1 + 3) // 4, (columns1 + 3) // 4
    count = _inside(rows1, 16)[:, None] * _inside(columns1, 16)[None, :]
    means2 = tl.div_rn(sums, count.to(tl.float32))
    means3 = _block_means(means2, rows2, columns2, 16, 16)
    for row in tl.static_range(4):
        own = tl.where(tl.arange(0, 4)[:, None] == row, means3, 0.0)
        total += tl.sum(own, axis=0)[None, :]  # one number and zeros
    return means2, means3, total


@jit
def _store_largest(p, largest, means, means2, means3, total, count):
    """Store the five magnitudes of a channel. total: sums of means of 64 x 64 in every fourth column, [1, 4]."""
    whole = _sums_of_four(total, 1, 4)
    tl.store(p, tl.max(tl.max(largest, 1), 0))
    tl.store(p + 1, tl.max(tl.max(means, 1), 0))
    tl.store(p + 2, tl.max(tl.max(means2, 1), 0))
    tl.store(p + 3, tl.max(tl.max(means3, 1), 0))
    tl.store(p + 4, tl.max(tl.max(tl.div_rn(whole, tl.zeros_like(whole) + count.to(tl.float32)), 1), 0))


@jit
def _magnitudes_kernel(
    x,  # [N, C, H, W] in any strides: uint8 or floats
    y,  # [N, C, 5] float32
    groups,  # C / CHANNELS
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
    CHANNELS: tl.constexpr,  # of a program: 1, or 3, whose numbers lie side by side
    WORD: tl.constexpr,  # bytes of the words that are read, each of four numbers; 0: numbers are read
):
    TYPE: tl.constexpr = x.dtype.element_ty
    i_n, i_c = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    x += i_n * x_n + i_c.to(tl.int64) * x_c
    y += tl.program_id(0).to(tl.int64) * (CHANNELS * 5)
    height1, width1 = (height + 3) // 4, (width + 3) // 4  # in blocks of 4 x 4
    height3, width3 = (height1 + 15) // 16, (width1 + 15) // 16  # of 64 x 64
    mean_0, std_0 = of_channel(i_c, mean0, mean1, mean2), of_channel(i_c, std0, std1, std2)
    zeros, zeros3, zeros4 = tl.zeros([16, 16], tl.float32), tl.zeros([4, 4], tl.float32), tl.zeros([1, 4], tl.float32)
    # Of each channel: largest, largest mean of 4 x 4, of 16 x 16, of 64 x 64, and sums of the last.
    a0, b0, c0, d0, t0 = zeros, zeros, zeros, zeros3, zeros4
    a1, b1, c1, d1, t1 = zeros, zeros, zeros, zeros3, zeros4
    a2, b2, c2, d2, t2 = zeros, zeros, zeros, zeros3, zeros4
    tiles_in_a_row = (width3 + 3) // 4
    for tile in range((height3 + 3) // 4 * tiles_in_a_row):
        row, column = tile // tiles_in_a_row * 256, tile % tiles_in_a_row * 256  # in pixels
        low0, high0, low1, high1, low2, high2 = zeros, zeros, zeros, zeros, zeros, zeros
        for i in range(tl.minimum(height1, 4)):
            h = row + 16 * tl.arange(0, 16)[:, None] + 4 * i
            left0, right0, left1, right1, left2, right2 = zeros, zeros, zeros, zeros, zeros, zeros
            for j in range(tl.minimum(width1, 4)):
                w = column + 16 * tl.arange(0, 16)[None, :] + 4 * j
                p, columns = x + (h * x_h + w * x_w), width - w
                row0 = _row_of_block(p, h < height, columns, x_w, CHANNELS, WORD)
                row1 = _row_of_block(p + x_h, h + 1 < height, columns, x_w, CHANNELS, WORD)
                row2 = _row_of_block(p + 2 * x_h, h + 2 < height, columns, x_w, CHANNELS, WORD)
                row3 = _row_of_block(p + 3 * x_h, h + 3 < height, columns, x_w, CHANNELS, WORD)
                a, b = _block_of_channel(
                    row0, row1, row2, row3, 0, CHANNELS, h, columns, height, mean_0, std_0, WORD, TYPE
                )
                a0, b0 = tl.maximum(a0, a), tl.maximum(b0, b)
                left0, right0 = _added_to_half(left0, right0, b, j)
                if CHANNELS == 3:
                    a, b = _block_of_channel(
                        row0, row1, row2, row3, 1, CHANNELS, h, columns, height, mean1, std1, WORD, TYPE
                    )
                    a1, b1 = tl.maximum(a1, a), tl.maximum(b1, b)
                    left1, right1 = _added_to_half(left1, right1, b, j)
                    a, b = _block_of_channel(
                        row0, row1, row2, row3, 2, CHANNELS, h, columns, height, mean2, std2, WORD, TYPE
                    )
                    a2, b2 = tl.maximum(a2, a), tl.maximum(b2, b)
                    left2, right2 = _added_to_half(left2, right2, b, j)
            low0, high0 = _added_to_half(low0, high0, left0 + right0, i)
            low1, high1 = _added_to_half(low1, high1, left1 + right1, i)
            low2, high2 = _added_to_half(low2, high2, left2 + right2, i)
        rows1, columns1 = height1 - row // 4, width1 - column // 4
        c, d, t0 = _larger_blocks(low0 + high0, rows1, columns1, t0)
        c0, d0 = tl.maximum(c0, c), tl.maximum(d0, d)
        if CHANNELS == 3:
            c, d, t1 = _larger_blocks(low1 + high1, rows1, columns1, t1)
            c1, d1 = tl.maximum(c1, c), tl.maximum(d1, d)
            c, d, t2 = _larger_blocks(low2 + high2, rows1, columns1, t2)
            c2, d2 = tl.maximum(c2, c), tl.maximum(d2, d)
    _store_largest(y, a0, b0, c0, d0, t0, height3 * width3)
    if CHANNELS == 3:
        _store_largest(y + 5, a1, b1, c1, d1, t1, height3 * width3)
        _store_largest(y + 10, a2, b2, c2, d2, t2, height3 * width3)


def words(maps: Tensor) -> tuple[int, int]:
    """(channels of a program, bytes of a word of four numbers; 0 where rows of blocks are no whole words)."""
    channels = 3 if maps.shape[1] == 3 and maps.stride(1) == 1 and maps.stride(3) == 3 else 1
    word = 4 * maps.element_size()
    rows = [maps.stride(dim) for dim in (0, 1, 2) if maps.shape[dim] > 1 and (dim != 1 or channels == 1)]
    side_by_side = channels == 3 or maps.stride(3) == 1
    if word > 8 or maps.shape[3] % 4 or not side_by_side or any(stride % 4 for stride in rows):
        return 1, 0
    if maps.data_ptr() % word or torch.version.hip:  # AMD's compiler spills registers where three channels are read
        return 1, 0
    return channels, word


def plan(x: Tensor, mean: Sequence[float], std: Sequence[float], y: Tensor) -> Launch | None:
    """The launch that fills y, float32 [N, C, 5], with the magnitudes of x; None where there is no kernel for x."""
    maps = x.permute(0, 3, 1, 2) if mean else x
    N, C, H, W = maps.shape
    if not N or (H + 255) * abs(maps.stride(2)) + (W + 255) * abs(maps.stride(3)) >= 2**31:
        return None  # offsets inside a channel are int32
    channels, word = words(maps)
    groups = C // channels
    args = (maps, y, groups, H, W, *maps.stride(), *three(mean or (0.0,)), *three(std or (1.0,)))
    options = {"CHANNELS": channels, "WORD": word, "num_warps": 8, "num_stages": 1}
    if not torch.version.hip:
        options["maxnreg"] = 128  # without it ptxas spills registers to raise an occupancy that does not help here
    return Launch(_magnitudes_kernel, (N * groups,), args, options)


@torch.library.custom_op("unitvis::magnitudes", mutates_args=())
def _magnitudes(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    return cpu.magnitudes(x, mean, std)


@_magnitudes.register_fake
def _(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    return new_magnitudes(x, mean)


def new_magnitudes(x: Tensor, mean: Sequence[float]) -> Tensor:
    """float32 [N, C, 5] to be filled; pixels, which have a mean, hold their channels last."""
    return x.new_empty((x.shape[0], x.shape[3 if mean else 1], SCALES), dtype=torch.float32)


def launch(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """float32 [N, C, 5] by the kernel; in PyTorch where there is none."""
    y = new_magnitudes(x, mean)
    planned = plan(x, mean, std, y)
    if planned is None:
        return cpu.magnitudes(x, mean, std)
    planned.run()
    return y


if HAS_TRITON:
    _magnitudes.register_kernel("cuda")(launch)


def magnitudes(x: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Tensor:
    """The largest magnitude in each channel of an image at five scales, float32 [N, C, 5]; infinite where one is NaN.

    Of magnitudes, then of means over blocks of 4 x 4, 16 x 16 and 64 x 64 pixels, and over the whole image. Each is a
    mean of means at the scale before; blocks at the lower and right border may be smaller. Sums are in float32, in one
    order whatever the batch.

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
