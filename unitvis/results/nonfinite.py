"""Responses that are no ordinary numbers: counted by layer with the first image, told, or refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unitvis.errors import UnitvisError
from unitvis.results.data import RunData


def infinite_info(values: Any, ids: Any) -> dict[str, int] | None:
    """How many units have a response of +infinity, to how many images at least, and the first image; [units, places].

    It is the largest value there is, and of equal values the lower id stands first: the places hold the first image of
    each unit whatever comes later, so nothing has to be counted while images go by.
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
    """How many responses were NaN, of how many units, and the first image with one; nan: [units, 2]."""
    if not nan[:, 0].any():
        return None
    return {"responses": int(nan[:, 0].sum()), "units": int((nan[:, 0] > 0).sum()), "first_image": int(nan[:, 1].min())}


def odd_responses(run: RunData) -> Iterator[str]:
    """A sentence for each layer with NaN, and for each with infinite responses."""
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
    """UnitvisError at the first NaN or infinite response, for on_error="raise"."""
    for sentence in odd_responses(run):
        raise UnitvisError(f"{sentence}; on_error='skip' (--on-error skip) goes on and counts them")
