"""The strongest responses of every unit, against Python's own sorting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import unitvis_kernels as uk
from unitvis.state.topk import TopK

UNITS, PLACES, IMAGES = 3, 4, 9
CPU = torch.device("cpu")
NAN = math.nan

# [image][unit] = (response, its position in the map): ties in unit 0, too few responses for all places in unit 1
RESPONSES = [
    [(1.5, 3), (-7.0, 5), (-2.0, 0)],
    [(4.0, 0), (NAN, 0), (-1.0, 7)],
    [(4.0, 9), (0.5, 2), (-0.0, 1)],
    [(2.0, 1), (NAN, 0), (0.0, 5)],
    [(4.0, 4), (-math.inf, 6), (-3.0, 2)],
    [(0.0, 8), (NAN, 0), (math.inf, 3)],
    [(2.0, 6), (NAN, 0), (1.0, 4)],
    [(-5.0, 2), (NAN, 0), (1.0, 0)],
    [(NAN, 0), (NAN, 0), (-1.0, 1)],
]


def keys(images: list[int]) -> torch.Tensor:
    """The keys of some images, int64 [images, units]."""
    values, positions = zip(*(zip(*RESPONSES[image], strict=True) for image in images), strict=True)
    return uk.pack(torch.tensor(values), torch.tensor(positions))


def filled(*batches: list[int]) -> TopK:
    topk = TopK.empty(UNITS, PLACES, CPU)
    for batch in batches:
        topk.merge(keys(batch), torch.tensor(batch))
    return topk


def want(images: list[int], unit: int) -> list[tuple[float, int, int]]:
    """(value, image, position) of a unit's places, best first; of equal values the lower id comes first."""
    known = [(RESPONSES[image][unit][0] + 0.0, image, RESPONSES[image][unit][1]) for image in images]
    ranked = sorted((one for one in known if not math.isnan(one[0])), key=lambda one: (-one[0], one[1]))
    return ranked[:PLACES]


def check(topk: TopK, images: list[int]) -> None:
    """Fail unless the places and the NaN counts are those of these images."""
    found = topk.read()
    assert [part.dtype for part in found] == [np.float32, np.int64, np.int64, np.int64]
    for unit in range(UNITS):
        ranked = want(images, unit)
        blank = PLACES - len(ranked)
        values, ids, positions = zip(*ranked, strict=True) if ranked else ((), (), ())
        np.testing.assert_array_equal(found.values[unit], [*values, *[NAN] * blank])
        assert found.images[unit].tolist() == [*ids, *[-1] * blank]
        assert found.positions[unit].tolist() == [*positions, *[-1] * blank]
        nan = [image for image in images if math.isnan(RESPONSES[image][unit][0])]
        assert found.nan[unit].tolist() == [len(nan), min(nan, default=2**63 - 1)]


@pytest.mark.parametrize(
    "batches",
    [[[0, 1, 2, 3, 4, 5, 6, 7, 8]], [[0, 1, 2], [3], [4, 5, 6, 7, 8]], [[8, 3, 5], [7, 0], [6, 2, 1, 4]]],
    ids=["one batch", "several", "out of order"],
)
def test_places_do_not_depend_on_batches_or_their_order(batches: list[list[int]]) -> None:
    topk = filled(*batches)
    assert (topk.units, topk.places) == (UNITS, PLACES)
    check(topk, list(range(IMAGES)))


def test_without_responses_all_places_are_blank() -> None:
    topk = filled()
    check(topk, [])
    assert topk.threshold().isnan().all()
    assert topk.images().tolist() == []
    assert topk.counts_nan().tolist() == [False] * UNITS


def test_the_threshold_is_the_value_of_a_place_and_nan_where_that_is_blank() -> None:
    topk = filled(list(range(IMAGES)))
    ranked = [want(list(range(IMAGES)), unit) for unit in range(UNITS)]
    for place in range(PLACES):
        values = [one[place][0] if place < len(one) else NAN for one in ranked]
        np.testing.assert_array_equal(topk.threshold(place), np.array(values, np.float32))
    np.testing.assert_array_equal(topk.threshold(), topk.threshold(PLACES - 1))
    assert topk.threshold().isnan().tolist() == [False, True, False]


def test_of_is_a_view_into_which_merging_changes_the_whole() -> None:
    topk = filled([0, 1, 2])
    part = topk.of(slice(1, 3))
    assert part.units == 2
    rest = list(range(3, IMAGES))
    part.merge(keys(rest)[:, 1:], torch.tensor(rest))
    found, before, after = topk.read(), filled([0, 1, 2]).read(), filled(list(range(IMAGES))).read()
    for whole, old, new in zip(found, before, after, strict=True):
        np.testing.assert_array_equal(whole[:1], old[:1])
        np.testing.assert_array_equal(whole[1:], new[1:])


def test_rows_of_what_was_read_are_views() -> None:
    found = filled(list(range(IMAGES))).read()
    rows = found.of(slice(1, 3))
    for part, whole in zip(rows, found, strict=True):
        np.testing.assert_array_equal(part, whole[1:3])
        assert np.shares_memory(part, whole)


@pytest.mark.parametrize(("one", "other"), [([0, 2, 4, 6, 8], [1, 3, 5, 7]), ([5, 6, 7, 8], [0, 1, 2, 3, 4])])
def test_two_states_merge_into_that_of_all_images(one: list[int], other: list[int]) -> None:
    topk, second = filled(one), filled(other)
    before = second.tensor.clone()
    topk.merge_all(second)
    check(topk, list(range(IMAGES)))
    assert torch.equal(second.tensor, before)


def test_images_are_the_ids_that_hold_a_place() -> None:
    topk = filled(list(range(IMAGES)))
    held = {image for unit in range(UNITS) for _, image, _ in want(list(range(IMAGES)), unit)}
    assert 0 < len(held) < IMAGES
    assert topk.images().tolist() == sorted(held)


def test_units_with_a_nan_response_are_told() -> None:
    assert filled([2, 3, 4]).counts_nan().tolist() == [False, True, False]
    assert filled(list(range(IMAGES))).counts_nan().tolist() == [True, True, False]


def test_a_copy_changes_on_its_own() -> None:
    topk = filled([0, 1])
    copy = topk.to("cpu")
    assert torch.equal(copy.tensor, topk.tensor)
    copy.merge(keys([2]), torch.tensor([2]))
    check(topk, [0, 1])
    check(copy, [0, 1, 2])
