"""Rewriting a copy of the model for a scan: each convolution and the operators after it become one `Chain`.

The copy returns the layers' keys and ends after the last of them. Other operators stay as they are.
"""

from __future__ import annotations

import copy
import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import unitvis_kernels as uk
from unitvis.errors import first_line
from unitvis.network import copies
from unitvis.network.forward import Rectangle, as_map
from unitvis.network.tracing import TRACING
from unitvis_kernels.choice import prefer

_RELUS = {nn.ReLU: "relu", nn.ReLU6: "relu6", F.relu: "relu", torch.relu: "relu", F.relu6: "relu6"}
_RELUS |= {"relu": "relu", "relu_": "relu", torch.relu_: "relu", F.relu_: "relu"}


class NotRewrittenError(Exception):
    """Error for a model that cannot be rewritten; the message is the reason."""


class Pool(NamedTuple):
    """The parameters of a max-pool that rounds down and treats rows and columns alike."""

    window: int
    stride: int
    padding: int


class Threshold:
    """The values that responses must reach to enter the top-k: float32 [units of all layers]; None: all may enter."""

    def __init__(self) -> None:
        self.values: Tensor | None = None

    def of(self, units: slice) -> Tensor | None:
        """The values of some units, such as one layer's."""
        return None if self.values is None else self.values[units]


class Chain(nn.Module):
    """A convolution, an optional activation and an optional max-pool, with the keys of one of their outputs.

    conv: with a BatchNorm that followed it folded in. threshold: a function that returns the layer's thresholds, or
    None where all responses may enter; without the function there are no keys. key_after: the keys are those of the
    activated map, else of the convolution's output. one_pass: `uk.conv_argmax` computes the whole chain, or
    `uk.epilogue` all that follows the convolution, whichever is preferred (on a GPU); otherwise PyTorch's operators do
    (on a CPU, where convolutions add their bias themselves).
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        activation: str | None,
        pool: Pool | None,
        threshold: Callable[[], Tensor | None] | None,
        *,
        key_after: bool,
        one_pass: bool,
    ) -> None:
        super().__init__()
        self.conv, self.activation, self.pool = conv, activation, pool
        self.threshold, self.key_after, self.one_pass = threshold, key_after, one_pass
        self.store = True  # False: no other node uses the map, so it need not be written
        self.fused: str | None = None  # if `conv_argmax` is used: "measured" or "estimated", see `prefer`

    def _fuses(self, x: Tensor) -> bool:
        """True where `conv_argmax` is preferred for this input [N, C, H, W]; sets `fused`."""
        conv = self.conv
        if isinstance(conv.padding, str) or x.dtype == torch.float32:
            return False
        geometry = zip(x.shape[2:], conv.padding, conv.dilation, conv.kernel_size, conv.stride, strict=True)
        height, width = ((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, p, d, k, s in geometry)
        architecture = "cpu"
        if x.is_cuda:
            architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(x.device))
        fuses, source = prefer(
            conv.in_channels,
            conv.out_channels,
            (conv.kernel_size[0], conv.kernel_size[1]),
            (conv.stride[0], conv.stride[1]),
            conv.groups,
            (height, width),
            x.dtype,
            architecture,
            pooled=self.pool is not None,
        )
        self.fused = source if fuses else None
        return fuses

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return (keys int64 [N, C], output map [N, C, H, W]), with None in place of one that is not needed."""
        conv = self.conv
        if self.one_pass and self._fuses(x):
            fused_keys, fused_map = uk.conv_argmax(
                x,
                conv.weight,
                conv.bias,
                conv.stride,  # type: ignore[arg-type]  # two numbers, which nn.Conv2d does not say
                conv.padding,  # type: ignore[arg-type]
                conv.dilation,  # type: ignore[arg-type]
                conv.groups,
                activation=self.activation,
                store=self.store,
                key_after=self.key_after,
            )
            if self.pool is not None and fused_map is not None:
                fused_map = F.max_pool2d(fused_map, *self.pool)
            return fused_keys, fused_map
        if self.one_pass and (conv.bias is not None or self.activation is not None or self.pool is not None):
            raw = F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
            return uk.epilogue(raw, conv.bias, self.activation, self.pool, key_after=self.key_after)
        y = conv(x)
        keys = None if self.threshold is None or self.key_after else uk.spatial_argmax(y, self.threshold())
        if self.activation is not None:
            y = F.relu_(y) if self.activation == "relu" else F.relu6(y, inplace=True)
        if self.threshold is not None and self.key_after:
            keys = uk.spatial_argmax(y, self.threshold())
        return keys, y if self.pool is None else F.max_pool2d(y, *self.pool)


class MapKeys(nn.Module):
    """The keys of a layer's output that no chain computes. axis: that of its channels, see `as_map`.

    inside: the positions that are read; None: all.
    """

    def __init__(
        self, name: str, axis: int | None, threshold: Callable[[], Tensor | None], inside: Rectangle | None
    ) -> None:
        super().__init__()
        self.name, self.axis, self.threshold, self.inside = name, axis, threshold, inside

    def forward(self, output: object) -> Tensor:
        """Return keys, int64 [N, C]."""
        return uk.spatial_argmax(as_map(self.name, self.axis, output), self.threshold(), self.inside)


class _Tracer(fx.Tracer):
    """Traces a model and records the node that each module returned, also of modules whose inside is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.returned: dict[str, fx.Node] = {}
        self._thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:  # tracing replaces nn.Module.__call__ for all threads
            return forward(*args, **kwargs)
        result = super().call_module(m, forward, args, kwargs)
        if isinstance(result, fx.Proxy):
            self.returned[self.path_of_module(m)] = result.node
        return result


def rewritten(
    model: nn.Module,
    layers: Mapping[str, slice],
    threshold: Threshold,
    *,
    one_pass: bool,
    axes: Mapping[str, int | None] | None = None,
    inside: Mapping[str, Rectangle | None] | None = None,
) -> fx.GraphModule:
    """Copy a model in eval mode into one that returns the layers' keys, a tuple of int64 [N, C].

    layers: names, in the order of the forward pass, and the units of each. one_pass: see `Chain`. axes: of each layer's
    channels; None: 1, as all convolutions have it. inside: the positions of each that are read; None: all. Raises
    NotRewrittenError for a model that `torch.fx` cannot trace.
    """
    tracer = _Tracer()
    try:
        model = copies.copied(model)
        with TRACING:
            graph = tracer.trace(model)
        tapped = {name: tracer.returned[name] for name in layers}
    except KeyError as error:
        raise NotRewrittenError(f"layer {error} does not show in its trace") from error
    except Exception as error:  # a model's code may raise anything when it gets a symbol instead of a tensor
        raise NotRewrittenError(f"it cannot be traced ({type(error).__name__}: {first_line(error)})") from error

    thresholds = {name: _layer_threshold(threshold, units) for name, units in layers.items()}
    keys: dict[str, fx.Node] = {}
    modules, inside = dict(model.named_modules()), inside or {}
    # A chain reads the whole map, so one ends before a layer of which a part is read.
    in_part = {tapped[name] for name in layers if inside.get(name) is not None}
    for number, node in enumerate(list(graph.nodes)):
        if (found := _find_chain(node, modules, set(tapped.values()), in_part)) is not None:
            names = [name for name, output in tapped.items() if output is found.key]
            chain = Chain(
                found.folded(modules),
                found.activation,
                found.pool,
                thresholds[names[0]] if names else None,
                key_after=found.key_after,
                one_pass=one_pass,
            )
            model.add_module(f"chain{number}", chain)
            with graph.inserting_before(node):
                both = graph.call_module(f"chain{number}", node.args)
                chain_keys, y = (graph.call_function(operator.getitem, (both, i)) for i in range(2))
            keys |= dict.fromkeys(names, chain_keys)
            last = found.nodes[-1]
            tapped |= {name: y for name, output in tapped.items() if output is last and name not in names}
            last.replace_all_uses_with(y)
            for replaced in reversed(found.nodes):
                graph.erase_node(replaced)
    for index, (name, node) in enumerate(tapped.items()):
        if name not in keys:
            axis = 1 if axes is None else axes[name]
            model.add_module(f"key{index}", MapKeys(name, axis, thresholds[name], inside.get(name)))
            with graph.inserting_after(node):  # directly after it: a later operator may overwrite it in place
                keys[name] = graph.call_module(f"key{index}", (node,))
    _return_keys(graph, [keys[name] for name in layers])
    copied = fx.GraphModule(model, graph)
    for node in graph.nodes:
        called = copied.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(called, Chain):
            called.store = any(user.args[1] == 1 and user.users for user in node.users)
    return copied


class _ChainNodes(NamedTuple):
    """The nodes that one chain replaces, and the parameters of that chain."""

    nodes: list[fx.Node]  # the convolution first
    norm: str | None  # the name of the BatchNorm to fold in
    activation: str | None
    pool: Pool | None
    key: fx.Node | None  # the node whose output the keys are of
    key_after: bool

    def folded(self, modules: Mapping[str, nn.Module]) -> nn.Conv2d:
        """A copy of the convolution with the BatchNorm folded into its weights."""
        conv: Any = modules[str(self.nodes[0].target)]
        if self.norm is None:
            return copy.deepcopy(conv)
        norm: Any = modules[self.norm]
        return fuse_conv_bn_eval(conv, norm)


def _find_chain(
    node: fx.Node, modules: Mapping[str, nn.Module], tapped: set[fx.Node], in_part: set[fx.Node]
) -> _ChainNodes | None:
    """Find the chain that begins with this node; None where it is no zero-padded convolution, or a chain gains nothing.

    tapped: the nodes whose outputs are layers. in_part: those of them at which a chain ends, and has no keys.
    """
    conv = _unhooked(node, modules, nn.Conv2d)
    if conv is None or conv.padding_mode != "zeros" or len(node.args) != 1 or node.kwargs:
        return None
    nodes, norm, activation, pool = [node], None, None, None

    def following() -> fx.Node | None:
        """The node that alone uses the last node's output, and no other input."""
        users = [] if nodes[-1] in in_part else list(nodes[-1].users)
        return users[0] if len(users) == 1 and users[0].all_input_nodes == [nodes[-1]] else None

    after = following()
    found = None if after is None or node in tapped else _unhooked(after, modules, nn.BatchNorm2d)
    if after is not None and found is not None and found.running_mean is not None:
        nodes.append(after)
        norm = str(after.target)
        after = following()
    key = nodes[-1] if nodes[-1] in tapped - in_part else None
    if after is not None and not (key is not None and after in tapped) and (kind := _relu(after, modules)):
        nodes.append(after)
        activation, after = kind, following()
    key_after = key is None and nodes[-1] in tapped - in_part
    key = nodes[-1] if key_after else key
    if after is not None and (found_pool := _max_pool(after, modules)):
        nodes.append(after)
        pool = found_pool
    if len(nodes) == 1 and key is None:
        return None  # no operator to absorb and no keys to compute
    return _ChainNodes(nodes, norm, activation, pool, key, key_after)


def _unhooked(node: fx.Node, modules: Mapping[str, nn.Module], kind: type[Any]) -> Any:
    """The module that the node calls, if its class is exactly `kind` and it has no forward hooks; else None."""
    module: Any = modules[str(node.target)] if node.op == "call_module" else None
    if type(module) is not kind or module._forward_hooks or module._forward_pre_hooks:
        return None
    return module


def _relu(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """The kind of ReLU that the node calls as a module, function or method: "relu", "relu6" or None."""
    if node.op == "call_module":
        return next((_RELUS[kind] for kind in (nn.ReLU, nn.ReLU6) if _unhooked(node, modules, kind) is not None), None)
    return _RELUS.get(node.target) if node.op in ("call_function", "call_method") else None


def _max_pool(node: fx.Node, modules: Mapping[str, nn.Module]) -> Pool | None:
    """The parameters of a max-pool that `Pool` can express; else None."""
    pool: Any = _unhooked(node, modules, nn.MaxPool2d)
    if pool is None or pool.ceil_mode or pool.return_indices or pool.dilation not in (1, (1, 1)):
        return None
    sizes = []
    for value in (pool.kernel_size, pool.stride, pool.padding):
        pair = (value, value) if isinstance(value, int) else value
        if pair[0] != pair[1]:
            return None
        sizes.append(pair[0])
    return Pool(*sizes)


def _layer_threshold(threshold: Threshold, units: slice) -> Callable[[], Tensor | None]:
    """A function that gives the present threshold of some units."""
    return lambda: threshold.of(units)


def _return_keys(graph: fx.Graph, keys: Sequence[fx.Node]) -> None:
    """Make the graph return the keys, and erase the nodes after the last of them."""
    needed = set(keys)
    for node in reversed(graph.nodes):
        if node in needed:
            with graph.inserting_after(node):
                graph.output(tuple(keys))
            return
        graph.erase_node(node)
