"""Fixtures for the tests of image sources."""

from __future__ import annotations

import pytest

from support.sources import write


@pytest.fixture
def folder(tmp_path):
    """23 readable images of 8 x 8, four that are not, two other files; ids are the places in the sorted names."""
    root = tmp_path / "images"
    for i in range(23):
        write(root / f"{i:02}.png", i)
    whole = (root / "00.png").read_bytes()
    (root / "03b.jpg").write_text("not a photograph")
    (root / "07b.JPG").write_bytes(b"")
    (root / "11b.png").write_bytes(whole[:100])
    (root / "22b.gif").write_bytes(b"GIF89a")
    (root / "notes.txt").write_text("x")
    (root / "labels.csv").write_text("x")
    return root
