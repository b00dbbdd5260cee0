"""The sample of images on which half precision is measured."""

from __future__ import annotations

import numpy as np

from unitvis.state.sampling import SIZE, mixed, sample


def test_the_sample_is_of_the_smallest_hashes_however_ids_came() -> None:
    ids = np.arange(2_500_000)
    want = np.sort(ids[np.argsort(mixed(ids))[:SIZE]])
    np.testing.assert_array_equal(sample(np.array([[0, 2_500_000]])), want)
    np.testing.assert_array_equal(sample(np.array([[0, 7], [7, 1_200_000], [1_200_000, 2_500_000]])), want)
    np.testing.assert_array_equal(sample(np.array([[5, 9], [20, 21]])), [5, 6, 7, 8, 20])
    assert len(np.unique(mixed(ids))) == len(ids)
