"""Identity of a network, for a manifest: its tensors, its modules, and what its layers compute from fixed noise."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from unitvis.network.attributes import Attribute, described_attributes
from unitvis.network.contents import flat
from unitvis.state.noise_numbers import encoded

NOISE_IMAGES = 2
LOUD = 8  # times the noise: most responses pass the bounds of activations, which the noise hardly reaches
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2

Description = dict[str, Any]


def describe_model(
    model: nn.Module, counters: Collection[str] = (), changing: Collection[Attribute] = ()
) -> Description:
    """Describe a model by its class, number of parameters, hashes of its state and of its modules, and attributes.

    counters: names of buffers that a forward pass changes, such as a number of calls, which are left out; changing:
    attributes that it changes. Returns {"class": name, "parameters": number, "weights": hexadecimal, "modules":
    hexadecimal, "attributes" and, where there are any, "arrays": see `described_attributes`}.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        if name not in counters:
            for leaf in tree_leaves(value):  # state that is no tensor: quantised weights, extra state
                digest.update(f"{name} {_outline(leaf)}".encode())
                if isinstance(leaf, Tensor):
                    digest.update(flat(leaf).view(torch.uint8).numpy().data)
    hashes = {"weights": digest.hexdigest(), "modules": _modules_hash(model)}
    attributes, arrays = described_attributes(model, counters, changing)
    return {**outline(model), **hashes, "attributes": attributes, **({"arrays": arrays} if arrays else {})}


def outline(model: nn.Module) -> Description:
    """The part of a description that costs nothing: {"class": name, "parameters": number}."""
    return {"class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())}


def noise(shape: tuple[int, int, int], images: int = NOISE_IMAGES) -> Tensor:
    """The same images for every version of every library: float32 [images, C, H, W], uniform in -2..2."""
    number = torch.arange(images * math.prod(shape), dtype=torch.float64, device="cpu")
    return (number.square().mul(_GOLDEN_RATIO).frac() * 4 - 2).float().view(images, *shape)


def numbers_of(maps: Tensor) -> list[float] | None:
    """Five numbers that tell a layer's maps [N, C, H, W] apart: largest magnitude, mean, root mean square, two sums.

    The sums weight every element by pseudo-random numbers in -1..1 and are divided by the number of elements. None for
    maps with NaN or infinity.
    """
    values = maps.detach().double().cpu().flatten()
    number = torch.arange(len(values), dtype=torch.float64, device="cpu")
    weights = [(number.square() * _GOLDEN_RATIO).frac() * 2 - 1, (number * _GOLDEN_RATIO).frac() * 2 - 1]
    sums = [float(values @ weight) / len(values) for weight in weights]
    found = [float(values.abs().max()), float(values.mean()), float(values.square().mean().sqrt()), *sums]
    return found if all(map(math.isfinite, found)) else None


def channel_numbers(maps: Tensor) -> str:
    """One number for each channel of a layer's maps [N, C, H, W], as `noise_numbers.encoded` writes float32 [C].

    It is the mean of the channel's magnitudes, in which negative values count half, so that a change of sign shows, and
    places by pseudo-random weights in 0.5..1.5, so that a shift shows.
    """
    values = maps.detach().double().cpu().transpose(0, 1).flatten(1)  # [C, N * H * W]
    number = torch.arange(values.shape[1], dtype=torch.float64, device="cpu")
    weights = (number.square() * _GOLDEN_RATIO).frac() + 0.5
    return encoded((torch.maximum(values, -0.5 * values) @ weights / weights.sum()).float().numpy())


def _outline(leaf: object) -> str:
    return f"{leaf.dtype} {list(leaf.shape)}" if isinstance(leaf, Tensor) else _without_addresses(repr(leaf))


def _modules_hash(model: nn.Module) -> str:
    """Hash of the words in a model's repr, sorted, since sets are printed in any order."""
    words = sorted(re.findall(r"[^\s(){}\[\],]+", _without_addresses(repr(model))))
    return hashlib.blake2b(" ".join(words).encode(), digest_size=16).hexdigest()


def _without_addresses(text: str) -> str:
    return re.sub(r"\bat 0x[0-9a-f]+", "", text)
