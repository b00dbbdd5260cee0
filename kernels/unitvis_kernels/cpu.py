"""The operators in PyTorch, tuned for CPUs; a GPU runs them too where an operator has no kernel for its input.

What they compute is defined in `naive`; the public functions in each operator's module check the arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from unitvis_kernels.geometry import Blocks, ConvGeometry
from unitvis_kernels.keys import BLANK, INF_KEY, MINUS_INF_HIGH, NAN_KEY, POSITION_MASK, pack
from unitvis_kernels.layout import memory_format

# Below a floor: up to this share of the maps, looking for the position in each is faster than one pass over all.
MAX_SEARCHED_SHARE = 1 / 4


def spatial_argmax(x: Tensor, floor: Tensor | None = None, inside: Sequence[int] | None = None) -> Tensor:
    layout, row = memory_format(x), x.shape[3]
    top, _, left, right = inside or (0, x.shape[2], 0, row)
    if inside:
        x = x[:, :, top : inside[1], left:right]

    def keys_of(values: Tensor, positions: Tensor) -> Tensor:
        """Keys of values with their positions in the part that is read."""
        if inside:
            positions = (positions // (right - left) + top) * row + positions % (right - left) + left
        return pack(values, positions)

    # `max` returns the first of equal values and lets NaN through, which is the order of the keys.
    if floor is not None:
        # The values alone take a sixth of the time; positions are looked for only where the value reaches the floor.
        values = x.amax((2, 3))
        keys = pack(values, torch.full_like(values, POSITION_MASK, dtype=torch.int64))
        images, channels = (~(values < floor)).nonzero().T  # a NaN is not below
        if not len(images):
            return keys
        if len(images) < MAX_SEARCHED_SHARE * keys.numel():
            keys[images, channels] = keys_of(*x[images, channels].flatten(1).max(dim=1))
            return keys
    if layout == torch.channels_last:  # reads [N, H*W, C] without a copy, unless it is a part of the map
        return keys_of(*x.permute(0, 2, 3, 1).flatten(1, 2).max(dim=1))  # [N, C]
    return keys_of(*x.flatten(2).max(dim=2))


def topk_merge_(state: Tensor, keys: Tensor, ids: Tensor, overflows: bool = False, clear: bool = False) -> None:
    _fold(state, keys, ids, overflows)
    if clear:
        keys.fill_(BLANK)


def _fold(state: Tensor, keys: Tensor, ids: Tensor, overflows: bool) -> None:
    k = (state.shape[1] - 2) // 2
    ids = ids.expand(keys.shape[1], -1) if ids.ndim == 1 else ids.T  # [C, N]
    keys = torch.where(ids < 0, BLANK, keys.T)  # [C, N]
    if overflows:
        keys = torch.where((keys == NAN_KEY) | ((keys >> 32) == MINUS_INF_HIGH), INF_KEY, keys)

    is_nan = keys == NAN_KEY
    if is_nan.any():
        state[:, -2] += is_nan.sum(dim=1)
        first = torch.where(is_nan, ids, torch.iinfo(torch.int64).max).amin(dim=1)
        state[:, -1] = torch.minimum(state[:, -1], first)
        keys = keys.masked_fill(is_nan, BLANK)

    # Only channels whose best new key reaches the last place can change: in a long stream, nearly none.
    changed = ((keys.amax(dim=1) >> 32) >= (state[:, k - 1] >> 32)).nonzero()[:, 0]
    if not len(changed):
        return
    merged_keys = torch.cat([state[changed, :k], keys[changed]], dim=1)  # [changed channels, k + N]
    merged_ids = torch.cat([state[changed, k : 2 * k], ids[changed]], dim=1)

    def reorder(order: Tensor) -> None:
        nonlocal merged_keys, merged_ids
        merged_keys, merged_ids = merged_keys.gather(1, order), merged_ids.gather(1, order)

    # Stable sorts, the least important criterion first.
    reorder(merged_keys.argsort(dim=1, descending=True, stable=True))
    reorder(merged_ids.argsort(dim=1, stable=True))
    repeated = merged_ids[:, 1:] == merged_ids[:, :-1]  # an image that is there already keeps its larger key
    merged_keys[:, 1:].masked_fill_(repeated, BLANK)
    reorder((merged_keys >> 32).argsort(dim=1, descending=True, stable=True))
    merged_ids.masked_fill_(merged_keys == BLANK, -1)
    state[changed, :k] = merged_keys[:, :k]
    state[changed, k : 2 * k] = merged_ids[:, :k]


def activate(x: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return x
    x = x.masked_fill(x <= 0, 0.0)  # -0.0 becomes +0.0, NaN stays
    return x.clamp_max(6) if activation == "relu6" else x


def biased(x: Tensor, bias: Tensor | None) -> Tensor:
    """What a convolution with a bias would have stored: the sum in float32, rounded once to the map's own dtype."""
    return x if bias is None else (x.float() + bias.float()[:, None, None]).to(x.dtype)


def epilogue(
    x: Tensor,
    bias: Tensor | None,
    activation: str | None,
    pool: Sequence[int],
    key_after: bool,
    floor: Tensor | None,
) -> tuple[Tensor, Tensor]:
    v = biased(x, bias)
    y = activate(v, activation)
    keys = spatial_argmax(y if key_after else v, floor)
    if pool:
        window, stride, padding = pool
        y = F.max_pool2d(y, window, stride, padding) + 0.0  # which of two zeros `max_pool2d` returns is not defined
    return keys, torch.empty_like(y, memory_format=memory_format(x)).copy_(y)


def residual(
    x: Tensor,
    shortcut: Tensor,
    bias: Tensor | None,
    shortcut_bias: Tensor | None,
    activation: str | None,
    keys: Sequence[Tensor | None],
    floors: Sequence[Tensor | None],
) -> Tensor:
    v, s = biased(x, bias), biased(shortcut, shortcut_bias)
    u = v + s  # rounded once: the sum of two half-precision numbers is taken in float32
    y = activate(u, activation)
    for one, floor, values in zip(keys, floors, (v, s, u, y), strict=True):
        if one is not None:
            one.copy_(spatial_argmax(values, floor))
    return torch.empty_like(y, memory_format=memory_format(x)).copy_(y)


def conv_argmax(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    activation: str | None,
    store: bool,
    key_after: bool,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        v = F.conv2d(x.float(), weight.float(), None, *geometry)
    v = (v if bias is None else v + bias.float()[:, None, None]).to(x.dtype)
    y = activate(v, activation)
    keys = spatial_argmax(y if key_after else v)
    return keys, torch.empty_like(y, memory_format=torch.channels_last).copy_(y) if store else x.new_empty(0)


def arrange(x: Tensor, blocks: Blocks, dtype: torch.dtype) -> Tensor:
    (BH, BW), (top, left), (rows, columns), (height, width), channels = blocks
    N, C = x.shape[:2]
    x = F.pad(x[:, :, :height, :width], (left, columns * BW - left - width, top, rows * BH - top - height))
    x = x.reshape(N, C, rows, BH, columns, BW).permute(0, 2, 4, 3, 5, 1).reshape(N, rows, columns, BH * BW * C)
    return F.pad(x.to(dtype), (0, channels - BH * BW * C)).permute(0, 3, 1, 2)


def normalize(x: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    # All three are tensors: a GPU divides by a plain number through its reciprocal, which rounds otherwise. Rows of
    # constants instead of three vectorise, and an image at a time, always in the same memory, stays in the cache.
    N, H, W, C = x.shape
    scale, shift, width = (torch.tensor(v, dtype=torch.float32, device=x.device) for v in ([255.0] * C, mean, std))
    scale, shift, width = scale.repeat(W), shift.repeat(W), width.repeat(W)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    buffer = torch.empty(H, W * C, dtype=torch.float32, device=x.device)
    for image, normalised in zip(x.reshape(N, H, W * C), y.view(N, H, W * C), strict=True):
        normalised.copy_(buffer.copy_(image).div_(scale).sub_(shift).div_(width))
    return y.permute(0, 3, 1, 2)


def magnitudes(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    # `avg_pool2d` adds up each window in one order whatever the batch, which `mean` does not promise.
    blocks = (normalize(x, mean, std, torch.float32) if mean else x.float()).abs()
    found = [blocks.amax((2, 3))]
    for _ in range(3):
        blocks = F.avg_pool2d(blocks, 4, ceil_mode=True)
        found.append(blocks.amax((2, 3)))
    found.append(F.avg_pool2d(blocks, blocks.shape[2:]).flatten(1))
    return torch.stack(found, 2).nan_to_num(torch.inf, torch.inf)
