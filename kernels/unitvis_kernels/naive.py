"""The definition of each operator in plain PyTorch: slow, untuned, and what the tests hold every implementation to.

It shares no code with the implementations, only the constants of the key (`keys`) and the size of a convolution's
output (`geometry`). Arguments are those of the operators after their checks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from unitvis_kernels.geometry import Blocks, ConvGeometry
from unitvis_kernels.keys import BLANK, NAN_KEY


def pack(values: Tensor, positions: Tensor) -> Tensor:
    """Keys, int64, of float values and int64 positions."""
    magnitude = values.float().abs().view(torch.int32).long()  # the bits without the sign order values >= 0
    ordered = torch.where(values < 0, -1 - magnitude, magnitude)  # -0.0 is not below 0
    return torch.where(values.isnan(), NAN_KEY, ordered * 2**32 + (2**31 - 1 - positions))


def spatial_argmax(x: Tensor, inside: Sequence[int] | None = None) -> Tensor:
    """Keys, int64 [N, C], of maps [N, C, H, W]; inside: (top, bottom, left, right) of the rectangle that is read."""
    height, width = x.shape[2:]
    top, bottom, left, right = inside or (0, height, 0, width)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    read = ((rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)).flatten().nonzero()[:, 0]
    values, positions = x.flatten(2)[:, :, read.to(x.device)], read.to(x.device)  # [N, C, positions that are read]
    largest = values.amax(2)  # NaN where the map holds one
    first = torch.where(values == largest[:, :, None], positions, 2**31 - 1).amin(2)
    return pack(largest, first)


def topk_merge_(state: Tensor, keys: Tensor, ids: Tensor) -> None:
    """Fold keys [N, C] of images with ids [N] or [N, C] into the state [C, 2k + 2], channel by channel, by sorting."""
    k = (state.shape[1] - 2) // 2
    for c, row in enumerate(state.tolist()):
        best = {id: key for key, id in zip(row[:k], row[k : 2 * k], strict=True) if id >= 0}
        nan_count, first_nan = row[2 * k :]
        for key, id in zip(keys[:, c].tolist(), (ids if ids.ndim == 1 else ids[:, c]).tolist(), strict=True):
            if id < 0 or key == BLANK:
                continue
            if key == NAN_KEY:
                nan_count, first_nan = nan_count + 1, min(first_nan, id)
            else:
                best[id] = max(key, best.get(id, key))
        places = sorted(best.items(), key=lambda entry: (-(entry[1] >> 32), entry[0]))[:k]
        places += [(-1, BLANK)] * (k - len(places))
        row = [key for _, key in places] + [id for id, _ in places] + [nan_count, first_nan]
        state[c] = torch.tensor(row, dtype=torch.int64)


def activate(x: Tensor, activation: str | None) -> Tensor:
    """ReLU or ReLU6 of x; a zero is +0.0, NaN stays."""
    if activation is not None:
        x = torch.where(x <= 0, 0.0, x)
    return torch.where(x > 6, 6.0, x) if activation == "relu6" else x


def epilogue(
    x: Tensor, bias: Tensor | None, activation: str | None, pool: Sequence[int], key_after: bool
) -> tuple[Tensor, Tensor]:
    """(keys [N, C], y [N, C, OH, OW]) of x [N, C, H, W]; `pool` is () or (window, stride, padding)."""
    v = x if bias is None else (x.float() + bias.float()[:, None, None]).to(x.dtype)
    y = activate(v, activation)
    keys = spatial_argmax(y if key_after else v)
    if pool:
        window, stride, padding = pool
        y = F.max_pool2d(y, window, stride, padding) + 0.0  # + 0.0 makes -0.0 into +0.0
    return keys, y


def residual(
    x: Tensor, shortcut: Tensor, bias: Tensor | None, shortcut_bias: Tensor | None, activation: str | None
) -> tuple[list[Tensor], Tensor]:
    """(keys [N, C] of v, s, v + s and y; y [N, C, H, W]) of a sum with a shortcut."""
    v, s = (
        one if b is None else (one.float() + b.float()[:, None, None]).to(x.dtype)
        for one, b in ((x, bias), (shortcut, shortcut_bias))
    )
    u = (v.float() + s.float()).to(x.dtype)
    y = activate(u, activation)
    return [spatial_argmax(one) for one in (v, s, u, y)], y


def conv_argmax(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    activation: str | None = None,
    key_after: bool = False,
) -> tuple[Tensor, Tensor]:
    """(keys [N, D], y [N, D, OH, OW]) as matrix products over patches, summed in float64 and rounded once."""
    (N, _, H, W), (D, _, KH, KW), G = x.shape, weight.shape, geometry.groups
    patches = F.unfold(x.double(), (KH, KW), geometry.dilation, geometry.padding, geometry.stride)
    patches = patches.view(N, G, -1, patches.shape[2])  # [N, G, C / G * KH * KW, OH * OW]
    v = (weight.double().view(G, D // G, -1) @ patches).view(N, D, *geometry.output_size((H, W), (KH, KW)))
    v = (v if bias is None else v + bias.double()[:, None, None]).to(x.dtype)
    y = activate(v, activation)
    return spatial_argmax(y if key_after else v), y


def arrange(x: Tensor, blocks: Blocks, dtype: torch.dtype) -> Tensor:
    """[N, channels, *size] of images [N, C, H, W], pixel by pixel."""
    N, C = x.shape[:2]
    y = torch.zeros(N, blocks.channels, *blocks.size, dtype=dtype, device=x.device)
    for row, column in itertools.product(*(range(used) for used in blocks.used)):
        (i, p), (j, q) = (
            divmod(at + pad, b) for at, pad, b in zip((row, column), blocks.padding, blocks.block, strict=True)
        )
        first = (p * blocks.block[1] + q) * C
        y[:, first : first + C, i, j] = x[:, :, row, column].to(dtype)
    return y


def normalize(x: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """(x / 255 - mean) / std of uint8 [N, H, W, C] as [N, C, H, W]: float32, rounded to `dtype` at the end."""
    y = (x.float() / torch.tensor(255.0) - torch.tensor(mean)) / torch.tensor(std)
    return y.to(dtype).permute(0, 3, 1, 2)


def magnitudes(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """float32 [N, C, 5] of floats [N, C, H, W], or of pixels [N, H, W, C] with mean and std, as `normalize` has them.

    Sums are in float32: of four neighbours as pairs of pairs, columns first; of the largest blocks every fourth column,
    in tiles of four by four row by row, then these four.
    """
    means = (normalize(x, mean, std, torch.float32) if mean else x.float()).abs().nan_to_num(torch.inf, torch.inf)
    found = [means.amax((2, 3))]
    for _ in range(3):
        height, width = means.shape[2:]
        rows, columns = ((size - torch.arange(0, size, 4)).clamp(max=4) for size in (height, width))
        whole = F.pad(means, (0, -width % 4, 0, -height % 4))
        whole = whole.reshape(*means.shape[:2], len(rows), 4, len(columns), 4)
        means = _sum_of_four(_sum_of_four(whole, 5), 3) / (rows[:, None] * columns).to(x.device)
        found.append(means.amax((2, 3)))
    tiles = F.pad(means, (0, -means.shape[3] % 4, 0, -means.shape[2] % 4))
    down, across = tiles.shape[2] // 4, tiles.shape[3] // 4
    tiles = tiles.reshape(*means.shape[:2], down, 4, across, 4).movedim(4, 3)  # [N, C, down, across, 4, 4]
    four = means.new_zeros(*means.shape[:2], 4)
    for part in tiles.flatten(2, 4).unbind(2):
        four += part
    found.append(_sum_of_four(four, 2) / means[0, 0].numel())
    return torch.stack(found, 2)


def _sum_of_four(x: Tensor, dim: int) -> Tensor:
    a, b, c, d = x.unbind(dim)
    return (a + b) + (c + d)
