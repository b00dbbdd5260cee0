"""Effective boxes of a run: found from a sample of each layer's winners."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from unitvis.network.forward import COMPUTE_BATCH
from unitvis.network.gradients import Neuron, Shares, gradient_shares, is_effective_side, neurons_of_a_layer, side_of
from unitvis.network.network import Network
from unitvis.results.arrays import LayerArrays
from unitvis.results.data import RunData


def effective_boxes(network: Network, run: RunData) -> dict[str, int | None]:
    """Compute the side of each layer's effective box, see `gradients.effective_sides`, in model-input pixels.

    The neurons are a sample of the layer's winners chosen by hash: 8, fewer where there are more than 128 layers. None
    for a layer without gradients, or whose receptive fields, and so their centres, are unknown. A layer that was ranked
    inside of its drawn boxes keeps their side.
    """
    shares = _shares_of_winners(network, run)
    return {name: side_of(shares[name]) for name in run.tops} | network.drawn_sides


def differing_effective_boxes(network: Network, run: RunData) -> list[str]:
    """Say which effective boxes of a run the gradients contradict: `layers.0.effective_box is 9 and 3`.

    None where the run has none, as after a loop of one's own.
    """
    said = {name: top.info["effective_box"] for name, top in run.tops.items()}
    if not any(said.values()):
        return []
    drawn, shares = network.drawn_sides, _shares_of_winners(network, run)
    return [
        f"layers.{name}.effective_box is {side} and {drawn.get(name, side_of(shares[name]))}"
        for name, side in said.items()
        if not (side == drawn[name] if name in drawn else is_effective_side(side, shares[name]))
    ]


def _shares_of_winners(network: Network, run: RunData) -> dict[str, Shares | None]:
    """`gradient_shares` about a sample of each layer's winners; None where there is none, or their side is known."""
    none: dict[str, Shares | None] = dict.fromkeys(run.tops)
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
    return none | gradient_shares(network, chosen, images)


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
