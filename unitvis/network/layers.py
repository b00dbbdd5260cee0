"""The layers of a model as one forward pass shows them, and their selection by name, by pattern or by default."""

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
from unitvis.network.channels import ChannelAxes
from unitvis.network.forward import as_map, call


@dataclass(frozen=True)
class Layer:
    """A layer whose output is a feature map, as one forward pass showed it."""

    name: str
    channels: int
    height: int
    width: int
    feeds_relu: bool  # only ReLUs use its output, so a response at or below 0 does not fire
    fed_by: str | None  # for an activation: the convolution, Linear or BatchNorm whose output it takes


class _OutputUses(TorchFunctionMode):
    """Records which torch functions use each module's output; tensors are compared by identity.

    Functional calls are seen as well as modules.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[int, tuple[Tensor, list[str]]] = {}  # by id; holding the tensors keeps each id unique
        self.used_by_relu: dict[str, list[bool]] = {}  # one entry for each use of a module's output: True for a ReLU

    def producers(self, tensor: object) -> list[str]:
        """Names of the modules that returned this tensor, innermost first."""
        return self.outputs.get(id(tensor), (None, []))[1]

    def add(self, name: str, tensor: Tensor) -> None:
        """Record that a module returned a tensor."""
        self.outputs.setdefault(id(tensor), (tensor, []))[1].append(name)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        known = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and id(t) in self.outputs]
        versions = [t._version for t in known]
        result = func(*args, **kwargs)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):  # reading a shape does not count
            for tensor, version in zip(known, versions, strict=True):
                for name in self.producers(tensor):
                    self.used_by_relu.setdefault(name, []).append(_is_relu(func, args, kwargs))
                if tensor._version != version:
                    self.outputs.pop(id(tensor), None)  # overwritten in place: no longer the module's output
        return result


def _is_relu(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True for a function that maps everything at or below 0 to 0 and keeps the order above (ReLU, ReLU6)."""
    name = getattr(func, "__name__", "")
    if name in ("hardtanh", "hardtanh_"):  # what nn.ReLU6 calls
        return (args[1] if len(args) > 1 else kwargs.get("min_val", -1.0)) == 0
    return name in ("relu", "relu_", "relu6")


class Examination:
    """Records one forward pass of an image [1, C, H, W] through the whole model.

    modules: by name. runs: how often each module ran, in the order in which modules first returned. axes: which axis of
    each module's output holds the channels, None where that is unknown.
    """

    def __init__(self, model: nn.Module, image: Tensor) -> None:
        self.modules = {name: module for name, module in model.named_modules() if name}
        self.runs: dict[str, int] = {}
        self._outputs: dict[str, object] = {}
        self._inputs: dict[str, list[str]] = {}  # the modules whose output each module takes
        self.axes: dict[str, int | None] = {}
        self._uses = uses = _OutputUses()
        channel_axes = ChannelAxes(image)

        def enter(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                self._inputs[name] = list(uses.producers(args[0])) if args else []

            return hook

        def leave(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
                self.runs[name] = self.runs.get(name, 0) + 1
                self._outputs[name] = output.detach() if isinstance(output, Tensor) else output
                if isinstance(output, Tensor):
                    uses.add(name, output)
                    self.axes[name] = channel_axes.axis_of(output)

            return hook

        hooked = {n: m for n, m in self.modules.items() if not isinstance(m, torch.jit.ScriptModule)}
        self._sees_all_uses = len(hooked) == len(self.modules)  # TorchScript calls no functions that could be seen
        handles = [m.register_forward_pre_hook(enter(n)) for n, m in hooked.items()]
        handles += [m.register_forward_hook(leave(n)) for n, m in hooked.items()]
        try:
            with torch.no_grad(), uses, channel_axes:
                call(model, image)
        finally:
            for handle in handles:
                handle.remove()

    def following_batch_norms(self) -> dict[str, str]:
        """For each module that a BatchNorm directly follows, the name of that BatchNorm."""
        return {
            source: name
            for name, sources in self._inputs.items()
            if isinstance(self.modules[name], nn.modules.batchnorm._BatchNorm)
            for source in sources
        }

    def default_layers(self) -> list[str]:
        """Names of the convolutions that ran once, in forward order; a BatchNorm that directly follows one replaces it.

        Raises UnitvisError where there is none.
        """
        batch_norms = self.following_batch_norms()
        convolutions = [n for n in self.runs if isinstance(self.modules[n], nn.Conv2d | nn.ConvTranspose2d)]
        names = dict.fromkeys(batch_norms.get(name, name) for name in convolutions if self.runs[name] == 1)
        repeated = [name for name in convolutions if self.runs[name] > 1]
        if repeated:
            warnings.warn(f"left out, because they run more than once in a forward pass: {', '.join(repeated)}")
        if not names:
            raise UnitvisError(f"the model has no convolution that runs once; name layers: {abridged(list(self.runs))}")
        return list(names)

    def select(self, patterns: Sequence[str] | str | None) -> list[str]:
        """Names of the layers that names or shell patterns match, in forward order; None gives `default_layers`.

        Raises UnitvisError for a pattern without a match and for a layer that did not run exactly once.
        """
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
            if isinstance(self.modules[name], torch.jit.ScriptModule):
                raise UnitvisError(f"layer {name!r} is TorchScript, whose output cannot be read; give the eager module")
            if self.runs.get(name, 0) != 1:
                times = f"runs {self.runs[name]} times" if name in self.runs else "never ran"
                raise UnitvisError(
                    f"layer {name!r} {times} in one forward pass; only layers that run once can be ranked"
                )
        return [name for name in self.runs if name in chosen]

    def layer(self, name: str) -> Layer:
        """Describe one layer; raises UnitvisError where its output is not a map (see `as_map`)."""
        axis = self.axes.get(name)
        _, channels, height, width = as_map(name, axis, self._outputs[name]).shape
        uses = self._uses.used_by_relu.get(name, [])
        linear = isinstance(self.modules[name], _LINEAR)
        feeding = [] if linear else [s for s in self._inputs[name] if isinstance(self.modules[s], _LINEAR)]
        only_relus = self._sees_all_uses and bool(uses) and all(uses)
        return Layer(name, channels, height, width, only_relus, feeding[0] if feeding else None)


_LINEAR = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.modules.batchnorm._BatchNorm)
