"""An interval set: ids as disjoint ranges, small while they come in order, exact whatever the order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

_PENDING = 1 << 16  # ids that wait before they are folded in
Ranges = NDArray[np.int64]


class IntervalSet:
    """A set of ids from 0, kept as disjoint half-open ranges, int64 [n, 2] ascending, with a gap between any two."""

    def __init__(self, ranges: Iterable[Iterable[int]] | Ranges = ()) -> None:
        given = ranges if isinstance(ranges, np.ndarray) else list(ranges)
        self._ranges = _joined(np.asarray(given, np.int64).reshape(-1, 2))
        self._pending: list[NDArray[np.int64]] = []
        self._waiting = 0

    @classmethod
    def of(cls, ids: Iterable[int]) -> IntervalSet:
        """The set of these ids, in any order."""
        return cls(_runs(np.unique(np.fromiter(ids, np.int64))))

    def holds(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[ids]: whether each is in."""
        return _holds(self.ranges, ids)

    def add(self, ids: NDArray[np.int64]) -> None:
        """Put ids in, in any order; one that is in already stays in."""
        self._pending.append(ids)
        self._waiting += len(ids)
        if self._waiting > _PENDING:
            self._fold()

    @property
    def ranges(self) -> Ranges:
        """int64 [n, 2]: first id, one past the last."""
        self._fold()
        return self._ranges

    def left(self, of: range) -> Iterator[int]:
        """The ids of a range (step 1) that are not in, ascending."""
        for start, stop in (IntervalSet([(of.start, of.stop)]) - self).ranges.tolist():
            yield from range(start, stop)

    def copy(self) -> IntervalSet:
        """The same set, which changes on its own."""
        return IntervalSet(self.ranges)

    def __len__(self) -> int:
        return int((self.ranges[:, 1] - self.ranges[:, 0]).sum())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IntervalSet) and np.array_equal(self.ranges, other.ranges)

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __or__(self, other: IntervalSet) -> IntervalSet:
        return IntervalSet(np.concatenate([self.ranges, other.ranges]))

    def __and__(self, other: IntervalSet) -> IntervalSet:
        return self._combined(other, np.logical_and)

    def __sub__(self, other: IntervalSet) -> IntervalSet:
        return self._combined(other, lambda mine, theirs: mine & ~theirs)

    def __str__(self) -> str:
        """As people write it: 0 to 4, 7, 9 to 12."""
        ends = [(first, stop - 1) for first, stop in self.ranges[:6].tolist()]
        told = ", ".join(f"{first:,}" if first == last else f"{first:,} to {last:,}" for first, last in ends)
        return told + (f" and {len(self.ranges) - 6} more ranges" if len(self.ranges) > 6 else "")

    def _fold(self) -> None:
        if not self._pending:
            return
        ids, self._pending, self._waiting = np.unique(np.concatenate(self._pending)), [], 0
        self._ranges = _joined(np.concatenate([self._ranges, _runs(ids)]))

    def _combined(
        self, other: IntervalSet, keep: Callable[[NDArray[np.bool_], NDArray[np.bool_]], NDArray[np.bool_]]
    ) -> IntervalSet:
        """By looking at each stretch between two neighbouring ends: both sets are constant there."""
        points = np.unique(np.concatenate([self.ranges, other.ranges]))
        kept = keep(_holds(self.ranges, points), _holds(other.ranges, points)).nonzero()[0]
        return IntervalSet(np.stack([points[kept], points[kept + 1]], axis=1)) if len(kept) else IntervalSet()


def _holds(ranges: Ranges, points: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[points]: whether each lies in a range."""
    return np.searchsorted(ranges[:, 0], points, "right") > np.searchsorted(ranges[:, 1], points, "right")


def _runs(ids: NDArray[np.int64]) -> Ranges:
    """Ranges of ids that ascend."""
    breaks = np.flatnonzero(np.diff(ids) > 1)
    starts, stops = np.append(ids[:1], ids[breaks + 1]), np.append(ids[breaks], ids[-1:])
    return np.stack([starts, stops + 1], axis=1)


def _joined(ranges: Ranges) -> Ranges:
    """Sorted, and joined where they touch or overlap; empty ones dropped."""
    ranges = ranges[ranges[:, 0] < ranges[:, 1]]
    ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
    if len(ranges) < 2:
        return ranges
    reach = np.maximum.accumulate(ranges[:, 1])
    first = np.concatenate([[True], ranges[1:, 0] > reach[:-1]])
    last = np.concatenate([first[1:], [True]])
    return np.stack([ranges[first, 0], reach[last]], axis=1)
