"""normalize, arrange: a batch of images to a network's input, on the device that computes.

normalize: from uint8 pixels. arrange: from an input in the usual layout to the one that the first convolution wants.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unitvis_kernels import cpu
from unitvis_kernels._triton import HAS_TRITON, Launch, jit, next_power_of_2, tl
from unitvis_kernels.arguments import require_normalizable, require_tensors, three
from unitvis_kernels.geometry import Blocks

BLOCKS_PER_PROGRAM = 4


@jit
def of_channel(channel, value0, value1, value2):
    """The value of each channel, 0 to 2."""
    return tl.where(channel == 0, value0, tl.where(channel == 1, value1, value2))


@jit
def normalized(v, mean, std):
    """(v / 255 - mean) / std of float32 numbers, by IEEE divisions; `/` approximates."""
    v = tl.div_rn(v, tl.full(v.shape, 255.0, tl.float32)) - mean
    return tl.div_rn(v, tl.zeros_like(v) + std)


@jit
def _normalize_kernel(
    x,  # [E] uint8: [N, H, W, 3] flattened, or [N, H, W, 1], of whose channel there are three means and stds
    y,  # [E] float32 | float16 | bfloat16, in the same order
    E,
    mean0,
    mean1,
    mean2,
    std0,
    std1,
    std2,
    BLOCKS: tl.constexpr,
    BE: tl.constexpr,
):
    # A program takes every third block, so that a lane has the same channel in each.
    i_phase, i_block = tl.program_id(0) % 3, tl.program_id(0) // 3
    lane = tl.arange(0, BE)  # [BE]
    channel = (i_phase * BE + lane) % 3
    mean, std = of_channel(channel, mean0, mean1, mean2), of_channel(channel, std0, std1, std2)
    for i in range(BLOCKS):
        o = (i_block.to(tl.int64) * BLOCKS + i) * (3 * BE) + i_phase * BE + lane
        v = tl.load(x + o, mask=o < E, other=0).to(tl.float32)
        tl.store(y + o, normalized(v, mean, std).to(y.dtype.element_ty), mask=o < E)


@jit
def _arrange_kernel(
    x,  # [N, H, W, C] in any strides: uint8 with PIXELS, else float32 | float16 | bfloat16
    y,  # [N, rows, columns, CHANNELS], float32 | float16 | bfloat16, contiguous
    blocks,  # N * rows * columns
    rows,
    columns,
    height,  # pixels of x that are used
    width,
    x_n,
    x_h,
    x_w,
    x_c,
    mean0,
    mean1,
    mean2,
    std0,
    std1,
    std2,
    PIXELS: tl.constexpr,
    C: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    CHANNELS: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    parts: tl.constexpr = (CHANNELS + BC - 1) // BC
    o_p = (tl.program_id(0) // parts).to(tl.int64) * BP + tl.arange(0, BP)  # [BP]
    o_k = tl.program_id(0) % parts * BC + tl.arange(0, BC)  # [BC]
    channel = o_k % C
    i_n, within = o_p // (rows * columns), (o_p % (rows * columns)).to(tl.int32)
    h = (within // columns * BH)[:, None] + (o_k // (BW * C))[None, :] - TOP  # [BP, BC]
    w = (within % columns * BW)[:, None] + (o_k // C % BW)[None, :] - LEFT
    m = (o_p < blocks)[:, None] & (o_k < BH * BW * C)[None, :] & (h >= 0) & (h < height) & (w >= 0) & (w < width)
    o_x = (i_n * x_n)[:, None] + (h * x_h + w * x_w + (channel * x_c)[None, :])
    v = tl.load(x + o_x, mask=m, other=0).to(tl.float32)
    if PIXELS:
        mean, std = of_channel(channel, mean0, mean1, mean2), of_channel(channel, std0, std1, std2)
        v = tl.where(m, normalized(v, mean[None, :], std[None, :]), 0.0)
    m_y = (o_p < blocks)[:, None] & (o_k < CHANNELS)[None, :]
    tl.store(y + o_p[:, None] * CHANNELS + o_k[None, :], v.to(y.dtype.element_ty), mask=m_y)


def plan_blocks(
    x: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None, blocks: Blocks, y: Tensor
) -> Launch | None:
    """The launch that fills `y` [N, rows, columns, channels] from x [N, H, W, C]; None where there is no kernel for x.

    mean, std: None where x is normalised already.
    """
    (N, *_, C), (rows, columns) = x.shape, blocks.size
    largest = sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    if not x.numel() or largest >= 2**31 or C > 4:
        return None  # offsets inside an image are int32
    BC = min(64, next_power_of_2(blocks.channels))
    options: dict[str, Any] = {
        "PIXELS": mean is not None, "C": C, "BH": blocks.block[0], "BW": blocks.block[1], "TOP": blocks.padding[0],
        "LEFT": blocks.padding[1], "CHANNELS": blocks.channels, "BP": 2048 // BC, "BC": BC, "num_warps": 4,
        "num_stages": 1,
    }  # fmt: skip
    programs = -(-N * rows * columns // options["BP"]) * -(-blocks.channels // BC)
    constants = (*three(mean or (0.0,)), *three(std or (1.0,)))
    args = (x, y, N * rows * columns, rows, columns, *blocks.used, *x.stride(), *constants)
    return Launch(_arrange_kernel, (programs,), args, options)


def plan(x: Tensor, mean: Sequence[float], std: Sequence[float], y: Tensor) -> Launch | None:
    """The launch that fills `y`; None where there is no kernel for x."""
    if not x.is_contiguous() or not x.numel():
        return None
    options: dict[str, Any] = {"BLOCKS": BLOCKS_PER_PROGRAM, "BE": 2048, "num_warps": 4, "num_stages": 1}
    programs = 3 * -(-x.numel() // (3 * BLOCKS_PER_PROGRAM * options["BE"]))
    return Launch(_normalize_kernel, (programs,), (x, y, x.numel(), *three(mean), *three(std)), options)


# A schema holds no `Blocks`: the operators take its integers, none for the usual layout.
@torch.library.custom_op("unitvis::normalize", mutates_args=())
def _normalize(
    x: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, blocks: Sequence[int]
) -> Tensor:
    y = cpu.normalize(x, mean, std, dtype)
    return cpu.arrange(y, Blocks.from_ints(blocks), dtype) if blocks else y


@_normalize.register_fake
def _(x: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, blocks: Sequence[int]) -> Tensor:
    return _new_input(x, dtype, blocks).permute(0, 3, 1, 2)


@torch.library.custom_op("unitvis::arrange", mutates_args=())
def _arrange(x: Tensor, blocks: Sequence[int], dtype: torch.dtype) -> Tensor:
    return cpu.arrange(x, Blocks.from_ints(blocks), dtype)


@_arrange.register_fake
def _(x: Tensor, blocks: Sequence[int], dtype: torch.dtype) -> Tensor:
    return _new_input(x, dtype, blocks).permute(0, 3, 1, 2)


def _new_input(x: Tensor, dtype: torch.dtype, blocks: Sequence[int]) -> Tensor:
    """The input to be filled, channels last: [N, H, W, C] as x, or in blocks."""
    if not blocks:
        return x.new_empty(x.shape, dtype=dtype)
    layout = Blocks.from_ints(blocks)
    return x.new_empty((x.shape[0], *layout.size, layout.channels), dtype=dtype)


def launch(
    x: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    blocks: Sequence[int] = (),
    y: Tensor | None = None,
) -> Tensor:
    """[N, C, H, W] by a kernel, into y (channels last) if given; in PyTorch where there is no kernel."""
    y = _new_input(x, dtype, blocks) if y is None else y
    layout = Blocks.from_ints(blocks) if blocks else None
    planned = plan(x, mean, std, y) if layout is None else plan_blocks(x, mean, std, layout, y)
    if planned is not None:
        planned.run()
        return y.permute(0, 3, 1, 2)
    normalised = cpu.normalize(x, mean, std, dtype)
    return normalised if layout is None else cpu.arrange(normalised, layout, dtype)


def launch_arrange(x: Tensor, blocks: Sequence[int], dtype: torch.dtype, y: Tensor | None = None) -> Tensor:
    """[N, channels, rows, columns] by the kernel, into y (channels last) if given; in PyTorch where there is none."""
    y = _new_input(x, dtype, blocks) if y is None else y
    planned = plan_blocks(x.permute(0, 2, 3, 1), None, None, Blocks.from_ints(blocks), y)
    if planned is None:
        return cpu.arrange(x, Blocks.from_ints(blocks), dtype)
    planned.run()
    return y.permute(0, 3, 1, 2)


if HAS_TRITON:
    _normalize.register_kernel("cuda")(launch)
    _arrange.register_kernel("cuda")(launch_arrange)


def normalize(
    x: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    blocks: Blocks | None = None,
) -> Tensor:
    """(x / 255 - mean) / std of uint8 [N, H, W, C] as channels_last [N, C, H, W] in float32, float16 or bfloat16.

    C is 3, or 1 for grey images; there is one mean and one std a channel. `blocks`: another layout, see `Blocks`.

    The arithmetic is IEEE float32 in that order on every device, rounded once to `dtype`: the same bits everywhere. On
    a GPU contiguous batches take one pass, and blocks do in any strides; the rest runs in PyTorch. Raises ValueError
    for anything else.
    """
    require_tensors("normalize", x=x)
    require_normalizable("normalize", x, mean, std)
    _check_dtype("normalize", dtype)
    if blocks is not None:
        _check_blocks(blocks, x.shape[3], x.shape[1:3])
    return _normalize(x, mean, std, dtype, [] if blocks is None else blocks.as_ints())


def arrange(x: Tensor, blocks: Blocks, dtype: torch.dtype) -> Tensor:
    """A network's input x [N, C, H, W], float, in blocks: a new channels_last tensor of `dtype`, see `Blocks`.

    On a GPU one pass, up to four channels in any strides. Raises ValueError for anything else.
    """
    require_tensors("arrange", x=x)
    if x.ndim != 4 or not x.dtype.is_floating_point:
        raise ValueError(f"arrange takes float [N, C, H, W], not {x.dtype} {tuple(x.shape)}")
    _check_dtype("arrange", dtype)
    _check_blocks(blocks, x.shape[1], x.shape[2:])
    return _arrange(x, blocks.as_ints(), dtype)


def _check_dtype(operator: str, dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{operator} gives float32, float16 or bfloat16, not {dtype}")


def _check_blocks(blocks: Blocks, C: int, size: Sequence[int]) -> None:
    """Raise ValueError for blocks that lack room for what they are to hold of an image [C, *size]."""
    held = (b * count - p for b, count, p in zip(blocks.block, blocks.size, blocks.padding, strict=True))
    fits = all(0 <= used <= min(s, h) for used, s, h in zip(blocks.used, size, held, strict=True))
    if not fits or min(blocks.block) < 1 or blocks.channels < blocks.block[0] * blocks.block[1] * C:
        raise ValueError(f"{blocks} do not fit images of {C} x {size[0]} x {size[1]}")
