"""The witness: a few winners whose images are read and computed again, to tell whether the images are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unitvis.errors import UnitvisError
from unitvis.network.forward import COMPUTE_BATCH
from unitvis.network.network import Network
from unitvis.reranking.pairs import ResponsePairs
from unitvis.reranking.rereading import read_again
from unitvis.sources import Source
from unitvis.state.noise_numbers import ROUNDING
from unitvis.state.sampling import mixed
from unitvis.state.topk import Ranked

WITNESSES = COMPUTE_BATCH  # images that are computed again
HALF_ROUNDINGS = 16  # steps of half precision, at a unit's largest response, by which another pass may change one

HalfResponses = Callable[[Tensor], NDArray[np.float64]]  # images as they were read -> [N, units]


def check_witness(
    network: Network,
    ranked: Ranked,
    k: int,
    source: Source,
    *,
    bits: bool = False,
    rounding: float = ROUNDING,
    half: HalfResponses | None = None,
    resolution: float = 0.0,
) -> dict[str, int]:
    """Compute 16 winners again, chosen by `witnesses`, and compare all their places.

    network: in eval mode, its layers known. k: places of winners. bits: values and positions must be bit-equal, except
    in layers whose bits are found to depend on an image's place in its batch; otherwise values may differ by
    `rounding` of the layer's largest. half: computes responses in half precision, where those were ranked; then an
    image is refused if more than half of its responses differ by `HALF_ROUNDINGS` times `resolution` of the unit's
    largest.

    Returns {"images": computed, "responses": compared, "equal": bit-equal}. Raises UnitvisError about the first image
    that is absent, has changed, or gives other responses.
    """
    ids = witnesses(ranked.images[:, :k])
    if not len(ids):
        return {"images": 0, "responses": 0, "equal": 0}
    [batch] = read_again(source, ids)
    if (shape := network.input_shape_of(batch.pixels)) != network.input_shape:
        raise UnitvisError(f"the images give inputs of {list(shape)}, and {list(network.input_shape)} were recorded")
    unit, rank = np.nonzero(np.isin(ranked.images, ids))
    pairs = ResponsePairs(ranked.images[unit, rank], unit)
    unit, rank = unit[pairs.order], rank[pairs.order]
    then = ranked.values[unit, rank]
    if half is None:
        with network.reading() as canonical:
            varying = canonical.check(batch.pixels).by_slot
            keys = canonical.keys(batch.pixels)
        pairs.take(keys, batch.ids)
        now = pairs.values
        equal = (now.view(np.int32) == then.view(np.int32)) & (pairs.positions == ranked.positions[unit, rank])
        sizes = [own.stop - own.start for own in network.columns]
        in_bits = np.array([bits and layer.name not in varying for layer in network.layers])[network.layer_of[unit]]
        wrong = ~equal & (in_bits | ~_close(then, now, rounding * ranked.largest_of_layers(sizes)[unit]))
    else:
        now = half(batch.pixels)[np.searchsorted(ids, pairs.images), unit].astype(np.float32)
        equal = (now == then) | ~(np.isfinite(now) | np.isfinite(then))  # NaN and overflow are recorded as infinity
        far = ~equal & ~_close(then, now, HALF_ROUNDINGS * resolution * ranked.largest[unit])
        at = np.searchsorted(ids, pairs.images)
        wrong = far & (np.bincount(at, far) > np.bincount(at) / 2)[at]
    if wrong.any():
        first = int(np.argmax(wrong))
        layer = network.layers[network.layer_of[unit[first]]].name
        raise UnitvisError(
            f"{source.name(int(pairs.images[first]))!r} gave {then[first]:.9g} in layer {layer!r} when it was recorded "
            f"and gives {now[first]:.9g} now"
        )
    return {"images": len(ids), "responses": len(equal), "equal": int(equal.sum())}


def witnesses(winners: NDArray[np.int64]) -> NDArray[np.int64]:
    """At most 16 of the images in `winners` [units, k], -1 where blank, that win for many different units: ascending.

    The first is the winner with the largest id: where a loop left images out and counted on, the ids of all that
    followed are too small, so if that of any winner is, that of the last one is. Then, one after the other, the image
    is taken that wins for most units for which none of those before it does (Chvatal 1979, a greedy cover); of equal
    ones, and once all units are covered, that whose id has the smallest hash.
    """
    ids, at = np.unique(winners, return_inverse=True)
    unit, image = np.nonzero(winners >= 0)[0], at.ravel()[winners.ravel() >= 0]
    order = np.argsort(mixed(ids), kind="stable")
    place = np.argsort(order, kind="stable")[image]  # of each pair's image by hash: argmax takes the first
    free, chosen = ids[order] >= 0, list[int]()
    for number in range(min(WITNESSES, int(free.sum()))):
        wins = np.bincount(place, minlength=len(ids))
        chosen.append(int(np.argmax(np.where(free, wins, -1) if number else ids[order])))
        free[chosen[-1]] = False
        left = ~np.isin(unit, unit[place == chosen[-1]])
        unit, place = unit[left], place[left]
    return np.sort(ids[order][chosen])


def _close(then: NDArray[Any], now: NDArray[Any], slack: NDArray[np.float64]) -> NDArray[np.bool_]:
    with np.errstate(invalid="ignore", over="ignore"):
        return np.abs(now.astype(np.float64) - then) <= slack
