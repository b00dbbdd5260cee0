"""Ranking inside the image: the positions whose responses, or whose drawn boxes, no padding enters."""

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
    """Set the layers' `inside`: the largest rectangle of positions that lie in the image.

    Where a layer's receptive field is at most half as wide and high as the image, such positions read no padding.
    Where it is wider, their effective boxes, as they are drawn, lie in the image; the side is found for the neuron in
    the middle of the map from fixed noise, and kept in `drawn_sides`. A layer without such positions is ranked
    everywhere, and a warning names it. Padding excites many units of deep layers more than any picture does ("Padding
    Aware Neurons", arXiv 2309.08048).
    """
    size, fields = network.input_shape[1:], network.fields
    wide = [layer for layer in network.layers if _has_wide_field(fields[layer.name], size)]
    sides = _sides_from_noise(network, wide)
    layers = []
    everywhere: dict[str, list[str]] = {}  # layers by the reason
    for layer in network.layers:
        side, field = sides.get(layer.name), fields[layer.name]
        if field.method == "unknown" or (layer in wide and side is None):
            found, reason = None, "no box is known"
        else:
            found = largest_rectangle(field.positions_inside(side))
            reason = "no position reads the image alone" if side is None else "no effective box lies in the image"
        if found is None:
            everywhere.setdefault(reason, []).append(layer.name)
        elif side is not None:
            network.drawn_sides[layer.name] = side
        layers.append(replace(layer, inside=found or (0, layer.height, 0, layer.width)))
    network.layers = layers
    for reason, names in everywhere.items():
        warnings.warn(
            f"in {len(names)} of {len(layers)} layers {reason} ({abridged(names)}), so all of their positions are "
            "ranked"
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


def largest_rectangle(inside: NDArray[np.bool_]) -> Rectangle | None:
    """The rectangle with most positions, all of them True in bool [H, W]; the first of equal ones, None without any."""
    best, found = 0, None
    heights = np.zeros(inside.shape[1], np.int64)  # of the columns of True that end in a row
    for row, line in enumerate(inside):
        heights = np.where(line, heights + 1, 0)
        starts: list[tuple[int, int]] = []  # left, and height, of rectangles that may grow to the right; ascending
        for column, height in enumerate([*heights.tolist(), 0]):
            left = column
            while starts and starts[-1][1] >= height:
                left, high = starts.pop()
                if (size := high * (column - left)) > best:
                    best, found = size, (row + 1 - high, row + 1, left, column)
            starts.append((left, height))
    return found
