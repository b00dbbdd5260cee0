"""conv_argmax: a convolution with the argmax of its channels, as an implicit matrix product on the tensor cores."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unitvis_kernels import reference
from unitvis_kernels._triton import HAS_TRITON, Launch, jit, next_power_of_2, tl
from unitvis_kernels.epilogue import ACTIVATIONS, _activate
from unitvis_kernels.keys import BLANK, POSITION_MASK, pack_block

# The product is [pixels of one image, C * KH * KW] x [C * KH * KW, channels of one group]; both operands are read along
# the input channels, where channels_last keeps them together. A lane beyond the last pixel or channel reads the last
# one again instead of being masked, so only a padded border or a ragged end of the depth masks a load. A rounded value
# leaves at least 13 of its float32's low bits zero: the pixel's number in the tile goes there, and the argmax over the
# tile is one maximum over int32.


@jit
def _taps(o, size, K: tl.constexpr, DILATION: tl.constexpr):
    """Bit i: does o + i * DILATION lie in 0 .. size - 1, for i below K."""
    first = tl.minimum((tl.maximum(-o, 0) + (DILATION - 1)) // DILATION, K)
    stop = tl.minimum((tl.maximum(size - o, 0) + (DILATION - 1)) // DILATION, K)
    return (1 << stop) - (1 << first)


@jit
def _conv_argmax_kernel(
    x,  # [N, H, W, G * C], float16 | bfloat16, contiguous
    weight,  # [G * D, KH, KW, C], as x
    bias,  # [G * D], float32 | float16 | bfloat16; any pointer without HAS_BIAS
    keys,  # [N, G * D], int64; holds BLANK where SPLIT
    y,  # [N, P, G * D], as x; any pointer without STORE
    H,
    W,
    OW,
    P,  # OH * OW
    G: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEY_AFTER: tl.constexpr,
    STORE: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    K: tl.constexpr = KH * KW * C
    LOW: tl.constexpr = BM - 1
    blocks = tl.cdiv(D, BN)  # neighbouring programs read the same pixels
    i_d, i_g = tl.program_id(0) % blocks, tl.program_id(0) // blocks % G
    i_m = tl.program_id(0) // (blocks * G) % tl.cdiv(P, BM)
    i_n = (tl.program_id(0) // (blocks * G) // tl.cdiv(P, BM)).to(tl.int64)

    lane = tl.arange(0, BM)
    o_p = tl.minimum(i_m * BM + lane, P - 1)  # [BM]
    o_h, o_w = o_p // OW * SH - PH, o_p % OW * SW - PW
    o_x = (o_h * W + o_w)[:, None] * (G * C)  # [BM, 1]
    inside = (_taps(o_h, H, KH, DH) | (_taps(o_w, W, KW, DW) << KH))[:, None]
    o_d = i_g * D + tl.minimum(i_d * BN + tl.arange(0, BN), D - 1)  # [BN]
    p_x = x + i_n * H * W * (G * C) + i_g * C
    p_weight = weight + o_d[None, :] * K  # [1, BN]
    acc = tl.zeros([BM, BN], tl.float32)
    for i in range(tl.cdiv(K, BK)):
        k = i * BK + tl.arange(0, BK)  # [BK]
        if C % BK == 0:  # one tap a step
            tap, o_c = tl.full([BK], i // (C // BK), tl.int32), i % (C // BK) * BK + tl.arange(0, BK)
        else:
            tap, o_c = k // C, k % C
        row, column = tap // KW, tap % KW
        p_a = p_x + (o_x + ((row * DH * W + column * DW) * (G * C) + o_c)[None, :])  # [BM, BK]
        if PH + PW > 0:
            reach = (1 << row) | (1 << (KH + column))
            if K % BK > 0:
                reach = tl.where(k < K, reach, -1)  # never inside
            a = tl.load(p_a, mask=(inside & reach[None, :]) == reach[None, :], other=0.0)
        elif K % BK > 0:
            a = tl.load(p_a, mask=(k < K)[None, :], other=0.0)
        else:
            a = tl.load(p_a)
        if K % BK > 0:
            b = tl.load(p_weight + k[:, None], mask=(k < K)[:, None], other=0.0)  # [BK, BN]
        else:
            b = tl.load(p_weight + k[:, None])
        acc = tl.dot(a, b, acc)

    if HAS_BIAS:
        acc += tl.load(bias + o_d).to(tl.float32)[None, :]
    v = acc.to(x.dtype.element_ty).to(tl.float32)
    z = _activate(v, ACTIVATION)
    m_p, m_d = i_m * BM + lane < P, i_d * BN + tl.arange(0, BN) < D
    if STORE:
        o_y = (i_m * BM + lane)[:, None] * (G * D) + (i_g * D + i_d * BN + tl.arange(0, BN))[None, :]
        p_y = y + i_n * P * (G * D) + o_y
        tl.store(p_y, z.to(x.dtype.element_ty), mask=m_p[:, None] & m_d[None, :])
    if KEY_AFTER:
        v = z
    bits = (v + 0.0).to(tl.int32, bitcast=True)
    rank = (bits ^ ((bits >> 31) & (0x7FFFFFFF - LOW))) | (LOW - lane)[:, None]
    rank = tl.where(v != v, 0x7FFFFFFF, rank)
    best = tl.max(tl.where(m_p[:, None], rank, -0x80000000), axis=0)  # [BN]
    bits = (best | LOW) - LOW
    bits = bits ^ ((bits >> 31) & (0x7FFFFFFF - LOW))
    found = pack_block(bits.to(tl.float32, bitcast=True), i_m * BM + LOW - (best & LOW))
    p_keys = keys + i_n * (G * D) + o_d
    if SPLIT:
        tl.atomic_max(p_keys, found, mask=m_d, sem="relaxed")
    else:
        tl.store(p_keys, found, mask=m_d)


def tile(P: int, D: int, K: int) -> dict[str, int]:
    """The tile for maps of P pixels, D channels a group and depth K: the least work, counting what is cut off."""

    def least(size: int, penalty: dict[int, float], smallest: int) -> int:
        blocks = {b: cost for b, cost in penalty.items() if b <= max(smallest, next_power_of_2(size))}
        return min(blocks, key=lambda b: -(-size // b) * b * blocks[b])

    BM = least(P, {128: 1.0, 64: 1.15}, 64)
    BN = least(D, {128: 1.0, 64: 1.15, 32: 1.6, 16: 2.5}, 16)
    BK = least(K, {64: 1.0, 32: 1.1, 16: 1.3}, 16)
    return {"BM": BM, "BN": BN, "BK": BK, "num_warps": 8 if BM * BN == 128 * 128 else 4, "num_stages": 3}


def whole_vectors(x: Tensor, weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """x and weight as the kernel reads them: the weight channels_last, input channels in vectors of at least 8 bytes."""
    missing = -x.shape[1] % 4 if groups == 1 else 0
    if missing:
        x, weight = F.pad(x, (0, 0, 0, 0, 0, missing)), F.pad(weight, (0, 0, 0, 0, 0, missing))
    return x, weight.contiguous(memory_format=torch.channels_last)


def out_size(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Any:
    """(OH, OW) of the convolution; below 1 where the kernel does not fit."""
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes)


def plan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    store: bool,
    key_after: bool,
    keys: Tensor,
    y: Tensor,
) -> Launch | None:
    """The launch that fills `keys` and `y` from what `whole_vectors` gives; None for what has no kernel."""
    N, C, H, W = x.shape
    D, _, KH, KW = weight.shape
    OH, OW = out_size(x, weight, stride, padding, dilation)
    P = OH * OW
    if x.dtype == torch.float32 or not x.is_contiguous(memory_format=torch.channels_last) or not x.numel():
        return None
    if max((H + 2 * padding[0]) * (W + 2 * padding[1]) * C, P * D, weight.numel()) >= 2**31:
        return None  # offsets inside an image are int32
    options: dict[str, Any] = {
        "G": groups, "C": C // groups, "D": D // groups, "KH": KH, "KW": KW, "SH": stride[0], "SW": stride[1],
        "PH": padding[0], "PW": padding[1], "DH": dilation[0], "DW": dilation[1], "HAS_BIAS": bias is not None,
        "ACTIVATION": ACTIVATIONS[activation], "KEY_AFTER": key_after, "STORE": store,
        **tile(P, D // groups, KH * KW * C // groups),
    }  # fmt: skip
    options["SPLIT"] = P > options["BM"]
    programs = N * -(-P // options["BM"]) * groups * -(-options["D"] // options["BN"])
    args = (x, weight, x if bias is None else bias, keys, y if store else x, H, W, OW, P)
    return Launch(_conv_argmax_kernel, (programs,), args, options)


@torch.library.custom_op("unitvis::conv_argmax", mutates_args=())
def _conv_argmax(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    store: bool,
    key_after: bool,
) -> tuple[Tensor, Tensor]:
    """As `conv_argmax`; without `store` an empty tensor stands for y, because an operator returns no optional one."""
    return reference.conv_argmax(
        x, weight, bias, list(stride), list(padding), list(dilation), groups, activation, store, key_after
    )


@_conv_argmax.register_fake
def outputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    store: bool,
    key_after: bool,
) -> tuple[Tensor, Tensor]:
    N, D = x.shape[0], weight.shape[0]
    keys = x.new_empty((N, D), dtype=torch.int64)
    if not store:
        return keys, x.new_empty(0)
    shape = (N, D, *out_size(x, weight, stride, padding, dilation))
    return keys, torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
