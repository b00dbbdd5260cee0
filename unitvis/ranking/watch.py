"""Notices weights that move while responses are recorded, without a look at the device."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from unitvis.errors import UnitvisError
from unitvis.network.borrowing import mark_of


class WeightsWatch:
    """Watches the parameters and buffers of a model for changes between the passes of a Recorder.

    Around each pass it compares which tensors there are, their addresses and their version counters, which PyTorch
    keeps on the host and raises with each write. Where these moved, as by `model.to(memory_format=...)`, hashes tell
    whether values did. What a pass itself writes (a counter of calls) does not count. Writes that bypass the counters
    (`parameter.data`) are found by `refuse`, by a hash, unless they were taken back.

    evaluating: makes the context in which values are compared, the model's eval mode, which may merge weights.
    """

    def __init__(self, model: nn.Module, evaluating: Callable[[], AbstractContextManager[None]]) -> None:
        self._model, self._evaluating = model, evaluating
        with evaluating():
            self._hashes = _hashes(model)
            self._take_in()
        self._dtypes = {name: tensor.dtype for name, tensor in _tensors(model)}
        self._moved: str | None = None  # name of a tensor
        self.own: set[str] = set()  # names of the tensors that a pass writes

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Context of passes: note a tensor that was written to before them, and count what they write as their own."""
        self.look()
        try:
            yield
        finally:  # also of a pass that raised, after which a loop may go on
            if self._moved_marks():
                self.own |= self._changed()
                self._take_in()

    def look(self) -> None:
        """Note a tensor that got other values since the last pass; UnitvisError if it got another type of numbers."""
        if self._moved is None and self._moved_marks():
            with self._evaluating():
                self._look()

    def _look(self) -> None:
        changed = self._changed()
        now = dict(_tensors(self._model))
        for name in sorted(changed & now.keys() & self._dtypes.keys()):
            if (dtype := now[name].dtype) != (before := self._dtypes[name]):
                raise UnitvisError(
                    f"{name!r} was converted from {before} to {dtype} while images were recorded; convert the model "
                    f"before the first image, and leave it until the result is made"
                )
        hashes = _hashes(self._model, changed)
        self._moved = min((n for n in changed if n not in hashes or hashes[n] != self._hashes.get(n)), default=None)
        if self._moved is None:
            self._take_in()

    def refuse(self, *, hashes: bool) -> None:
        """Raise UnitvisError that names a tensor that moved, if one did. hashes: compare contents, too."""
        self.look()
        if hashes and self._moved is None:
            with self._evaluating():
                now = _hashes(self._model)
            names = {name for name in {**self._hashes, **now} if self._hashes.get(name) != now.get(name)}
            self._moved = min(names - self.own, default=None)
        if self._moved is not None:
            raise UnitvisError(
                f"the weights moved while images were recorded ({self._moved!r} was written to), so the responses are "
                "those of different networks; record with one set of weights, or with Recorder(weights='moving'), "
                "whose units are unseparated"
            )

    def _take_in(self) -> None:
        """Take the tensors as they are for those that the next look compares with."""
        self._seen = {name: (tensor, mark_of(tensor)) for name, tensor in _tensors(self._model)}
        self._marks = _marks(self._model)

    def _moved_marks(self) -> bool:
        """Whether anything changed, which costs a tenth of telling what; the tensors that were seen are still held."""
        return self._marks != _marks(self._model)

    def _changed(self) -> set[str]:
        before = self._seen
        now = {name: (tensor, mark_of(tensor)) for name, tensor in _tensors(self._model)}
        names = {
            name
            for name in {**before, **now}
            if name not in before
            or name not in now
            or before[name][0] is not now[name][0]
            or before[name][1] != now[name][1]
        }
        return names - self.own


def _marks(model: nn.Module) -> list[tuple[int, int | None, int | None]]:
    """Identity and `mark_of` of every tensor of a model, in the order of its modules."""
    found, seen, left = [], set(), [model]
    while left:
        module = left.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        for registry in (module._parameters, module._buffers):
            found += [(id(tensor), *mark_of(tensor)) for _, tensor in registry.items() if tensor is not None]
        left += module.children()
    return found


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


def _hashes(model: nn.Module, names: Collection[str] | None = None) -> dict[str, tuple[torch.Size, bytes]]:
    """Shape and hash of each tensor's bytes, by name; names: of those alone; None: of all.

    Sparse and quantised tensors, and those without values, have no plain bytes and are left out.
    """
    return {
        name: (
            tensor.shape,
            hashlib.blake2b(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data).digest(),
        )
        for name, tensor in _tensors(model)
        if names is None or name in names
        if tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
    }
