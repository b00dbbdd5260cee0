"""epilogue: bias, key, activation, max-pool and store in one pass over a convolution's output."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unitvis_kernels import cpu
from unitvis_kernels._triton import HAS_TRITON, TARGET_PROGRAMS, Launch, jit, next_power_of_2, tl
from unitvis_kernels.arguments import check_floor, require_tensors
from unitvis_kernels.keys import TL_POSITION_MASK, new_keys
from unitvis_kernels.layout import memory_format
from unitvis_kernels.residual import (
    ACTIVATIONS,
    activate,
    align,
    check_map,
    has_kernel,
    larger,
    largest_of,
    load,
    load_bias,
    plan_pixels,
    reaches,
    store_keys,
    stored,
)

LARGEST_KEPT_WINDOW = 3  # of a pool whose rows stay in registers for the window below; larger ones would spill

# With a pool the tile is [BW columns of outputs, BC channels], and a program goes down rows of outputs. The maxima over
# the columns of a row of the input stay in registers for the windows below that hold the row too, so a row is read
# once. Where windows leave pixels out, rows and columns of outputs go on until each pixel is in one, for the keys.


@jit
def _pooled_row(p_x, row, o_w, H, W, C, m_c, shift, best, HAS_BIAS, WINDOW: tl.constexpr, SPAN: tl.constexpr):
    """(maxima over each window's columns of a row of the input, `best` with all of the row)."""
    o_h = tl.minimum(tl.maximum(row, 0), H - 1) * W
    across = best
    for j in tl.static_range(SPAN):
        o = (o_h + tl.minimum(tl.maximum(o_w + j, 0), W - 1)).to(tl.int64)[:, None] * C
        v = load(p_x, o, m_c, shift, HAS_BIAS)
        best = larger(best, v)
        if j == 0:
            across = v
        elif j < WINDOW:
            across = larger(across, v)
    return across, best


@jit
def _pool_kernel(
    x,  # [N, H, W, C], float32 | float16 | bfloat16, contiguous
    bias,  # [C], float32 | float16 | bfloat16; any pointer without HAS_BIAS
    y,  # [N, OH, OW, C], as x
    keys,  # [N, C], int64, rows keys_n apart; holds BLANK where SHARED
    floor,  # [C], float32; any pointer without HAS_FLOOR
    H,
    W,
    vectors,  # C // ALIGN, so that the compiler knows that ALIGN divides C
    OH,
    OW,
    rows,  # of outputs, with those beyond OH that reach the last row of pixels
    columns,  # likewise
    keys_n,
    ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEY_AFTER: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    KEPT: tl.constexpr,  # rows of a window that are kept for the one below: 0 to 2
    SPLITS: tl.constexpr,
    SHARED: tl.constexpr,
    BW: tl.constexpr,
    BC: tl.constexpr,
):
    SPAN: tl.constexpr = WINDOW if WINDOW > STRIDE else STRIDE
    dtype: tl.constexpr = x.dtype.element_ty
    C = vectors * ALIGN
    blocks, tiles = tl.cdiv(C, BC), tl.cdiv(columns, BW)
    i_w, i_s = tl.program_id(0) % tiles, tl.program_id(0) // tiles % SPLITS
    i_c = tl.program_id(0) // (tiles * SPLITS) % blocks
    i_n = (tl.program_id(0) // (tiles * SPLITS) // blocks).to(tl.int64)
    o_c = i_c * BC + tl.arange(0, BC)  # [BC]
    m_c = o_c < C
    column = i_w * BW + tl.arange(0, BW)  # [BW]
    o_w = column * STRIDE - PADDING
    p_x, p_y = x + i_n * H * W * C + o_c[None, :], y + i_n * OH * OW * C + o_c[None, :]  # [1, BC]
    shift = load_bias(bias, o_c, m_c, HAS_BIAS)

    share = tl.cdiv(rows, SPLITS)
    first, last = i_s * share, tl.minimum(i_s * share + share, rows)
    best = tl.full([BW, BC], -float("inf"), tl.float32)
    kept, kept_below = best, best
    if KEPT > 0:
        top = first * STRIDE - PADDING
        kept, best = _pooled_row(p_x, top, o_w, H, W, C, m_c, shift, best, HAS_BIAS, WINDOW, SPAN)
        if KEPT > 1:
            kept_below, best = _pooled_row(p_x, top + 1, o_w, H, W, C, m_c, shift, best, HAS_BIAS, WINDOW, SPAN)
    for i in range(first, last):
        pooled = kept
        if KEPT > 1:
            pooled = larger(pooled, kept_below)
            kept = kept_below
        for r in tl.static_range(KEPT, SPAN):
            row = i * STRIDE - PADDING + r
            across, best = _pooled_row(p_x, row, o_w, H, W, C, m_c, shift, best, HAS_BIAS, WINDOW, SPAN)
            if r == 0:
                pooled = across
            elif r < WINDOW:
                pooled = larger(pooled, across)
            if KEPT > 0 and r == STRIDE:
                kept = across
            if KEPT > 1 and r == STRIDE + 1:
                kept_below = across
        pooled = activate(stored(pooled, dtype), ACTIVATION) + 0.0  # makes -0.0 into +0.0
        m_y = ((i < OH) & (column < OW))[:, None] & m_c[None, :]
        tl.store(p_y + (i * OW + column).to(tl.int64)[:, None] * C, pooled.to(dtype), mask=m_y)

    AFTER: tl.constexpr = ACTIVATION if KEY_AFTER else 0
    largest = largest_of(best, dtype, AFTER)
    place = tl.full([BW, BC], TL_POSITION_MASK, tl.int32)
    if reaches(largest, floor + o_c, m_c, HAS_FLOOR):
        for i in range(first, last):
            for cell in tl.static_range(SPAN * SPAN):
                h = tl.minimum(tl.maximum(i * STRIDE - PADDING + cell // SPAN, 0), H - 1)
                pixel = (h * W + tl.minimum(tl.maximum(o_w + cell % SPAN, 0), W - 1))[:, None]
                v = activate(stored(load(p_x, pixel.to(tl.int64) * C, m_c, shift, HAS_BIAS), dtype), AFTER)
                place = tl.minimum(place, tl.where(v == largest[None, :], pixel, TL_POSITION_MASK))
    store_keys(keys + i_n * keys_n + o_c, largest, place, m_c, SHARED)


def out_shape(x: Tensor, pool: Sequence[int]) -> list[int]:
    """[N, C, OH, OW] of the stored map."""
    if not pool:
        return list(x.shape)
    window, stride, padding = pool
    return [*x.shape[:2], *((size + 2 * padding - window) // stride + 1 for size in x.shape[2:])]


def plan(
    x: Tensor,
    bias: Tensor | None,
    activation: str | None,
    pool: Sequence[int],
    key_after: bool,
    floor: Tensor | None,
    keys: Tensor,
    y: Tensor,
) -> Launch | None:
    """The launch that fills `keys` and `y`; None where there is no kernel for x."""
    if not pool:
        at = 3 if key_after else 0  # the activated value, or v
        taps = [keys if i == at else None for i in range(4)], [floor if i == at else None for i in range(4)]
        return plan_pixels(x, None, bias, None, activation, *taps, y)
    if not has_kernel(x) or keys.stride(1) != 1:
        return None
    (N, C, H, W), (OH, OW), (window, stride, padding) = x.shape, y.shape[2:], pool
    span = max(window, stride)
    rows, columns = (max(o, -(-(i + padding - span) // stride) + 1) for o, i in ((OH, H), (OW, W)))
    BC = min(64, next_power_of_2(C))
    BW = 8 if columns <= 8 else 16
    programs = N * -(-C // BC) * -(-columns // BW)
    splits = max(1, min(-(-TARGET_PROGRAMS // programs), rows // 4))
    kept = max(0, window - stride) if window <= LARGEST_KEPT_WINDOW else 0
    options: dict[str, Any] = {
        "ALIGN": align(C, x, y), "HAS_BIAS": bias is not None, "HAS_FLOOR": floor is not None,
        "ACTIVATION": ACTIVATIONS[activation], "KEY_AFTER": key_after, "WINDOW": window, "STRIDE": stride,
        "PADDING": padding, "KEPT": kept, "SPLITS": splits, "SHARED": splits > 1 or columns > BW, "BW": BW, "BC": BC,
        "num_warps": BW // 4, "num_stages": 1,
    }  # fmt: skip
    args = (x, x if bias is None else bias, y, keys, x if floor is None else floor)
    sizes = (H, W, C // options["ALIGN"], OH, OW, rows, columns, keys.stride(0))
    return Launch(_pool_kernel, (programs * splits,), args + sizes, options)


@torch.library.custom_op("unitvis::epilogue", mutates_args=("keys",))
def _epilogue(
    x: Tensor,
    bias: Tensor | None,
    activation: str | None,
    pool: Sequence[int],
    key_after: bool,
    floor: Tensor | None,
    keys: Tensor,
) -> Tensor:
    found, y = cpu.epilogue(x, bias, activation, pool, key_after, floor)
    keys.copy_(found)
    return y


@_epilogue.register_fake
def _(
    x: Tensor,
    bias: Tensor | None,
    activation: str | None,
    pool: Sequence[int],
    key_after: bool,
    floor: Tensor | None,
    keys: Tensor,
) -> Tensor:
    return new_map(x, pool)


def new_map(x: Tensor, pool: Sequence[int]) -> Tensor:
    """The map to be filled, in x's dtype and layout."""
    return torch.empty(out_shape(x, pool), dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def launch(
    x: Tensor,
    bias: Tensor | None,
    activation: str | None,
    pool: Sequence[int],
    key_after: bool,
    floor: Tensor | None,
    keys: Tensor,
    y: Tensor | None = None,
) -> Tensor:
    """Fill `keys` and y, a new map if None, by the kernel, and return y; by `cpu.epilogue` where there is no kernel."""
    y = new_map(x, pool) if y is None else y
    planned = plan(x, bias, activation, pool, key_after, floor, keys, y)
    if planned is None:
        found, y = cpu.epilogue(x, bias, activation, pool, key_after, floor)
        keys.copy_(found)
    else:
        planned.run()
    return y


if HAS_TRITON:
    _epilogue.register_kernel("cuda")(launch)


def epilogue(
    x: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    pool: tuple[int, int] | tuple[int, int, int] | None = None,
    *,
    key_after: bool = False,
    floor: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(keys int64 [N, C], y [N, C, OH, OW]) of a convolution's raw output x [N, C, H, W], in x's dtype and layout.

    v = x + bias[c], summed in float32 and rounded to x's dtype; keys are those of v as it would have been stored, or
    with `key_after` those of the activated v; y = max_pool(activation(v)), a new tensor. `activation` is None, "relu"
    or "relu6" (their zero is +0.0; NaN stays); `pool` is (window, stride) or (window, stride, padding), rounded down,
    NaN winning, its zero +0.0. `floor`: see `spatial_argmax`; where responses lie below it, the map is read once, else
    twice. `out`: the keys to write, in place of new ones; they must hold `BLANK`. On a GPU channels_last takes one
    pass; another layout runs in PyTorch, in several passes. Raises ValueError for anything else.
    """
    require_tensors("epilogue", x=x, bias=bias, floor=floor, out=out)
    check_map("epilogue", x, activation, bias=bias)
    check_floor(x, floor)
    window, stride, padding = pool = (*pool, 0)[:3] if pool else (1, 1, 0)
    if min(window, stride) < 1 or not 0 <= 2 * padding <= window or min(out_shape(x, pool)[2:]) < 1:
        raise ValueError(f"pool (window, stride, padding) = {pool} does not fit a map {tuple(x.shape[2:])}")
    keys = new_keys(x, x.shape[1], out)
    return keys, _epilogue(x, bias, activation, pool if pool != (1, 1, 0) else (), key_after, floor, keys)
