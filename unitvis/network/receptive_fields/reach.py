"""Reaches: for every element of a tensor, the interval of input positions that can change it, along one input axis.

A `Reach` has the shape of the tensor that it describes, so that channels, groups and windows stay apart, but every
dimension along which the interval is constant has size 1: the rows that reach a plain feature map are [1, 1, H, 1].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

EMPTY = -math.inf  # all bounds of the empty interval, and "no padding is read"
PADDED = 0.0  # padding is read: more than `EMPTY`, so that it survives every union
ROWS = 5  # of a reach's bounds
UNREAD = 1 << 40  # in a window's table of positions: an entry that reads nothing


@dataclass(frozen=True)
class Reach:
    """The interval of input positions, along one input axis, that can change each element of a tensor.

    bounds: float64 [5, *shape]: -first and last position, exact; then the same *virtual*: as if the image went on
    where the network pads; then `PADDED` where padding along this axis is read, else `EMPTY`. With the minus sign every
    union is a maximum, with -inf for the empty interval. A virtual bound of +inf belongs to an element that would
    depend on all of an image of any size.
    """

    bounds: Tensor
    axis: int  # the input axis: 0 images, -2 rows, -1 columns
    extent: int  # input positions along that axis
    step: float  # input positions from one element to the next along that axis: the product of the strides

    @property
    def ndim(self) -> int:
        return self.bounds.ndim - 1

    def widened(self, dim: int, n: int) -> Tensor:
        """The bounds with a collapsed dimension at its full size n."""
        shape = list(self.bounds.shape)
        shape[dim + 1] = n
        return self.bounds.expand(shape)


def input_reach(shape: Sequence[int], axis: int) -> Reach:
    """The reach of the model's input itself: every element is reached by its own position."""
    extent = shape[axis]
    view = [1] * len(shape)
    view[axis] = extent
    position = torch.arange(extent, dtype=torch.float64).reshape(view)
    unpadded = torch.full_like(position, EMPTY)
    return Reach(torch.stack([-position, position, -position, position, unpadded]), axis, extent, 1.0)


def collapse(bounds: Tensor, dims: Sequence[int] | None = None) -> Tensor:
    """Reduce to size 1 each dimension (all, or those given) along which bounds [5, *shape] are constant."""
    for dim in range(bounds.ndim - 1) if dims is None else dims:
        first = bounds.narrow(dim + 1, 0, 1)
        if bounds.shape[dim + 1] > 1 and torch.equal(bounds, first.expand_as(bounds)):
            bounds = first
    return bounds


def aligned(reach: Reach, ndim: int) -> Reach:
    """Add the leading dimensions of size 1 that broadcasting to `ndim` dimensions adds."""
    if reach.ndim == ndim:
        return reach
    shape = reach.bounds.shape
    return replace(reach, bounds=reach.bounds.reshape(ROWS, *[1] * (ndim - reach.ndim), *shape[1:]))


def union(reaches: Sequence[Reach], ndim: int) -> Reach:
    """The reach of an elementwise result with `ndim` dimensions: the union over its broadcast operands."""
    reaches = [aligned(reach, ndim) for reach in reaches]
    bounds = functools.reduce(torch.maximum, [reach.bounds for reach in reaches])
    return replace(reaches[0], bounds=bounds, step=max(reach.step for reach in reaches))


def reduced(reach: Reach, dims: Sequence[int], keepdim: bool = True) -> Reach:
    """The reach of a result computed from all elements along `dims` (positive): sums, maxima, norms, contractions."""
    bounds = reach.bounds
    over = [dim + 1 for dim in dims if bounds.shape[dim + 1] > 1]
    if over:
        # A reduction over image positions (elements whose centres lie at least a step apart) is no window that slides
        # beyond the border: its virtual interval becomes the exact one, or infinite where that is the whole axis.
        centres = (bounds[3:4] - bounds[2:3]) / 2
        highest = centres.nan_to_num(nan=-math.inf).amax(over, keepdim=True)
        slides = highest - centres.nan_to_num(nan=math.inf).amin(over, keepdim=True) < reach.step
        bounds = bounds.amax(over, keepdim=True)
        everything = (bounds[:1] == 0) & (bounds[1:2] == reach.extent - 1)
        exact = torch.where(everything, math.inf, bounds[:2])
        bounds = torch.cat([bounds[:2], torch.where(slides, bounds[2:4], exact), bounds[4:]])
    if not keepdim:
        kept = [size for dim, size in enumerate(bounds.shape[1:]) if dim not in dims]
        bounds = bounds.reshape(ROWS, *kept)
    return replace(reach, bounds=bounds)


def windowed(reach: Reach, dim: int, n: int, positions: Tensor, ratio: float = 1.0) -> Reach:
    """The reach of windows along one dimension of size n (its size in the reach may be 1).

    positions: int64 [outputs, window], the positions that each output reads; `UNREAD` entries read nothing. Those
    outside [0, n) are padding: nothing reaches them exactly, and virtually the map goes on with its own slope. Along
    another dimension than the reach's own (channels, say) they are not noted as padding. ratio: the stride of the
    window, below 1 for up-sampling.
    """
    own_axis = reach.axis == dim - reach.ndim
    step = reach.step * ratio if own_axis else reach.step
    inside = (positions >= 0) & (positions < n)
    if reach.bounds.shape[dim + 1] == 1 and bool(inside.any(1).all()) and not (n == 1 and own_axis):
        return replace(reach, step=step)
    read = positions != UNREAD
    before = max(0, -int(positions.min()))
    after = max(0, int(positions[read].max()) - n + 1) if bool(read.any()) else 0
    lines = reach.widened(dim, n).movedim(dim + 1, -1)  # [5, ..., n]
    first, last = lines[..., :1], lines[..., -1:]
    if n > 1:
        # inf - inf is NaN, and a slope of 0 keeps infinite and empty intervals as they are.
        slope = ((last - first) / (n - 1)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    else:
        sign = torch.tensor([-1.0, 1.0, -1.0, 1.0, 0.0], dtype=torch.float64).reshape(ROWS, *[1] * reach.ndim)
        slope = sign * (reach.step if own_axis else 0.0)
    left = first - slope * torch.arange(before, 0, -1)
    right = last + slope * torch.arange(1, after + 1)
    left[:2] = right[:2] = EMPTY
    left[4] = right[4] = PADDED if own_axis else EMPTY
    lines = torch.cat([left, lines, right], -1)
    bounds = torch.full((*lines.shape[:-1], len(positions)), EMPTY, dtype=torch.float64)
    for position, is_read in zip(positions.unbind(1), read.unbind(1), strict=True):
        entry = lines.index_select(-1, torch.where(is_read, position + before, 0))
        bounds = torch.maximum(bounds, torch.where(is_read, entry, EMPTY))
    return replace(reach, bounds=collapse(bounds.movedim(-1, dim + 1), [dim]), step=step)


def reshaped(reach: Reach, old: Sequence[int], new: Sequence[int]) -> Reach:
    """The reach of a view from shape `old` to `new`: only dimensions that it merges or splits become full size."""
    before: list[int] = []
    after: list[int] = []
    split: list[int] = []
    i = j = 0
    while i < len(old) or j < len(new):
        start_i, start_j = i, j
        size_i = size_j = 1
        if i < len(old):
            size_i, i = old[i], i + 1
        if j < len(new):
            size_j, j = new[j], j + 1
        while size_i != size_j:
            if size_i < size_j:
                size_i, i = size_i * old[i], i + 1
            else:
                size_j, j = size_j * new[j], j + 1
        constant = all(size == 1 for size in reach.bounds.shape[start_i + 1 : i + 1])
        before += [1] * (i - start_i) if constant else old[start_i:i]
        after += [1] * (j - start_j) if constant else new[start_j:j]
        split += range(start_j, j)
    bounds = reach.bounds.expand(ROWS, *before).reshape(ROWS, *after)
    return replace(reach, bounds=collapse(bounds, split))


def regrouped(reach: Reach, channels: int, groups: int, outputs: int) -> Reach:
    """The reach of a convolution's output channels (dimension 1): each depends on all input channels of its group."""
    bounds = reach.bounds
    if bounds.shape[2] == 1:
        return reach
    bounds = torch.unflatten(bounds, 2, (groups, channels // groups)).amax(3)
    bounds = bounds.repeat_interleave(outputs // groups, 2)
    return replace(reach, bounds=collapse(bounds, [1]))


def concatenated(reaches: Sequence[Reach], sizes: Sequence[int], dim: int) -> Reach:
    """The reach of a concatenation along `dim` of operands with these sizes along it."""
    if all(torch.equal(reach.bounds, reaches[0].bounds) for reach in reaches[1:]) and (
        reaches[0].bounds.shape[dim + 1] == 1
    ):
        return reaches[0]
    operands = [reach.widened(dim, size) for reach, size in zip(reaches, sizes, strict=True)]
    common = [max(sizes) for sizes in zip(*(bounds.shape for bounds in operands), strict=True)]
    operands = [b.expand(*common[: dim + 1], b.shape[dim + 1], *common[dim + 2 :]) for b in operands]
    step = max(reach.step for reach in reaches)
    return replace(reaches[0], bounds=collapse(torch.cat(operands, dim + 1), [dim]), step=step)


def unreached(like: Reach, ndim: int) -> Reach:
    """The reach of a constant with `ndim` dimensions: empty intervals along the axis of `like`."""
    return replace(like, bounds=torch.full((ROWS, *[1] * ndim), EMPTY, dtype=torch.float64))


ZERO_OFFSET = 2.0**24  # added to bounds so that none is 0; float64 keeps the fractions of virtual ones beside it


def moved(
    reaches: Sequence[Reach],
    shapes: Sequence[Sequence[int]],
    move: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    dims: Sequence[int] | None = None,
) -> list[Reach]:
    """The reaches of the outputs of an operator that only moves elements: `move` is applied to the operands' bounds.

    shapes: the operands' shapes. dims: the dimensions (None: all) that must have full size for the move to be right.
    Bounds are offset meanwhile, so that a zero that the operator fills in means the empty interval.
    """
    offset = []
    for reach, shape in zip(reaches, shapes, strict=True):
        sizes = [n if dims is None or d in dims else reach.bounds.shape[d + 1] for d, n in enumerate(shape)]
        bounds = reach.bounds.expand(ROWS, *sizes)
        offset.append(torch.where(bounds == EMPTY, 0.0, bounds + ZERO_OFFSET))
    outputs = [move(operands) for operands in zip(*offset, strict=True)]
    stacked = [torch.stack(output) for output in zip(*outputs, strict=True)]
    step = max(reach.step for reach in reaches)
    return [
        replace(reaches[0], bounds=collapse(torch.where(bounds == 0, EMPTY, bounds - ZERO_OFFSET)), step=step)
        for bounds in stacked
    ]
