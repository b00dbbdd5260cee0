"""spatial_argmax: the largest response of every channel to every image, and where it is."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor

from unitvis_kernels import cpu
from unitvis_kernels._triton import HAS_TRITON, TARGET_PROGRAMS, Launch, jit, next_power_of_2, tl
from unitvis_kernels.arguments import check_floor, require_tensors
from unitvis_kernels.keys import POSITION_MASK, new_keys, pack_block
from unitvis_kernels.layout import memory_format

# Both kernels keep, in every lane of a tile, the largest value and the step of the loop that brought it; keys are built
# once, after the loop. A lane sees its pixels in ascending order and takes a value only if it is larger, so it has the
# lowest position of its largest value. A lane that saw nothing above -inf gives "-inf at position 0", which is right if
# the whole map is -inf and below the other lanes' keys if not. Masked loads therefore read -inf.


@jit
def _take_larger(best, step, x, i):
    step = tl.where(x > best, i, step)
    return tl.maximum(best, x, propagate_nan=tl.PropagateNan.ALL), step


@jit
def _store_keys(p_keys, keys, m, SPLITS: tl.constexpr):
    if SPLITS == 1:
        tl.store(p_keys, keys, mask=m)
    else:
        tl.atomic_max(p_keys, keys, mask=m, sem="relaxed")  # the result is the same in any order


@jit
def _take_partial(p_x, o, head, L, stop, best, step, i):
    # The mask changes only between vectors, so that loads stay whole; elements of other rows become -inf afterwards.
    x = tl.load(p_x, mask=o < stop, other=-float("inf")).to(tl.float32)
    x = tl.where((o >= head) & (o < head + L), x, -float("inf"))
    return _take_larger(best, step, x, i)


@jit
def _rows_kernel(
    x,  # [R, L], float32 | float16 | bfloat16, contiguous; aligned to VECTOR elements
    keys,  # [N, C], int64, rows keys_n apart; holds BLANK where SPLITS > 1; R = N * C
    R,
    L,
    C,
    keys_n,
    VECTOR: tl.constexpr,
    SPLITS: tl.constexpr,
    BR: tl.constexpr,
    BL: tl.constexpr,
):
    i_r, i_s = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    o_r = i_r.to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    start = tl.minimum(o_r, R - 1) * L
    aligned = start // VECTOR * VECTOR
    head = (start - aligned).to(tl.int32)[:, None]  # elements of the previous row in this row's first vector
    stop = (head + L + VECTOR - 1) // VECTOR * VECTOR
    o_l = tl.arange(0, BL)[None, :]  # [1, BL]
    p_x = x + aligned[:, None] + o_l  # [BR, BL]

    steps = tl.cdiv(L + VECTOR - 1, BL)
    whole = L // BL  # steps 1 to whole - 1 lie inside the row, wherever it starts
    share = tl.cdiv(steps, SPLITS)
    first, last = i_s * share, tl.minimum(i_s * share + share, steps)

    best = tl.full([BR, BL], -float("inf"), tl.float32)
    step = tl.full([BR, BL], -1, tl.int32)
    if first == 0:
        best, step = _take_partial(p_x, o_l, head, L, stop, best, step, 0)
    for i in range(tl.maximum(first, 1), tl.minimum(last, whole)):
        best, step = _take_larger(best, step, tl.load(p_x + i * BL).to(tl.float32), i)
    for i in range(tl.maximum(first, tl.maximum(whole, 1)), last):
        best, step = _take_partial(p_x + i * BL, o_l + i * BL, head, L, stop, best, step, i)

    position = tl.where(step < 0, 0, step * BL + o_l - head)
    p_keys = keys + o_r // C * keys_n + o_r % C
    _store_keys(p_keys, tl.max(pack_block(best, position), axis=1), o_r < R, SPLITS)


@jit
def _place(o, first, width, row, INSIDE: tl.constexpr):
    """Position in the map of the pixel that is number `o` of those that are read."""
    if INSIDE:
        o = first + o // width * row + o % width
    return o


@jit
def _pixels_kernel(
    x,  # [N, P, C], float32 | float16 | bfloat16, contiguous
    keys,  # [N, C], int64, rows keys_n apart; holds BLANK where SPLITS > 1
    P,
    vectors,  # C // ALIGN, so that the compiler knows that ALIGN divides C
    read,  # positions that are read: with INSIDE those of a rectangle, else P
    first,  # with INSIDE the position of the rectangle's first pixel
    width,  # with INSIDE the rectangle's
    row,  # with INSIDE the map's width
    keys_n,
    ALIGN: tl.constexpr,
    INSIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    C = vectors * ALIGN
    blocks = tl.cdiv(C, BC)
    i_s, i_c = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS % blocks
    i_n = (tl.program_id(0) // SPLITS // blocks).to(tl.int64)
    o_c = i_c * BC + tl.arange(0, BC)  # [BC]
    m_c = o_c < C
    o_p = tl.arange(0, BP)[:, None]  # [BP, 1]

    steps = tl.cdiv(read, BP)
    share = tl.cdiv(steps, SPLITS)
    start, stop = i_s * share, tl.minimum(i_s * share + share, steps)
    p_x = x + i_n * P * C + o_c[None, :]  # [1, BC]
    if not INSIDE:
        p_x += (start.to(tl.int64) * BP + o_p) * C  # [BP, BC]

    best = tl.full([BP, BC], -float("inf"), tl.float32)
    step = tl.full([BP, BC], -1, tl.int32)
    for i in range(start, stop):
        m = m_c[None, :] & (o_p + i * BP < read)
        if INSIDE:
            p_v = p_x + _place(i * BP + o_p, first, width, row, INSIDE).to(tl.int64) * C
            v = tl.load(p_v, mask=m, other=-float("inf")).to(tl.float32)
        else:
            v = tl.load(p_x, mask=m, other=-float("inf")).to(tl.float32)
            p_x += BP * C.to(tl.int64)
        best, step = _take_larger(best, step, v, i)

    position = _place(tl.where(step < 0, 0, step * BP + o_p), first, width, row, INSIDE)
    _store_keys(keys + i_n * keys_n + o_c, tl.max(pack_block(best, position), axis=0), m_c, SPLITS)


def splits_for(programs: int, steps: int) -> int:
    """The number of programs that share a reduction of `steps` steps, each with at least 8 of them."""
    return max(1, min(-(-TARGET_PROGRAMS // programs), steps // 8))


def plan(x: Tensor, keys: Tensor, inside: Sequence[int] | None = None) -> Launch | None:
    """The launch that fills `keys`; None where there is no kernel for x."""
    N, C, H, W = x.shape
    P = H * W
    vector = 16 // x.element_size() if x.data_ptr() % 16 == 0 else 1
    options: dict[str, Any] = {"num_warps": 4, "num_stages": 2}
    if not x.numel() or P > 2**30 or keys.stride(1) != 1:  # in-row offsets are int32
        return None
    if memory_format(x) == torch.channels_last or (inside and x.is_contiguous(memory_format=torch.channels_last)):
        top, bottom, left, right = inside or (0, H, 0, W)
        read = (bottom - top) * (right - left)
        align, BC = gcd(C, vector), min(64, next_power_of_2(C))
        BP = 2048 // BC
        programs = N * -(-C // BC)
        options |= {"ALIGN": align, "INSIDE": bool(inside), "SPLITS": splits_for(programs, -(-read // BP))}
        options |= {"BP": BP, "BC": BC}
        args = (x, keys, P, C // align, read, top * W + left, right - left, W, keys.stride(0))
        return Launch(_pixels_kernel, (programs * options["SPLITS"],), args, options)
    if x.is_contiguous() and not inside:
        BL = 256 if P > 1024 else min(64, next_power_of_2(P + vector - 1))
        BR = 2048 // BL
        programs = -(-N * C // BR)
        options |= {"VECTOR": vector, "SPLITS": splits_for(programs, -(-P // BL)), "BR": BR, "BL": BL}
        return Launch(_rows_kernel, (programs * options["SPLITS"],), (x, keys, N * C, P, C, keys.stride(0)), options)
    return None


@torch.library.custom_op("unitvis::spatial_argmax", mutates_args=("keys",))
def _spatial_argmax(x: Tensor, floor: Tensor | None, inside: Sequence[int] | None, keys: Tensor) -> None:
    keys.copy_(cpu.spatial_argmax(x, floor, inside))


@_spatial_argmax.register_fake
def _(x: Tensor, floor: Tensor | None, inside: Sequence[int] | None, keys: Tensor) -> None:
    return None


def launch(x: Tensor, floor: Tensor | None, inside: Sequence[int] | None, keys: Tensor) -> None:
    """Fill the keys by the kernel, where positions cost nothing; by `cpu.spatial_argmax` where there is none."""
    planned = plan(x, keys, inside)
    if planned is None:
        keys.copy_(cpu.spatial_argmax(x, None, inside))
    else:
        planned.run()


if HAS_TRITON:
    _spatial_argmax.register_kernel("cuda")(launch)


def spatial_argmax(
    x: Tensor, floor: Tensor | None = None, inside: Sequence[int] | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Keys, int64 [N, C], of maps [N, C, H, W] in float32, float16 or bfloat16, any strides; see `unpack`.

    Of equal values the lowest flattened position (row * W + column) wins; -0.0 equals +0.0. A map with a NaN gets the
    key `NAN_KEY`. Reads the map once; on a GPU the Triton kernels take contiguous and channels_last maps, other
    strides run in PyTorch. `floor`, float32 [C], saves time on a CPU: where a map's largest value lies below its
    channel's floor, the position may be given as 2^31 - 1 instead of being looked for; a floor of NaN is none.
    `inside`, (top, bottom, left, right): only rows top <= row < bottom and columns left <= column < right are read;
    positions are those in the whole map. `out`: keys to write, in place of new ones; they must hold `BLANK`. Raises
    ValueError for another dtype, rank or an empty map or rectangle.
    """
    require_tensors("spatial_argmax", x=x, floor=floor, out=out)
    if x.ndim != 4:
        raise ValueError(f"spatial_argmax takes maps [N, C, H, W], not a tensor of shape {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"spatial_argmax takes float32, float16 or bfloat16, not {x.dtype}")
    height, width = x.shape[2:]
    if not 0 < height * width <= POSITION_MASK:
        raise ValueError(f"spatial_argmax needs 1 to 2^31 - 1 positions, not {height} x {width}")
    check_floor(x, floor)
    top, bottom, left, right = whole = (0, height, 0, width)
    if inside is not None:
        top, bottom, left, right = inside
        if not (0 <= top < bottom <= height and 0 <= left < right <= width):
            raise ValueError(f"inside {tuple(inside)} is no rectangle of a map of {height} x {width}")
    rectangle = (top, bottom, left, right)
    keys = new_keys(x, x.shape[1], out)
    _spatial_argmax(x, floor, None if rectangle == whole else rectangle, keys)
    return keys
