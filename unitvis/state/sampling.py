"""A sample of images that does not depend on how they were scanned: those whose ids hash to the smallest numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SIZE = 256  # images


def mixed(ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A hash of ids: the finaliser of splitmix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = ids.astype(np.uint64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def smallest_hashes(ids: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """At most `size` of the ids, those whose hashes are smallest, ascending."""
    return np.sort(ids[np.argsort(mixed(ids), kind="stable")[:size]])


def sample(ranges: NDArray[np.int64], size: int = SIZE) -> NDArray[np.int64]:
    """At most `size` of the ids in half-open ranges [n, 2], ascending."""
    chosen = np.zeros(0, np.int64)
    for first, stop in ranges.tolist():
        for start in range(first, stop, 1 << 20):
            ids = np.concatenate([chosen, np.arange(start, min(stop, start + (1 << 20)))])
            chosen = smallest_hashes(ids, size)
    return chosen
