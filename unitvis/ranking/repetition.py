"""Notices a stream that gives every image more than once."""

from __future__ import annotations

import numpy as np

from unitvis.state.topk import Ranked

MIN_SHARE = 0.9  # of the units in which every response must come several times
MIN_IMAGES = 3  # different images that must come several times; fewer may be equal by chance
MIN_CONSISTENT = 0.95  # of the images that must have the same copies in every unit; a plateau has others in each


def repetition_warning(ranked: Ranked, k: int) -> str | None:
    """A warning where nearly all of the first k + 1 responses come several times, of the same images each time.

    Copies of an image have its value and position in every unit, under ids of their own.
    """
    values, positions, ids = (part[:, : k + 1] for part in (ranked.values, ranked.positions, ranked.images))
    filled = ids >= 0
    same = filled[:, 1:] & (values[:, 1:] == values[:, :-1]) & (positions[:, 1:] == positions[:, :-1])
    equals_previous = np.pad(same, ((0, 0), (1, 0)))
    several = equals_previous | np.pad(same, ((0, 0), (0, 1)))
    alone = filled & ~several
    alone[:, -1] = False  # it may be cut off from its copies
    ranking = filled[:, 1:].any(axis=1)
    if not ranking.any() or (share := 1 - alone[ranking].any(axis=1).mean()) < MIN_SHARE:
        return None
    start = np.maximum.accumulate(np.where(equals_previous, 0, np.arange(ids.shape[1])), axis=1)
    first = np.take_along_axis(ids, start, axis=1)  # [units, places]: the copy with the lowest id
    copies = np.unique(np.stack([ids[several], first[several]]), axis=1)
    images = len(np.unique(copies[0]))
    if len(np.unique(copies[1])) < MIN_IMAGES or images < MIN_CONSISTENT * copies.shape[1]:
        return None
    return (
        f"in {share:.0%} of the units every response comes more than once, so images seem to be repeated under other "
        "ids and take several places: an IterableDataset that is not split between the workers of its DataLoader gives "
        "each image once a worker (torch.utils.data.get_worker_info tells a worker its number)"
    )
