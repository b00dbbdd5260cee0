"""Which axis of each tensor holds channels, followed through one forward pass operator by operator.

An image [N, C, H, W] begins with axis 1. A convolution or batch normalisation puts channels at axis 1, a product with
weights or a layer normalisation at the last axis; permutations, views and reductions move them; operators that compute
element by element, or along windows, keep them. Where nothing is known, or two operands disagree, the axis is unknown.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from unitvis.network.operators import CONVOLUTIONS_AND_NORMS, names

# The axes that together hold the channels: several while a view has split them; none where they are unknown.
Axes = frozenset[int]
UNKNOWN: Axes = frozenset()


class _Labelled(NamedTuple):
    """The label of a tensor that may be gone, with what tells its memory and its view of that."""

    storage: StorageWeakRef
    axes: Axes
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class ChannelAxes(TorchDispatchMode):
    """Dispatch mode that labels every tensor computed under it with its channel axes; `axis_of` tells them.

    Labels do not keep tensors alive. A tensor into whose views something computed was written, such as a preallocated
    output, takes its label from the last of them.
    operators: names of all that computed with the image so far, in their order.
    """

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.operators: list[str] = []
        self._maker = WeakTensorKeyDictionary()  # the number of the operator that made or overwrote a tensor last
        self._labels = WeakTensorKeyDictionary()  # the axes of a tensor
        self._last_by_storage: dict[int, _Labelled] = {}
        self._label(image, frozenset([1]))

    def axis_of(self, tensor: Tensor) -> int | None:
        """The axis that holds channels; None where it is unknown."""
        axes = self._axes_of(tensor)
        return next(iter(axes)) if len(axes) == 1 else None

    def operator_of(self, tensor: Tensor) -> int | None:
        """The number of the operator that made or overwrote a tensor last; None if it does not depend on the image."""
        return self._maker.get(tensor)

    def _label(self, tensor: Tensor, axes: Axes) -> None:
        self._labels[tensor] = axes
        if _has_memory(tensor):
            storage = tensor.untyped_storage()
            self._last_by_storage[storage._cdata] = _Labelled(
                StorageWeakRef(storage), axes, tuple(tensor.shape), tensor.stride()
            )

    def _axes_of(self, tensor: Tensor) -> Axes:
        if tensor in self._labels:
            return self._labels[tensor]
        written = self._written_view(tensor)
        return UNKNOWN if written is None else _same_strides(written, tensor)

    def is_computed(self, tensor: object) -> bool:
        """Whether a tensor depends on the image; parameters and constants do not."""
        return isinstance(tensor, Tensor) and (tensor in self._labels or self._written_view(tensor) is not None)

    def _written_view(self, tensor: Tensor) -> _Labelled | None:
        """The last labelled tensor in the memory of an unlabelled one."""
        if not _has_memory(tensor):
            return None
        found = self._last_by_storage.get(tensor.untyped_storage()._cdata)
        return None if found is None or found.storage.expired() else found  # its address may be another's by now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [one for one in tree_leaves((args, kwargs)) if self.is_computed(one)]
        if given:
            name = func._schema.name.removeprefix("aten::")
            if name not in ("detach", "alias"):  # the same values
                self.operators.append(name)
            for made in tree_leaves(result):
                if isinstance(made, Tensor):
                    self._maker[made] = len(self.operators) - 1
                    self._label(made, self._axes(name, args, kwargs, given, made))
        return result

    def _axes(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], given: Sequence[Tensor], made: Tensor
    ) -> Axes:
        """The channel axes of `made`, a result of the operator; given: the computed operands."""
        if (view := name.removesuffix("_copy")) in _MOVES or view in _LOSE:
            name = view  # the same, in new memory
        if name in _PUT_AT_AXIS_1:
            return frozenset([1]) if made.ndim > 1 else UNKNOWN
        if name in _INDEXED:
            return _indexed(self._axes_of(args[0]), args[0], args[1], made)
        if name in _WRITTEN_AT:
            return self._written_axes(args[0], args[1], args[2])
        if name in _PUT_LAST and not (name in _NORMS and len(args[1]) > 1):  # several axes: of a map, say [C, H, W]
            return frozenset([made.ndim - 1])
        if name in _LOSE or (name.startswith(_OF_MATRICES) and name not in _MOVES):
            return UNKNOWN
        if name in _PRODUCTS:
            return self._product_axes(args[-2], args[-1], made)
        if name in _MOVES:
            axes = _agreed([self._axes_of(one) for one in given], given, given[0])
            return _MOVES[name](axes, given[0], made, args, kwargs)
        if max(one.ndim for one in given) == made.ndim:  # also poolings, paddings, interpolations, concatenations
            return _agreed([self._axes_of(one) for one in given], given, made)
        return UNKNOWN

    def _written_axes(self, into: Tensor, indices: Sequence[Tensor | None], values: Tensor) -> Axes:
        """The axes of a tensor that values are written into at indices: its own, or else those of the values in it."""
        own, places = self._axes_of(into), _places(into, indices)
        start = len(places) - values.ndim  # values are broadcast to the places
        written = {places[axis + start] for axis in self._axes_of(values)} if start >= 0 else {None}
        found = UNKNOWN if None in written else frozenset(place for place in written if place is not None)
        return own or found if not (own and found) or own == found else UNKNOWN

    def _product_axes(self, left: Tensor, right: Tensor, made: Tensor) -> Axes:
        """A linear layer, images times weights, puts channels last; what mixes positions leaves them where they are.

        Positions are mixed by weights times images, and by attention: probabilities, whose axes are unknown, times
        values.
        """
        axes = self._axes_of(right)
        if not self.is_computed(right):
            return frozenset([made.ndim - 1])
        if self.is_computed(left) and (self._axes_of(left) or right.ndim - 2 in axes):
            return UNKNOWN
        return frozenset(axis + made.ndim - right.ndim for axis in axes)


@torch.inference_mode(False)  # under which operators come whole that are made of others
def channel_axes(model: nn.Module, layers: Iterable[str], image: Tensor) -> dict[str, int | None]:
    """For each of these modules, the axis of its output that holds channels in a forward pass of an image [1, C, H, W].

    None where it is unknown, and where there is no such module, it does not run, or the model fails before it.
    """
    axes: dict[str, int | None] = dict.fromkeys(layers)
    modules = dict(model.named_modules())
    image = image.clone()  # a model may overwrite its input
    mode = ChannelAxes(image)

    def keep(name: str, output: object) -> None:
        axes[name] = mode.axis_of(output) if isinstance(output, Tensor) else None

    hooks = [
        modules[name].register_forward_hook(lambda module, _, output, name=name: keep(name, output))
        for name in modules.keys() & axes.keys()
    ]
    try:
        with torch.no_grad(), mode, suppress(Exception):
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return axes


def _has_memory(tensor: Tensor) -> bool:
    """Whether a tensor has memory of its own or of another that can be told; not within torch.vmap and its like."""
    return tensor.layout == torch.strided and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _places(old: Tensor, indices: Sequence[Tensor | None]) -> list[int | None]:
    """For each axis of `old[indices]`, the axis of `old` that it is; None for those of the index tensors.

    Those stand where the first index tensor does, or first of all where axes without one lie between index tensors.
    """
    axis, indexed, broadcast = 0, list[int](), 0
    for index in indices:
        if index is not None:
            mask = index.dtype in (torch.bool, torch.uint8)  # of as many axes as it has
            consumed = index.ndim if mask else 1
            indexed += range(axis, axis + consumed)
            broadcast = max(broadcast, 1 if mask else index.ndim)
            axis += consumed
        else:
            axis += 1
    kept: list[int | None] = [axis for axis in range(old.ndim) if axis not in indexed]
    adjacent = not indexed or indexed == list(range(indexed[0], indexed[-1] + 1))
    at = indexed[0] if indexed and adjacent else 0
    return kept[:at] + [None] * broadcast + kept[at:]


def _indexed(axes: Axes, old: Tensor, indices: Sequence[Tensor | None], new: Tensor) -> Axes:
    """The axes of `new`, `old[indices]`; unknown where channels are picked together with positions."""
    places = _places(old, indices)
    if len(places) != new.ndim:
        return UNKNOWN
    found = {at for at, axis in enumerate(places) if axis in axes}
    picked = axes.difference(axis for axis in places if axis is not None)
    if picked:  # by one index tensor for that axis alone, which picks channels
        if len(axes) > 1 or sum(index is not None for index in indices) > 1 or places.count(None) != 1:
            return UNKNOWN
        (index,) = [index for index in indices if index is not None]
        if index.dtype in (torch.bool, torch.uint8) and index.ndim > 1:
            return UNKNOWN
        found.add(places.index(None))
    return frozenset(found)


def _agreed(axes: Iterable[Axes], given: Sequence[Tensor], made: Tensor) -> Axes:
    """The axes on which all operands agree that have any, aligned from the last axis as broadcasting does.

    Of axes that contain one another the most: split channels may meet others that have an axis more.
    """
    aligned = (frozenset(axis + made.ndim - one.ndim for axis in own) for own, one in zip(axes, given, strict=True))
    found = sorted({own for own in aligned if own}, key=len)
    return found[-1] if found and all(own <= found[-1] for own in found) else UNKNOWN


def _same_strides(old: _Labelled, new: Tensor) -> Axes:
    """The axes of another tensor in the same memory that step through it as these do; unknown unless each is one."""
    steps = [
        [other for other in range(new.ndim) if new.shape[other] > 1 and new.stride(other) == old.strides[axis]]
        for axis in old.axes
        if old.shape[axis] > 1
    ]
    return frozenset(step[0] for step in steps) if all(len(step) == 1 for step in steps) else UNKNOWN


def _viewed(axes: Axes, old: Tensor, new: Tensor, args: Any, kwargs: Any) -> Axes:
    """The axes after a view, which splits and merges neighbouring axes; unknown where channels merge with others."""
    if old.ndim == new.ndim and old.shape == new.shape:
        return axes
    found: set[int] = set()
    for axis in axes:
        if old.shape[axis] == 1:  # known again by how many elements lie in the axes before it, and not being images
            same = [
                other
                for other in range(1, new.ndim)
                if new.shape[other] == 1 and math.prod(new.shape[:other]) == math.prod(old.shape[:axis])
            ]
            if len(same) != 1:
                return UNKNOWN
            found.update(same)
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


def _rotated(axes: Axes, old: Tensor, new: Tensor, args: Any, kwargs: Any) -> Axes:
    turns = args[1] if len(args) > 1 else kwargs.get("k", 1)
    dims = args[2] if len(args) > 2 else kwargs.get("dims", (0, 1))
    return _transposed(axes, old, new, (old, *dims), {}) if turns % 2 else axes


def _without(axes: Axes, dims: Sequence[int]) -> Axes:
    """The axes that are left once `dims` are gone."""
    return frozenset(axis - sum(dim < axis for dim in dims) for axis in axes.difference(dims))


def _selected(axes: Axes, old: Tensor, new: Tensor, args: Any, kwargs: Any) -> Axes:
    return _without(axes, [(args[1] if len(args) > 1 else kwargs.get("dim", 0)) % old.ndim])


def _squeezed(axes: Axes, old: Tensor, new: Tensor, args: Any, kwargs: Any) -> Axes:
    dims = args[1] if len(args) > 1 else range(old.ndim)
    dims = [dims] if isinstance(dims, int) else dims
    return _without(axes, [dim % old.ndim for dim in dims if old.shape[dim] == 1])


def _unsqueezed(axes: Axes, old: Tensor, new: Tensor, args: Any, kwargs: Any) -> Axes:
    at = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % new.ndim
    return frozenset(axis + (axis >= at) for axis in axes)


def _reduced(axes: Axes, old: Tensor, new: Tensor, args: Any, kwargs: Any) -> Axes:
    return _over(axes, old, new, kwargs.get("dim", args[1] if len(args) > 1 else None))


def _normed(axes: Axes, old: Tensor, new: Tensor, args: Any, kwargs: Any) -> Axes:
    return _over(axes, old, new, kwargs.get("dim", args[2] if len(args) > 2 else None))


def _over(axes: Axes, old: Tensor, new: Tensor, dims: Any) -> Axes:
    """The axes after a reduction over dims; None or empty: over all."""
    if isinstance(dims, int) and not isinstance(dims, bool):
        dims = [dims]
    dims = [dim % old.ndim for dim in dims] if isinstance(dims, list | tuple) and dims else list(range(old.ndim))
    return axes.difference(dims) if old.ndim == new.ndim else _without(axes, dims)


def _unfolded(axes: Axes, old: Tensor, new: Tensor, args: Any, kwargs: Any) -> Axes:
    """Windows along one axis, in a new last axis; unknown where they are windows of channels."""
    return UNKNOWN if args[1] % old.ndim in axes else axes


_NORMS = names("native_layer_norm _fused_rms_norm")
_PUT_AT_AXIS_1 = names("pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle") | (
    CONVOLUTIONS_AND_NORMS - _NORMS
)
_PUT_LAST = names("linear mkldnn_linear") | _NORMS
_LOSE = names("as_strided squeeze_ t_ resize_ set_ _cdist_forward nonzero")  # the axes may be others afterwards
_OF_MATRICES = ("linalg_", "_linalg_")  # how names of operators begin for which that holds, too, unless in _MOVES
_INDEXED = names("index _unsafe_index")
_WRITTEN_AT = names("index_put index_put_ _unsafe_index_put _index_put_impl _index_put_impl_")
_PRODUCTS = names("mm addmm bmm baddbmm")
_VIEWS = names("view _unsafe_view _reshape_alias _reshape")
_REDUCTIONS = names("sum mean amax amin max min prod var std var_mean median any all argmax argmin logsumexp")
_MOVES: dict[str, Callable[[Axes, Tensor, Tensor, Any, Any], Axes]] = {
    **dict.fromkeys(_VIEWS, _viewed),
    "permute": _permuted,
    **dict.fromkeys(names("transpose t transpose_"), _transposed),
    **dict.fromkeys(names("select unbind"), _selected),
    "rot90": _rotated,
    "squeeze": _squeezed,
    **dict.fromkeys(names("unsqueeze unsqueeze_ stack"), _unsqueezed),
    **dict.fromkeys(names("linalg_vector_norm norm"), _normed),
    "unfold": _unfolded,
    **dict.fromkeys(_REDUCTIONS, _reduced),
}
