"""The modules of a rewritten model: each computes layers' keys in the pass that computes their maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unitvis_kernels as uk
from unitvis.network.forward import Rectangle, as_map
from unitvis_kernels.choice import prefer


class Pool(NamedTuple):
    """The parameters of a max-pool that rounds down and treats rows and columns alike."""

    window: int
    stride: int
    padding: int


class Taps:
    """What all layers of a rewritten model share: the thresholds of their responses, and where their keys go.

    thresholds: float32 [units of all layers], values that responses must reach to enter the top-k; None: all may enter.
    keys: int64 [N, units], which hold `uk.BLANK` and are written; None: each layer's keys are a new tensor.
    """

    def __init__(self) -> None:
        self.thresholds: Tensor | None = None
        self.keys: Tensor | None = None


class Tap(NamedTuple):
    """The share of one layer, with these units, in the taps."""

    taps: Taps
    units: slice

    @property
    def floor(self) -> Tensor | None:
        """The layer's thresholds, float32 [units]."""
        return self._own(self.taps.thresholds, 0)

    @property
    def out(self) -> Tensor | None:
        """The layer's keys that are to be written, int64 [N, units]."""
        return self._own(self.taps.keys, 1)

    def _own(self, of_all: Tensor | None, axis: int) -> Tensor | None:
        units = self.units
        return None if of_all is None else of_all.narrow(axis, units.start, units.stop - units.start)

    def keys_of(self, maps: Tensor, inside: Rectangle | None = None) -> Tensor:
        """The keys, int64 [N, C], of maps [N, C, H, W], or of those positions."""
        return uk.spatial_argmax(maps, self.floor, inside, out=self.out)


class Chain(nn.Module):
    """A convolution, an optional activation and an optional max-pool, with the keys of one of their outputs.

    conv: with a BatchNorm that followed it folded in. tap: of the layer whose keys are computed; None: there is none.
    key_after: the keys are those of the activated map, else of the convolution's output. one_pass: `uk.conv_argmax`
    computes the whole chain, or `uk.epilogue` all that follows the convolution, whichever is preferred (on a GPU);
    otherwise PyTorch's operators do (on a CPU, where convolutions add their bias themselves).
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        activation: str | None,
        pool: Pool | None,
        tap: Tap | None,
        *,
        key_after: bool,
        one_pass: bool,
    ) -> None:
        super().__init__()
        self.conv, self.activation, self.pool = conv, activation, pool
        self.tap, self.key_after, self.one_pass = tap, key_after, one_pass
        self.store = True  # False: no other node uses the map, so it need not be written
        self.fused: str | None = None  # if `conv_argmax` is used: "measured" or "estimated", see `prefer`

    def _fuses(self, x: Tensor) -> bool:
        """True where `conv_argmax` is preferred for this input [N, C, H, W]; sets `fused`."""
        conv = self.conv
        if isinstance(conv.padding, str) or x.dtype == torch.float32:
            return False
        geometry = zip(x.shape[2:], conv.padding, conv.dilation, conv.kernel_size, conv.stride, strict=True)
        height, width = ((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, p, d, k, s in geometry)
        architecture = "cpu"
        if x.is_cuda:
            architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(x.device))
        fuses, source = prefer(
            conv.in_channels,
            conv.out_channels,
            (conv.kernel_size[0], conv.kernel_size[1]),
            (conv.stride[0], conv.stride[1]),
            conv.groups,
            (height, width),
            x.dtype,
            architecture,
            pooled=self.pool is not None,
        )
        self.fused = source if fuses else None
        return fuses

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return (keys int64 [N, C], output map [N, C, H, W]), with None in place of one that is not needed."""
        conv, tap = self.conv, self.tap
        floor, out = (None, None) if tap is None else (tap.floor, tap.out)
        if self.one_pass and self._fuses(x):
            fused_keys, fused_map = uk.conv_argmax(
                x,
                conv.weight,
                conv.bias,
                conv.stride,  # type: ignore[arg-type]  # two numbers, which nn.Conv2d does not say
                conv.padding,  # type: ignore[arg-type]
                conv.dilation,  # type: ignore[arg-type]
                conv.groups,
                activation=self.activation,
                store=self.store,
                key_after=self.key_after,
                out=out,
            )
            if self.pool is not None and fused_map is not None:
                fused_map = F.max_pool2d(fused_map, *self.pool)
            return fused_keys, fused_map
        if self.one_pass and (conv.bias is not None or self.activation is not None or self.pool is not None):
            raw = F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
            return uk.epilogue(
                raw, conv.bias, self.activation, self.pool, key_after=self.key_after, floor=floor, out=out
            )
        y = conv(x)
        keys = None if tap is None or self.key_after else tap.keys_of(y)
        if self.activation is not None:
            y = F.relu_(y) if self.activation == "relu" else F.relu6(y, inplace=True)
        if tap is not None and self.key_after:
            keys = tap.keys_of(y)
        return keys, y if self.pool is None else F.max_pool2d(y, *self.pool)


class Residual(nn.Module):
    """What follows a convolution whose output is added to a shortcut: both biases, the sum and an activation.

    bias, shortcut_bias: of the convolution and of one that the shortcut comes from. taps: of the layers that are the
    two summands, the sum and the activated sum; None in place of those that are none.
    """

    def __init__(
        self, bias: Tensor | None, shortcut_bias: Tensor | None, activation: str | None, taps: Sequence[Tap | None]
    ) -> None:
        super().__init__()
        self.bias, self.shortcut_bias = (None if b is None else nn.Parameter(b) for b in (bias, shortcut_bias))
        self.activation, self.taps = activation, taps

    def forward(self, raw: Tensor, shortcut: Tensor) -> tuple[Tensor | None, ...]:
        """Return the keys, int64 [N, C] or None, of each tap, and the output [N, C, H, W]."""
        if raw.shape != shortcut.shape or raw.dtype != shortcut.dtype:  # the sum repeats one of them
            return self._broadcast(raw, shortcut)
        keys = [
            None
            if tap is None
            else raw.new_full(raw.shape[:2], uk.BLANK, dtype=torch.int64)
            if tap.out is None
            else tap.out
            for tap in self.taps
        ]
        floors = [None if tap is None else tap.floor for tap in self.taps]
        y = uk.residual(raw, shortcut, self.bias, self.shortcut_bias, self.activation, keys=keys, floors=floors)
        return *keys, y

    def _broadcast(self, raw: Tensor, shortcut: Tensor) -> tuple[Tensor | None, ...]:
        v, s = (
            x if bias is None else x + bias[:, None, None]
            for x, bias in ((raw, self.bias), (shortcut, self.shortcut_bias))
        )
        u = v + s
        y = {None: lambda x: x, "relu": F.relu, "relu6": F.relu6}[self.activation](u)
        keys = [None if tap is None else tap.keys_of(x) for tap, x in zip(self.taps, (v, s, u, y), strict=True)]
        return *keys, y


class Blocked(nn.Module):
    """The model's input, in the layout that its first convolution was rewritten for; see `uk.Blocks`."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.channels, self.kernel, self.geometry = conv.in_channels, conv.kernel_size, geometry_of(conv)

    def blocks(self, size: Sequence[int]) -> uk.Blocks:
        """The layout of images of a size (H, W)."""
        return uk.Blocks.of(self.channels, size, self.kernel, self.geometry)

    def forward(self, x: Tensor) -> Tensor:
        """Return x [N, channels, H, W] as [N, channels of a block, rows, columns]; x itself where it has that layout.

        The two differ in their channels: only convolutions of an input of up to three channels are rewritten, and a
        block has at least four.
        """
        return x if x.shape[1] != self.channels else uk.arrange(x, self.blocks(x.shape[2:]), x.dtype)


class MapKeys(nn.Module):
    """The keys of a layer's output that no chain computes. axis: that of its channels, see `as_map`.

    inside: the positions that are read; None: all.
    """

    def __init__(self, name: str, axis: int | None, tap: Tap, inside: Rectangle | None) -> None:
        super().__init__()
        self.name, self.axis, self.tap, self.inside = name, axis, tap, inside

    def forward(self, output: object) -> Tensor:
        """Return keys, int64 [N, C]."""
        return self.tap.keys_of(as_map(self.name, self.axis, output), self.inside)


class SameKeys(nn.Module):
    """The keys of a layer whose output is another layer's output as well."""

    def __init__(self, tap: Tap) -> None:
        super().__init__()
        self.tap = tap

    def forward(self, keys: Tensor) -> Tensor:
        """Return the keys, int64 [N, C], where this layer's go."""
        return keys if self.tap.out is None else self.tap.out.copy_(keys)


def geometry_of(conv: nn.Conv2d) -> uk.ConvGeometry:
    """Stride, padding, dilation and groups of a convolution whose padding is given in numbers."""
    return uk.ConvGeometry.of(conv.stride, conv.padding, conv.dilation, conv.groups)  # type: ignore[arg-type]


def blocked(conv: nn.Conv2d) -> nn.Conv2d:
    """The same convolution for an input in blocks."""
    weight, geometry = uk.Blocks.of_weight(conv.weight.detach(), geometry_of(conv))
    D, C, *kernel = weight.shape
    made = nn.Conv2d(
        C, D, (kernel[0], kernel[1]), geometry.stride, geometry.padding, bias=conv.bias is not None, device="meta"
    )
    made.weight, made.bias = nn.Parameter(weight), conv.bias
    return made
