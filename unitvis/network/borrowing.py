"""A model is used and left as it came: its training flags, what its own `eval` did, the tensors that a pass changes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from unitvis.errors import UnitvisError
from unitvis.network.attributes import Attribute, contents_of, kept_attributes

LEARNING_PASSES = 5  # the first two get images of zeros, by which an observed range does not change


@dataclass
class _Use:
    """The use of one model by this process.

    lock: of the thread that computes with it, which may take it several times. before: for each open block of
    `evaluating`, in the order in which they began, what is to be put back at its end.
    """

    lock: AbstractContextManager[object] = field(default_factory=threading.RLock)
    before: dict[object, _Before] = field(default_factory=dict)


_uses: WeakKeyDictionary[nn.Module, _Use] = WeakKeyDictionary()
_uses_lock = threading.Lock()


def _use_of(model: nn.Module) -> _Use:
    with _uses_lock:
        return _uses.setdefault(model, _Use())


def turn(model: nn.Module) -> AbstractContextManager[object]:
    """Context in which no other thread computes with the model through unitvis; it may be entered again inside."""
    return _use_of(model).lock


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode, and a compiled one into eager mode, for a `with` block.

    Each module's training flag is restored afterwards; by the last one where blocks overlap, as in two threads. A
    module with a `train` method of its own, such as LoRA layers that merge their weights in eval mode, is switched back
    by it; then the tensors that `eval` changed get their bits back, unless they were trained meanwhile. Raises
    UnitvisError where `eval` replaces parameters or modules for good.
    """
    use, block = _use_of(model), object()
    with use.lock:
        use.before[block] = before = _Before.of(model)
    compiled = any(
        module._compiled_call_impl or type(module).__name__ == "OptimizedModule" for module in before.modules
    )
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        with use.lock:
            blocks = list(use.before)
            later = blocks[blocks.index(block) + 1 :]
            before = use.before.pop(block)
            if later:  # it needs eval mode still, and began in the mode that this block had chosen
                use.before[later[0]] = before
            else:
                before.put_back()


class _Before(NamedTuple):
    """How a model was before `evaluating`: its modules, their training flags, and what `eval` changed.

    switching: the modules that have a `train` or `eval` method of their own. changed: tensors with their marks after
    `eval`.
    """

    modules: list[nn.Module]
    flags: list[bool]
    switching: list[nn.Module]
    changed: list[tuple[_Held, tuple[int | None, int | None]]]

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Put a model into eval mode, and tell how it was."""
        modules = list(model.modules())
        flags = [module.training for module in modules]
        switching = [module for module in modules if _switches_itself(module)] if any(flags) else []
        before = {key: (name, _Held.of(tensor)) for key, (name, tensor) in _tensors(switching).items()}
        if any(flags):
            model.eval()
        kept = _tensors(switching)
        if gone := [name for key, (name, _) in before.items() if key not in kept]:
            raise UnitvisError(
                f"the model's eval() replaces {gone[0]!r} for good, and so it could not be left as it came; give "
                f"copy.deepcopy(model).eval()"
            )
        changed = [(held, mark_of(held.tensor)) for _, held in before.values() if held.differs()]
        return cls(modules, flags, switching, changed)

    def put_back(self) -> None:
        """Put the model back into the mode that it had."""
        untrained = [held for held, mark in self.changed if mark_of(held.tensor) == mark]
        flags = list(zip(self.modules, self.flags, strict=True))
        for module, flag in flags:  # parents first: their train() reaches their children
            if module in self.switching and module.training != flag:
                module.train(flag)
        for module, flag in flags:
            if module.training != flag:
                module.training = flag
        for held in untrained:
            held.put_back()


def _switches_itself(module: nn.Module) -> bool:
    """Whether a module has `train` or `eval` methods of its own, which may do more than set flags."""
    return type(module).train is not nn.Module.train or type(module).eval is not nn.Module.eval


def _tensors(modules: list[nn.Module]) -> dict[int, tuple[str, Tensor]]:
    """Parameters and buffers, with their names, of modules and of what is inside them, each once, by identity."""
    named = [pair for module in modules for pair in (*module.named_parameters(), *module.named_buffers())]
    return {id(tensor): (name, tensor) for name, tensor in reversed(named)}  # the first name, its longest, counts


def mark_of(tensor: Tensor) -> tuple[int | None, int | None]:
    """What changes when a tensor is written to or given other memory: its version and address, where it has them."""
    address = tensor.data_ptr() if tensor.layout == torch.strided else None
    return None if tensor.is_inference() else tensor._version, address


class _Held(NamedTuple):
    """A tensor, its memory, a copy of its values and its mark, from before something that may change it."""

    tensor: Tensor
    memory: Tensor
    values: Tensor
    mark: tuple[int | None, int | None]

    @classmethod
    def of(cls, tensor: Tensor) -> _Held:
        return cls(tensor, tensor.data, tensor.data.clone(), mark_of(tensor))

    def differs(self) -> bool:
        """Whether the tensor has other values or other memory; a write of equal values moves its mark alone."""
        moved = mark_of(self.tensor)[1] != self.mark[1]
        return moved or (not self.values.is_meta and not torch.equal(self.tensor.data, self.values))

    def still(self, mark: tuple[int | None, int | None]) -> bool:
        """Whether the tensor, which had this mark before it was written to, has the values that it has here."""
        return mark == self.mark and not self.differs()

    def put_back(self) -> None:
        """Give the tensor its memory and values back; autograd and version counters do not see it."""
        with torch.no_grad():
            self.memory.copy_(self.values)
            self.tensor.data = self.memory


class Tensors:
    """The parameters and buffers of a model, put back after forward passes that change them, as counters and observers.

    Attributes of its modules are put back with them, see `kept_attributes`.

    So responses do not depend on what ran before. The first `LEARNING_PASSES` show which ones change; later passes copy
    only those.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.changing: set[str] = set()  # names of the tensors that were seen to change
        self.changing_attributes: set[Attribute] = set()  # of modules, that were seen to change
        self._rewritten: set[str] = set()  # and of those that later passes wrote to without a change
        self._settled: dict[str, _Held] = {}  # buffers that the first passes did not change, as they were then
        self._passes = 0

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Context of one forward pass, which has the model for itself.

        UnitvisError where a later pass changes a tensor that the first ones did not.
        """
        learning = self._passes < LEARNING_PASSES
        with turn(self._model), kept_attributes(self._model) as changed:
            before = contents_of(self._model) if learning else {}
            yield from self._kept()
            now = contents_of(self._model) if learning else {}
        in_place = {key for key, contents in before.items() if now.get(key) != contents}
        self.changing_attributes |= changed | in_place

    def _kept(self) -> Iterator[None]:
        learning = self._passes < LEARNING_PASSES
        registries = [
            (f"{name}." if name else "", registry, dict(registry.items()))  # those of TorchScript are not quite dicts
            for name, module in self._model.named_modules()
            for registry in (module._parameters, module._buffers)
        ]
        tensors = {
            prefix + key: tensor
            for prefix, _, before in registries
            for key, tensor in before.items()
            if isinstance(tensor, Tensor)
        }
        copied = tensors if learning else tensors.keys() & (self.changing | self._rewritten)
        held = {name: _Held.of(tensors[name]) for name in copied}
        marks = {name: mark_of(tensor) for name, tensor in tensors.items() if name not in held}
        try:
            yield
        finally:
            for _, registry, before in registries:
                now = dict(registry.items())
                replaced = [*now] != [*before] or any(now[key] is not tensor for key, tensor in before.items())
                if replaced and isinstance(registry, dict):
                    registry.clear()
                    registry.update(before)
            changed = {name for name, one in held.items() if one.differs()}
            for name in changed:
                held[name].put_back()
        self._passes += 1  # one that raised may not have come to what changes
        self.changing |= changed
        if self._passes == LEARNING_PASSES:
            buffers = dict(self._model.named_buffers())
            kept = {name: one for name, one in held.items() if name in buffers and name not in self.changing}
            self._settled = {name: one._replace(mark=mark_of(one.tensor)) for name, one in kept.items()}
        written = {name for name, mark in marks.items() if mark_of(tensors[name]) != mark}
        equal = {name for name in written if name in self._settled and self._settled[name].still(marks[name])}
        self._rewritten |= equal
        if lost := sorted(written - equal):
            raise UnitvisError(
                f"{lost[0]!r} changed in this forward pass, though not in the first ones, so the model cannot be left "
                f"as it came; switch off what counts or records"
            )
