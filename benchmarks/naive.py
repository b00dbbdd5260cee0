"""Baselines and networks of the benchmarks; the baselines are those of `unitvis bench`."""

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
    """Load a torchvision network in eval mode with random weights, the same every time, and its preprocessing."""
    zoos.importable()
    torch.manual_seed(0)
    loaded = models.load(f"torchvision:{name}", pretrained=False)
    loaded.model.eval().requires_grad_(False)
    return loaded


def cut(model: nn.Module, layers: list[str]) -> Callable[[Tensor], list[Tensor]]:
    """Cut a copy of the model after the last of the layers: a function of a batch that returns the layers' maps."""
    from torchvision.models.feature_extraction import create_feature_extractor

    extractor = create_feature_extractor(copy.deepcopy(model), layers)
    for module in extractor.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # it would overwrite a map that is returned
    return lambda batch: list(extractor(batch).values())


def fold(best: Tensor, best_ids: Tensor, values: Tensor, ids: Tensor) -> None:
    """Merge values [N, C] of images with ids [N] into a running top-k, best and best_ids [C, k], in place."""
    top, at = torch.cat([best, values.T], dim=1).topk(best.shape[1], dim=1)
    best_ids.copy_(torch.cat([best_ids, ids.expand(len(best), -1)], dim=1).gather(1, at))
    best.copy_(top)
