"""Cells of JPEG pictures: each is encoded once, and pictures are put together from them without encoding again.

A cell is encoded with a restart marker after each row of blocks (ITU-T T.81, E.1.4), so that no row depends on what
stands before it. Rows of cells side by side, one after the other, are then the rows of a larger picture.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import NamedTuple

from PIL import Image

_RESTART = re.compile(rb"\xff[\xd0-\xd7]")  # nowhere else in a scan: there, 0xff is followed by 0
_RESTARTS = [bytes((0xFF, 0xD0 + number)) for number in range(8)]  # which follow each other in this order
_END_OF_IMAGE = b"\xff\xd9"
_FRAME, _SCAN = 0xC0, 0xDA  # markers of the segment with the picture's size, and of the last one before the scan


class Encoding(NamedTuple):
    """How the cells of a picture are encoded; their side is a multiple of 16 pixels."""

    quality: int  # see `PIL.Image.Image.save`
    subsampled: bool  # colours at half of the resolution


def cell_scan(image: Image.Image, encoding: Encoding) -> bytes:
    """Encode a cell; returns its scan, the file without header and end."""
    data = _encoded(image, encoding)
    return data[_segment(data, _SCAN)[1] : -len(_END_OF_IMAGE)]


def joined(rows: Sequence[Sequence[bytes]], side: int, encoding: Encoding) -> bytes:
    """Make a JPEG file of rows of cells, given as their scans; all rows have as many cells, each `side` pixels wide."""
    lines = chain.from_iterable(zip(*map(_RESTART.split, row), strict=True) for row in rows)
    parts = list(chain.from_iterable(lines))
    body = list(chain.from_iterable((part, _RESTARTS[number % 8]) for number, part in enumerate(parts)))
    body[-1] = _END_OF_IMAGE
    return b"".join((_head(len(rows[0]) * side, len(rows) * side, side, encoding), *body))


@cache
def _head(width: int, height: int, side: int, encoding: Encoding) -> bytes:
    """The header of a picture of this size: that of a cell, with another size."""
    data = _encoded(Image.new("RGB", (side, side)), encoding)
    start, _ = _segment(data, _FRAME)
    size = height.to_bytes(2, "big") + width.to_bytes(2, "big")  # after marker, length and bits of a sample
    return data[: start + 5] + size + data[start + 9 : _segment(data, _SCAN)[1]]


def _encoded(image: Image.Image, encoding: Encoding) -> bytes:
    file = io.BytesIO()
    subsampling = 2 if encoding.subsampled else 0
    image.save(file, "JPEG", quality=encoding.quality, subsampling=subsampling, restart_marker_rows=1)
    return file.getvalue()


def _segment(data: bytes, marker: int) -> tuple[int, int]:
    """Where the first segment with this marker starts and ends in the header of a JPEG that Pillow wrote."""
    place = 2
    while True:
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if data[place + 1] == marker:
            return place, end
        place = end
