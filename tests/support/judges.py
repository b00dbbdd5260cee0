"""Brute force for receptive fields: it shares no code with the closed form."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unitvis.errors import UnitvisError
from unitvis.network.forward import as_map
from unitvis.network.receptive_fields.fields import receptive_fields
from unitvis.network.receptive_fields.receptive_field import ReceptiveField


def responses(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Every layer's output that is a map, as the layer returned it: {name: [N, C, H, W]}."""
    maps: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, output: object) -> None:
        if isinstance(output, Tensor) and len(output) == len(images):
            with contextlib.suppress(UnitvisError):
                norm_of_vectors = isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1
                last = isinstance(module, nn.Linear) or norm_of_vectors
                maps[name] = as_map(name, output.ndim - 1 if last else 1, output).clone()

    hooks = [m.register_forward_hook(lambda m, _, out, n=n: keep(n, m, out)) for n, m in model.named_modules() if n]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return maps


def places(model: nn.Module, size: tuple[int, int]) -> list[str]:
    """The layers that return maps."""
    return list(responses(model, torch.zeros(2, 3, *size, dtype=next(model.parameters()).dtype)))


def nan_boxes(model: nn.Module, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """left, top, right, bottom of every neuron inside the image by NaN: {layer: [C, H, W, 4]}, all 0 where empty."""
    model = model.double()
    boxes: dict[str, np.ndarray] = {}
    for axis, n in enumerate(size):
        images = torch.rand(1, 3, *size, dtype=torch.float64).repeat(n, 1, 1, 1)
        for position in range(n):
            images[position].select(1 + axis, position).fill_(torch.nan)
        for name, found in responses(model, images).items():
            reached = found.isnan().numpy()  # [position, C, H, W]
            box = boxes.setdefault(name, np.zeros((*reached.shape[1:], 4), np.int32))
            box[..., 1 - axis] = reached.argmax(0)
            box[..., 3 - axis] = np.where(reached.any(0), n - reached[::-1].argmax(0), 0)
    return boxes


class Neuron(NamedTuple):
    channel: int
    row: int
    column: int


def all_boxes(field: ReceptiveField) -> np.ndarray:
    """[C, H, W, 4]"""
    neurons = np.indices((field.channels, *field.map_size)).reshape(3, -1)
    return field.boxes(*neurons).reshape(field.channels, *field.map_size, 4)


def inside(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Boxes clipped to the image; all 0 where nothing is left."""
    height, width = size
    boxes = boxes.clip(0, [width, height, width, height])
    empty = (boxes[..., 0] == boxes[..., 2]) | (boxes[..., 1] == boxes[..., 3])
    return np.where(empty[..., None], 0, boxes)


def some_neurons(field: ReceptiveField, random: np.random.Generator) -> list[Neuron]:
    """The four corners and three others."""
    shape = (field.channels, *field.map_size)
    corners = [
        (int(random.integers(shape[0])), row, column) for row in (0, shape[1] - 1) for column in (0, shape[2] - 1)
    ]
    return [Neuron(*map(int, neuron)) for neuron in [*corners, *(random.integers(shape) for _ in range(3))]]


def leaky(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """With leaky ReLUs in place of ReLUs: a thin network has channels that are off whatever the image."""
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: F.leaky_relu(x, 0.5, inplace))
    monkeypatch.setattr(F, "relu_", lambda x: F.leaky_relu_(x, 0.5))
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.LeakyReLU(0.5, inplace=child.inplace))
    return model


def check_by_perturbation(
    model: nn.Module,
    names: Iterable[str],
    size: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
    neurons: dict[str, list[Neuron]] | None = None,
    tries: int = 6,
) -> None:
    """In float64: changing every pixel outside a neuron's box leaves it bit for bit what it was, and each border line
    of the box, as far as it lies in the image, can change it. neurons: by layer; None: corners and some others.
    """
    model = leaky(model.eval().double(), monkeypatch)
    random = np.random.default_rng(0)
    torch.manual_seed(1)
    fields = receptive_fields(model, list(names), size)
    scales = torch.logspace(-1, 2, tries, dtype=torch.float64).view(-1, 1, 1, 1)
    for name, field in fields.items():
        assert field.method == "traced", field.note
        for neuron in neurons[name] if neurons else some_neurons(field, random):
            left, top, right, bottom = inside(field.boxes(*neuron), size)[0]
            changed = torch.zeros(5, 1, 1, *size, dtype=torch.bool)  # outside, then the four border lines
            changed[0] = True
            changed[0, ..., top:bottom, left:right] = False
            for line, (start, end) in enumerate(((top, top + 1), (bottom - 1, bottom)), 1):
                changed[line, ..., start:end, left:right] = True
            for line, (start, end) in enumerate(((left, left + 1), (right - 1, right)), 3):
                changed[line, ..., top:bottom, start:end] = True
            can = torch.zeros(4, dtype=torch.bool)
            for _ in range(20):  # a maximum elsewhere may hide a line
                image = torch.randn(1, tries, 3, *size, dtype=torch.float64).expand(5, -1, -1, -1, -1)
                noise = torch.randn(1, tries, 3, *size, dtype=torch.float64) * scales
                # Batches of the same size, compared slot by slot: there float64 keeps its bits.
                before = responses(model, image.flatten(0, 1))[name][:, *neuron]
                after = responses(model, torch.where(changed, noise, image).flatten(0, 1))[name][:, *neuron]
                differs = (before != after).view(5, tries).any(1)
                assert not differs[0], f"{name} {neuron} changed by a pixel outside"
                can |= differs[1:]
                if right == left or can.all():
                    break
            else:
                pytest.fail(f"{name} {neuron}: top, bottom, left, right can change it: {can.tolist()}")
