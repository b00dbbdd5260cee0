"""The weights of the first convolution, which can be looked at because they lie over pixels."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unitvis.network.canonical import evaluating
from unitvis.network.layers import Examination
from unitvis.results.data import RunData


def first_filters(model: nn.Module, run: RunData) -> dict[str, NDArray[np.float32]]:
    """{layer: [channels, C, h, w]} of the run's layer that is the first convolution to run, or the BatchNorm after it.

    Empty where that convolution is no layer of the run, takes more than an image's channels, or is 1x1. A BatchNorm
    whose weight is negative turns its filter's sign, as it turns the response's.
    """
    channels = run.manifest["input"][0]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with evaluating(model):
        examination = Examination(model, torch.zeros(1, *run.manifest["input"], device=device))
    convolutions = {n: m for n in examination.runs if isinstance(m := examination.modules[n], nn.Conv2d)}
    if not convolutions:
        return {}
    first, convolution = next(iter(convolutions.items()))
    if convolution.in_channels != channels or convolution.groups != 1 or max(convolution.kernel_size) == 1:
        return {}
    weights = convolution.weight.detach().float()
    norm = examination.normalised().get(first)
    scale = examination.modules[norm].weight if norm else None
    turned = weights * scale.detach().sign().view(-1, 1, 1, 1) if isinstance(scale, Tensor) else weights
    return {
        name: filters.cpu().numpy() for name, filters in ((first, weights), (norm, turned)) if name in run.tops and name
    }
