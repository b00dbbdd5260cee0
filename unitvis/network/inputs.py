"""What a model takes: how many channels its images have, and whether a batch has them first."""

from __future__ import annotations

import torch
from torch import nn

from unitvis.errors import UnitvisError
from unitvis.network.borrowing import Tensors, evaluating
from unitvis.network.canonical import canonical_settings

_COLOURS = 3
_FEW_CHANNELS = (1, 3, 4)  # grey, RGB, RGBA: a last axis as short as these may be one of channels


def input_channels(model: nn.Module, height: int, width: int, device: torch.device) -> int:
    """Number of channels of the images that a model takes, by trying: 3 if it runs with them, else as it can run.

    Tried are 3, the input channels of its first convolution, and 1; if it runs with none of them, the convolution's (or
    3) are returned, so that the model's own error tells why. A first convolution of 3 is believed without a try.
    device: the model's.
    """
    first = _first_convolution_channels(model)
    if first == _COLOURS:
        return first
    for channels in dict.fromkeys((_COLOURS, first or 1, 1)):
        if _runs(model, (1, channels, height, width), device):
            return channels
    return first or _COLOURS


def refuse_channels_last(model: nn.Module, shape: tuple[int, int, int]) -> None:
    """Raise UnitvisError if float images of this shape [C, H, W] may be [H, W, C] in truth.

    A last axis as short as a pixel's colours is a width if the model's first convolution takes as many channels as the
    first axis has. A model that moves the axes itself would run all the same, and its boxes would be wrong.
    """
    short = shape[2] in _FEW_CHANNELS and min(shape[:2]) > max(_FEW_CHANNELS)
    if short and _first_convolution_channels(model) != shape[0]:
        raise UnitvisError(
            f"images of shape {list(shape)} seem to have their channels last; normalised float [N, C, H, W] is needed, "
            "channels first"
        )


def _first_convolution_channels(model: nn.Module) -> int | None:
    """Input channels of the first convolution of a model, as its modules are listed; None without one."""
    return next((module.in_channels or None for module in model.modules() if isinstance(module, nn.Conv2d)), None)


def _runs(model: nn.Module, shape: tuple[int, ...], device: torch.device) -> bool:
    """True if a forward pass of zeros, float32, raises nothing."""
    try:
        with evaluating(model), Tensors(model).kept(), canonical_settings(device), torch.no_grad():
            model(torch.zeros(shape, dtype=torch.float32, device=device))
    except Exception:  # whatever a model raises for images that it cannot take
        return False
    return True
