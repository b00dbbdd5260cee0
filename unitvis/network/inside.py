"""Ranking inside the image: the positions whose drawn boxes no padding enters."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from unitvis.errors import abridged
from unitvis.network.forward import Rectangle
from unitvis.network.gradients import MAX_TOGETHER, Neuron, effective_sides, neurons_of_a_layer
from unitvis.network.identity import noise
from unitvis.network.layers import Layer
from unitvis.network.network import Network
from unitvis.network.receptive_fields.receptive_field import ReceptiveField, seen_in_part


def rank_inside(network: Network) -> None:
    """Set the layers' `inside`: the rectangle of positions whose boxes, as they are drawn, lie in the image.

    The box is the receptive field, or where that is wider than half of the image the effective box, whose side is found
    for the neuron in the middle of the map from fixed noise, and kept in `drawn_sides`. A layer without such positions
    is ranked everywhere, and a warning names it. Padding excites many units of deep layers more than any picture does
    ("Padding Aware Neurons", arXiv 2309.08048).
    """
    size, fields = network.input_shape[1:], network.fields
    wide = [layer for layer in network.layers if _has_wide_field(fields[layer.name], size)]
    sides = _sides_from_noise(network, wide)
    layers, everywhere = [], []
    for layer in network.layers:
        side, field = sides.get(layer.name), fields[layer.name]
        without_box = layer in wide and side is None
        found = None if without_box or field.method == "unknown" else _rectangle(field.positions_inside(side))
        if found is None:
            everywhere.append(layer.name)
        elif side is not None:
            network.drawn_sides[layer.name] = side
        layers.append(replace(layer, inside=found or (0, layer.height, 0, layer.width)))
    network.layers = layers
    if everywhere:
        warnings.warn(
            f"in {len(everywhere)} of {len(layers)} layers no box lies in the image ({abridged(everywhere)}), so all "
            "of their positions are ranked"
        )


def _has_wide_field(field: ReceptiveField, size: tuple[int, int]) -> bool:
    return field.method != "unknown" and not seen_in_part(field.size, size)


def _sides_from_noise(network: Network, layers: list[Layer]) -> dict[str, int | None]:
    """The side of each layer's effective box, of neurons in the middle of the map and images of fixed noise."""
    count = neurons_of_a_layer(len(layers))
    chosen: dict[str, list[Neuron]] = {}
    for layer in layers:
        row, column = layer.height // 2, layer.width // 2
        channels = [number * layer.channels // count for number in range(count)]
        boxes = network.fields[layer.name].boxes(channels, row, column).tolist()
        chosen[layer.name] = [
            (number, (channel, row, column), ((left + right) / 2, (top + bottom) / 2))
            for number, (channel, (left, top, right, bottom)) in enumerate(zip(channels, boxes, strict=True))
        ]
    return effective_sides(network, chosen, dict(enumerate(noise(network.input_shape, MAX_TOGETHER))))


def _rectangle(inside: NDArray[np.bool_]) -> Rectangle | None:
    """The rectangle that the positions [H, W] make; None where there are none, or they make no rectangle."""
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    if not len(rows):
        return None
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    return (top, bottom, left, right) if inside[top:bottom, left:right].all() else None
