"""The colours of response maps."""

from __future__ import annotations

import numpy as np

from unitvis.drawing import colours


def test_heat_has_levels_from_zero_to_the_largest() -> None:
    maps = np.array([[[-1, 0, 0.001, 0.5, 1.0, np.nan]], [[-3, -2, -1, -5, -9, 0]]], np.float32)
    assert colours.heat_levels(maps).tolist() == [[[0, 0, 1, 8, 15, 0]], [[0] * 6]]
    assert colours.heat_levels(np.array([[np.inf, 1.0]], np.float32)).tolist() == [[15, 1]]
    rgba = np.asarray(colours.heat(np.array([[0, 15]], np.uint8)).convert("RGBA"))
    assert rgba[0, 0, 3] == 0
    assert rgba[0, 1, 3] > 200
