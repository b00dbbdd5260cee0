"""The layers of a model: which modules run, how often, what feeds what, and which are read by default."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from unitvis.errors import UnitvisError, abridged, closest_names
from unitvis.network.forward import as_map, call


@dataclass(frozen=True)
class Layer:
    """A place in the model that can be tapped, as one forward pass showed it."""

    name: str
    channels: int
    height: int
    width: int
    feeds_relu: bool  # a ReLU takes its output, and nothing else does: at or below 0 it did not fire
    fed_by: str | None  # of an activation: the convolution (or its BatchNorm) whose output it takes


class _Watch(TorchFunctionMode):
    """Notes which functions take which module's output, by the tensor itself, so that functional calls count too."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[int, tuple[Tensor, list[str]]] = {}  # keeps the tensors alive: an id is not used twice
        self.taken_by: dict[str, list[bool]] = {}  # of each function that took a module's output: is it a ReLU

    def names(self, tensor: object) -> list[str]:
        """The modules that returned this very tensor, innermost first."""
        return self.outputs.get(id(tensor), (None, []))[1]

    def returned(self, name: str, tensor: Tensor) -> None:
        self.outputs.setdefault(id(tensor), (tensor, []))[1].append(name)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        known = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and id(t) in self.outputs]
        versions = [t._version for t in known]
        result = func(*args, **kwargs)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):  # not a question about its shape
            for tensor, version in zip(known, versions, strict=True):
                for name in self.names(tensor):
                    self.taken_by.setdefault(name, []).append(_is_relu(func, args, kwargs))
                if tensor._version != version:
                    self.outputs.pop(id(tensor), None)  # overwritten: no longer what the module returned
        return result


def _is_relu(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the function maps everything at or below 0 to 0 and keeps the order above."""
    name = getattr(func, "__name__", "")
    if name in ("hardtanh", "hardtanh_"):  # what nn.ReLU6 calls
        return (args[1] if len(args) > 1 else kwargs.get("min_val", -1.0)) == 0
    return name in ("relu", "relu_", "relu6")


class Examination:
    """One forward pass of one image [1, C, H, W] through the whole model: what ran, how often, and what feeds what."""

    def __init__(self, model: nn.Module, image: Tensor) -> None:
        self.modules = {name: module for name, module in model.named_modules() if name}
        self.runs: dict[str, int] = {}  # in the order in which modules first returned
        self._outputs: dict[str, object] = {}
        self._inputs: dict[str, list[str]] = {}
        self._watch = watch = _Watch()

        def enter(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                self._inputs[name] = list(watch.names(args[0])) if args else []

            return hook

        def leave(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
                self.runs[name] = self.runs.get(name, 0) + 1
                self._outputs[name] = output.detach() if isinstance(output, Tensor) else output
                if isinstance(output, Tensor):
                    watch.returned(name, output)

            return hook

        handles = [m.register_forward_pre_hook(enter(n)) for n, m in self.modules.items()]
        handles += [m.register_forward_hook(leave(n)) for n, m in self.modules.items()]
        try:
            with torch.no_grad(), watch:
                call(model, image)
        finally:
            for handle in handles:
                handle.remove()

    def normalised(self) -> dict[str, str]:
        """Of each module that a BatchNorm directly follows: that BatchNorm."""
        return {
            source: name
            for name, sources in self._inputs.items()
            if isinstance(self.modules[name], nn.modules.batchnorm._BatchNorm)
            for source in sources
        }

    def default_layers(self) -> list[str]:
        """Each convolution that ran once, or the BatchNorm that directly follows it; in the order of the forward."""
        normalised = self.normalised()
        convolutions = [n for n in self.runs if isinstance(self.modules[n], nn.Conv2d | nn.ConvTranspose2d)]
        names = dict.fromkeys(normalised.get(name, name) for name in convolutions if self.runs[name] == 1)
        repeated = [name for name in convolutions if self.runs[name] > 1]
        if repeated:
            warnings.warn(f"left out, because they run more than once in a forward pass: {', '.join(repeated)}")
        if not names:
            raise UnitvisError(f"the model has no convolution that runs once; name layers: {abridged(list(self.runs))}")
        return list(names)

    def select(self, patterns: Sequence[str] | str | None) -> list[str]:
        """Names of layers, in the order of the forward, that the names or shell patterns stand for; None: default."""
        if patterns is None:
            return self.default_layers()
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        chosen: set[str] = set()
        for pattern in patterns:
            found = [pattern] if pattern in self.modules else fnmatch.filter(self.modules, pattern)
            if not found:
                raise UnitvisError(f"no layer is named {pattern!r}; {closest_names(pattern, self.modules)}")
            chosen.update(found)
        if not chosen:
            raise UnitvisError("no layer was named; leave layers out for every convolution")
        for name in sorted(chosen):
            if self.runs.get(name, 0) != 1:
                times = f"runs {self.runs[name]} times" if name in self.runs else "never ran"
                raise UnitvisError(
                    f"layer {name!r} {times} in one forward pass; only layers that run once can be ranked"
                )
        return [name for name in self.runs if name in chosen]

    def layer(self, name: str) -> Layer:
        """What is known of one layer; raises UnitvisError where its output is no map."""
        _, channels, height, width = as_map(name, type(self.modules[name]), self._outputs[name]).shape
        relus = self._watch.taken_by.get(name, [])
        linear = isinstance(self.modules[name], _LINEAR)
        roots = [] if linear else [s for s in self._inputs[name] if isinstance(self.modules[s], _LINEAR)]
        return Layer(name, channels, height, width, bool(relus) and all(relus), roots[0] if roots else None)


_LINEAR = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.modules.batchnorm._BatchNorm)
