"""One int64 for a value and where it was found, so that the largest key is the argmax.

    key = ordered32(value) << 32 | (0x7fffffff - position)

`ordered32` reads the float's bits as an integer that sorts as the float does. Within one image the largest key is the
largest value at the lowest flattened position, in whatever order keys are compared. Across images compare the high
words only: the low word is a position and says nothing about who comes first.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
from torch import Tensor

from unitvis_kernels._triton import jit, tl

POSITION_MASK = 0x7FFFFFFF
BLANK = -(2**63)  # no response; below the key of -inf
NAN_KEY = 2**63 - 2**31 - 1  # 0x7fffffff_7fffffff: above the key of +inf, position 0


def pack(values: Tensor, positions: Tensor) -> Tensor:
    """Keys, int64, of float values and int64 positions in 0 .. 2^31 - 1. -0.0 packs as +0.0; every NaN as `NAN_KEY`."""
    bits = (values.float() + 0.0).view(torch.int32)  # + 0.0 makes -0.0 into +0.0
    ordered = bits ^ ((bits >> 31) & POSITION_MASK)
    keys = (ordered.long() << 32) | (POSITION_MASK - positions)
    return torch.where(values.isnan(), NAN_KEY, keys)


def unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """(values float32, positions int64) of keys int64; NaN and -1 for a blank."""
    ordered = (keys >> 32).int()
    values = (ordered ^ ((ordered >> 31) & POSITION_MASK)).view(torch.float32)
    positions = POSITION_MASK - (keys & POSITION_MASK)
    blank = keys == BLANK
    return values.masked_fill(blank | (keys == NAN_KEY), torch.nan), positions.masked_fill(blank, -1)


@jit
def pack_block(values, positions):
    """`pack` inside a kernel: int64 keys of float32 values and int32 positions."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - positions).to(tl.int64)
    return tl.where(values != values, 0x7FFFFFFF7FFFFFFF, keys)
