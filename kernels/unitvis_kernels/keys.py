"""Keys: one int64 for a value and the position where it was found, such that the largest key is the argmax.

     63                     32  31  30                     0
    +-------------------------+----+------------------------+
    |    ordered32(value)     |  0 | 0x7fffffff - position  |
    +-------------------------+----+------------------------+
              high word                    low word

    ordered32(value)  the float32's bits as an int32 that sorts as the float does: from +0.0 on the bits as they are,
                      below with all but the sign inverted; -0.0 is taken for +0.0
    position          row * W + column, 0 to 2^31 - 1; of equal values the lower position has the larger key

                high word   low word
    NAN_KEY    0x7fffffff  0x7fffffff   any NaN, at position 0; above the key of +inf
    +inf       0x7f800000
    +0.0       0x00000000
    -inf       0x807fffff
    BLANK      0x80000000  0x00000000   no response; below the key of -inf

Within one image keys can be compared in any order. Across images compare the high words only: the low word is a
position and says nothing about which image comes first.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
from torch import Tensor

from unitvis_kernels._triton import constexpr, jit, tl
from unitvis_kernels.arguments import require_tensors

POSITION_MASK = 2**31 - 1
BLANK = -(2**63)
NAN_KEY = (POSITION_MASK << 32) | POSITION_MASK
INF_KEY = (0x7F800000 << 32) | POSITION_MASK  # of +inf, at position 0
MINUS_INF_HIGH = 0x807FFFFF - 2**32  # as an int32

# The same for kernels, which read a global only if it is a constexpr.
TL_POSITION_MASK = constexpr(POSITION_MASK)
TL_BLANK = constexpr(BLANK)
TL_BLANK_HIGH = constexpr(BLANK >> 32)
TL_NAN_KEY = constexpr(NAN_KEY)
TL_NAN_HIGH = constexpr(NAN_KEY >> 32)


def pack(values: Tensor, positions: Tensor) -> Tensor:
    """Keys, int64, of float values and int64 positions in 0 .. 2^31 - 1. -0.0 packs as +0.0; every NaN as `NAN_KEY`."""
    require_tensors("pack", values=values, positions=positions)
    bits = (values.float() + 0.0).view(torch.int32)  # + 0.0 makes -0.0 into +0.0
    ordered = bits ^ ((bits >> 31) & POSITION_MASK)
    keys = (ordered.long() << 32) | (POSITION_MASK - positions)
    return torch.where(values.isnan(), NAN_KEY, keys)


def unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """(values float32, positions int64) of keys int64; NaN and -1 for a blank."""
    require_tensors("unpack", keys=keys)
    ordered = (keys >> 32).int()
    values = (ordered ^ ((ordered >> 31) & POSITION_MASK)).view(torch.float32)
    positions = POSITION_MASK - (keys & POSITION_MASK)
    blank = keys == BLANK
    return values.masked_fill(blank | (keys == NAN_KEY), torch.nan), positions.masked_fill(blank, -1)


def new_keys(x: Tensor, channels: int, out: Tensor | None) -> Tensor:
    """`out`, or new keys of the maps x that hold `BLANK`; ValueError unless `out` is int64 [N, channels] beside x."""
    if out is None:
        return x.new_full((x.shape[0], channels), BLANK, dtype=torch.int64)
    if out.shape != (x.shape[0], channels) or out.dtype != torch.int64 or out.device != x.device:
        wanted = f"int64 [{x.shape[0]}, {channels}] on {x.device}"
        raise ValueError(f"keys must be {wanted}, not {out.dtype} {list(out.shape)} on {out.device}")
    return out


@jit
def order_block(values):
    """The high words of float32 values inside a kernel; an int32 maximum of them lets NaN through."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    return tl.where(values != values, TL_NAN_HIGH, bits ^ ((bits >> 31) & TL_POSITION_MASK))


@jit
def value_block(high):
    """The float32 values of high words inside a kernel."""
    return (high ^ ((high >> 31) & TL_POSITION_MASK)).to(tl.float32, bitcast=True)


@jit
def pack_block(values, positions):
    """`pack` inside a kernel: int64 keys of float32 values and int32 positions."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & TL_POSITION_MASK)
    keys = (ordered.to(tl.int64) << 32) | (TL_POSITION_MASK - positions).to(tl.int64)
    return tl.where(values != values, TL_NAN_KEY, keys)
