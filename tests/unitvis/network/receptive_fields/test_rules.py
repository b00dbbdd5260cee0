"""Every operator that is followed: its boxes are those that perturbation in float64 finds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from support.judges import all_boxes, inside
from support.operators import CASES, OF_GPUS
from unitvis.network.receptive_fields import fields
from unitvis.network.receptive_fields.rules import RULES

TRIES = 70


class Each(nn.Module):
    """Every function applied to the same images; the layers are named by numbers."""

    def __init__(self, functions: list[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.functions = functions
        self.layers = nn.ModuleList(nn.Identity() for _ in functions)
        self.register_buffer("dtype", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> None:
        for function, layer in zip(self.functions, self.layers, strict=True):
            layer(function(x))


def perturbed_boxes(function: Callable[[Tensor], Tensor], size: tuple[int, int]) -> np.ndarray:
    """left, top, right, bottom of every neuron, [C, H, W, 4], all 0 where no row or column changes it."""
    sides = {}
    g = torch.Generator().manual_seed(0)
    base = torch.randn(TRIES, 1, 4, *size, generator=g, dtype=torch.float64)
    noise = torch.randn(TRIES, 1, 4, *size, generator=g, dtype=torch.float64) * torch.logspace(
        -1, 2, TRIES, dtype=torch.float64
    ).view(-1, 1, 1, 1, 1)
    for axis, n in enumerate(size):
        line = torch.eye(n, dtype=torch.bool).view(1, n, 1, *[n if a == axis else 1 for a in range(2)])
        before = function(base.expand(-1, n, -1, -1, -1).flatten(0, 1).contiguous())
        after = function(torch.where(line, noise, base).flatten(0, 1))
        reached = (before != after).unflatten(0, (TRIES, n)).any(0).numpy()  # [line, C, H, W]
        sides[1 - axis] = reached.argmax(0)
        sides[3 - axis] = np.where(reached.any(0), n - reached[::-1].argmax(0), 0)
    return np.stack([sides[side] for side in range(4)], -1)


def ancestors(node: torch.fx.Node) -> set[str]:
    """Names of the operators that an output of a trace is computed with."""
    seen, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += node.all_input_nodes
    targets = [node.target for node in seen]
    return {t._schema.name.removeprefix("aten::") for t in targets if isinstance(t, torch._ops.OpOverload)}


@pytest.mark.parametrize("width", [8, 12])
def test_boxes_are_those_of_perturbation(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []
    follow = fields.reaches
    monkeypatch.setattr(fields, "reaches", lambda graph, names: follow(graphs.append(graph) or graph, names))
    size = (6, width)
    found = fields.receptive_fields(
        Each(list(CASES.values())), {f"layers.{i}": 1 for i in range(len(CASES))}, (4, *size)
    )
    (graph,) = graphs
    (outputs,) = next(node for node in graph.graph.nodes if node.op == "output").args
    wrong = {}
    for (name, function), (layer, field) in zip(CASES.items(), found.items(), strict=True):
        if name.split()[0] not in ancestors(outputs[layer]):
            wrong[name] = f"its graph has {ancestors(outputs[layer])}"
        elif field.note:
            wrong[name] = field.note
        else:
            boxes, want = inside(all_boxes(field), size), perturbed_boxes(function, size)
            if not (boxes == want).all():
                at = tuple(np.argwhere((boxes != want).any(-1))[0])
                wrong[name] = f"{boxes[at].tolist()}, by perturbation {want[at].tolist()} at neuron {at}"
    assert wrong == {}


def test_no_rule_is_without_a_perturbation() -> None:
    assert {name.split()[0] for name in CASES} | set(OF_GPUS) == set(RULES)
    assert all(RULES[name] is RULES[twin] for name, twin in OF_GPUS.items())


# All of them: `dir(torch.ops.aten)` has those alone that this process used.
ATEN = sorted(
    {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name[:6] == "aten::"}
)
POINTWISE = [
    overload
    for name in ATEN
    for packet in [getattr(torch.ops.aten, name)]
    if isinstance(packet, torch._ops.OpOverloadPacket)
    for overload in (getattr(packet, one) for one in packet.overloads())
    if torch.Tag.pointwise in overload.tags and not overload._schema.is_mutable
    if "Generator" not in str(overload._schema)  # those draw at random
    if all(str(result.type) == "Tensor" for result in overload._schema.returns)  # others compute with numbers
]


def arguments(overload: torch._ops.OpOverload, x: Tensor) -> dict[str, object]:
    """Arguments that a schema takes: x for tensors, a condition on it for masks."""
    number = 0.5 if x.is_floating_point() else 1
    values = {"Tensor": x, "Optional[Tensor]": x, "bool": False, "int": 1, "str": "none", "Optional[str]": "floor"}
    return {
        a.name: x > 0.7
        if a.name in ("mask", "condition")
        else a.default_value
        if a.has_default_value() and "Optional" not in str(a.type)
        else values.get(str(a.type), number)
        for a in overload._schema.arguments
    }


def test_operators_that_pytorch_tags_as_pointwise_are_elementwise() -> None:
    g = torch.Generator().manual_seed(0)
    base = torch.rand(20, 1, 3, 4, generator=g, dtype=torch.float64).mul(2).expand(-1, 4, -1, -1).contiguous()
    column = torch.eye(4, dtype=torch.bool).view(1, 4, 1, 4)
    noisy = torch.where(column, torch.randn(20, 1, 3, 4, generator=g, dtype=torch.float64) * 3, base)
    failed = {}
    for overload in POINTWISE:
        for convert in (lambda x: x, lambda x: (x * 3).long().abs()):
            try:
                before, after = (overload(**arguments(overload, convert(x))) for x in (base, noisy))
                break
            except (RuntimeError, TypeError, ValueError) as error:
                failed[overload] = repr(error)
        else:
            continue
        failed.pop(overload, None)
        for one, other in zip(*(y if isinstance(y, tuple) else (y,) for y in (before, after)), strict=True):
            changed = (one != other) & ~(one.isnan() & other.isnan())
            assert one.shape == base.shape, overload
            assert not (changed & ~column).any(), overload
    assert failed == {}
    assert len(POINTWISE) > 100
