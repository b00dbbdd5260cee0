"""Tracing a model once and carrying reaches through its graph, operator by operator."""

from __future__ import annotations

import logging
import operator
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from unitvis.errors import UnitvisError
from unitvis.network.receptive_fields.reach import Reach, input_reach
from unitvis.network.receptive_fields.rules import Call, Operand, Pooling, Unsupported, carry
from unitvis.network.tracing import TRACING

_map_nodes: Any = fx.node.map_arg  # declared for functions from node to node only
Axes = tuple[Reach, Reach, Reach]  # along the input's images, rows and columns


ASKS_FOR_VALUES = "the model's code asks for values that are computed from the image"


class MixedError(UnitvisError):
    """Error for a response that depends on chance or on other images of its batch."""


class Traced(NamedTuple):
    """What a trace tells of one layer's map."""

    shape: tuple[int, ...]
    note: str  # why its reaches are unknown, else empty
    axes: Axes | None = None  # None for a constant


def trace(run: Callable[[Tensor], dict[str, Tensor]], images: Tensor) -> fx.GraphModule:
    """Trace `run` into an ATen graph without in-place operators, on fake tensors: nothing is computed.

    run: returns the graph's outputs by name; it is called once.
    """
    current = run
    with TRACING, _without_log(), forward_of_autograd_functions():
        for _ in range(2):  # twice, because some operators (circular padding) write to views below functionalisation
            traced = make_fx(torch.func.functionalize(current), tracing_mode="fake", _allow_non_fake_inputs=True)
            with torch.no_grad():
                graph = traced(images)
            if not _unseen_writes(graph):
                break
            current = graph
    return graph


@contextmanager
def forward_of_autograd_functions() -> Iterator[None]:
    """Let this thread run the forward alone of a `torch.autograd.Function`, the older form of which is not traced."""
    tracing, apply = threading.get_ident(), torch.autograd.Function.__dict__["apply"]

    def applied(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != tracing:
            return apply.__get__(None, cls)(*args, **kwargs)
        if cls.setup_context is not torch.autograd.Function.setup_context:
            return cls.forward(*args, **kwargs)
        return cls.forward(torch.autograd.function.FunctionCtx(), *args, **kwargs)

    torch.autograd.Function.apply = classmethod(applied)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]


@contextmanager
def _without_log() -> Iterator[None]:
    """Keep PyTorch from printing the traceback of an operator that fails on fake tensors."""
    log = logging.getLogger(FakeTensorMode.__module__)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _unseen_writes(graph: fx.GraphModule) -> list[fx.Node]:
    """In-place operators left in the graph, whose writes no node's value shows.

    Changes of strides, and writes to the model's own tensors or to the images, do not count.
    """
    return [
        node
        for node in graph.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        and node.target._schema.is_mutable
        and torch.Tag.inplace_view not in node.target.tags
        and not (isinstance(node.args[0], fx.Node) and node.args[0].op in ("placeholder", "get_attr"))
    ]


def reaches(graph: fx.GraphModule, names: Collection[str]) -> dict[str, Traced]:
    """Compute the shape and the reaches of the outputs of the graph that have these names.

    Those after an operator without a rule are unknown. Raises Unsupported for a graph with in-place operators, and
    MixedError for responses that depend on chance or on other images of the batch.
    """
    if writes := _unseen_writes(graph):
        raise Unsupported(f"no closed form for {writes[0].target}, which writes in place")
    walk = _Walk(graph)
    (returned,) = next(node for node in graph.graph.nodes if node.op == "output").args
    returned = {name: node for name, node in returned.items() if name in names}
    needed = set(returned.values())
    for node in reversed(graph.graph.nodes):
        if node in needed and node.op != "output":
            needed.update(node.all_input_nodes)
    with torch.device("cpu"):  # not on the caller's default device: the bounds are small
        for node in graph.graph.nodes:
            if node in needed and node.op != "output":
                walk.visit(node)
    return {
        name: Traced(tuple(node.meta["val"].shape), walk.unknown.get(node, ""), walk.axes.get(node))
        for name, node in returned.items()
    }


class _Walk:
    """The reaches of the nodes visited so far; a node in none of `axes`, `several` and `unknown` is a constant."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.axes: dict[fx.Node, Axes] = {}
        self.several: dict[fx.Node, list[Axes | None]] = {}  # of operators with several outputs
        self.unknown: dict[fx.Node, str] = {}  # why nothing is known of them
        self.constants: dict[fx.Node, Any] = {}  # values of constant nodes, computed when an index needs them

    def visit(self, node: fx.Node) -> None:
        """Find the reaches of one node, after those of its inputs."""
        if node.op == "placeholder":
            shape = node.meta["val"].shape
            self.axes[node] = (input_reach(shape, 0), input_reach(shape, -2), input_reach(shape, -1))
        elif node.op != "call_function":
            return
        else:
            try:
                self._follow(node)
            except Unsupported as error:
                self.unknown[node] = str(error)

    def _follow(self, node: fx.Node) -> None:
        if node.target is operator.getitem and node.args[0] in self.several:
            self._item(node)
        else:
            self._call(node)

    def _item(self, node: fx.Node) -> None:
        origin, index = node.args
        axes = self.several[origin][index]  # type: ignore[index]
        if axes is None:
            raise Unsupported(f"no closed form for output {index} of {origin.target}")  # type: ignore[union-attr]
        self.axes[node] = axes

    def _call(self, node: fx.Node) -> None:
        func = node.target
        args = _named_arguments(func, node) if isinstance(func, torch._ops.OpOverload) else {}
        if isinstance(func, torch._ops.OpOverload) and _is_random(func, args):
            raise MixedError(f"{func} is random: the model has active dropout or noise; switch it off")
        for origin in node.all_input_nodes:
            if origin in self.unknown:
                raise Unsupported(self.unknown[origin])
        if not isinstance(func, torch._ops.OpOverload):
            if any(origin in self.axes or origin in self.several for origin in node.all_input_nodes):
                raise Unsupported(f"no closed form for {func}")
            return
        if not any(origin in self.axes for origin in node.all_input_nodes):
            return
        value = node.meta["val"]
        if not isinstance(value, Tensor | list | tuple):
            raise Unsupported(ASKS_FOR_VALUES)
        values = [v for v in value if isinstance(v, Tensor)] if isinstance(value, list | tuple) else [value]
        results = []
        for axis in range(3):
            operands = _map_nodes(args, partial(self._operand, axis=axis))
            result = carry(Call(func, operands, tuple(values[0].shape), values[0].dtype))
            results.append([result] if isinstance(result, Reach) else list(result))
        first, last = results[0][0].bounds[:2]
        if bool((first + last > 0).any()):
            raise MixedError(f"{func} mixes the images of a batch, so that a response depends on its neighbours")
        if not isinstance(value, list | tuple):
            self.axes[node] = tuple(result[0] for result in results)  # type: ignore[assignment]
            return
        outputs: list[Axes | None] = list(zip(*results, strict=True))
        if len(outputs) == 1:  # one for all outputs of that shape: values and indices, variance and mean
            same_shape = [isinstance(v, Tensor) and v.shape == values[0].shape for v in value]
            outputs = [outputs[0] if same else None for same in same_shape]
        self.several[node] = outputs

    def _operand(self, node: fx.Node, axis: int) -> Any:
        axes = self.axes.get(node)
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            return self._constant(node)  # a number out of a constant tensor
        reach = None if axes is None else axes[axis]
        return Operand(
            tuple(value.shape), tuple(value.stride()), reach, lambda: self._constant(node), _pooling(node), value.dtype
        )

    def _constant(self, node: fx.Node) -> Any:
        if node.op == "placeholder" or node in self.axes:
            raise Unsupported("a value that depends on the image is used as an index")
        if node not in self.constants:
            if node.op == "get_attr":
                self.constants[node] = getattr(self.graph, str(node.target))
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._constant)
                with torch.no_grad():
                    self.constants[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self.constants[node]


def _pooling(node: fx.Node) -> Pooling | None:
    """The pooling that found the positions which this node holds, if there is one."""
    origin = node.args[0] if node.target is operator.getitem else None
    if not isinstance(origin, fx.Node) or node.args[1] != 1 or "max_pool" not in str(origin.target):
        return None
    assert isinstance(origin.target, torch._ops.OpOverload)  # noqa: S101 - for mypy; modules are traced inside
    return Pooling(_named_arguments(origin.target, origin), tuple(origin.all_input_nodes[0].meta["val"].shape))


def _named_arguments(func: torch._ops.OpOverload, node: fx.Node) -> dict[str, Any]:
    """The node's arguments by their names in the operator's schema, with defaults."""
    args = dict(zip((argument.name for argument in func._schema.arguments), node.args, strict=False))
    for argument in func._schema.arguments[len(node.args) :]:
        if argument.name in node.kwargs:
            args[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            args[argument.name] = argument.default_value
    return args


def _is_random(func: torch._ops.OpOverload, args: dict[str, Any]) -> bool:
    """True where this call draws random numbers: operators with a switch or a probability draw only when it is on."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for switch in ("dropout_p", "training", "train"):
        if args.get(switch) is not None:
            return bool(args[switch])
    return True
