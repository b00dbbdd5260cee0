"""Which axis of each tensor holds channels, followed through one forward pass operator by operator.

An image [N, C, H, W] begins with axis 1. A convolution or batch normalisation puts channels at axis 1, a product with
weights or a layer normalisation at the last axis; permutations, views and reductions move them; operators that compute
element by element, or along windows, keep them. Where nothing is known, or two operands disagree, the axis is unknown.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The axes that together hold the channels: several while a view has split them; none where they are unknown.
Axes = frozenset[int]
UNKNOWN: Axes = frozenset()


class ChannelAxes(TorchDispatchMode):
    """Dispatch mode that labels every tensor computed under it with its channel axes; `axis_of` tells them.

    Tensors are kept alive as long as the mode is, since a label belongs to a tensor by identity.
    """

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self._labels: dict[int, tuple[Tensor, Axes]] = {id(image): (image, frozenset([1]))}

    def axis_of(self, tensor: Tensor) -> int | None:
        """The axis that holds channels; None where it is unknown."""
        axes = self._axes_of(tensor)
        return next(iter(axes)) if len(axes) == 1 else None

    def _axes_of(self, tensor: Tensor) -> Axes:
        return self._labels[id(tensor)][1] if self._is_computed(tensor) else UNKNOWN

    def _is_computed(self, tensor: object) -> bool:
        """Whether a tensor depends on the image; parameters and constants do not."""
        return isinstance(tensor, Tensor) and id(tensor) in self._labels

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [one for one in tree_leaves((args, kwargs)) if self._is_computed(one)]
        if given:
            name = func._schema.name.removeprefix("aten::")
            for made in tree_leaves(result):
                if isinstance(made, Tensor):
                    self._labels[id(made)] = made, self._axes(name, args, kwargs, given, made)
        return result

    def _axes(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], given: Sequence[Tensor], made: Tensor
    ) -> Axes:
        """The channel axes of `made`, a result of the operator; given: the computed operands."""
        if name in _PUT_AT_AXIS_1:
            return frozenset([1]) if made.ndim > 1 else UNKNOWN
        if name in _PUT_LAST:
            return frozenset([made.ndim - 1])
        if name in _PRODUCTS:
            return self._product_axes(args[-2], args[-1], made)
        if name in _MOVES:
            return _MOVES[name](self._axes_of(given[0]), given[0], made, args, kwargs)
        if max(one.ndim for one in given) == made.ndim:  # also poolings, paddings, interpolations, concatenations
            return _agreed([self._axes_of(one) for one in given], given, made)
        return UNKNOWN

    def _product_axes(self, left: Tensor, right: Tensor, made: Tensor) -> Axes:
        """Images times weights, a linear layer, puts channels last; weights times images leaves them where they are."""
        if self._is_computed(left):
            return UNKNOWN if self._is_computed(right) else frozenset([made.ndim - 1])  # of two computed: attention
        return frozenset(axis + made.ndim - right.ndim for axis in self._axes_of(right))


def _agreed(axes: Iterable[Axes], given: Sequence[Tensor], made: Tensor) -> Axes:
    """The axes on which all operands agree that have any, aligned from the last axis as broadcasting does."""
    aligned = (frozenset(axis + made.ndim - one.ndim for axis in own) for own, one in zip(axes, given, strict=True))
    found = {own for own in aligned if own}
    return found.pop() if len(found) == 1 else UNKNOWN


def _viewed(axes: Axes, old: Tensor, new: Tensor, args: Any, kwargs: Any) -> Axes:
    """The axes after a view, which splits and merges neighbouring axes; unknown where channels merge with others."""
    if old.ndim == new.ndim and old.shape == new.shape:
        return axes
    if any(old.shape[axis] == 1 for axis in axes):  # an axis of size 1 leaves no trace in a view
        return UNKNOWN
    found: set[int] = set()
    for before, after in _groups(old.shape, new.shape):
        if axes.issuperset(before):
            found.update(after)
        elif axes.intersection(before):
            return UNKNOWN
    return frozenset(found)


def _groups(old: Sequence[int], new: Sequence[int]) -> Iterable[tuple[list[int], list[int]]]:
    """Smallest groups of neighbouring axes, without those of size 1, that hold the same elements before and after."""
    left, right = ([axis for axis, size in enumerate(shape) if size != 1] for shape in (old, new))
    while left and right:
        before, after = [left.pop(0)], [right.pop(0)]
        sizes = [old[before[0]], new[after[0]]]
        while sizes[0] != sizes[1]:
            side = 0 if sizes[0] < sizes[1] else 1
            axis = (left, right)[side].pop(0)
            (before, after)[side].append(axis)
            sizes[side] *= (old, new)[side][axis]
        yield before, after


def _permuted(axes: Axes, old: Tensor, new: Tensor, args: Any, kwargs: Any) -> Axes:
    order = [dim % old.ndim for dim in (args[1] if len(args) > 1 else kwargs["dims"])]
    return frozenset(order.index(axis) for axis in axes)


def _transposed(axes: Axes, old: Tensor, new: Tensor, args: Any, kwargs: Any) -> Axes:
    first, second = [dim % old.ndim for dim in args[1:3]] if len(args) > 2 else [0, 1]
    return frozenset({first: second, second: first}.get(axis, axis) for axis in axes)


def _without(axes: Axes, dims: Sequence[int]) -> Axes:
    """The axes once `dims` are gone; unknown where channels are among them."""
    if axes.intersection(dims):
        return UNKNOWN
    return frozenset(axis - sum(dim < axis for dim in dims) for axis in axes)


def _selected(axes: Axes, old: Tensor, new: Tensor, args: Any, kwargs: Any) -> Axes:
    return _without(axes, [(args[1] if len(args) > 1 else kwargs.get("dim", 0)) % old.ndim])


def _squeezed(axes: Axes, old: Tensor, new: Tensor, args: Any, kwargs: Any) -> Axes:
    dims = args[1] if len(args) > 1 else range(old.ndim)
    dims = [dims] if isinstance(dims, int) else dims
    return _without(axes, [dim % old.ndim for dim in dims if old.shape[dim] == 1])


def _unsqueezed(axes: Axes, old: Tensor, new: Tensor, args: Any, kwargs: Any) -> Axes:
    at = args[1] % new.ndim
    return frozenset(axis + (axis >= at) for axis in axes)


def _reduced(axes: Axes, old: Tensor, new: Tensor, args: Any, kwargs: Any) -> Axes:
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if isinstance(dims, int) and not isinstance(dims, bool):
        dims = [dims]
    dims = [dim % old.ndim for dim in dims] if isinstance(dims, list | tuple) and dims else list(range(old.ndim))
    if axes.intersection(dims):
        return UNKNOWN
    return axes if old.ndim == new.ndim else _without(axes, dims)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PUT_AT_AXIS_1 = _names(
    """convolution convolution_overrideable mkldnn_convolution cudnn_convolution _convolution native_batch_norm
    _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm _batch_norm_no_update
    miopen_batch_norm batch_norm native_group_norm pixel_shuffle pixel_unshuffle channel_shuffle
    native_channel_shuffle"""
)
_PUT_LAST = _names("native_layer_norm layer_norm linear _fused_rms_norm")
_PRODUCTS = _names("mm addmm bmm baddbmm")
_VIEWS = _names("view _unsafe_view reshape _reshape_alias view_copy flatten unflatten")
_REDUCTIONS = _names(
    "sum mean amax amin max min prod var std median any all argmax argmin logsumexp linalg_vector_norm norm"
)
_MOVES: dict[str, Callable[[Axes, Tensor, Tensor, Any, Any], Axes]] = {
    **dict.fromkeys(_VIEWS, _viewed),
    "permute": _permuted,
    **dict.fromkeys(_names("transpose t transpose_ swapaxes"), _transposed),
    **dict.fromkeys(_names("select unbind"), _selected),
    **dict.fromkeys(_names("squeeze squeeze_"), _squeezed),
    **dict.fromkeys(_names("unsqueeze unsqueeze_"), _unsqueezed),
    **dict.fromkeys(_REDUCTIONS, _reduced),
}
