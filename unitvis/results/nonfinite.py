"""NaN and infinite responses: counted for each layer with the first image, reported, or refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unitvis.errors import UnitvisError
from unitvis.results.data import RunData


def infinite_info(values: Any, ids: Any) -> dict[str, int] | None:
    """Count responses of +infinity in a layer's top-k; None without any. values, ids: [units, k], ids -1 where blank.

    Returns {"responses": at least so many, "units": with one, "first_image": id}. Infinity is the largest value and of
    equal values the lower id ranks first, so the top-k holds each unit's first image and the scan need not count.
    """
    infinite = (values == np.inf) & (ids >= 0)
    if not infinite.any():
        return None
    return {
        "responses": int(infinite.sum()),
        "units": int(infinite.any(axis=1).sum()),
        "first_image": int(ids[infinite].min()),
    }


def nan_info(nan: NDArray[np.int64]) -> dict[str, int] | None:
    """Sum up the NaN responses of a layer; None without any. nan: int64 [units, 2], their number and the first image.

    Returns {"responses": number, "units": with one, "first_image": id}.
    """
    if not nan[:, 0].any():
        return None
    return {"responses": int(nan[:, 0].sum()), "units": int((nan[:, 0] > 0).sum()), "first_image": int(nan[:, 1].min())}


def odd_responses(run: RunData) -> Iterator[str]:
    """Yield a sentence for each layer with NaN responses, and for each with infinite ones."""
    for name, top in run.tops.items():
        if nan := top.info["nan"]:
            yield (
                f"layer {name}: {nan['responses']} NaN responses in {nan['units']} units hold no place; "
                f"first: image {nan['first_image']}"
            )
        if infinite := top.info["infinite"]:
            yield (
                f"layer {name}: infinite responses in {infinite['units']} units, of {infinite['responses']} places; "
                f"first: image {infinite['first_image']}"
            )


def refuse_odd_responses(run: RunData) -> None:
    """Raise UnitvisError where a layer has NaN or infinite responses, for on_error="raise"."""
    for sentence in odd_responses(run):
        raise UnitvisError(f"{sentence}; on_error='skip' (--on-error skip) goes on and counts them")
