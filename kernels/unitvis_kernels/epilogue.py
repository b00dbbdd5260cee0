"""epilogue: bias, key, activation, max-pool and store in one pass over a convolution's output."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor

from unitvis_kernels import cpu
from unitvis_kernels._triton import HAS_TRITON, Launch, jit, next_power_of_2, tl
from unitvis_kernels.arguments import require_tensors
from unitvis_kernels.keys import BLANK, POSITION_MASK, TL_BLANK, pack_block
from unitvis_kernels.layout import memory_format
from unitvis_kernels.spatial_argmax import splits_for

ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2}

# The tile is [BH * BW outputs, BC channels]. The input is cut into cells of stride x stride pixels, one an output. Each
# output reads its whole window, but makes keys of the pixels of its own cell only, so that each pixel gets one key;
# pixels that several windows share are read again, from the cache. The outputs are continued beyond the map's last one
# until the cells cover the input. A lane goes down one column of outputs, so it sees its pixels in ascending order and
# takes a value only if it is larger. Adding a bias, rounding and the activations keep the order of values, so a window
# takes the maximum of the raw values and does the rest to that one value.


@jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION > 0:
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)  # of -0.0 and +0.0 the latter
    if ACTIVATION == 2:
        x = tl.minimum(x, 6.0, propagate_nan=tl.PropagateNan.ALL)
    return x


@jit
def _epilogue_kernel(
    x,  # [N, H, W, C], float32 | float16 | bfloat16, contiguous
    bias,  # [C], float32 | float16 | bfloat16; any pointer without HAS_BIAS
    keys,  # [N, C], int64; holds BLANK where SPLITS > 1
    y,  # [N, OH, OW, C], as x
    H,
    W,
    vectors,  # C // ALIGN, so that the compiler knows that ALIGN divides C
    OH,
    OW,
    ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEY_AFTER: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    SPLITS: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BC: tl.constexpr,
):
    SPAN: tl.constexpr = WINDOW if WINDOW > STRIDE else STRIDE
    C = vectors * ALIGN
    blocks = tl.cdiv(C, BC)
    i_s, i_c = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS % blocks
    i_n = (tl.program_id(0) // SPLITS // blocks).to(tl.int64)
    o_c = i_c * BC + tl.arange(0, BC)  # [BC]
    m_c = o_c < C
    lane = tl.arange(0, BH * BW)  # [BH * BW]
    p_x, p_y = x + i_n * H * W * C + o_c[None, :], y + i_n * OH * OW * C + o_c[None, :]  # [1, BC]
    shift = tl.zeros([BC], tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)

    steps = tl.cdiv(tl.cdiv(H + PADDING, STRIDE), BH)
    share = tl.cdiv(steps, SPLITS)
    found = tl.full([BC], TL_BLANK, tl.int64)
    for column in range(0, tl.cdiv(W + PADDING, STRIDE), BW):
        o_w = column + lane % BW
        best = tl.full([BH * BW, BC], -float("inf"), tl.float32)
        step = tl.full([BH * BW, BC], -1, tl.int32)
        for i in range(i_s * share, tl.minimum(i_s * share + share, steps)):
            o_h = i * BH + lane // BW
            pooled = tl.full([BH * BW, BC], -float("inf"), tl.float32)
            for cell in tl.static_range(SPAN * SPAN):
                h, w = o_h * STRIDE - PADDING + cell // SPAN, o_w * STRIDE - PADDING + cell % SPAN
                m = ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
                o_x = (h * W + w).to(tl.int64)[:, None] * C
                v = tl.load(p_x + o_x, mask=m & m_c[None, :], other=-float("inf")).to(tl.float32)
                if (cell // SPAN < WINDOW) & (cell % SPAN < WINDOW):
                    pooled = tl.maximum(pooled, v, propagate_nan=tl.PropagateNan.ALL)
                if (cell // SPAN < STRIDE) & (cell % SPAN < STRIDE):
                    if HAS_BIAS:
                        v = (v + shift[None, :]).to(x.dtype.element_ty).to(tl.float32)
                    if KEY_AFTER:
                        v = _activate(v, ACTIVATION)
                    if HAS_BIAS or (KEY_AFTER and ACTIVATION > 0):  # which changed the -inf of the padding
                        v = tl.where(m, v, -float("inf"))
                    step = tl.where(v > best, i * (SPAN * SPAN) + cell, step)
                    best = tl.maximum(best, v, propagate_nan=tl.PropagateNan.ALL)
            if HAS_BIAS:
                pooled = (pooled + shift[None, :]).to(x.dtype.element_ty).to(tl.float32)
            pooled = _activate(pooled, ACTIVATION)
            if WINDOW * STRIDE > 1:
                pooled += 0.0  # makes -0.0 into +0.0
            m_y = ((o_h < OH) & (o_w < OW))[:, None] & m_c[None, :]
            tl.store(p_y + (o_h * OW + o_w).to(tl.int64)[:, None] * C, pooled.to(y.dtype.element_ty), mask=m_y)
        cell = step % (SPAN * SPAN)
        h = (step // (SPAN * SPAN) * BH + (lane // BW)[:, None]) * STRIDE - PADDING + cell // SPAN
        position = h * W + (o_w * STRIDE - PADDING)[:, None] + cell % SPAN
        lanes = pack_block(best, tl.where(step < 0, 0, position))  # step < 0: only -inf, see spatial_argmax
        found = tl.maximum(found, tl.max(lanes, axis=0))
    if SPLITS == 1:
        tl.store(keys + i_n * C + o_c, found, mask=m_c)
    else:
        tl.atomic_max(keys + i_n * C + o_c, found, mask=m_c, sem="relaxed")


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
    keys: Tensor,
    y: Tensor,
) -> Launch | None:
    """The launch that fills `keys` and `y`; None where there is no kernel for x."""
    N, C, H, W = x.shape
    if memory_format(x) != torch.channels_last or not x.numel() or H * W > 2**28:
        return None  # positions, those of the padding included, are int32
    OH, OW = y.shape[2:]
    if not pool:
        H, W, OH, OW = H * W, 1, OH * OW, 1
    window, stride, padding = pool or (1, 1, 0)
    BC = min(64, next_power_of_2(C))
    lanes = 2048 // BC
    columns = -(-(W + padding) // stride)  # outputs a row, including those beyond the map's last
    widest = min(32, lanes, next_power_of_2(columns))
    widths = (w for w in (32, 16, 8) if w <= widest)  # the one whose last tile wastes the fewest columns
    BW = min(widths, key=lambda w: -(-columns // w) * w, default=widest)
    BH = lanes // BW
    programs = N * -(-C // BC)
    vector = 16 // x.element_size() if x.data_ptr() % 16 == y.data_ptr() % 16 == 0 else 1
    options: dict[str, Any] = {
        "ALIGN": gcd(C, vector), "HAS_BIAS": bias is not None, "ACTIVATION": ACTIVATIONS[activation],
        "KEY_AFTER": key_after, "WINDOW": window, "STRIDE": stride, "PADDING": padding,
        "SPLITS": splits_for(programs, -(-(H + padding) // stride // BH)), "BH": BH, "BW": BW, "BC": BC,
        "num_warps": 4, "num_stages": 1,
    }  # fmt: skip
    args = (x, x if bias is None else bias, keys, y, H, W, C // options["ALIGN"], OH, OW)
    return Launch(_epilogue_kernel, (programs * options["SPLITS"],), args, options)


@torch.library.custom_op("unitvis::epilogue", mutates_args=())
def _epilogue(
    x: Tensor, bias: Tensor | None, activation: str | None, pool: Sequence[int], key_after: bool
) -> tuple[Tensor, Tensor]:
    return cpu.epilogue(x, bias, activation, pool, key_after)


@_epilogue.register_fake
def _(
    x: Tensor, bias: Tensor | None, activation: str | None, pool: Sequence[int], key_after: bool
) -> tuple[Tensor, Tensor]:
    return outputs(x, pool)


def outputs(x: Tensor, pool: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(keys, y) to be filled."""
    keys = x.new_empty(x.shape[:2], dtype=torch.int64)
    y = torch.empty(out_shape(x, pool), dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    return keys, y


def launch(
    x: Tensor,
    bias: Tensor | None,
    activation: str | None,
    pool: Sequence[int],
    key_after: bool,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(keys, y) by the kernel, into `out` if given; by `cpu.epilogue` where there is no kernel."""
    keys, y = outputs(x, pool) if out is None else out
    planned = plan(x, bias, activation, pool, key_after, keys, y)
    if planned is None:
        return cpu.epilogue(x, bias, activation, pool, key_after)
    if planned.options["SPLITS"] > 1:
        keys.fill_(BLANK)
    planned.run()
    return keys, y


if HAS_TRITON:
    _epilogue.register_kernel("cuda")(launch)


def epilogue(
    x: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    pool: tuple[int, int] | tuple[int, int, int] | None = None,
    *,
    key_after: bool = False,
) -> tuple[Tensor, Tensor]:
    """(keys int64 [N, C], y [N, C, OH, OW]) of a convolution's raw output x [N, C, H, W], in x's dtype and layout.

    v = x + bias[c], summed in float32 and rounded to x's dtype; keys are those of v as it would have been stored, or
    with `key_after` those of the activated v; y = max_pool(activation(v)), a new tensor. `activation` is None, "relu"
    or "relu6" (their zero is +0.0; NaN stays); `pool` is (window, stride) or (window, stride, padding), rounded down,
    NaN winning, its zero +0.0. On a GPU channels_last takes one pass; another layout runs in PyTorch, in several
    passes. Raises ValueError for anything else.
    """
    require_tensors("epilogue", x=x, bias=bias)
    if x.ndim != 4 or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"epilogue takes float32, float16 or bfloat16 [N, C, H, W], not {x.dtype} {tuple(x.shape)}")
    if not 0 < x.shape[2] * x.shape[3] <= POSITION_MASK:
        raise ValueError(f"epilogue needs 1 to 2^31 - 1 positions, not {x.shape[2]} x {x.shape[3]}")
    if bias is not None and (bias.shape != x.shape[1:2] or not bias.dtype.is_floating_point):
        raise ValueError(f"bias must be one float a channel [{x.shape[1]}], not {bias.dtype} {tuple(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None, 'relu' or 'relu6', not {activation!r}")
    window, stride, padding = pool = (*pool, 0)[:3] if pool else (1, 1, 0)
    if min(window, stride) < 1 or not 0 <= 2 * padding <= window or min(out_shape(x, pool)[2:]) < 1:
        raise ValueError(f"pool (window, stride, padding) = {pool} does not fit a map {tuple(x.shape[2:])}")
    return _epilogue(x, bias, activation, pool if pool != (1, 1, 0) else (), key_after)
