"""Re-ranking: from candidates in half precision to the exact result.

An outsider is an image whose canonical response to a unit is not known. Its response in half precision is at most the
unit's last candidate; by how much half precision may have erred there is bounded from the images where both are known
(`bound`). A unit whose k-th canonical response lies above all that is decided.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import unitvis_kernels as uk
from unitvis.half_precision.step import HALF
from unitvis.half_precision.suitability import unsuitable_layers
from unitvis.network.memory import let_go, may_fit_in_parts
from unitvis.network.network import Network
from unitvis.reranking.bound import upper_bound
from unitvis.reranking.outlying import outlying_inputs, outlying_responses
from unitvis.reranking.pairs import ResponsePairs
from unitvis.reranking.rereading import read_again
from unitvis.sources import Source
from unitvis.state.interval_set import IntervalSet
from unitvis.state.sampling import sample
from unitvis.state.topk import TopK

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]

MAX_RECOMPUTED_SHARE = 0.4  # of the images: once so many were computed again, all others are too


@dataclass(frozen=True)
class Scanned:
    """What a scan in half precision leaves to be decided."""

    k: int
    candidates: TopK  # more than k places a unit, ranked by half precision
    largest_inputs: TopK  # the images whose inputs are largest, see `ranked_magnitudes`
    coverage: IntervalSet  # the ids that were scanned
    responses: Callable[[Tensor, int], Floats]  # images as read, and how many at once -> half precision [N, units]
    magnitudes: Callable[[Tensor, int], Floats]  # the same -> [N, C * SCALES], of their inputs
    precision: str  # of the scan, a name in `HALF`
    batch_sizes: Sequence[int]  # how many images were computed at once: half precision errs otherwise in each


class HalfSample(NamedTuple):
    """Images of the sample in half precision, as of one batch size."""

    responses: Floats  # [images, units]
    magnitudes: Floats  # [images, C * SCALES], of their inputs


@dataclass(frozen=True)
class Reranked:
    """The canonical top-k after re-ranking."""

    topk: TopK  # k + 1 places a unit
    decided: NDArray[np.bool_]  # [units]: no other image can enter
    computed: int  # images whose canonical responses were computed
    outlying: int  # of these, images outside of what the sample spans
    sample: Ids  # of these, images of the sample, ascending
    sample_responses: NDArray[np.float32]  # [images, units]: their canonical responses


def rerank(network: Network, scanned: Scanned, source: Source) -> Reranked:
    """Compute canonical responses of what can win until each unit is decided, or as far as that pays.

    network: in eval mode, its layers known. Reads again a sample of the images, those outside of what it spans, and
    those that can hold a place; where the undecided are few beside what that took, a layer overflowed, or the sample
    shows that the scan's precision did not suit it, all the rest.
    """
    again = Reranking(network, scanned, source)
    again.compute_sample()
    again.compute_outlying()
    margins = again.margins()
    k, half = scanned.k, again.half
    kth, last = half[:, min(k, half.shape[1]) - 1], half[:, -1]
    with np.errstate(invalid="ignore"):
        hopeless = kth <= last + margins / 4  # a plateau: no candidate more or less will decide it
        near = ~(half < (kth - 2 * margins)[:, None])  # [units, M]; NaN margins and blanks count as near
    near[hopeless, k + 1 :] = False
    again.compute_candidates(near[again.rows, again.ranks])
    margins = again.margins()
    again.decide(margins)

    with np.errstate(invalid="ignore"):
        open_units = ~again.decided & ~(last + margins > again.kth)  # another candidate can decide these
    again.compute_candidates(open_units[again.rows])
    again.decide(again.margins())

    overflowed = np.isposinf(last)
    pays = len(again.computed) >= MAX_RECOMPUTED_SHARE * len(scanned.coverage)
    rest = again.layer_of[~again.decided & (overflowed | pays | again.unsuitable)]
    if len(rest):
        again.compute_all(rest.max())
    return Reranked(
        again.topk,
        again.decided,
        len(again.computed),
        again.outlying,
        again.sample,
        again.canonical_sample.astype(np.float32),  # which computed them
    )


MIN_VARYING = 16  # images of the sample in which a unit's response must not be its commonest one


class Reranking:
    """Canonical responses of a half-precision scan's images, in the layers that need them, and what they decide.

    `pairs` are the candidates, [units, M] flattened where there is one; `rows` and `ranks` tell each one's unit and
    rank. A place's value is NaN until its image is computed.
    """

    def __init__(self, network: Network, scanned: Scanned, source: Source) -> None:
        self._network, self._scanned, self._source = network, scanned, source
        self.topk = TopK.empty(network.units, scanned.k + 1, network.device)
        candidates = scanned.candidates.read()
        self.half: Floats = candidates.values.astype(np.float64)  # [units, M]; NaN where blank
        self.images = candidates.images  # [units, M]; -1 where blank
        unit, rank = np.nonzero(candidates.images >= 0)
        self.pairs = ResponsePairs(candidates.images[unit, rank], unit)
        self.rows, self.ranks = unit[self.pairs.order], rank[self.pairs.order]
        self.decided = np.zeros(network.units, bool)
        self.layer_of = network.layer_of
        self.computed, self._depth = np.zeros(0, np.int64), np.zeros(0, np.int64)  # ids, and of how many layers
        self.sample = sample(scanned.coverage.ranges)  # ids, ascending
        self.canonical_sample = np.zeros((0, network.units))  # [images, units]: their canonical responses
        self._half_samples: list[HalfSample] = []  # the same images in half precision, for each batch size
        # [layers]: how many times as large as those of the sample the numbers that a layer is computed from may be.
        self._stretch = np.ones(len(network.layers))
        self.outlying = 0  # images outside of what the sample spans
        self.unsuitable = np.zeros(network.units, bool)  # [units]: of layers whose errors no sample shows
        self._resolution = torch.finfo(HALF[scanned.precision]).eps  # from 1 to the next number

    def compute(self, ids: Ids, depths: NDArray[np.int64]) -> list[Floats]:
        """Canonical responses of images in their first layers, as many as `depths`; never one twice.

        Returns the values, float64 [n, units of the layers], of each compute batch.
        """
        at = np.searchsorted(self.computed, ids).clip(max=max(0, len(self.computed) - 1))
        before = np.where(self.computed[at] == ids, self._depth[at], 0) if len(self.computed) else np.zeros_like(ids)
        values = []
        for first, last in np.unique(np.stack([before, depths])[:, depths > before], axis=1).T.tolist():
            values += list(self._compute(ids[(before == first) & (depths == last)], first, last))
        both, deep = np.concatenate([self.computed, ids]), np.concatenate([self._depth, depths])
        order = np.lexsort((-deep, both))
        self.computed, first_of_each = np.unique(both[order], return_index=True)
        self._depth = deep[order][first_of_each]
        return values

    def _compute(self, ids: Ids, first: int, last: int) -> Iterator[Floats]:
        """Rank images in the layers first <= number < last alone."""
        columns = slice(self._network.columns[first].start, self._network.columns[last - 1].stop)
        topk = self.topk.of(columns)
        with self._network.reading(first, last) as canonical:
            for batch in read_again(self._source, ids):
                keys = canonical.keys(batch.pixels, topk.threshold())
                topk.merge(keys, batch.ids.to(keys.device))
                self.pairs.take(keys, batch.ids, columns.start)
                yield uk.unpack(keys)[0].cpu().double().numpy()

    def compute_sample(self) -> None:
        """The images with the smallest hashes of their ids, in all layers, in both precisions.

        A warning names a layer that the scan's precision turns out not to suit.
        """
        ids = self.sample
        self.canonical_sample = np.concatenate(self.compute(ids, np.full(len(ids), len(self._network.layers))))
        half, found = {size: list[HalfSample]() for size in self._scanned.batch_sizes}, dict[str, str]()
        for batch in read_again(self._source, ids):
            for size in list(half):
                if (sampled := self._half(batch.pixels, size)) is None:
                    del half[size]
                else:
                    half[size].append(sampled)
            found |= unsuitable_layers(self._network, batch.pixels, self._scanned.precision)
        self._half_samples = [HalfSample(*map(np.concatenate, zip(*own, strict=True))) for own in half.values()]
        for layer, own in zip(self._network.layers, self._network.columns, strict=True):
            self.unsuitable[own] = layer.name in found or len(half) < len(self._scanned.batch_sizes)
        if found:
            reason, last = (
                next(iter(found.values())),
                [layer for layer in self._network.layers if layer.name in found][-1],
            )
            warnings.warn(f"{reason}; all images are computed again in float32 up to layer {last.name!r}")

    def _half(self, images: Tensor, size: int) -> HalfSample | None:
        """What half precision makes of so many images at once; None, with a warning, if those do not fit now."""
        try:
            return HalfSample(self._scanned.responses(images, size), self._scanned.magnitudes(images, size))
        except Exception as error:
            if not may_fit_in_parts(error):
                raise
        let_go(self._network.device)  # outside of the handler, which holds what the batch computed
        warnings.warn(
            f"batch {size} fitted on {self._network.device} in the scan and does not now, so its errors in half "
            "precision cannot be measured; all images are computed again in float32"
        )
        return None

    def compute_outlying(self) -> None:
        """The images outside of what the sample spans, in all layers, as many as the scan kept.

        Those count that are outside in any of the batch sizes, as nothing tells in which one an image was computed.
        Where others may lie outside, their rounding errors are larger than the sample's in proportion, and so are the
        margins from here on.
        """
        network, kept, candidates = self._network, self._scanned.largest_inputs.read(), self._scanned.candidates.read()
        read_by_relu = np.array([layer.feeds_relu for layer in network.layers])[self.layer_of]
        margins, ids, stretch = self.margins(), np.zeros(0, np.int64), np.ones(len(network.layers))
        for sampled in self._half_samples:
            outside, largest_input = outlying_inputs(kept, sampled.magnitudes)
            ids = np.union1d(ids, kept.images[outside])
            # Within its margin: a flat image gives just the bias of a unit, which tells nothing of rounding errors.
            largest = np.maximum(self.canonical_sample, sampled.responses).max(axis=0)
            closed = read_by_relu & (largest <= np.where(np.isfinite(margins), margins, 0))
            outside, times = outlying_responses(candidates, sampled.responses, network.columns, closed, margins)
            outside[network.columns[-1]] = False  # no layer reads the last one's responses
            ids = np.union1d(ids, candidates.images[outside])
            before = np.maximum.accumulate([largest_input, *times[:-1]])  # [layers]: of what lies before each
            stretch = np.maximum(stretch, before)
        self.compute(ids, np.full(len(ids), len(network.layers)))
        self.outlying, self._stretch = len(ids), stretch

    def margins(self) -> Floats:
        """float64 [units]: how far an outsider's response may lie above its value in half precision.

        It may have been computed in any of the batch sizes, so the one that errs most counts.
        """
        if self.unsuitable.all():
            return np.full(len(self.half), np.inf)
        return np.max([self._margins(sampled.responses) for sampled in self._half_samples], axis=0)

    def _margins(self, half_sample: Floats) -> Floats:
        """Like `margins`, for one batch size. half_sample: float64 [images, units]."""
        with np.errstate(invalid="ignore"):
            sampled = self.canonical_sample - half_sample  # [images, units]
            error = self.pairs.values - self.half[self.rows, self.ranks]
        # Infinite in float32 where half precision is finite: nothing bounds that. The other way round is a candidate.
        boundless = self.unsuitable | (np.isposinf(self.canonical_sample) & np.isfinite(half_sample)).any(axis=0)
        sampled[~np.isfinite(sampled)] = 0
        usable = np.isfinite(error)
        unit, error = self.rows[usable], error[usable].astype(np.float64)
        count = np.bincount(unit, minlength=len(self.half)) + len(sampled)
        square = np.bincount(unit, weights=error**2, minlength=len(self.half)) + (sampled**2).sum(axis=0)
        # No finer than the rounding of the response itself; a unit that was never seen to err has no scale otherwise.
        largest = np.nan_to_num(np.where(np.isfinite(self.half), abs(self.half), 0), nan=0).max(axis=1)
        scale = np.maximum(np.sqrt(square / np.maximum(count, 1)), largest * self._resolution / 4)
        scale[scale == 0] = 1.0  # all zero, in half precision and in float32
        margins = np.empty(len(self.half))
        for own, stretch in zip(self._network.columns, self._stretch, strict=True):
            pooled = np.concatenate(
                [(sampled[:, own] / scale[own]).ravel(), (error / scale[unit])[(unit >= own.start) & (unit < own.stop)]]
            )
            # The number of outsiders that lie close below the last candidate is not known; it is taken for four times
            # that of the candidates. Those further below have room for larger errors.
            draws = 4.0 * (own.stop - own.start) * self.half.shape[1]
            bound = math.inf if boundless[own].any() else upper_bound(pooled, draws)
            least = largest[own] * self._resolution / 2  # a rounding
            margins[own] = np.maximum(stretch * bound * scale[own], least)
        margins[_rarely_varies(half_sample)] = np.inf
        return margins

    def outsiders(self) -> Floats:
        """float64 [units]: the largest value in half precision of an image whose canonical response is not known."""
        unknown = self.half.copy()
        known = self.pairs.known
        unknown[self.rows[known], self.ranks[known]] = -np.inf
        unknown[self.images < 0] = -np.inf
        full = (self.images[:, -1] >= 0) & (len(self._scanned.coverage) > self.images.shape[1])
        unknown[:, -1] = np.where(full, self.half[:, -1], unknown[:, -1])
        return unknown.max(axis=1)

    def complete(self) -> NDArray[np.bool_]:
        """Bool [units]: all images were computed in the unit's layer."""
        deep = np.bincount(self._depth, minlength=len(self._network.layers) + 1)[::-1].cumsum()[::-1][1:]
        return (deep >= len(self._scanned.coverage))[self.layer_of]  # deep: int64 [layers], images computed in each

    def decide(self, margins: Floats) -> None:
        """Mark the units that no outsider can enter."""
        best = np.where(self.complete(), -np.inf, self.outsiders())
        with np.errstate(invalid="ignore"):
            self.decided |= (best == -np.inf) | (self.kth > best + margins)

    @property
    def kth(self) -> Floats:
        """float64 [units]: the k-th canonical response so far; NaN where there is room."""
        return self.topk.threshold(self._scanned.k - 1).cpu().double().numpy()

    def compute_candidates(self, wanted: NDArray[np.bool_]) -> None:
        """The images of the places wanted [places], each in the layers up to the last that wants it."""
        images, depth = self.pairs.images[wanted], self.layer_of[self.rows[wanted]] + 1
        ids, at = np.unique(images, return_inverse=True)
        depths = np.zeros(len(ids), np.int64)
        np.maximum.at(depths, at, depth)
        self.compute(ids, depths)

    def compute_all(self, layer: int) -> None:
        """Every image that was scanned, up to a layer: all units up to there are decided."""
        ids = np.concatenate([np.arange(*ends) for ends in self._scanned.coverage.ranges.tolist()])
        self.compute(ids, np.full(len(ids), layer + 1))
        self.decided |= self.layer_of <= layer


def _rarely_varies(sampled: Floats) -> NDArray[np.bool_]:
    """Bool [units]: fewer than `MIN_VARYING` of the values [images, units] differ from the commonest one.

    Such a unit shows no error in the sample, as behind a ReLU that all of its images close, and others may open.
    """
    if len(sampled) < MIN_VARYING:
        return np.ones(sampled.shape[1], bool)
    ordered = np.sort(sampled, axis=0)
    return np.asarray((ordered[:MIN_VARYING] == ordered[len(ordered) - MIN_VARYING :]).any(axis=0))
