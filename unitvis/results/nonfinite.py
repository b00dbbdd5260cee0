"""Responses that are no ordinary numbers: counted by layer with the first image, told, or refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from unitvis.errors import UnitvisError
from unitvis.run import Run


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


def odd_responses(run: Run) -> Iterator[str]:
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


def refuse_odd_responses(run: Run) -> None:
    """UnitvisError at the first NaN or infinite response, for on_error="raise"."""
    for sentence in odd_responses(run):
        raise UnitvisError(f"{sentence}; on_error='skip' (--on-error skip) goes on and counts them")
