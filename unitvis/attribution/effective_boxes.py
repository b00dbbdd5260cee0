"""Effective boxes of a run: found from a sample of each layer's winners."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from unitvis.network.forward import COMPUTE_BATCH
from unitvis.network.gradients import Neuron, effective_sides, neurons_of_a_layer
from unitvis.network.network import Network
from unitvis.results.arrays import LayerArrays
from unitvis.results.data import RunData


def effective_boxes(network: Network, run: RunData) -> dict[str, int | None]:
    """Compute the side of each layer's effective box, see `gradients.effective_sides`, in model-input pixels.

    The neurons are a sample of the layer's winners chosen by hash: 8, fewer where there are more than 128 layers. None
    for a layer without gradients, or whose receptive fields, and so their centres, are unknown. A layer that was ranked
    inside of its drawn boxes keeps their side.
    """
    sides: dict[str, int | None] = dict.fromkeys(run.tops) | network.drawn_sides
    count = neurons_of_a_layer(len(run.tops))
    known = {
        name: top
        for name, top in run.tops.items()
        if top.info["receptive_field"]["method"] != "unknown" and name not in network.drawn_sides
    }
    chosen = {name: winners for name, top in known.items() if (winners := _sampled_winners(top, count))}
    ids = sorted({image for winners in chosen.values() for image, _, _ in winners})
    images: dict[int, Tensor] = {}
    for batch in run.source.batches(4 * COMPUTE_BATCH, ids=ids):
        images.update(zip(batch.ids.tolist(), batch.pixels, strict=True))
    network.channel_axes(run.layers, tuple(run.manifest["input"]))  # of all layers in one pass
    return sides | effective_sides(network, chosen, images)


def _sampled_winners(top: LayerArrays, count: int) -> list[Neuron]:
    """Choose the `count` winners with the smallest hashes of image and unit."""
    units, ranks = np.nonzero(top.fired)
    with np.errstate(over="ignore"):
        mixed = top.images[units, ranks].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + units.astype(np.uint64)
        mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    per_channel = top.info["height"] * top.info["width"] if top.info["unit"] == "neuron" else 1
    sample = []
    for index in np.argsort(mixed ^ (mixed >> np.uint64(29)), kind="stable")[:count]:
        unit, rank = units[index], ranks[index]
        row, column = top.positions[unit, rank].tolist()
        left, upper, right, lower = top.boxes[unit, rank].tolist()
        centre = ((left + right) / 2, (upper + lower) / 2)
        sample.append((int(top.images[unit, rank]), (int(unit) // per_channel, row, column), centre))
    return sample
