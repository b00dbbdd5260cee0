"""Rewriting a copy of the model for a scan: each convolution and the operators after it become one module of `parts`.

The copy returns the layers' keys and ends after the last of them. Other operators stay as they are.
"""

from __future__ import annotations

import copy
import itertools
import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from unitvis.errors import first_line
from unitvis.half_precision.parts import Blocked, Chain, MapKeys, Pool, Residual, SameKeys, Tap, Taps, blocked
from unitvis.network import copies
from unitvis.network.forward import Rectangle
from unitvis.network.tracing import TRACING

_RELUS = {nn.ReLU: "relu", nn.ReLU6: "relu6", F.relu: "relu", torch.relu: "relu", F.relu6: "relu6"}
_RELUS |= {"relu": "relu", "relu_": "relu", torch.relu_: "relu", F.relu_: "relu"}
_SUMS = (operator.add, torch.add, "add")
_SUMS_IN_PLACE = (operator.iadd, "add_")


class NotRewrittenError(Exception):
    """Error for a model that cannot be rewritten; the message is the reason."""


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
    taps: Taps,
    *,
    one_pass: bool,
    axes: Mapping[str, int | None] | None = None,
    inside: Mapping[str, Rectangle | None] | None = None,
) -> fx.GraphModule:
    """Copy a model in eval mode into one that returns the layers' keys, a tuple of int64 [N, C].

    layers: names, in the order of the forward pass, and the units of each in the taps. one_pass: see `Chain`; with it
    there are `Residual` and `Blocked` too. axes: of each layer's channels; None: 1, as all convolutions have it.
    inside: the positions of each that are read; None: all. Raises NotRewrittenError for a model that `torch.fx` cannot
    trace.
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

    own = {name: Tap(taps, units) for name, units in layers.items()}
    rewriting = _Rewriting(model, graph, tapped, own, axes or {}, inside or {})
    rewriting.drop_identities()
    if one_pass:
        rewriting.make_residuals()
    rewriting.make_chains(one_pass=one_pass)
    if one_pass:
        rewriting.make_blocks()
    rewriting.key_the_rest()
    _return_keys(graph, [rewriting.keys[name] for name in layers])
    copied = fx.GraphModule(model, graph)
    for node in graph.nodes:
        called = copied.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(called, Chain):
            called.store = any(user.args[1] == 1 and user.users for user in node.users)
    return copied


class _Rewriting:
    """A graph that is being rewritten.

    tapped: each layer's node, until its keys have a node in `keys`. axes, inside: see `rewritten`.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: fx.Graph,
        tapped: dict[str, fx.Node],
        taps: Mapping[str, Tap],
        axes: Mapping[str, int | None],
        inside: Mapping[str, Rectangle | None],
    ) -> None:
        self._model, self._graph, self._tapped, self._taps = model, graph, tapped, taps
        self._axes, self._inside = axes, inside
        self.keys: dict[str, fx.Node] = {}

    @property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(self._model.named_modules())

    def _added(self, kind: str, module: nn.Module) -> str:
        """The name under which the module is added to the model."""
        name = next(name for n in itertools.count() if not hasattr(self._model, name := f"{kind}{n}"))
        self._model.add_module(name, module)
        return name

    @property
    def _in_part(self) -> set[fx.Node]:
        """The nodes of layers of which a part is read: a module that reads whole maps ends before one."""
        return {node for name, node in self._tapped.items() if self._inside.get(name) is not None}

    def _names(self, node: fx.Node | None) -> list[str]:
        """The layers whose output the node is."""
        return [name for name, output in self._tapped.items() if output is node]

    def _key(self, names: Sequence[str], node: fx.Node) -> None:
        """Let a node be the keys of layers that have one output."""
        for name in names:
            del self._tapped[name]
            self.keys[name] = node
        for name in names[1:]:
            with self._graph.inserting_after(node):
                self.keys[name] = self._graph.call_module(self._added("same", SameKeys(self._taps[name])), (node,))

    def drop_identities(self) -> None:
        """Take out modules that return their input."""
        modules = self._modules
        for node in list(self._graph.nodes):
            if _unhooked(node, modules, nn.Identity) is None or len(node.args) != 1 or node.kwargs:
                continue
            source, names = node.args[0], self._names(node)
            if not isinstance(source, fx.Node) or (names and len(source.users) > 1):
                continue  # another user may change the layer's output in place before it is read
            self._tapped |= dict.fromkeys(names, source)
            node.replace_all_uses_with(source)
            self._graph.erase_node(node)

    def make_residuals(self) -> None:
        """Replace sums of a convolution's output and something else."""
        modules = self._modules
        for node in list(self._graph.nodes):
            if (found := _find_residual(node, modules, set(self._tapped.values()))) is None:
                continue
            names = [self._names(output) for output in found.outputs]
            names[1] = names[1] if found.summands[1] is not None else []  # a shortcut's own keys are made where it is
            if any(self._axes.get(name, 1) != 1 for each in names for name in each):
                continue
            own = found.outputs if found.summands[1] is not None else (found.outputs[0], *found.outputs[2:])
            if self._in_part.intersection(own):
                continue
            convs = [None if one is None else one.folded(modules) for one in found.summands]
            biases = [None if conv is None or conv.bias is None else conv.bias.detach() for conv in convs]
            inputs = []
            for conv, one, summand in zip(convs, found.summands, found.outputs, strict=False):
                if conv is None or one is None:
                    inputs.append(summand)
                    continue
                conv.bias = None
                with self._graph.inserting_before(one.nodes[0]):
                    inputs.append(self._graph.call_module(self._added("conv", conv), one.nodes[0].args))
            taps = [self._taps[each[0]] if each else None for each in names]
            residual = Residual(biases[0], biases[1], found.activation, taps)
            with self._graph.inserting_before(node):
                results = self._graph.call_module(self._added("residual", residual), tuple(inputs))
                *keys, y = (self._graph.call_function(operator.getitem, (results, i)) for i in range(5))
            for each, key in zip(names, keys, strict=True):
                if each:
                    self._key(each, key)
            found.nodes[-1].replace_all_uses_with(y)
            for replaced in reversed(found.nodes):
                self._graph.erase_node(replaced)
            for one in found.summands:
                for replaced in reversed(one.nodes if one is not None else ()):
                    self._graph.erase_node(replaced)

    def make_chains(self, *, one_pass: bool) -> None:
        """Replace convolutions and what follows them."""
        modules = self._modules
        for node in list(self._graph.nodes):
            if (found := _find_chain(node, modules, set(self._tapped.values()), self._in_part)) is None:
                continue
            names, last = self._names(found.key), found.nodes[-1]
            chain = Chain(
                found.folded(modules),
                found.activation,
                found.pool,
                self._taps[names[0]] if names else None,
                key_after=found.key_after,
                one_pass=one_pass,
            )
            with self._graph.inserting_before(node):
                both = self._graph.call_module(self._added("chain", chain), node.args)
                chain_keys, y = (self._graph.call_function(operator.getitem, (both, i)) for i in range(2))
            if names:
                self._key(names, chain_keys)
            self._tapped |= dict.fromkeys(self._names(last), y)
            last.replace_all_uses_with(y)
            for replaced in reversed(found.nodes):
                self._graph.erase_node(replaced)

    def make_blocks(self) -> None:
        """Let the first convolution read an input in blocks, if it alone reads the input."""
        inputs = [node for node in self._graph.nodes if node.op == "placeholder" and node.users]
        if len(inputs) != 1 or len(inputs[0].users) != 1 or inputs[0] in self._tapped.values():
            return
        (user,) = inputs[0].users
        chain = self._modules[str(user.target)] if user.op == "call_module" else None
        if not isinstance(chain, Chain) or not _gains_by_blocks(chain.conv):
            return
        module = Blocked(chain.conv)
        with self._graph.inserting_before(user):
            arranged = self._graph.call_module(self._added("blocks", module), (inputs[0],))
        user.replace_input_with(inputs[0], arranged)
        chain.conv = blocked(chain.conv)

    def key_the_rest(self) -> None:
        """Add the keys of layers that no module above computes."""
        for name, node in list(self._tapped.items()):
            module = MapKeys(name, self._axes.get(name, 1), self._taps[name], self._inside.get(name))
            with self._graph.inserting_after(node):  # directly after it: a later operator may overwrite it in place
                self.keys[name] = self._graph.call_module(self._added("key", module), (node,))


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


class _ResidualNodes(NamedTuple):
    """The nodes that one `Residual` replaces."""

    nodes: list[fx.Node]  # the sum, and the activation if there is one
    summands: tuple[_ChainNodes, _ChainNodes | None]  # convolutions with their BatchNorms
    outputs: tuple[fx.Node | None, ...]  # the two summands, the sum and the activated sum
    activation: str | None


def _find_residual(node: fx.Node, modules: Mapping[str, nn.Module], tapped: set[fx.Node]) -> _ResidualNodes | None:
    """Find the residual sum that is this node; None where it is none of a convolution's output and another tensor.

    tapped: the nodes whose outputs are layers.
    """
    in_place = node.target in _SUMS_IN_PLACE
    if node.op not in ("call_function", "call_method") or node.kwargs or len(node.args) != 2:
        return None
    if not in_place and node.target not in _SUMS:
        return None
    one, other = node.args
    if not isinstance(one, fx.Node) or not isinstance(other, fx.Node) or one is other:
        return None
    found, second = (_convolution_before(summand, node, modules, tapped) for summand in (one, other))
    if found is None:
        if second is None or in_place:  # which would change a tensor that others may hold
            return None
        one, other, found, second = other, one, second, None
    nodes, activation = [node], None
    users = list(node.users)
    if len(users) == 1 and users[0].all_input_nodes == [node] and (kind := _relu(users[0], modules)):
        nodes.append(users[0])
        activation = kind
    activated = nodes[1] if activation else None
    return _ResidualNodes(nodes, (found, second), (one, other, node, activated), activation)


def _convolution_before(
    node: fx.Node, user: fx.Node, modules: Mapping[str, nn.Module], tapped: set[fx.Node]
) -> _ChainNodes | None:
    """The convolution, with a BatchNorm to fold in, whose output is this node and goes to one user alone."""
    if list(node.users) != [user]:
        return None
    first: Any = node
    if node.op == "call_module" and isinstance(modules[str(node.target)], nn.BatchNorm2d):
        first = node.args[0] if len(node.args) == 1 else None
    if not isinstance(first, fx.Node):
        return None
    begun = _begin_chain(first, modules, tapped)
    return begun if begun is not None and begun.nodes[-1] is node else None


def _begin_chain(node: fx.Node, modules: Mapping[str, nn.Module], tapped: set[fx.Node]) -> _ChainNodes | None:
    """The chain of a convolution and the BatchNorm after it; None where the node is no zero-padded convolution."""
    conv = _unhooked(node, modules, nn.Conv2d)
    if conv is None or conv.padding_mode != "zeros" or len(node.args) != 1 or node.kwargs:
        return None
    nodes, norm = [node], None
    after = _only_user(node)
    found = None if after is None or node in tapped else _unhooked(after, modules, nn.BatchNorm2d)
    if after is not None and found is not None and found.running_mean is not None:
        nodes.append(after)
        norm = str(after.target)
    return _ChainNodes(nodes, norm, None, None, nodes[-1] if nodes[-1] in tapped else None, key_after=False)


def _only_user(node: fx.Node) -> fx.Node | None:
    """The node that alone uses this one's output, and no other input."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].all_input_nodes == [node] else None


def _find_chain(
    node: fx.Node, modules: Mapping[str, nn.Module], tapped: set[fx.Node], in_part: set[fx.Node]
) -> _ChainNodes | None:
    """Find the chain that begins with this node; None where it is no zero-padded convolution, or a chain gains nothing.

    tapped: the nodes whose outputs are layers. in_part: those of them at which a chain ends, and has no keys.
    """
    begun = _begin_chain(node, modules, tapped)
    if begun is None:
        return None
    nodes, norm, _, _, key, _ = begun
    activation, pool = None, None
    key = None if key in in_part else key
    after = None if nodes[-1] in in_part else _only_user(nodes[-1])
    if after is not None and not (key is not None and after in tapped) and (kind := _relu(after, modules)):
        nodes.append(after)
        activation, after = kind, None if after in in_part else _only_user(after)
    key_after = key is None and nodes[-1] in tapped - in_part
    key = nodes[-1] if key_after else key
    if after is not None and (found_pool := _max_pool(after, modules)):
        nodes.append(after)
        pool = found_pool
    if len(nodes) == 1 and key is None:
        return None  # no operator to absorb and no keys to compute
    return _ChainNodes(nodes, norm, activation, pool, key, key_after)


def _gains_by_blocks(conv: nn.Conv2d) -> bool:
    """Whether a convolution can read its input in blocks, and does not read whole vectors of channels as it is."""
    if isinstance(conv.padding, str) or conv.groups != 1 or any(d != 1 for d in conv.dilation):
        return False
    if any(p >= k for p, k in zip(conv.padding, conv.kernel_size, strict=True)):
        return False  # a whole window of padding, which blocks do not hold
    return conv.in_channels < 4


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


def _return_keys(graph: fx.Graph, keys: Sequence[fx.Node]) -> None:
    """Make the graph return the keys, and erase the nodes after the last of them."""
    needed = set(keys)
    for node in reversed(graph.nodes):
        if node in needed:
            with graph.inserting_after(node):
                graph.output(tuple(keys))
            return
        graph.erase_node(node)
