"""The short forms of benchmarks/million.py: images from many shards, and kills in the midst of the scan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import million, results


def compare(folder: Path, images: int, kills: int, every: float, batch: int) -> million.Outcome:
    pattern = million.make(folder / "shards", images, 100)
    outcome = million.compare(folder, pattern, 100, kills=kills, seed=0, every=every, batch=batch)
    assert outcome.equal
    assert len(outcome.kills) == len(outcome.resumed) == kills
    assert min(outcome.resumed) > 0
    assert outcome.images == images
    return outcome


def test_two_thousand_images_and_two_kills(tmp_path: Path) -> None:
    assert "the same bytes" in str(compare(tmp_path, 2_000, kills=2, every=1e9, batch=32))


@pytest.mark.slow
def test_fifty_thousand_images_and_three_kills(tmp_path: Path) -> None:
    outcome = compare(tmp_path, 50_000, kills=3, every=5, batch=million.BATCH)
    assert outcome.spread < 64 * 2**20


def test_memory_is_told_from_ten_thousand_images_on() -> None:
    told = {9_984: 5, 10_240: 6, 10_496: 7, 19_968: 8, 20_224: 9, 25_000: 10}
    assert million.sampled(told) == {10_240: 6, 20_224: 9, 25_000: 10}
    assert million.sampled({256: 1, 300: 2}) == {300: 2}


def test_a_record_says_on_what_it_was_measured(tmp_path: Path) -> None:
    found = json.loads(results.record("some", {"images": 3}, tmp_path).read_text())
    assert found["images"] == 3
    assert found["machine"]["cores"] > 0
    assert {"name", "cores", "threads", "load", "versions", "commit", "date"} <= set(found["machine"])
