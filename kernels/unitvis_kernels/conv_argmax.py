"""conv_argmax: a convolution and the argmax of its channels in one pass, as an implicit matrix product.

Inside a tile an int32 rank of value and pixel stands for the int64 key, which needs twice the registers. Rounded to
float16 or bfloat16, a value leaves at least the lowest 13 bits of its float32 zero, and they hold the pixel:

     31   30                      13   12                    0
    +----+--------------------------+-------------------------+
    |sign|        magnitude         |  2 * (BM - 1 - pixel)   |     pixel: its row in the tile, 0 to BM - 1
    +----+--------------------------+-------------------------+

Below 0 the bits of the magnitude and the 13 zeros are inverted before the pixel is added, so that ranks sort as values
do. Inverting is negating and taking 1 away; pixels count in steps of 2, so the 1 changes no order and -0.0 ties with
+0.0. The largest rank is the argmax, of equal values at the lowest pixel.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unitvis_kernels import cpu
from unitvis_kernels._triton import HAS_TRITON, Launch, constexpr, jit, next_power_of_2, tl
from unitvis_kernels.arguments import require_tensors
from unitvis_kernels.geometry import ConvGeometry
from unitvis_kernels.keys import POSITION_MASK, TL_NAN_KEY, TL_POSITION_MASK, new_keys
from unitvis_kernels.residual import ACTIVATIONS, activate

TL_MAGNITUDE_BITS = constexpr(0x7FFFE000)
TL_LARGEST_RANK_OF_INF = constexpr(0x7F801FFF)  # the bits of +inf, 0x7f800000, over the largest pixel field
TL_NAN_RANK = constexpr(0x7FFFE000)

# The product is [pixels of one image, C * KH * KW] x [C * KH * KW, channels of one group]; both operands are read along
# the input channels, where channels_last keeps them together. A lane beyond the last pixel or channel reads the last
# one again instead of being masked, so only a padded border or a ragged end of the depth masks a load; such a pixel has
# the last one's value at a later place and never wins.


@jit
def _taps(o, size, K: tl.constexpr, DILATION: tl.constexpr):
    """Bits i = 0 .. K - 1: 1 where o + i * DILATION lies in 0 .. size - 1."""
    first = tl.minimum((tl.maximum(-o, 0) + (DILATION - 1)) // DILATION, K)
    stop = tl.minimum((tl.maximum(size - o, 0) + (DILATION - 1)) // DILATION, K)
    return (1 << stop) - (1 << first)


@jit
def _conv_argmax_kernel(
    x,  # [N, H, W, G * C], float16 | bfloat16, contiguous
    weight,  # [G * D, KH, KW, C], as x
    bias,  # [G * D], float32 | float16 | bfloat16; any pointer without HAS_BIAS
    keys,  # [N, G * D], int64, rows keys_n apart; holds BLANK where SPLIT
    y,  # [N, P, G * D], as x; any pointer without STORE
    H,
    W,
    OW,
    P,  # OH * OW
    keys_n,
    steps,  # cdiv(K, BK); no constexpr, because a small constant is unrolled, and 9 steps then spill on sm_80
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
    SIGNED_NAN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    K: tl.constexpr = KH * KW * C
    LAST: tl.constexpr = BM - 1  # BM is a power of 2, so this is a mask too
    blocks = tl.cdiv(D, BN)  # neighbouring programs read the same pixels
    i_d, i_g = tl.program_id(0) % blocks, tl.program_id(0) // blocks % G
    i_m = tl.program_id(0) // (blocks * G) % tl.cdiv(P, BM)
    i_n = (tl.program_id(0) // (blocks * G) // tl.cdiv(P, BM)).to(tl.int64)

    lane = tl.arange(0, BM)
    o_p = tl.minimum(i_m * BM + lane, P - 1)  # [BM]
    o_h, o_w = o_p // OW * SH - PH, o_p % OW * SW - PW
    o_x = (o_h * W + o_w)[:, None] * (G * C)  # [BM, 1]
    inside = (_taps(o_h, H, KH, DH) | (_taps(o_w, W, KW, DW) << KH))[:, None]
    o_d = i_d * BN + tl.arange(0, BN)  # [BN]
    m_p, m_d = i_m * BM + lane < P, o_d < D
    p_x = x + i_n * H * W * (G * C) + i_g * C
    p_weight = weight + i_g * D * K + (tl.minimum(o_d, D - 1) * K)[None, :]  # [1, BN]
    acc = tl.zeros([BM, BN], tl.float32)
    for i in range(steps):
        k = i * BK + tl.arange(0, BK)  # [BK]
        if C % BK == 0:  # one tap a step
            tap, o_c = tl.full([BK], i // (C // BK), tl.int32), i % (C // BK) * BK + tl.arange(0, BK)
        else:
            tap, o_c = k // C, k % C
        row = tap // KW
        column = tap - row * KW
        p_a = p_x + (o_x + ((row * DH * W + column * DW) * (G * C) + o_c)[None, :])  # [BM, BK]
        if PH + PW > 0:
            reach = (1 << row) | (1 << (KH + column))
            if K % BK > 0:
                reach = tl.where(k < K, reach, -1)  # all bits, which `inside` never has
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
        acc += tl.load(bias + i_g * D + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    v = acc.to(x.dtype.element_ty).to(tl.float32)
    z = activate(v, ACTIVATION)
    if STORE:
        p_y = y + i_n * P * (G * D) + i_g * D
        p_y += (i_m * BM + lane)[:, None] * (G * D) + o_d[None, :]  # [BM, BN]
        tl.store(p_y, z.to(x.dtype.element_ty), mask=m_p[:, None] & m_d[None, :])
    if KEY_AFTER:
        v = z
    bits = v.to(tl.int32, bitcast=True)
    rank = ((bits & TL_MAGNITUDE_BITS) ^ (bits >> 31)) + 2 * (LAST - lane)[:, None]
    if SIGNED_NAN:  # PTX rounds every NaN to a positive one, AMD and the interpreter do not
        rank = tl.where(v != v, TL_NAN_RANK, rank)
    best = tl.max(rank, axis=0).to(tl.int64)  # [BN]
    best += best & 1  # gives back the 1 that inverting took
    high = (best & (-2 * BM)) + (best >> 63)  # `ordered32` of the value, see `keys`
    found = (high << 32) | (TL_POSITION_MASK - LAST - i_m * BM + (best >> 1 & LAST))
    found = tl.where(best > TL_LARGEST_RANK_OF_INF, TL_NAN_KEY, found)
    p_keys = keys + i_n * keys_n + i_g * D + o_d
    if SPLIT:
        tl.atomic_max(p_keys, found, mask=m_d, sem="relaxed")
    else:
        tl.store(p_keys, found, mask=m_d)


def tile(P: int, D: int, K: int) -> dict[str, int]:
    """The tile and launch options that cost least for maps of P pixels, D channels a group and depth K.

    The cost of a block size is the length that its blocks cover, the part beyond the end included, times the time an
    element takes relative to the largest block.
    """

    def cheapest(size: int, time_of: dict[int, float]) -> int:
        blocks = [b for b in time_of if b <= max(min(time_of), next_power_of_2(size))]
        return min(blocks, key=lambda b: -(-size // b) * b * time_of[b])

    BM = cheapest(P, {128: 1.0, 64: 1.15})
    BN = cheapest(D, {128: 1.0, 64: 1.15, 32: 1.6, 16: 2.5})
    BK = cheapest(K, {64: 1.0, 32: 1.1, 16: 1.3})
    return {"BM": BM, "BN": BN, "BK": BK, "num_warps": 8 if BM * BN == 128 * 128 else 4, "num_stages": 3}


def has_wgmma(device: torch.device) -> bool:
    """Whether products read both operands from shared memory (sm_90 and newer); True for what is no GPU, for tests."""
    return device.type != "cuda" or (not torch.version.hip and torch.cuda.get_device_capability(device)[0] >= 9)


def whole_vectors(x: Tensor, weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """(x, weight) as the kernel reads them: channels_last, input channels in whole vectors of at least 8 bytes."""
    missing = -x.shape[1] % 4 if groups == 1 else 0
    if missing:
        x, weight = (F.pad(t, (0, 0, 0, 0, 0, missing)) for t in (x, weight))
    return x.contiguous(memory_format=torch.channels_last), weight.contiguous(memory_format=torch.channels_last)


def plan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    activation: str | None,
    store: bool,
    key_after: bool,
    keys: Tensor,
    y: Tensor,
) -> Launch | None:
    """The launch that fills `keys` and `y`; None where there is no kernel for x and weight."""
    if x.dtype == torch.float32 or not x.is_contiguous(memory_format=torch.channels_last) or not x.numel():
        return None
    if keys.stride(1) != 1:
        return None
    (SH, SW), (PH, PW), (DH, DW), G = geometry
    x, weight = whole_vectors(x, weight, G)
    (N, C, H, W), (D, _, KH, KW) = x.shape, weight.shape
    OH, OW = geometry.output_size((H, W), (KH, KW))
    P = OH * OW
    largest = max((H + 2 * PH) * (W + 2 * PW) * C, (P + 128) * D, weight.numel())
    if largest >= 2**31 or (PH + PW > 0 and KH + KW > 31):
        return None  # offsets inside an image are int32, and so are the taps of both axes together
    options: dict[str, Any] = {
        "G": G, "C": C // G, "D": D // G, "KH": KH, "KW": KW, "SH": SH, "SW": SW, "PH": PH, "PW": PW, "DH": DH,
        "DW": DW, "HAS_BIAS": bias is not None, "ACTIVATION": ACTIVATIONS[activation], "KEY_AFTER": key_after,
        "STORE": store, "SIGNED_NAN": x.is_cpu or bool(torch.version.hip), **tile(P, D // G, KH * KW * C // G),
    }  # fmt: skip
    options["SPLIT"] = options["BM"] < P
    if options["num_warps"] == 8 and has_wgmma(x.device):
        options["maxnreg"] = 128  # so that two programs fit, one computing while one stores; other chips spill
    steps = -(-(KH * KW * C // G) // options["BK"])
    programs = N * -(-P // options["BM"]) * G * -(-options["D"] // options["BN"])
    args = (
        x,
        weight,
        x if bias is None else bias.contiguous(),
        keys,
        y if store else x,
        H,
        W,
        OW,
        P,
        keys.stride(0),
        steps,
    )
    return Launch(_conv_argmax_kernel, (programs,), args, options)


# A schema holds no ConvGeometry and no optional result: the operator takes seven integers, and without `store` an empty
# tensor stands for y.
@torch.library.custom_op("unitvis::conv_argmax", mutates_args=("keys",))
def _conv_argmax(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Sequence[int],
    activation: str | None,
    store: bool,
    key_after: bool,
    keys: Tensor,
) -> Tensor:
    found, y = cpu.conv_argmax(x, weight, bias, ConvGeometry.from_ints(geometry), activation, store, key_after)
    keys.copy_(found)
    return y


@_conv_argmax.register_fake
def _(x, weight, bias, geometry, activation, store, key_after, keys):
    return new_map(x, weight, ConvGeometry.from_ints(geometry), store)


def new_map(x: Tensor, weight: Tensor, geometry: ConvGeometry, store: bool) -> Tensor:
    """The map to be filled; empty without `store`."""
    if not store:
        return x.new_empty(0)
    shape = (x.shape[0], weight.shape[0], *geometry.output_size(x.shape[2:], weight.shape[2:]))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    activation: str | None,
    store: bool,
    key_after: bool,
    keys: Tensor,
    y: Tensor | None = None,
) -> Tensor:
    """Fill `keys` and y, a new map if None, by the kernel, and return y; by `cpu.conv_argmax` where there is none."""
    y = new_map(x, weight, geometry, store) if y is None else y
    planned = plan(x, weight, bias, geometry, activation, store, key_after, keys, y)
    if planned is None:
        found, y = cpu.conv_argmax(x, weight, bias, geometry, activation, store, key_after)
        keys.copy_(found)
    else:
        planned.run()
    return y


if HAS_TRITON:

    @_conv_argmax.register_kernel("cuda")
    def _(x, weight, bias, geometry, *rest):
        return launch(x, weight, bias, ConvGeometry.from_ints(geometry), *rest)


def conv_argmax(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    store: bool = True,
    key_after: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(keys int64 [N, D], y [N, D, OH, OW]) of `F.conv2d(x, weight, bias, stride, padding, dilation, groups)`.

    x [N, C, H, W] and weight [D, C / groups, KH, KW] are both float16, bfloat16 or float32. v = products + bias[d],
    summed in float32 and rounded once to x's dtype; y = activation(v), in x's dtype and channels_last, or None with
    store=False; keys are those of v, or with `key_after` those of y; `out`: see `epilogue`. On a GPU half precision in
    channels_last takes one pass, in which a map that is not stored is never written; anything else runs in PyTorch. The
    one pass copies a weight that is not channels_last, and x and the weight if C is no multiple of 4 (groups 1), at
    each call; pad both with channels of zeros to save the copies. Raises ValueError for anything else.
    """
    require_tensors("conv_argmax", x=x, weight=weight, bias=bias, out=out)
    if x.ndim != 4 or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"conv_argmax takes float32, float16 or bfloat16 [N, C, H, W], not {x.dtype} {tuple(x.shape)}")
    if weight.ndim != 4 or weight.dtype != x.dtype or not weight.numel():
        raise ValueError(f"weight must be {x.dtype} [D, C, KH, KW], as x, not {weight.dtype} {tuple(weight.shape)}")
    if groups < 1 or weight.shape[0] % groups or weight.shape[1] * groups != x.shape[1]:
        raise ValueError(f"weight {tuple(weight.shape)} in {groups} groups does not fit {x.shape[1]} input channels")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.dtype.is_floating_point):
        raise ValueError(f"bias must be one float a channel [{weight.shape[0]}], not {bias.dtype} {tuple(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None, 'relu' or 'relu6', not {activation!r}")
    geometry = ConvGeometry.of(stride, padding, dilation, groups)
    size = geometry.output_size(x.shape[2:], weight.shape[2:])
    if min(size) < 1 or size[0] * size[1] > POSITION_MASK:
        raise ValueError(f"a map of {size[0]} x {size[1]} from {tuple(x.shape[2:])}: it needs 1 to 2^31 - 1 positions")
    keys = new_keys(x, weight.shape[0], out)
    y = _conv_argmax(x, weight, bias, geometry.as_ints(), activation, store, key_after, keys)
    return keys, y if store else None
