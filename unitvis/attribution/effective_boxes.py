"""Effective boxes: the part of their receptive field that a layer's neurons depend on most."""

from __future__ import annotations

import warnings

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

MAX_WINNERS = 8  # winners of a layer whose gradients are averaged; all their activations are in memory at once
GRADIENT_SHARE = 0.9  # share of the squared gradient inside the effective box


def effective_boxes(network: Network, run: RunData) -> dict[str, int | None]:
    """Compute each layer's effective box (after the effective receptive field of Luo et al. 2016, section 2).

    Returns the side, in model-input pixels, of the smallest square centred on the neuron that holds 90% of the squared
    input gradient, averaged over a sample of the layer's winners chosen by hash; None for a layer without gradients.
    """
    chosen = {name: _sampled_winners(top) for name, top in run.tops.items()}
    ids = sorted({image for winners in chosen.values() for image, _, _ in winners})
    images: dict[int, Tensor] = {}
    for batch in run.source.batches(4 * COMPUTE_BATCH, ids=ids):
        images.update(zip(batch.ids.tolist(), batch.pixels, strict=True))
    sides: dict[str, int | None] = {}
    network.channel_axes(run.layers, tuple(run.manifest["input"]))  # of all layers in one pass
    with network.evaluating():
        for name, winners in chosen.items():
            sides[name] = None
            if winners:
                pixels = network.normalise(torch.stack([images[image] for image, _, _ in winners]))
                try:
                    squares = _squared_gradients(network, name, pixels, [neuron for _, neuron, _ in winners])
                except Exception as error:  # a model may raise anything; only drawings use the box, so the scan goes on
                    warnings.warn(f"layer {name!r} has no effective box, for want of gradients ({first_line(error)})")
                    continue
                sides[name] = _effective_side(squares, np.array([centre for *_, centre in winners]))
    return sides


def _sampled_winners(top: LayerArrays) -> list[tuple[int, tuple[int, int, int], tuple[float, float]]]:
    """Choose the winners with the smallest hashes of image and unit: (image, neuron, centre (x, y) of its box)."""
    units, ranks = np.nonzero(top.fired)
    with np.errstate(over="ignore"):
        mixed = top.images[units, ranks].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + units.astype(np.uint64)
        mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    per_channel = top.info["height"] * top.info["width"] if top.info["unit"] == "neuron" else 1
    sample = []
    for index in np.argsort(mixed ^ (mixed >> np.uint64(29)), kind="stable")[:MAX_WINNERS]:
        unit, rank = units[index], ranks[index]
        row, column = top.positions[unit, rank].tolist()
        left, upper, right, lower = top.boxes[unit, rank].tolist()
        centre = ((left + right) / 2, (upper + lower) / 2)
        sample.append((int(top.images[unit, rank]), (int(unit) // per_channel, row, column), centre))
    return sample


def _squared_gradients(
    network: Network, layer: str, images: Tensor, neurons: list[tuple[int, int, int]]
) -> NDArray[np.float64]:
    """Squared gradients of one neuron's response to each image [n, C, H, W], summed over the colours: [n, H, W]."""
    pixels = images.contiguous(memory_format=torch.channels_last).requires_grad_()
    responses: list[Tensor] = []

    def read(_: int, maps: Tensor) -> None:
        channel, row, column = torch.tensor(neurons, device=maps.device).T
        responses.append(maps[torch.arange(len(neurons), device=maps.device), channel, row, column])

    with network.reading_maps([layer], network.input_shape_of(images)) as canonical:
        canonical.differentiable_maps(pixels, read)
    if not responses[0].requires_grad:
        return np.zeros((len(neurons), *images.shape[2:]))
    with torch.enable_grad(), canonical_settings(network.device):
        (gradient,) = torch.autograd.grad(responses[0].sum(), pixels)
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
