"""The colours of response maps."""

from __future__ import annotations

import numpy as np

from unitvis.drawing import colours


def test_heat_has_levels_from_zero_to_the_largest() -> None:
    maps = np.array([[[-1, 0, 0.001, 0.5, 1.0, np.nan]], [[-3, -2, -1, -5, -9, 0]]], np.float32)
    assert colours.heat_levels(maps).tolist() == [[[0, 0, 1, 8, 15, 0]], [[0] * 6]]
    assert colours.heat_levels(np.array([[np.inf, 1.0]], np.float32)).tolist() == [[15, 0]]
    assert colours.heat_levels(np.array([[3e38, 3e38, 3e38, 1]], np.float32)).tolist() == [[15, 15, 15, 0]]


def test_heat_begins_at_the_median() -> None:
    """As of a sigmoid, whose responses are all positive; each half of the map is told apart by sorting."""
    maps = np.random.default_rng(0).uniform(0.4, 0.6, (3, 7, 8)).astype(np.float32)
    for map_, levels in zip(maps, colours.heat_levels(maps), strict=True):
        ascending = levels.ravel()[np.argsort(map_, axis=None)].tolist()
        assert ascending[:28] == [0] * 28
        assert ascending[28] >= 1
        assert ascending == sorted(ascending)
        assert ascending[-1] == 15
    saturated = np.array([[6, 6, 6], [1, 6, 0]], np.float32)  # of a ReLU6: the median is the maximum
    assert colours.heat_levels(saturated).tolist() == [[15, 15, 15], [0, 15, 0]]

    rgba = np.asarray(colours.heat(np.array([[0, 15]], np.uint8)).convert("RGBA"))
    assert rgba[0, 0, 3] == 0
    assert rgba[0, 1, 3] > 200
