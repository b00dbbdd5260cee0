"""Fixtures for the tests of scans."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seventy small pictures, of which three cannot be read."""
    (tmp_path / "images").mkdir()
    for number in range(70):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number:03}.png")
    for number in (0, 31, 69):
        (tmp_path / "images" / f"{number:03}.png").write_bytes(b"broken")
    return tmp_path / "images"
