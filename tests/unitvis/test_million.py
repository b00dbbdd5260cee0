"""The short form of benchmarks/million.py: 50,000 images from a hundred shards, and three kills."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import million


@pytest.mark.slow
def test_fifty_thousand_images_and_three_kills(tmp_path: Path) -> None:
    outcome = million.compare(tmp_path, million.make(tmp_path / "shards", 50_000, 100), kills=3, seed=0, every=5)
    assert outcome.equal
    assert outcome.kills == 3
    assert outcome.images == 50_000
    assert max(outcome.memory) - min(outcome.memory) < 64 * 2**20
    assert outcome.checkpoints < 0.01
