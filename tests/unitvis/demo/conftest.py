"""Fixtures for the tests of the demo."""

from __future__ import annotations

import pytest

from unitvis.demo import pictures


@pytest.fixture(scope="session")
def drawn():
    """300 pictures, uint8 [300, H, W, 3], and their labels."""
    return pictures.pictures(300, seed=77, workers=2)
