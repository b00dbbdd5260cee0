"""Baselines in plain PyTorch that `unitvis bench` and `benchmarks/` compare a scan with.

All of them stop after the last layer that is read, as a scan does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from unitvis.network.forward import Hooks


class Forward:
    """Bare forward pass up to the last of the layers; no map is read.

    layers: names, in the order of the forward pass. Call it with batches [N, C, H, W], inside a `with` block, on a
    model in eval mode.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], k: int = 9) -> None:
        self.k = k
        self._hooks = Hooks(model, dict.fromkeys(layers, 1))  # convolutions and what normalises them

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.__exit__()

    def __call__(self, batch: Tensor, ids: Tensor) -> None:
        """Run a batch; ids: int64, ascending from call to call, of its images; images beyond them are padding."""
        with torch.inference_mode():
            self._hooks.run(batch, lambda layer, maps: self._read(layer, maps[: len(ids)], ids))

    def _read(self, layer: int, maps: Tensor, ids: Tensor) -> None:
        pass


class HostHook(Forward):
    """Naive hooks: copy every map to the host, and compute each channel's maximum and a running top-k there.

    `tops`: layer number -> (values float, ids int64, positions int64), each [C, k] on the host, in the total order
    (value descending, id ascending, position ascending); ids are -1 where blank.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], k: int = 9) -> None:
        super().__init__(model, layers, k)
        self.tops: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def _read(self, layer: int, maps: Tensor, ids: Tensor) -> None:
        values, positions = maps.cpu().flatten(2).max(dim=2)  # [N, C]
        new = values.T, ids.cpu().expand(maps.shape[1], -1), positions.T  # [C, N]
        if layer not in self.tops:
            blank = new[1].new_full((maps.shape[1], self.k), -1)
            self.tops[layer] = values.new_full(blank.shape, -torch.inf), blank, blank
        merged = [torch.cat(pair, dim=1) for pair in zip(self.tops[layer], new, strict=True)]
        order = merged[0].argsort(dim=1, descending=True, stable=True)[:, : self.k]  # the earlier image first
        self.tops[layer] = (merged[0].gather(1, order), merged[1].gather(1, order), merged[2].gather(1, order))


class DeviceHook(Forward):
    """Fastest hooks of a few lines: `amax` of every map on the device, merged into a running `topk` there.

    `tops`: layer number -> (values, ids), each [C, k] on the device; there are no positions, and ties have any order.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], k: int = 9) -> None:
        super().__init__(model, layers, k)
        self.tops: dict[int, tuple[Tensor, Tensor]] = {}

    def _read(self, layer: int, maps: Tensor, ids: Tensor) -> None:
        values = maps.amax((2, 3)).T  # [C, N]
        if layer not in self.tops:
            blank = ids.new_full((maps.shape[1], self.k), -1)
            self.tops[layer] = values.new_full(blank.shape, -torch.inf), blank
        best, best_ids = self.tops[layer]
        top, at = torch.cat([best, values], dim=1).topk(self.k, dim=1)
        best_ids.copy_(torch.cat([best_ids, ids.expand(len(values), -1)], dim=1).gather(1, at))
        best.copy_(top)  # in place, so that a CUDA graph can replay it
