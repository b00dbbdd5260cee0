"""First-layer filters: the weights of the first convolution, which can be drawn because its inputs are pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unitvis import models
from unitvis.network.borrowing import Tensors, evaluating
from unitvis.network.device import on_device, unwrapped
from unitvis.network.layers import Examination
from unitvis.results.data import RunData


def first_filters(model: nn.Module | str | models.Loaded, run: RunData) -> dict[str, NDArray[np.float32]]:
    """Get the filters {layer: [channels, C, h, w]} of the first convolution that runs.

    layer: that convolution or the BatchNorm that follows it, whichever the run has. A channel with a negative BatchNorm
    weight has the sign of its filter changed, as that of its response. Empty where the run has neither, and for a
    convolution that is grouped, is 1x1, or has other input channels than the image.
    """
    found = filters_of_first(models.resolved(model)[0], run.manifest["input"])
    return {name: filters for name, filters in found.items() if name in run.tops}


def filters_of_first(model: nn.Module, shape: Sequence[int]) -> dict[str, NDArray[np.float32]]:
    """Get the filters of the first convolution, and the same under the name of its BatchNorm; see `first_filters`.

    shape: [C, H, W] of the model's input.
    """
    model, device = on_device(unwrapped(model), None)
    channels = shape[0]
    with evaluating(model), Tensors(model).kept():
        examination = Examination(model, torch.zeros(1, *shape, device=device))
    convolutions = {n: m for n in examination.runs if isinstance(m := examination.modules[n], nn.Conv2d)}
    if not convolutions:
        return {}
    first, convolution = next(iter(convolutions.items()))
    if convolution.in_channels != channels or convolution.groups != 1 or max(convolution.kernel_size) == 1:
        return {}
    weights = convolution.weight.detach()
    found = {first: weights}
    for norm in examination.following_batch_norms().get(first, []):
        scale = examination.modules[norm].weight
        scaled = weights * scale.detach().sign().view(-1, 1, 1, 1) if isinstance(scale, Tensor) else weights
        found |= {norm: scaled, examination.before_activation(norm) or norm: scaled}
    return {name: filters.cpu().numpy() for name, filters in found.items()}
