"""Effective boxes: the part of their receptive field that neurons depend on most, by their gradients."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unitvis.errors import first_line
from unitvis.network.canonical import canonical_settings
from unitvis.network.memory import let_go, shortage
from unitvis.network.network import Network

MAX_TOGETHER = 8  # neurons whose gradients are found in one pass; all their activations are in memory at once
MAX_GRADIENTS = 1024  # neurons of all layers together, of which each layer has one at least
GRADIENT_SHARE = 0.9  # share of the squared gradient inside the effective box
_SHARE_ROUNDING = 1e-4  # of that share, by which other hardware or threads may change it

Shares = NDArray[np.float64]  # [sides]: the share of squared gradient in a centred square of so many pixels a side

Neuron = tuple[
    int, tuple[int, int, int], tuple[float, float]
]  # image, (channel, row, column), centre (x, y) of its box


def neurons_of_a_layer(layers: int) -> int:
    """How many neurons of each of so many layers tell its effective box."""
    count = MAX_TOGETHER
    while count > 1 and count * layers > MAX_GRADIENTS:
        count //= 2
    return count


def effective_sides(
    network: Network, chosen: Mapping[str, Sequence[Neuron]], images: Mapping[int, Tensor]
) -> dict[str, int | None]:
    """The side of each layer's effective box, in model-input pixels (effective receptive field, Luo et al. 2016).

    It is the smallest square centred on the neuron that holds 90% of the squared input gradient, averaged over the
    chosen neurons of the layer. images: by number, as they were read. None for a layer without gradients.
    """
    return {name: side_of(shares) for name, shares in gradient_shares(network, chosen, images).items()}


def side_of(shares: Shares | None) -> int | None:
    """The side of the effective box, from what `gradient_shares` gave of the layer."""
    return None if shares is None else int(np.searchsorted(shares, GRADIENT_SHARE))


def is_effective_side(side: int | None, shares: Shares | None) -> bool:
    """Whether a side is that of the effective box, up to rounding."""
    if side is None or shares is None:
        return side is None and shares is None
    most, least = GRADIENT_SHARE + _SHARE_ROUNDING, GRADIENT_SHARE - _SHARE_ROUNDING
    return 0 < side < len(shares) and bool(shares[side - 1] < most and shares[side] >= least)


def gradient_shares(
    network: Network, chosen: Mapping[str, Sequence[Neuron]], images: Mapping[int, Tensor]
) -> dict[str, Shares | None]:
    """How each layer's squared gradient lies about the chosen neurons; None without any. See `effective_sides`."""
    together = max(1, MAX_TOGETHER // max(map(len, chosen.values()), default=1))  # layers that one pass serves
    names, shares = list(chosen), dict[str, Shares | None]()
    with network.evaluating():
        for start in range(0, len(names), together):
            shares |= _layer_shares(network, {name: chosen[name] for name in names[start : start + together]}, images)
    return shares


def _layer_shares(
    network: Network, chosen: Mapping[str, Sequence[Neuron]], images: Mapping[int, Tensor]
) -> dict[str, Shares | None]:
    """The shares of layers, by one pass over the chosen neurons of all of them."""
    neurons_of_all = [neuron for own in chosen.values() for neuron in own]
    pixels = network.normalise(torch.stack([images[image] for image, _, _ in neurons_of_all]))
    neurons = {name: [neuron for _, neuron, _ in own] for name, own in chosen.items()}
    try:
        found = _squares(network, neurons, pixels)
    except Exception as error:  # a model may raise anything; only drawings use the box, so the scan goes on
        wanting, reason = "gradients" if shortage(error) is None else "memory", first_line(error)
    else:
        squares = iter(found)
        return {
            name: _shares_inside(np.stack([next(squares) for _ in own]), np.array([centre for *_, centre in own]))
            for name, own in chosen.items()
        }
    if len(chosen) > 1:  # the others may have gradients; outside of the handler, which holds what the pass computed
        alone = [_layer_shares(network, {name: own}, images) for name, own in chosen.items()]
        return {name: shares for one in alone for name, shares in one.items()}
    (name,) = chosen
    warnings.warn(f"layer {name!r} has no effective box, for want of {wanting} ({reason})")
    return {name: None}


def _squares(
    network: Network, neurons: Mapping[str, list[tuple[int, int, int]]], images: Tensor
) -> NDArray[np.float64]:
    """Like `_squared_gradients`, and in halves where memory runs out over the images of one layer."""
    try:
        return _squared_gradients(network, neurons, images)
    except Exception as error:
        if len(neurons) > 1 or len(images) == 1 or shortage(error) is None:
            raise
    let_go(network.device)  # outside of the handler, which holds what the pass computed
    ((name, own),) = neurons.items()
    halves = slice(len(own) // 2), slice(len(own) // 2, None)
    return np.concatenate([_squares(network, {name: own[half]}, images[half].detach()) for half in halves])


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


def _shares_inside(squares: NDArray[np.float64], centres: NDArray[np.float64]) -> Shares | None:
    """The mean share of squared gradients [n, H, W] in a centred square, by its side from 0; None without gradients.

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
    return np.bincount(np.ravel(sides), weights=shares.ravel()).cumsum()
