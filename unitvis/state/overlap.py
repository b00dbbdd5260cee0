"""Whether two states agree on the images that both of them ranked."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from unitvis.state.interval_set import IntervalSet
from unitvis.state.topk import Ranked


class Contradiction(NamedTuple):
    """An image to which two states give responses that cannot both be its own."""

    image: int
    unit: int
    one: float | None  # its value in the one state; None where it has no place there
    other: float | None


def contradiction(
    one: Ranked, other: Ranked, shared: IntervalSet, slack: NDArray[np.float64], share: float = 0.0
) -> Contradiction | None:
    """The first image of `shared` whose places in two states of the same units contradict each other; None if none do.

    An image that holds a place of a unit in both must have the same value, and one that holds a place in one state
    alone must not be stronger than the other's last place; up to `slack`, float64 [units]. share: of an image's
    responses that may differ by more.
    """
    known, index = np.unique(np.concatenate([one.images, other.images], axis=None), return_inverse=True)
    numbers = index[: one.images.size].reshape(one.images.shape), index[one.images.size :].reshape(other.images.shape)
    places = [np.nonzero(shared.holds(state.images)) for state in (one, other)]  # a blank place, -1, is never in
    keys = [unit * len(known) + number[unit, rank] for number, (unit, rank) in zip(numbers, places, strict=True)]
    values = [state.values[place].astype(np.float64) for state, place in zip((one, other), places, strict=True)]
    both, mine, theirs = np.intersect1d(keys[0], keys[1], assume_unique=True, return_indices=True)
    first, second = values[0][mine], values[1][theirs]
    with np.errstate(invalid="ignore"):
        wrong = [(first != second) & ~(np.abs(first - second) <= slack[both // len(known)])]
    found, pairs = [both], [(first, second)]
    for mine_first, (own, held, state) in enumerate(((0, keys[1], other), (1, keys[0], one))):
        alone = ~np.isin(keys[own], held)
        unit, value = keys[own][alone] // len(known), values[own][alone]
        full = state.images[unit, -1] >= 0
        found.append(keys[own][alone])
        wrong.append(~full | (value > state.values[unit, -1] + slack[unit]))
        absent = np.full(len(value), np.nan)
        pairs.append((absent, value) if mine_first else (value, absent))
    key, far = np.concatenate(found), np.concatenate(wrong)
    image = key % len(known)
    far &= (np.bincount(image, far, len(known)) > share * np.bincount(image, minlength=len(known)))[image]
    if not far.any():
        return None
    at = np.flatnonzero(far)[np.argmin(image[far])]
    pair = (float(np.concatenate(column)[at]) for column in zip(*pairs, strict=True))
    return Contradiction(
        int(known[image[at]]), int(key[at] // len(known)), *(None if np.isnan(value) else value for value in pair)
    )
