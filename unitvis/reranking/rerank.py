"""From candidates in half precision to the exact result: what can still win is computed again, canonically.

An outsider is an image whose canonical response to a unit is not known. What half precision said of it is at most the
unit's last candidate; by how much it may have erred is bounded from the images where both are known (`bound`). A unit
whose k-th canonical response lies above all that is decided.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

import unitvis_kernels as uk
from unitvis.network.canonical import BATCH
from unitvis.network.layers import Taps
from unitvis.ranking.recorder import Recorder
from unitvis.reranking.bound import DOUBT, upper_bound
from unitvis.reranking.places import Places
from unitvis.run import SEPARATED, TIED, UNSEPARATED, Run
from unitvis.sources import Source

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]
MOST = 0.4  # once this share of the images was computed again, the rest is too rather than left undecided


class Rescorer(Recorder):
    """Computes canonical responses of images of a half-precision scan, in the layers that need them.

    `state` keeps the strongest; `places` are the candidates, [units, M] flattened where there is one.
    """

    def __init__(self, scanned: Recorder) -> None:
        super().__init__(scanned.model, k=scanned.k, unit=scanned.unit, transform=scanned.transform)
        self._scanned = scanned
        self.adopt(scanned)
        values, ids, _ = (part.cpu().numpy() for part in uk.topk_read(scanned.state))
        self.half: Floats = values.astype(np.float64)  # [units, M]; NaN where blank
        self.candidates: Ids = ids  # [units, M]; -1 where blank
        unit, rank = np.nonzero(ids >= 0)
        self.places = Places(ids[unit, rank], unit)
        self.rows, self.ranks = unit[self.places.order], rank[self.places.order]  # of each place
        self.decided = np.zeros(len(ids), bool)
        self.layer_of = np.repeat(np.arange(len(self.layers)), [u.stop - u.start for u in self._units])  # [units]
        self.computed, self._depth = np.zeros(0, np.int64), np.zeros(0, np.int64)  # ids, and of how many layers
        self._sample: list[Floats] | None = None
        self._half_sample = self._canonical_sample = np.zeros((0, len(ids)))

    @contextmanager
    def _only(self, first: int, last: int) -> Iterator[None]:
        """Read the layers first <= i < last alone."""
        start = self._units[first].start
        self._columns = slice(start, self._units[last - 1].stop)
        self._own = [slice(units.start - start, units.stop - start) for units in self._units[first:last]]
        with Taps(self.model, [layer.name for layer in self.layers[first:last]]) as self._taps:
            yield

    def _floor(self) -> Tensor:
        return uk.unpack(self.state[self._columns, self.k])[0]

    def _read(self, batch: Tensor) -> Tensor:
        return self._taps.keys(batch, self._own, self._floor())

    def _take(self, keys: Tensor, ids: Tensor) -> None:
        uk.topk_merge_(self.state[self._columns], keys, ids)
        self.places.take(keys, ids, self._columns.start)
        if self._sample is not None:
            self._sample.append(uk.unpack(keys)[0].cpu().double().numpy())

    def compute(self, source: Source, ids: Ids, depths: NDArray[np.int64]) -> None:
        """Canonical responses of images in their first layers, as many as `depths`; never one twice."""
        at = np.searchsorted(self.computed, ids).clip(max=max(0, len(self.computed) - 1))
        before = np.where(self.computed[at] == ids, self._depth[at], 0) if len(self.computed) else np.zeros_like(ids)
        for first, last in np.unique(np.stack([before, depths])[:, depths > before], axis=1).T.tolist():
            with self._only(first, last):
                for batch in source.batches(4 * BATCH, ids=ids[(before == first) & (depths == last)].tolist()):
                    self(batch.pixels, batch.ids)
                self.flush()
        both, deep = np.concatenate([self.computed, ids]), np.concatenate([self._depth, depths])
        order = np.lexsort((-deep, both))
        self.computed, first_of_each = np.unique(both[order], return_index=True)
        self._depth = deep[order][first_of_each]

    def compute_sample(self, source: Source) -> None:
        """The sample, in all layers, and what half precision says of it."""
        ids = self._scanned.sample
        half = [self._scanned.half_responses(batch.pixels) for batch in source.batches(BATCH, ids=ids.tolist())]
        self._sample = []
        self.compute(source, ids, np.full(len(ids), len(self.layers)))
        self._half_sample, self._canonical_sample = np.concatenate(half), np.concatenate(self._sample)
        self._sample = None

    def margins(self) -> Floats:
        """[units]: how far an outsider's response may lie above its value in half precision."""
        with np.errstate(invalid="ignore"):
            sampled = self._canonical_sample - self._half_sample  # [images, units]
            error = self.places.values - self.half[self.rows, self.ranks]
        sampled[~np.isfinite(sampled)] = 0
        usable = np.isfinite(error)
        unit, error = self.rows[usable], error[usable].astype(np.float64)
        count = np.bincount(unit, minlength=len(self.half)) + len(sampled)
        square = np.bincount(unit, weights=error**2, minlength=len(self.half)) + (sampled**2).sum(axis=0)
        # No finer than the rounding of the response itself; a unit that was never seen to err has no scale otherwise.
        largest = np.nan_to_num(np.where(np.isfinite(self.half), abs(self.half), 0), nan=0).max(axis=1)
        scale = np.maximum(np.sqrt(square / np.maximum(count, 1)), largest * self._scanned.resolution / 4)
        scale[scale == 0] = 1.0  # all zero, in half precision and in float32
        margins = np.empty(len(self.half))
        for own in self._units:
            pooled = np.concatenate(
                [(sampled[:, own] / scale[own]).ravel(), (error / scale[unit])[(unit >= own.start) & (unit < own.stop)]]
            )
            # As many outsiders close below the last candidate as there are candidates, several times over.
            draws = 4.0 * (own.stop - own.start) * self.half.shape[1]
            margins[own] = upper_bound(pooled, draws) * scale[own]
        return margins

    def outsiders(self) -> Floats:
        """[units]: the largest value in half precision of an image whose canonical response is not known."""
        unknown = self.half.copy()
        known = self.places.known
        unknown[self.rows[known], self.ranks[known]] = -np.inf
        unknown[self.candidates < 0] = -np.inf
        full = (self.candidates[:, -1] >= 0) & (self._scanned.images > self.candidates.shape[1])
        unknown[:, -1] = np.where(full, self.half[:, -1], unknown[:, -1])
        return unknown.max(axis=1)

    def complete(self) -> NDArray[np.bool_]:
        """[units]: all images were computed in its layer."""
        deep = np.bincount(self._depth, minlength=len(self.layers) + 1)[::-1].cumsum()[::-1][1:]  # images, by layer
        return (deep >= self._scanned.images)[self.layer_of]

    def decide(self, margins: Floats) -> None:
        """Which units no outsider can enter."""
        best = np.where(self.complete(), -np.inf, self.outsiders())
        with np.errstate(invalid="ignore"):
            self.decided |= (best == -np.inf) | (self.kth > best + margins)

    @property
    def kth(self) -> Floats:
        """[units]: the k-th canonical response so far; NaN where there is room."""
        values, _, _ = uk.topk_read(self.state)
        return values[:, self.k - 1].cpu().double().numpy()

    def compute_candidates(self, source: Source, wanted: NDArray[np.bool_]) -> None:
        """The images of the places wanted [places], each in the layers up to the last that wants it."""
        images, depth = self.places.images[wanted], self.layer_of[self.rows[wanted]] + 1
        ids, at = np.unique(images, return_inverse=True)
        depths = np.zeros(len(ids), np.int64)
        np.maximum.at(depths, at, depth)
        self.compute(source, ids, depths)

    def compute_all(self, source: Source, layers: NDArray[np.int64]) -> None:
        """Every image that can be read, up to the last of the layers: all units up to there are decided."""
        failed = np.array([failure.id for failure in source.failures], np.int64)
        ids = np.setdiff1d(np.arange(source.length or 0), failed)
        self.compute(source, ids, np.full(len(ids), layers.max() + 1))
        self.decided |= self.layer_of <= layers.max()

    def _check_ids(self) -> None:
        """An image comes again where layers behind those of its first time want it."""

    def _status(self, tied: NDArray[np.bool_], units: slice) -> NDArray[np.str_]:
        return np.where(self.decided[units], np.where(tied, TIED, SEPARATED), UNSEPARATED)

    def _manifest(self, tops: dict[str, Any]) -> dict[str, Any]:
        return super()._manifest(tops) | {
            "images": self._scanned.images,
            "coverage": self._scanned.coverage.ranges.tolist(),
            "precision": "exact",
            "scan": self._scanned.how,
            "rescored": {"images": len(self.computed), "sample": len(self._half_sample), "doubt": DOUBT},
        }


def rescored(scanned: Recorder, source: Source) -> Run:
    """The exact run of a half-precision scan: each unit's status says whether the bound decides it.

    Reads again, once each, a sample of the images and those that can hold a place; where the undecided are few beside
    what that took, or a layer overflowed, all the rest.
    """
    start = time.perf_counter()
    with Rescorer(scanned) as again:
        again.compute_sample(source)
        margins = again.margins()
        k, half = again.k, again.half
        kth, last = half[:, min(k, half.shape[1]) - 1], half[:, -1]
        with np.errstate(invalid="ignore"):
            hopeless = kth <= last + margins / 4  # a plateau: no candidate more or less will decide it
            near = ~(half < (kth - 2 * margins)[:, None])  # [units, M]; NaN margins and blanks count as near
        near[hopeless, k + 1 :] = False
        again.compute_candidates(source, near[again.rows, again.ranks])
        margins = again.margins()
        again.decide(margins)

        with np.errstate(invalid="ignore"):
            open_units = ~again.decided & ~(last + margins > again.kth)  # another candidate can decide these
        again.compute_candidates(source, open_units[again.rows])
        again.decide(again.margins())

        overflowed = np.isposinf(last)
        pays = len(again.computed) >= MOST * scanned.images
        rest = again.layer_of[~again.decided & (overflowed | pays)]
        if len(rest):
            again.compute_all(source, rest)
        run = again.result()
    run.manifest["seconds"]["rescoring"] = time.perf_counter() - start
    run.attach(source)
    return run
