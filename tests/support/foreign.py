"""Files that stand in the place of a run's pictures and are none of them."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from unitvis import UnitvisError


def encoded(width: int, height: int, kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, kind)
    return file.getvalue()


def with_text(text: bytes) -> bytes:
    """A PNG of one pixel with a compressed text that is a million times as long."""
    png = encoded(1, 1, "PNG")
    chunk = b"zTXt" + b"Comment\0\0" + zlib.compress(text)
    return png[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"
CONTENTS = {
    "a program": (POSTSCRIPT, r"not an image"),
    "too many pixels": (encoded(1, 1, "PPM").replace(b"1 1", b"60000 60000"), "60000 x 60000 pixels; more than"),
    "a bomb of text": (with_text(bytes(2**26)), "broken PNG"),
    "long and thin": (encoded(1, 5000, "PNG"), r"1 x 5000 pixels, (not 336 x 336|more than 30 x 10)"),
    "too small": (encoded(29, 10, "PNG"), r"29 x 10 pixels, not (336 x 336|6 x 2 filters)"),
    "damaged": (encoded(5, 5, "PNG")[:45], "broken PNG"),
    "none": (None, "No such file or directory"),
}
FOREIGN = [*CONTENTS, "a pipe", "a folder", "a link"]


def put(what: str, path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Put something of `FOREIGN` in the place of a picture; returns the reason for which it is refused.

    folder: gets a Ghostscript of which the file "executed" tells, because what opens EPS starts it.
    """
    (folder / "gs").write_text(f"#!/bin/sh\ntouch {folder / 'executed'}\n")
    (folder / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    content = path.read_bytes()
    path.unlink()
    if what == "a pipe":
        os.mkfifo(path)
        return "not a regular file"
    if what == "a folder":
        path.mkdir()
        return "Is a directory"
    if what == "a link":
        (folder / "elsewhere").write_bytes(content)
        path.symlink_to(folder / "elsewhere")
        return "it is reached through a link"
    data, reason = CONTENTS[what]
    if data is not None:
        path.write_bytes(data)
    return reason


def refusal(call: Callable[[], object]) -> str:
    """The one line with which a call is refused."""
    with pytest.raises(UnitvisError) as told:
        call()
    assert "\n" not in str(told.value)
    return str(told.value)
