"""A sample of images that does not depend on how they were scanned: those whose ids hash to the smallest numbers."""

from __future__ import annotations

import torch
from torch import Tensor

SIZE = 256  # images


def mixed(ids: Tensor) -> Tensor:
    """A hash of ids, int64 in and out, on any device (splitmix64, Steele et al. 2014; shifts are signed)."""
    ids = (ids ^ (ids >> 30)) * -0x40A7B892E31B1A47
    ids = (ids ^ (ids >> 27)) * -0x6B2FB644ECCEEE15
    return ids ^ (ids >> 31)


class Sample:
    """The ids of at most `SIZE` of the images seen so far; samples of parts give that of the whole."""

    def __init__(self) -> None:
        self._ids: Tensor | None = None

    def see(self, ids: Tensor) -> None:
        """Take ids int64 [N], none below 0; no synchronisation."""
        known = ids if self._ids is None else torch.cat([self._ids, ids])
        order = torch.argsort(mixed(known), stable=True)[:SIZE]
        self._ids = known[order]

    @property
    def ids(self) -> Tensor:
        """int64 [at most SIZE], ascending and each once, on the CPU."""
        return torch.empty(0, dtype=torch.int64) if self._ids is None else torch.unique(self._ids.cpu())
