"""Half-precision decisions on seeded networks of odd operations: no unit called separated or tied is wrong."""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter

import pytest

from support.brute import wrong
from support.odd_networks import odd_network, uneven_pictures
from support.scans import by_half
from unitvis.reranking import rerank
from unitvis.results.arrays import UNSEPARATED
from unitvis.state.sampling import sample


def attacked(seeds: range, count: int) -> Counter[str]:
    """Counts networks by the precision that scanned them, their units, those that were decided, and of these the wrong.

    The last are also counted under "seed N".
    """
    found: Counter[str] = Counter()
    for seed in seeds:
        model, images = odd_network(seed), uneven_pictures(count, 16, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a precision that does not suit, layers that saturate
            run = by_half(model, images)
        failed = wrong(run, model, images)
        statuses = [status for top in run.tops.values() for status in top.status]
        decided = len(statuses) - statuses.count(UNSEPARATED)
        found += Counter(units=len(statuses), decided=decided, wrong=failed)
        found[run.manifest["scan"]["precision"]] += 1
        found[f"seed {seed}"] += failed
    return +found


@pytest.fixture(autouse=True)
def only_the_bound_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undecided units stay so, however many images were computed."""
    monkeypatch.setattr(rerank, "MAX_RECOMPUTED_SHARE", math.inf)


def test_ten_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rerank, "sample", lambda ranges: sample(ranges, 64))  # leaves more images that none computes
    found = attacked(range(130, 140), 300)
    assert found["wrong"] == 0, found
    assert found["decided"] > 0.7 * found["units"]
    assert found["fp16"] >= 2  # not because nothing is scanned in half precision


@pytest.mark.slow
def test_two_hundred_networks(capsys: pytest.CaptureFixture[str]) -> None:
    found = attacked(range(200), 1200)
    with capsys.disabled():
        print(json.dumps(found))
    assert found["wrong"] == 0
    assert found["decided"] > 0.7 * found["units"]
    assert found["fp16"] >= 40
