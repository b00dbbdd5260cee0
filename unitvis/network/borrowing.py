"""A model is used and left as it came: its training flags, what its own `eval` did, the tensors that a pass changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unitvis.errors import UnitvisError

LEARNING_PASSES = 4  # the first one gets an image of zeros, by which an observed range does not change


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode, and a compiled one into eager mode, for a `with` block.

    Each module's training flag is restored afterwards. A module with a `train` method of its own, such as LoRA layers
    that merge their weights in eval mode, is switched back by it; then the tensors that `eval` changed get their bits
    back, unless they were trained meanwhile. Raises UnitvisError where `eval` replaces parameters or modules for good.
    """
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
    changed = [(held, _mark(held.tensor)) for _, held in before.values() if held.differs()]
    before.clear()  # the copies of what did not change
    compiled = any(module._compiled_call_impl or type(module).__name__ == "OptimizedModule" for module in modules)
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        untrained = [held for held, mark in changed if _mark(held.tensor) == mark]
        for module, flag in zip(modules, flags, strict=True):  # parents first: their train() reaches their children
            if module in switching and module.training != flag:
                module.train(flag)
        for module, flag in zip(modules, flags, strict=True):
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


def _mark(tensor: Tensor) -> tuple[int | None, int | None]:
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
        return cls(tensor, tensor.data, tensor.data.clone(), _mark(tensor))

    def differs(self) -> bool:
        """Whether the tensor was written to; by its values too, since writes to `.data` leave no mark."""
        return _mark(self.tensor) != self.mark or not torch.equal(self.tensor.data, self.values)

    def put_back(self) -> None:
        """Give the tensor its memory and values back; autograd and version counters do not see it."""
        with torch.no_grad():
            self.memory.copy_(self.values)
            self.tensor.data = self.memory


class Tensors:
    """The parameters and buffers of a model, put back after forward passes that change them, as counters and observers.

    So responses do not depend on what ran before. The first `LEARNING_PASSES` show which ones change; later passes copy
    only those.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.changing: set[str] = set()  # names of the tensors that were seen to change
        self._passes = 0

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Context of one forward pass; UnitvisError where a later one changes a tensor that the first ones did not."""
        self._passes += 1
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
        copied = tensors if self._passes <= LEARNING_PASSES else tensors.keys() & self.changing
        held = {name: _Held.of(tensors[name]) for name in copied}
        marks = {name: _mark(tensor) for name, tensor in tensors.items() if name not in held}
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
        self.changing |= changed
        if lost := [name for name, mark in marks.items() if _mark(tensors[name]) != mark]:
            raise UnitvisError(
                f"{lost[0]!r} changed in this forward pass, though not in the first ones, so the model cannot be left "
                f"as it came; switch off what counts or records"
            )
