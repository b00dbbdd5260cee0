"""Images outside of what the sample spans: its rounding errors say nothing of theirs.

The errors of half precision are in proportion to the numbers that are rounded: the network's inputs, and the responses
that the next layers read. The images where they are largest are known from the scan: see `state.magnitudes`, and the
candidates of each unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from unitvis.state.topk import Ranked

Floats = NDArray[np.float64]
Outside = NDArray[np.bool_]  # [rows, places] of a top-k: which of its images lie outside

TIMES = 1.01  # times the largest of the sample, beyond which an image is outside: images are read with other last bits
UNIT_TIMES = 2  # the same for the responses of one unit, which exceed those of the sample in many images


def outlying_inputs(kept: Ranked, sampled: Floats) -> tuple[Outside, float]:
    """Which images have larger inputs, in some channel at some scale, than all of the sample, [C * SCALES, KEPT].

    kept: see `ranked_magnitudes`. sampled: `uk.magnitudes` of the sample, [images, C * SCALES]. Also returns how many
    times as large as the sample's, at least 1, the inputs of the other images may be, of those too that are not kept.
    """
    times = _times(kept, _largest(sampled))
    return times > TIMES, _largest_left(times)


def outlying_responses(
    candidates: Ranked, sampled: Floats, columns: Sequence[slice], closed: NDArray[np.bool_], margins: Floats
) -> tuple[Outside, Floats]:
    """Which candidates may err in later layers as no image of the sample does, [units, M].

    Those whose response exceeds all of the sample's in the layer, or twice the sample's in the unit, and those that may
    open a unit which the sample closes. Infinite responses do not count: what overflowed is a candidate in the later
    layers as well. sampled: responses of the sample in half precision, [images, units]. columns: the units of each
    layer. closed: [units], only ReLUs read the unit, and it is at most its margin in all of the sample. margins:
    [units], how far float32 may lie above half precision.

    Also returns, float64 [layers], how many times as large as the sample's, at least 1, a layer's responses to the
    other images may be, of those too that are no candidates.
    """
    finite = candidates._replace(values=np.where(np.isfinite(candidates.values), candidates.values, -np.inf))
    span = _largest(sampled)
    outside, left = (_times(finite, span) > UNIT_TIMES) & (span > 0)[:, None], []
    for own in columns:
        times = _times(finite.of(own), np.full(own.stop - own.start, span[own].max()))
        outside[own] |= times > TIMES
        left.append(_largest_left(times))
    opening = np.where(np.isfinite(margins), -margins, 0)[:, None]
    return outside | (closed[:, None] & (finite.values > opening)), np.array(left)


def _largest(sampled: Floats) -> Floats:
    """float64 [columns]: the largest finite value in each, at least 0."""
    return np.where(np.isfinite(sampled), sampled, 0).max(axis=0, initial=0)


def _times(kept: Ranked, span: Floats) -> Floats:
    """float64 [rows, places]: values over the row's span; 0 where blank or not above 0."""
    values = np.where(kept.images < 0, 0, np.maximum(kept.values, 0)).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(values == 0, 0, values / span[:, None])


def _largest_left(times: Floats) -> float:
    """The largest of `times` that is not outside, or that an image behind the last place may have; at least 1."""
    return float(max(1.0, times[times <= TIMES].max(initial=1), times[:, -1].max()))
