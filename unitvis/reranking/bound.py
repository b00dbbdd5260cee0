"""A statistical bound on how far canonical responses exceed those of half precision where only the latter are known."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

EXCEEDING_PROBABILITY = 1e-3  # for each layer, of any image left out having a response above the bound
MIN_ERRORS = 200  # known errors of a layer; with fewer nothing is bounded


def upper_bound(errors: NDArray[np.float64], draws: float, doubt: float = EXCEEDING_PROBABILITY) -> float:
    """A bound that the largest of `draws` further errors exceeds with probability `doubt`; infinite for few errors.

    The largest errors follow a generalised Pareto distribution (Pickands 1975), fitted by probability-weighted moments
    (Hosking & Wallis 1987, section 3) to the largest of them; a tail lighter than exponential counts as exponential,
    and one standard error is added to the shape, which is the uncertain part.
    """
    if len(errors) < MIN_ERRORS:
        return math.inf
    count = max(40, math.isqrt(len(errors)))
    tail = np.sort(np.partition(errors, len(errors) - count - 1)[-count - 1 :])
    excess = tail[1:] - tail[0]
    mean = float(excess.mean())
    if mean == 0:
        return float(tail[-1])
    ranks = (np.arange(1, count + 1) - 0.35) / count
    weighted = float(((1 - ranks) * excess).mean())
    fitted = 2 - mean / (mean - 2 * weighted) if mean > 2 * weighted else 0.0
    scale = mean if fitted <= 0 else 2 * mean * weighted / (mean - 2 * weighted)
    shape = max(0.0, fitted) + 1 / math.sqrt(count)
    rarity = max(1.0, count / len(errors) * draws / doubt)
    return float(max(tail[0] + scale * (rarity**shape - 1) / shape, tail[-1]))
