"""Pictures of cells that were encoded one by one: each cell has the pixels that it has in a file of its own."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from unitvis.decoding.mosaic import Encoding, cell_scan, joined


def decoded(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "JPEG"
        return np.asarray(image)


@pytest.mark.parametrize("encoding", [Encoding(82, subsampled=True), Encoding(85, subsampled=False)])
@pytest.mark.parametrize("side", [16, 112])
def test_joined_cells_are_the_picture_that_pillow_encodes_whole(side: int, encoding: Encoding) -> None:
    """Byte for byte, but for the restart markers: the same pixels."""
    random = np.random.default_rng(0)
    coarse = [Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8)) for _ in range(15)]
    cells = [image.resize((side, side), Image.Resampling.BICUBIC) for image in coarse]
    page = Image.new("RGB", (5 * side, 3 * side))
    for number, cell in enumerate(cells):
        page.paste(cell, (number % 5 * side, number // 5 * side))
    whole = io.BytesIO()
    page.save(whole, "JPEG", quality=encoding.quality, subsampling=2 if encoding.subsampled else 0)

    scans = [cell_scan(cell, encoding) for cell in cells]
    found = joined([scans[start : start + 5] for start in (0, 5, 10)], side, encoding)
    np.testing.assert_array_equal(decoded(found), decoded(whole.getvalue()))
    assert len(found) < 1.05 * len(whole.getvalue()) + 15 * 16  # bytes that restart markers take
