"""The baselines: those of `unitvis bench`, and the bare forward pass as a CUDA graph and through torch.compile."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from support import zoos
from unitvis import models
from unitvis.bench.baselines import DeviceHook, Forward, HostHook

__all__ = ["DeviceHook", "Forward", "HostHook", "cut", "fold", "network"]


@functools.cache
def network(name: str) -> models.Loaded:
    """One of torchvision's networks with random weights, the same every time, in eval mode, with its preprocessing."""
    zoos.importable()
    torch.manual_seed(0)
    loaded = models.load(f"torchvision:{name}", pretrained=False)
    loaded.model.eval().requires_grad_(False)
    return loaded


def cut(model: nn.Module, layers: list[str]) -> Callable[[Tensor], list[Tensor]]:
    """The model as a function that gives the layers' maps and ends with the last of them, to be compiled."""
    from torchvision.models.feature_extraction import create_feature_extractor

    extractor = create_feature_extractor(copy.deepcopy(model), layers)
    for module in extractor.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # it would overwrite what is to be returned
    return lambda batch: list(extractor(batch).values())


def fold(best: Tensor, best_ids: Tensor, values: Tensor, ids: Tensor) -> None:
    """The running top-k of plain PyTorch, in place: best [C, k], values [N, C], ids [N]."""
    top, at = torch.cat([best, values.T], dim=1).topk(best.shape[1], dim=1)
    best_ids.copy_(torch.cat([best_ids, ids.expand(len(best), -1)], dim=1).gather(1, at))
    best.copy_(top)
