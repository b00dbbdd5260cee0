"""The layers of a model as one forward pass shows them, and their selection by name, by pattern or by default."""

# mypy: allow-untyped-calls

from __future__ import annotations

import fnmatch
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from unitvis.errors import UnitvisError, abridged, closest_names
from unitvis.network.channels import ChannelAxes
from unitvis.network.forward import Rectangle, as_map, call
from unitvis.network.operators import activation_after, last_layer


@dataclass(frozen=True)
class Layer:
    """A layer whose output is a feature map, as one forward pass showed it."""

    name: str
    channels: int
    height: int
    width: int
    feeds_relu: bool  # only ReLUs use its output, so a response at or below 0 does not fire
    fed_by: str | None  # for an activation: the convolution, Linear or BatchNorm whose output it takes
    # The only positions that are ranked: rows top <= row < bottom, columns left <= column < right; None: all.
    inside: Rectangle | None = None
    head: bool = False  # the network's last layer, whose units are its outputs: see `Examination.head`

    def to_json(self) -> dict[str, Any]:
        """The layer's entry in a manifest; `inside` is there only if it is not None, `head` only if it is true."""
        entry = asdict(self)
        inside, head = entry.pop("inside"), entry.pop("head")
        return entry | ({} if inside is None else {"inside": list(inside)}) | ({"head": True} if head else {})


class _OutputUses(TorchFunctionMode):
    """Records which torch functions use each module's output; tensors are compared by identity.

    Functional calls are seen as well as modules.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outputs = WeakTensorKeyDictionary()  # names of modules; a tensor that is gone has no further uses
        self.used_by_relu: dict[str, list[bool]] = {}  # one entry for each use of a module's output: True for a ReLU

    def producers(self, tensor: object) -> list[str]:
        """Names of the modules that returned this tensor, innermost first."""
        return self.outputs.get(tensor, []) if isinstance(tensor, Tensor) else []

    def add(self, name: str, tensor: Tensor) -> None:
        """Record that a module returned a tensor."""
        self.outputs.setdefault(tensor, []).append(name)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        known = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t in self.outputs]
        versions = [t._version for t in known]
        result = func(*args, **kwargs)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):  # reading a shape does not count
            for tensor, version in zip(known, versions, strict=True):
                for name in self.producers(tensor):
                    self.used_by_relu.setdefault(name, []).append(_is_relu(func, args, kwargs))
                if tensor._version != version:
                    self.outputs.pop(tensor, None)  # overwritten in place: no longer the module's output
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
        self._model = model
        self.runs: dict[str, int] = {}
        self._outputs: dict[str, object] = {}
        self._inputs: dict[str, list[str]] = {}  # the modules whose output each module takes, in any of its runs
        self._operators: dict[str, range] = {}  # the numbers of those that ran in each module
        self._computed: set[str] = set()  # the modules whose output depends on the image
        self._elsewhere: dict[str, str] = {}  # modules whose operators are not seen, with where they are computed
        self._made_by: dict[str, int | None] = {}  # the number of the operator that made each module's output
        self.axes: dict[str, int | None] = {}
        self._uses = uses = _OutputUses()
        self._seen = seen = ChannelAxes(image)
        own_thread = threading.get_ident()

        def enter(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                self._inputs.setdefault(name, []).extend(uses.producers(args[0]) if args else [])
                self._operators[name] = range(len(seen.operators), len(seen.operators))

            return hook

        def leave(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
                self.runs[name] = self.runs.get(name, 0) + 1
                self._outputs[name] = output
                self._operators[name] = range(self._operators[name].start, len(seen.operators))
                if threading.get_ident() != own_thread:
                    self._elsewhere[name] = "in a thread that the model starts"
                elif isinstance(output, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(output):
                    self._elsewhere[name] = "within torch.vmap or another transform of torch.func"
                if isinstance(output, Tensor):
                    self._outputs[name] = torch.empty(output.shape, dtype=output.dtype, device="meta")  # no values
                    if seen.is_computed(output):
                        self._computed.add(name)
                    uses.add(name, output)
                    self.axes[name] = seen.axis_of(output)
                    self._made_by[name] = seen.operator_of(output)

            return hook

        hooked = {n: m for n, m in self.modules.items() if not isinstance(m, torch.jit.ScriptModule)}
        self._sees_all_uses = len(hooked) == len(self.modules)  # TorchScript calls no functions that could be seen
        handles = [m.register_forward_pre_hook(enter(n)) for n, m in hooked.items()]
        handles += [m.register_forward_hook(leave(n)) for n, m in hooked.items()]
        try:
            with torch.no_grad(), uses, seen:
                returned = call(model, image)
        finally:
            for handle in handles:
                handle.remove()
        self.head = self._head([leaf.shape for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)])

    def _head(self, shapes: Sequence[torch.Size]) -> str | None:
        """The name of a classifier's head: the last module with parameters of its own, if it runs once.

        The model must return a vector of as many numbers as the module has channels, [1, C] or [1, C, 1, 1]; what comes
        between (an activation, pooling, softmax) has no parameters. None for other models. shapes: of what it returns.
        """
        weighted = [name for name in self.runs if next(self.modules[name].parameters(recurse=False), None) is not None]
        if not weighted or self.runs[name := weighted[-1]] > 1:
            return None
        output = self._outputs[name]
        axis = 1 if isinstance(output, Tensor) and output.ndim == 2 else self.axes.get(name)
        if not isinstance(output, Tensor) or axis is None:
            return None
        vectors = [shape.numel() for shape in shapes if shape[:1] == (1,) and shape[1:2].numel() == shape.numel()]
        return name if output.shape[axis] in vectors else None

    def following_batch_norms(self) -> dict[str, list[str]]:
        """For each module that BatchNorms directly follow, usually one, their names in forward order.

        Of a BatchNorm that calls another inside it, the inner one counts.
        """
        found: dict[str, list[str]] = {}
        for name, sources in self._inputs.items():
            if isinstance(self.modules[name], nn.modules.batchnorm._BatchNorm):
                for source in dict.fromkeys(sources):
                    outside = [norm for norm in found.get(source, []) if not name.startswith(f"{norm}.")]
                    found[source] = [*outside, name]
        return found

    def chosen(
        self,
        patterns: Sequence[str] | str | None,
        exclude: Sequence[str] | str = (),
        of_two: Mapping[str, list[int]] | None = None,
    ) -> list[Layer]:
        """Describe the layers that are ranked, in forward order.

        patterns: names or shell patterns; None: `_default_names`, of which those that cannot be ranked are left out
        with a warning. exclude: names or shell patterns of layers to leave out. of_two: see `maps_of_two`; default
        layers that are called for each image alone are left out by it. Raises UnitvisError for a pattern without a
        match, for a layer that was named and cannot be ranked, and where no layer is left.
        """
        excluded = self._matching(exclude)
        if patterns is not None:
            return [self.layer(name) for name in self._named(patterns, excluded)]
        layers: list[Layer] = []
        reasons: dict[str, str] = {}
        names, unfit = self._default_names()
        for line in unfit:
            warnings.warn(line)
        for name in names:
            tap = self.before_activation(name) or name
            if excluded.intersection((name, tap)):
                continue
            try:
                if tap == name and (operator := self._activation_after(name)):
                    raise UnitvisError(
                        f"layer {name!r} ({type(self.modules[name]).__name__}) goes on to compute {operator} and has "
                        f"no module whose output is the value before; name {name!r} to rank what it returns"
                    )
                layer = self.layer(tap)
                if of_two and of_two.get(tap) != [2]:
                    raise UnitvisError(
                        f"layer {tap!r} is not computed for all images of a batch at once: for 2 images it returned "
                        f"{' and '.join(map(str, of_two.get(tap, [0])))} maps; name a layer outside that loop"
                    )
                layers.append(layer)
            except UnitvisError as error:
                reasons[name] = str(error)
        if reasons:
            *others, last = reasons
            also = f"; left out too, for such a reason: {abridged(others)}" if others else ""
            warnings.warn(f"left out: {reasons[last]}{also}")
        if not layers:
            if isinstance(self._model, _CONVOLUTION):
                raise UnitvisError(
                    "the model itself is the convolution, and layers are modules inside of a model; give "
                    "torch.nn.Sequential(model)"
                )
            first = next(iter([*reasons.values(), *unfit]), "")
            raise UnitvisError(
                f"the model has no convolution that can be ranked{f' ({first})' if first else ''}; name layers: "
                f"{abridged(list(self.runs))}"
            )
        return layers

    def _default_names(self) -> tuple[list[str], list[str]]:
        """Convolutions in forward order, replaced by the BatchNorms that directly follow them; and lines of the rest.

        The lines name convolutions that do not run, or more than once, and those whose BatchNorm does.
        """
        unfit: list[str] = []
        batch_norms = self.following_batch_norms()
        convolutions = {name for name, module in self.modules.items() if isinstance(module, _CONVOLUTION)}
        if idle := [name for name in self.modules if name in convolutions and name not in self.runs]:
            unfit.append(f"left out, because they do not run in a forward pass: {abridged(idle)}")
        order = [name for name in self.runs if name in convolutions]
        if repeated := [name for name in order if self.runs[name] > 1]:
            unfit.append(f"left out, because they run more than once in a forward pass: {abridged(repeated)}")
        once = [name for name in order if self.runs[name] == 1]
        repeated_norms = {name: [norm for norm in norms if self.runs[norm] > 1] for name, norms in batch_norms.items()}
        if shared := [name for name in once if repeated_norms.get(name)]:
            norms = abridged(list(dict.fromkeys(norm for name in shared for norm in repeated_norms[name])))
            unfit.append(
                f"left out, because the BatchNorm behind them ({norms}) runs more than once in a forward pass: "
                f"{abridged(shared)}; name them to rank what they return before it"
            )
        read = [layer for name in once if name not in shared for layer in batch_norms.get(name, [name])]
        return list(dict.fromkeys(read)), unfit

    def _matching(self, patterns: Sequence[str] | str) -> set[str]:
        """Names that names or shell patterns match; UnitvisError for a pattern without a match."""
        found: set[str] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            matches = [pattern] if pattern in self.modules else fnmatch.filter(self.modules, pattern)
            if not matches:
                raise UnitvisError(f"no layer is named {pattern!r}; {closest_names(pattern, self.modules)}")
            found.update(matches)
        return found

    def _named(self, patterns: Sequence[str] | str, excluded: set[str]) -> list[str]:
        """Names of the layers that patterns match, in forward order; each runs exactly once."""
        named = self._matching(patterns) - excluded
        if not named:
            raise UnitvisError("no layer was named; leave layers out for every convolution")
        for name in sorted(named):
            if isinstance(self.modules[name], torch.jit.ScriptModule):
                raise UnitvisError(f"layer {name!r} is TorchScript, whose output cannot be read; give the eager module")
            if self.runs.get(name, 0) != 1:
                times = f"runs {self.runs[name]} times" if name in self.runs else "never ran"
                raise UnitvisError(
                    f"layer {name!r} {times} in one forward pass; only layers that run once can be ranked"
                )
        return [name for name in self.runs if name in named]

    def layer(self, name: str) -> Layer:
        """Describe one layer; raises UnitvisError where its output cannot be ranked (see `as_map`)."""
        output = self._outputs[name]
        if name in self._elsewhere:
            raise UnitvisError(
                f"layer {name!r} is computed {self._elsewhere[name]}, where its operators cannot be followed; name a "
                f"layer outside of it, or give a model that computes it without"
            )
        if isinstance(output, Tensor) and name not in self._computed:
            raise UnitvisError(
                f"layer {name!r} returns a tensor of shape {list(output.shape)} that does not depend on the image, or "
                f"not by operators of PyTorch; name another layer"
            )
        maps = as_map(name, self.axes.get(name), output)
        if len(maps) != 1:
            raise UnitvisError(
                f"layer {name!r} returns {len(maps)} maps for one image (windows or heads folded into the batch); "
                f"name a layer before or after it"
            )
        _, channels, height, width = maps.shape
        uses = self._uses.used_by_relu.get(name, [])
        linear = isinstance(self.modules[name], _LINEAR)
        feeding = [] if linear else [s for s in self._inputs[name] if isinstance(self.modules[s], _LINEAR)]
        only_relus = self._sees_all_uses and bool(uses) and all(uses)
        fed_by = self.before_activation(name) or (feeding[0] if feeding else None)
        return Layer(name, channels, height, width, only_relus, fed_by, head=name == self.head)

    def _activation_after(self, name: str) -> str | None:
        """The operator that a module applies to its convolution or normalisation and that is not linear; or None."""
        return activation_after(self._seen.operators, self._operators.get(name, range(0)))

    def before_activation(self, name: str) -> str | None:
        """The innermost module in a module that returns the value to which the module applies an activation at once.

        None where there is no such module: the value has no name, or another operator comes between.
        """
        own = self._operators.get(name, range(0))
        last = last_layer(self._seen.operators, own)
        if last is None or activation_after(self._seen.operators, range(own.start, min(last + 2, own.stop))) is None:
            return None
        inside = (n for n, by in self._made_by.items() if by == last and n.startswith(name + ".") and self.runs[n] == 1)
        return next(inside, None)


def maps_of_two(model: nn.Module, image: Tensor) -> dict[str, list[int]]:
    """For each module, the lengths of the tensors that it returns in a forward pass of an image [1, C, H, W] twice."""
    found: dict[str, list[int]] = {}

    def leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            if isinstance(output, Tensor):
                found.setdefault(name, []).append(len(output) if output.ndim else 0)

        return hook

    modules = {n: m for n, m in model.named_modules() if n and not isinstance(m, torch.jit.ScriptModule)}
    handles = [module.register_forward_hook(leave(name)) for name, module in modules.items()]
    try:
        with torch.no_grad():
            call(model, torch.cat([image, image]))
    finally:
        for handle in handles:
            handle.remove()
    return found


_CONVOLUTION = nn.modules.conv._ConvNd  # of 1, 2 or 3 dimensions, transposed ones too
_LINEAR = (_CONVOLUTION, nn.Linear, nn.modules.batchnorm._BatchNorm)
