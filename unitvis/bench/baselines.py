"""What one would write without unitvis, in plain PyTorch: what `unitvis bench` and `benchmarks/` compare a scan with.

All of them stop after the last layer that is read, as a scan does, which spares them the rest of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from unitvis.network.forward import Hooks


class Forward:
    """The bare forward pass up to the last of the layers; nothing is read.

    layers: names, in the order of the forward pass. Call it with batches [N, C, H, W], inside a `with` block, on a
    model in eval mode.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], k: int = 9) -> None:
        self.k = k
        self._hooks = Hooks(model, layers)

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.__exit__()

    def __call__(self, batch: Tensor, ids: Tensor) -> None:
        """Forward a batch; ids int64, ascending from call to call, of all its images but those that pad it."""
        with torch.inference_mode():
            self._hooks.run(batch, lambda layer, maps: self._read(layer, maps[: len(ids)], ids))

    def _read(self, layer: int, maps: Tensor, ids: Tensor) -> None:
        pass


class HostHook(Forward):
    """What one writes first: hooks that copy every map to the host, where each channel's maximum and a running top-k
    are computed. `tops`: a layer's (values float, ids int64, positions int64), each [C, k] on the host, in brute
    force's order; ids are -1 where blank.
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
    """The strongest that a few lines give: hooks that take `amax` on the device and fold it in with `topk` there.

    `tops`: a layer's (values, ids), each [C, k] on the device; no positions, and ties come as they like.
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
