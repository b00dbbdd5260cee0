"""A set of ids against Python's own set."""

import numpy as np
import pytest

from unitvis.state import interval_set as coverage
from unitvis.state.interval_set import IntervalSet


def drawn(random, size, largest):
    return set(random.integers(0, largest, size).tolist())


@pytest.mark.parametrize("pending", [1, 7, 1 << 16])
def test_it_behaves_as_a_set(pending, monkeypatch):
    monkeypatch.setattr(coverage, "_PENDING", pending)
    random = np.random.default_rng(0)
    for round_ in range(60):
        largest = (5, 40, 10**12)[round_ % 3]
        mine, theirs = drawn(random, round_, largest), drawn(random, 59 - round_, largest)
        a, b = IntervalSet(), IntervalSet.of(theirs)
        for part in np.array_split(random.permutation(list(mine)), 5):
            a.add(part.astype(np.int64))
            a.add(part[:1].astype(np.int64))
        for found, want in ((a, mine), (a | b, mine | theirs), (a & b, mine & theirs), (a - b, mine - theirs)):
            assert {id for start, stop in found.ranges.tolist() for id in range(start, stop)} == want
            assert len(found) == len(want)
            assert (found.ranges[:, 0] < found.ranges[:, 1]).all()
            assert (found.ranges[1:, 0] > found.ranges[:-1, 1]).all()
            assert found == IntervalSet.of(want)
        asked = np.array(sorted(mine | theirs | {0, 3}), np.int64)
        assert a.holds(asked).tolist() == [id in mine for id in asked.tolist()]
        assert list(a.left(range(2, 30))) == [id for id in range(2, 30) if id not in mine]


def test_ids_in_order_are_one_range():
    ids = IntervalSet()
    for start in range(0, 10**6, 1000):
        ids.add(np.arange(start, start + 1000))
    assert ids.ranges.tolist() == [[0, 10**6]]
    copy = ids.copy()
    copy.add(np.array([10**7]))
    assert len(ids) == 10**6


def test_it_is_told_as_people_write_it():
    assert str(IntervalSet.of([0, 1, 2, 5, 7, 8])) == "0 to 2, 5, 7 to 8"
    assert str(IntervalSet.of(range(0, 2000, 2))) == "0, 2, 4, 6, 8, 10 and 994 more ranges"
    assert str(IntervalSet()) == ""
