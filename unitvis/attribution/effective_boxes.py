"""Effective boxes: the part of their receptive field that a layer's neurons depend on most."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unitvis.errors import first_line
from unitvis.network.canonical import canonical_settings
from unitvis.network.forward import COMPUTE_BATCH
from unitvis.network.network import Network
from unitvis.results.arrays import LayerArrays
from unitvis.results.data import RunData

MAX_WINNERS = 8  # winners whose gradients are found in one pass; all their activations are in memory at once
MAX_GRADIENTS = 1024  # winners of all layers together, of which each layer has one at least
GRADIENT_SHARE = 0.9  # share of the squared gradient inside the effective box

Winner = tuple[int, tuple[int, int, int], tuple[float, float]]  # image, neuron, centre (x, y) of its box


def effective_boxes(network: Network, run: RunData) -> dict[str, int | None]:
    """Compute each layer's effective box (after the effective receptive field of Luo et al. 2016, section 2).

    Returns the side, in model-input pixels, of the smallest square centred on the neuron that holds 90% of the squared
    input gradient, averaged over a sample of the layer's winners chosen by hash: 8, fewer where there are more than 128
    layers. None for a layer without gradients, or whose receptive fields, and so their centres, are unknown.
    """
    sides: dict[str, int | None] = dict.fromkeys(run.tops)
    count = MAX_WINNERS
    while count > 1 and count * len(run.tops) > MAX_GRADIENTS:
        count //= 2
    known = {name: top for name, top in run.tops.items() if top.info["receptive_field"]["method"] != "unknown"}
    chosen = {name: winners for name, top in known.items() if (winners := _sampled_winners(top, count))}
    ids = sorted({image for winners in chosen.values() for image, _, _ in winners})
    images: dict[int, Tensor] = {}
    for batch in run.source.batches(4 * COMPUTE_BATCH, ids=ids):
        images.update(zip(batch.ids.tolist(), batch.pixels, strict=True))
    network.channel_axes(run.layers, tuple(run.manifest["input"]))  # of all layers in one pass
    together = MAX_WINNERS // count  # layers whose gradients one pass finds
    names = list(chosen)
    with network.evaluating():
        for start in range(0, len(names), together):
            sides |= _sides(network, {name: chosen[name] for name in names[start : start + together]}, images)
    return sides


def _sides(
    network: Network, chosen: Mapping[str, Sequence[Winner]], images: Mapping[int, Tensor]
) -> dict[str, int | None]:
    """The sides of the effective boxes of layers, by one pass over the chosen winners of all of them."""
    winners = [winner for own in chosen.values() for winner in own]
    pixels = network.normalise(torch.stack([images[image] for image, _, _ in winners]))
    neurons = {name: [neuron for _, neuron, _ in own] for name, own in chosen.items()}
    try:
        squares = iter(_squared_gradients(network, neurons, pixels))
    except Exception as error:  # a model may raise anything; only drawings use the box, so the scan goes on
        if len(chosen) > 1:  # the others may have gradients
            alone = [_sides(network, {name: own}, images) for name, own in chosen.items()]
            return {name: side for one in alone for name, side in one.items()}
        (name,) = chosen
        warnings.warn(f"layer {name!r} has no effective box, for want of gradients ({first_line(error)})")
        return {name: None}
    return {
        name: _effective_side(np.stack([next(squares) for _ in own]), np.array([centre for *_, centre in own]))
        for name, own in chosen.items()
    }


def _sampled_winners(top: LayerArrays, count: int) -> list[Winner]:
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


def _squared_gradients(
    network: Network, neurons: Mapping[str, list[tuple[int, int, int]]], images: Tensor
) -> NDArray[np.float64]:
    """Squared gradients of one neuron's response to each image [n, C, H, W], summed over the colours: [n, H, W].

    neurons: by layer, those of its images; the images of the first layer come first.
    """
    pixels = images.contiguous(memory_format=torch.channels_last).requires_grad_()
    responses: list[Tensor] = []
    ends = np.cumsum([len(own) for own in neurons.values()]).tolist()

    def read(index: int, maps: Tensor) -> None:
        own = list(neurons.values())[index]
        channel, row, column = torch.tensor(own, device=maps.device).T
        responses.append(
            maps[torch.arange(ends[index] - len(own), ends[index], device=maps.device), channel, row, column]
        )

    with network.reading_maps(list(neurons), network.input_shape_of(images)) as canonical:
        canonical.differentiable_maps(pixels, read)
    differentiable = [response.sum() for response in responses if response.requires_grad]
    if not differentiable:
        return np.zeros((len(images), *images.shape[2:]))
    with torch.enable_grad(), canonical_settings(network.device):
        (gradient,) = torch.autograd.grad(differentiable, pixels)
    return gradient.double().square().sum(dim=1).cpu().numpy()


def _effective_side(squares: NDArray[np.float64], centres: NDArray[np.float64]) -> int | None:
    """The side of the square that holds `GRADIENT_SHARE` of squared gradients [n, H, W] on average; None without any.

    centres: (x, y) of each square, [n, 2].
    """
    total = squares.sum(axis=(1, 2))
    usable = (total > 0) & np.isfinite(total)
    if not usable.any():
        return None
    height, width = squares.shape[1:]
    sides = []  # [n, H, W]: the side of the smallest centred square that contains each pixel
    for x, y in centres[usable]:
        dx, dy = abs(np.arange(width) + 0.5 - x), abs(np.arange(height) + 0.5 - y)
        sides.append(np.rint(2 * np.maximum(dx[None, :], dy[:, None]) + 1).astype(int))
    shares = (squares / np.where(usable, total, 1)[:, None, None])[usable] / usable.sum()
    share_inside = np.bincount(np.ravel(sides), weights=shares.ravel()).cumsum()  # by the side of the square
    return int(np.searchsorted(share_inside, GRADIENT_SHARE))
