"""Sequence of many images that takes little memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from unitvis.bench.bench import synthetic_images


class Ring:
    """Sequence of `count` images, uint8 [side, side, 3], that repeat once `memory` bytes are full.

    The images that are held are whole batches; pinned: they are in pinned memory.
    """

    def __init__(self, count: int, side: int, memory: int, pinned: bool, batch: int) -> None:
        self.count = count
        fit = min(count, max(1, memory // (3 * side**2) // batch) * batch)
        self.images = torch.from_numpy(synthetic_images(min(fit, 1024), (side, side)))
        self.images = torch.cat([self.images.roll(turn, 1) for turn in range(-(-fit // len(self.images)))])[:fit]
        if pinned:
            self.images = self.images.pin_memory()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images[index % len(self.images)].numpy()

    def batches(self, size: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (ids, uint8 [at most `size`, H, W, 3]) of the first `count` images; views of the ring."""
        start = 0
        while start < count:
            at = start % len(self.images)
            part = self.images[at : at + min(size, count - start)]
            yield torch.arange(start, start + len(part)), part
            start += len(part)
