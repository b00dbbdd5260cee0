"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` only when the block ends without an error."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def flush_to_disk(file: IO[Any]) -> None:
    """Return only when the file's bytes are on the disk."""
    file.flush()
    os.fsync(file.fileno())


def write_arrays(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Write an npz file without pickle; it is on the disk when this returns."""
    with open(path, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        flush_to_disk(file)


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of an npz file, checked against its checksums; raises nearly anything where it is damaged."""
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def file_name(layer: str) -> str:
    """A layer's name as the name of a file: whatever a file system might mind is percent-encoded."""
    return urllib.parse.quote(layer, safe=" ")
