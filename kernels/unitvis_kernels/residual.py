"""residual: bias, key, sum with a shortcut, activation and store in one pass over a convolution's output.

The kernel does the same without a shortcut, for `epilogue`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor

from unitvis_kernels import cpu
from unitvis_kernels._triton import HAS_TRITON, Launch, jit, next_power_of_2, tl
from unitvis_kernels.arguments import check_floor, require_tensors
from unitvis_kernels.keys import POSITION_MASK, TL_POSITION_MASK, new_keys, order_block, pack_block, value_block
from unitvis_kernels.layout import memory_format
from unitvis_kernels.spatial_argmax import splits_for

ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2}

# Both kernels keep the largest value alone while they go over the map. Its position is looked for afterwards, by
# reading again, and only if a channel of the program reaches its floor. A pixel beyond the map's edge reads the one on
# the edge again: maxima do not mind, neither those of keys nor those of a window, which holds that pixel too. Adding a
# bias, rounding and the activations keep the order of values, so a maximum is rounded and activated once, at the end.


@jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION > 0:
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)  # of -0.0 and +0.0 the latter
    if ACTIVATION == 2:
        x = tl.minimum(x, 6.0, propagate_nan=tl.PropagateNan.ALL)
    return x


@jit
def larger(best, v):
    return tl.maximum(best, v, propagate_nan=tl.PropagateNan.ALL)


@jit
def stored(v, dtype: tl.constexpr):
    """float32 values as they are when they have been stored."""
    return v.to(dtype).to(tl.float32)


@jit
def largest_of(best, dtype: tl.constexpr, ACTIVATION: tl.constexpr):
    """[BC]: the largest of float32 [lanes, BC], rounded and activated; NaN if there is one."""
    return activate(stored(value_block(tl.max(order_block(best), axis=0)), dtype), ACTIVATION)


@jit
def reaches(largest, p_floor, m_c, HAS_FLOOR: tl.constexpr):
    """Whether the position of any channel's largest value is wanted; a NaN has none."""
    wanted = m_c & (largest == largest)
    if HAS_FLOOR:
        floor = tl.load(p_floor, mask=m_c, other=float("inf"))
        wanted = wanted & ((largest >= floor) | (floor != floor))
    return tl.max(wanted.to(tl.int32), axis=0) > 0


@jit
def store_keys(p_keys, largest, place, m_c, SHARED: tl.constexpr):
    keys = pack_block(largest, tl.min(place, axis=0))
    if SHARED:
        tl.atomic_max(p_keys, keys, mask=m_c, sem="relaxed")  # the result is the same in any order
    else:
        tl.store(p_keys, keys, mask=m_c)


@jit
def load(p_x, o, m_c, shift, HAS_BIAS: tl.constexpr):
    v = tl.load(p_x + o, mask=m_c[None, :], other=0.0).to(tl.float32)
    if HAS_BIAS:
        v += shift[None, :]
    return v


@jit
def load_bias(bias, o_c, m_c, HAS_BIAS: tl.constexpr):
    shift = tl.zeros_like(o_c).to(tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    return shift


# A pixel's four values, by which keys, floors and VALUE are in this order: v = x + bias, s = shortcut + shortcut_bias,
# both as they would be stored, u = v + s and y = activation(u). Without a shortcut u is v.


@jit
def _sum(v, p_s, o, m_c, shift_s, dtype: tl.constexpr, HAS_SHORTCUT: tl.constexpr, HAS_SHORTCUT_BIAS: tl.constexpr):
    """(s, u) of v; both v where there is no shortcut."""
    s, u = v, v
    if HAS_SHORTCUT:
        s = load(p_s, o, m_c, shift_s, HAS_SHORTCUT_BIAS)
        if HAS_SHORTCUT_BIAS:
            s = stored(s, dtype)
        u = v + s
    return s, u


@jit
def _pixels_place(
    largest,
    p_x,
    p_s,
    offset,
    P,
    C,
    m_c,
    shift,
    shift_s,
    first,
    last,
    HAS_SHORTCUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHORTCUT_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    VALUE: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """int32 [BP, BC]: each lane's lowest pixel whose value is the largest, else 2^31 - 1."""
    dtype: tl.constexpr = p_x.dtype.element_ty
    place = tl.full([BP, BC], TL_POSITION_MASK, tl.int32)
    for i in range(first, last):
        pixel = tl.minimum(i * BP + tl.arange(0, BP), P - 1)[:, None]
        o = pixel.to(tl.int64) * C + offset[None, :]
        v = tl.zeros([BP, BC], tl.float32)
        if VALUE != 1:
            v = stored(load(p_x, o, m_c, shift, HAS_BIAS), dtype)
        if VALUE > 0:
            s, u = _sum(v, p_s, o, m_c, shift_s, dtype, HAS_SHORTCUT, HAS_SHORTCUT_BIAS)
            v = s if VALUE == 1 else stored(u, dtype)
        if VALUE == 3:
            v = activate(v, ACTIVATION)
        place = tl.minimum(place, tl.where(v == largest[None, :], pixel, TL_POSITION_MASK))
    return place


@jit
def _store_pixel_keys(
    p_keys,
    p_floor,
    best,
    p_x,
    p_s,
    offset,
    P,
    C,
    m_c,
    shift,
    shift_s,
    first,
    last,
    HAS_SHORTCUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHORTCUT_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    SPLITS: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """The keys of one of the four values, see `_pixels_place`; positions are looked for where it reaches the floor."""
    largest = largest_of(best, p_x.dtype.element_ty, ACTIVATION if VALUE == 3 else 0)
    place = tl.full([BP, BC], TL_POSITION_MASK, tl.int32)
    if reaches(largest, p_floor, m_c, KEY == 2):
        place = _pixels_place(
            largest, p_x, p_s, offset, P, C, m_c, shift, shift_s, first, last,
            HAS_SHORTCUT, HAS_BIAS, HAS_SHORTCUT_BIAS, ACTIVATION, VALUE, BP, BC,
        )  # fmt: skip
    store_keys(p_keys, largest, place, m_c, SPLITS > 1)


@jit
def _pixels_kernel(
    x,  # [N, P, C], float32 | float16 | bfloat16, contiguous
    shortcut,  # as x; any pointer without HAS_SHORTCUT
    bias,  # [C], float32 | float16 | bfloat16; any pointer without HAS_BIAS
    shortcut_bias,  # likewise
    y,  # as x
    keys_v,  # [N, C], int64, rows keys_n apart; hold BLANK where SPLITS > 1; any pointer where KEY_V is 0
    keys_s,
    keys_u,
    keys_y,
    floor_v,  # [C], float32; any pointer unless KEY_V is 2
    floor_s,
    floor_u,
    floor_y,
    P,
    vectors,  # C // ALIGN, so that the compiler knows that ALIGN divides C
    keys_n,
    ALIGN: tl.constexpr,
    HAS_SHORTCUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHORTCUT_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEY_V: tl.constexpr,  # 0: no keys; 1: keys; 2: keys with a floor
    KEY_S: tl.constexpr,
    KEY_U: tl.constexpr,
    KEY_Y: tl.constexpr,
    SPLITS: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    dtype: tl.constexpr = x.dtype.element_ty
    C = vectors * ALIGN
    blocks = tl.cdiv(C, BC)
    i_s, i_c = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS % blocks
    i_n = (tl.program_id(0) // SPLITS // blocks).to(tl.int64)
    o_c = i_c * BC + tl.arange(0, BC)  # [BC]
    m_c = o_c < C
    p_x, p_s, p_y = x + i_n * P * C, shortcut + i_n * P * C, y + i_n * P * C
    shift, shift_s = load_bias(bias, o_c, m_c, HAS_BIAS), load_bias(shortcut_bias, o_c, m_c, HAS_SHORTCUT_BIAS)

    steps = tl.cdiv(P, BP)
    share = tl.cdiv(steps, SPLITS)
    first, last = i_s * share, tl.minimum(i_s * share + share, steps)
    best_v = tl.full([BP, BC], -float("inf"), tl.float32)
    best_s, best_u = best_v, best_v
    for i in range(first, last):
        lane = i * BP + tl.arange(0, BP)
        o = tl.minimum(lane, P - 1).to(tl.int64)[:, None] * C + o_c[None, :]
        v = load(p_x, o, m_c, shift, HAS_BIAS)
        if HAS_SHORTCUT and HAS_BIAS:
            v = stored(v, dtype)
        s, u = _sum(v, p_s, o, m_c, shift_s, dtype, HAS_SHORTCUT, HAS_SHORTCUT_BIAS)
        if KEY_V:
            best_v = larger(best_v, v)
        if KEY_S:
            best_s = larger(best_s, s)
        if KEY_U or KEY_Y:
            best_u = larger(best_u, u)
        tl.store(p_y + o, activate(u, ACTIVATION).to(dtype), mask=(lane < P)[:, None] & m_c[None, :])

    p_keys = i_n * keys_n + o_c
    if KEY_V:
        _store_pixel_keys(
            keys_v + p_keys, floor_v + o_c, best_v, p_x, p_s, o_c, P, C, m_c, shift, shift_s, first, last,
            HAS_SHORTCUT, HAS_BIAS, HAS_SHORTCUT_BIAS, ACTIVATION, KEY_V, 0, SPLITS, BP, BC,
        )  # fmt: skip
    if KEY_S:
        _store_pixel_keys(
            keys_s + p_keys, floor_s + o_c, best_s, p_x, p_s, o_c, P, C, m_c, shift, shift_s, first, last,
            HAS_SHORTCUT, HAS_BIAS, HAS_SHORTCUT_BIAS, ACTIVATION, KEY_S, 1, SPLITS, BP, BC,
        )  # fmt: skip
    if KEY_U:
        _store_pixel_keys(
            keys_u + p_keys, floor_u + o_c, best_u, p_x, p_s, o_c, P, C, m_c, shift, shift_s, first, last,
            HAS_SHORTCUT, HAS_BIAS, HAS_SHORTCUT_BIAS, ACTIVATION, KEY_U, 2, SPLITS, BP, BC,
        )  # fmt: skip
    if KEY_Y:
        _store_pixel_keys(
            keys_y + p_keys, floor_y + o_c, best_u, p_x, p_s, o_c, P, C, m_c, shift, shift_s, first, last,
            HAS_SHORTCUT, HAS_BIAS, HAS_SHORTCUT_BIAS, ACTIVATION, KEY_Y, 3, SPLITS, BP, BC,
        )  # fmt: skip


def has_kernel(x: Tensor) -> bool:
    return memory_format(x) == torch.channels_last and x.numel() > 0 and x.shape[2] * x.shape[3] <= 2**28


def align(C: int, *maps: Tensor) -> int:
    """The number of elements, a power of 2, that divides C and at whose multiples all pixels begin."""
    aligned = all(one.data_ptr() % 16 == 0 for one in maps)
    return gcd(C, 16 // maps[0].element_size() if aligned else 1)


def plan_pixels(
    x: Tensor,
    shortcut: Tensor | None,
    bias: Tensor | None,
    shortcut_bias: Tensor | None,
    activation: str | None,
    keys: Sequence[Tensor | None],
    floors: Sequence[Tensor | None],
    y: Tensor,
) -> Launch | None:
    """The launch that fills `keys` (of v, s, u and y) and `y`; None where there is no kernel for x and the shortcut."""
    rows = {one.stride(0) for one in keys if one is not None}
    if not has_kernel(x) or len(rows) > 1 or any(one is not None and one.stride(1) != 1 for one in keys):
        return None
    if shortcut is not None and not shortcut.is_contiguous(memory_format=torch.channels_last):
        return None
    N, C, H, W = x.shape
    P = H * W
    BC = min(64, next_power_of_2(C))
    lanes = 4096 if P >= 512 else 2048
    BP = lanes // BC
    programs = N * -(-C // BC)
    maps = [x, y] if shortcut is None else [x, y, shortcut]
    options: dict[str, Any] = {
        "ALIGN": align(C, *maps), "HAS_SHORTCUT": shortcut is not None, "HAS_BIAS": bias is not None,
        "HAS_SHORTCUT_BIAS": shortcut_bias is not None, "ACTIVATION": ACTIVATIONS[activation],
        **{
            f"KEY_{name}": 0 if key is None else 1 if floor is None else 2
            for name, key, floor in zip("VSUY", keys, floors, strict=True)
        },
        "SPLITS": splits_for(programs, -(-P // BP)), "BP": BP, "BC": BC,
        "num_warps": lanes // 512, "num_stages": 1,
    }  # fmt: skip
    args = (shortcut, bias, shortcut_bias, y, *keys, *floors)
    pointers = (x, *(x if one is None else one for one in args))
    sizes = (P, C // options["ALIGN"], next(iter(rows), 0))
    return Launch(_pixels_kernel, (programs * options["SPLITS"],), pointers + sizes, options)


def _new_map(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


@torch.library.custom_op("unitvis::residual", mutates_args=("keys_v", "keys_s", "keys_u", "keys_y"))
def _residual(
    x: Tensor,
    shortcut: Tensor,
    bias: Tensor | None,
    shortcut_bias: Tensor | None,
    activation: str | None,
    floors: Sequence[Tensor | None],
    keys_v: Tensor | None,
    keys_s: Tensor | None,
    keys_u: Tensor | None,
    keys_y: Tensor | None,
) -> Tensor:
    keys = keys_v, keys_s, keys_u, keys_y
    return cpu.residual(x, shortcut, bias, shortcut_bias, activation, keys, floors)


@_residual.register_fake
def _(
    x: Tensor,
    shortcut: Tensor,
    bias: Tensor | None,
    shortcut_bias: Tensor | None,
    activation: str | None,
    floors: Sequence[Tensor | None],
    keys_v: Tensor | None,
    keys_s: Tensor | None,
    keys_u: Tensor | None,
    keys_y: Tensor | None,
) -> Tensor:
    return _new_map(x)


def launch(
    x: Tensor,
    shortcut: Tensor,
    bias: Tensor | None,
    shortcut_bias: Tensor | None,
    activation: str | None,
    floors: Sequence[Tensor | None],
    *keys: Tensor | None,
    y: Tensor | None = None,
) -> Tensor:
    """Fill `keys` and y, a new map if None, by the kernel, and return y; by `cpu.residual` where there is no kernel."""
    y = _new_map(x) if y is None else y
    planned = plan_pixels(x, shortcut, bias, shortcut_bias, activation, keys, floors, y)
    if planned is None:
        return cpu.residual(x, shortcut, bias, shortcut_bias, activation, keys, floors)
    planned.run()
    return y


if HAS_TRITON:
    _residual.register_kernel("cuda")(launch)


def residual(
    x: Tensor,
    shortcut: Tensor,
    bias: Tensor | None = None,
    shortcut_bias: Tensor | None = None,
    activation: str | None = None,
    *,
    keys: Sequence[Tensor | None] = (None, None, None, None),
    floors: Sequence[Tensor | None] = (None, None, None, None),
) -> Tensor:
    """activation(v + s), in x's dtype and layout, with v = x + bias[c] and s = shortcut + shortcut_bias[c].

    x is a convolution's raw output [N, C, H, W]; the shortcut, of the same shape and dtype, may be another's. Each sum
    is taken in float32 and rounded to x's dtype. `keys`, int64 [N, C] that hold `BLANK`, or None where none are wanted,
    are filled with those of v, of s, of v + s and of the result. `floors`: one for each, see `epilogue`. On a GPU
    channels_last takes one pass, another layout several. Raises ValueError for anything else.
    """
    require_tensors("residual", x=x, shortcut=shortcut, bias=bias, shortcut_bias=shortcut_bias)
    check_map("residual", x, activation, bias=bias, shortcut_bias=shortcut_bias)
    if shortcut.shape != x.shape or shortcut.dtype != x.dtype:
        raise ValueError(f"shortcut must be {x.dtype} {tuple(x.shape)}, not {shortcut.dtype} {tuple(shortcut.shape)}")
    if not len(keys) == len(floors) == 4:
        raise ValueError(f"residual takes four keys and four floors, not {len(keys)} and {len(floors)}")
    for one, floor in zip(keys, floors, strict=True):
        require_tensors("residual", keys=one, floors=floor)
        check_floor(x, floor)
        if one is not None:
            new_keys(x, x.shape[1], one)
    return _residual(x, shortcut, bias, shortcut_bias, activation, floors, *keys)


def check_map(operator: str, x: Tensor, activation: str | None, **biases: Tensor | None) -> None:
    if x.ndim != 4 or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{operator} takes float32, float16 or bfloat16 [N, C, H, W], not {x.dtype} {tuple(x.shape)}")
    if not 0 < x.shape[2] * x.shape[3] <= POSITION_MASK:
        raise ValueError(f"{operator} needs 1 to 2^31 - 1 positions, not {x.shape[2]} x {x.shape[3]}")
    for name, bias in biases.items():
        if bias is not None and (bias.shape != x.shape[1:2] or not bias.dtype.is_floating_point):
            raise ValueError(f"{name} must be one float a channel [{x.shape[1]}], not {bias.dtype} {tuple(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None, 'relu' or 'relu6', not {activation!r}")
