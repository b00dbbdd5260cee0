"""NaN and infinite responses are counted, and end a scan that is to end at errors."""

from __future__ import annotations

import math

import pytest

from support.scans import Constant, planted, recorded, scan
from unitvis import UnitvisError


def test_nan_takes_no_place_and_is_counted() -> None:
    pixels = planted([1, 2, 3, 4])
    pixels[2, 1, 0, 0] = math.nan
    pixels[3, 1, 0, 1] = math.nan
    run = recorded(pixels, 3)
    assert run["tap"].images.tolist() == [[3, 2, 1], [1, 0, -1], [3, 2, 1]]
    assert run.manifest["layers"]["tap"]["nan"] == {"responses": 2, "units": 1, "first_image": 2}


def test_infinite_responses_are_counted_with_their_first_image() -> None:
    pixels = planted([1, math.inf, 3, math.inf, -math.inf])
    pixels[1, 0, 1, 0] = 7
    info = recorded(pixels, 2).manifest["layers"]["tap"]["infinite"]
    assert info == {"responses": 5, "units": 3, "first_image": 1}
    assert recorded(planted([-math.inf, 1]), 1).manifest["layers"]["tap"]["infinite"] is None


@pytest.mark.parametrize(("odd", "message"), [(math.nan, "NaN responses in 3 units"), (math.inf, "infinite responses")])
def test_odd_responses_stop_a_scan_that_is_to_stop_at_errors(odd: float, message: str) -> None:
    pixels = planted([1, 2, odd, 4])
    assert scan(Constant(), pixels, "tap", 2).manifest["images"] == 4
    with pytest.raises(UnitvisError, match=f"layer tap: .*{message}.*; first: image 2; on_error='skip'"):
        scan(Constant(), pixels, "tap", 2, on_error="raise")
