"""Checkpoints: what a scan or a pack has done so far, written down every so often, whole or not at all."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import NDArray

from unitvis.choices import CHECKPOINT_SECONDS
from unitvis.errors import UnitvisError
from unitvis.files import read_arrays, replacing, write_arrays

SCAN_CHECKPOINT = "progress.npz"  # in the folder of a scan that is not finished
HOW_TO_RESUME = "resume with the same command and --resume (resume=True)"

Arrays = dict[str, NDArray[Any]]
_Parsed = TypeVar("_Parsed")


class Checkpoints:
    """A file with the newest checkpoint, and beside it the one before, should the newest be damaged.

    Checkpoints that are there and were not read, of a scan that is not gone on with, stay until the first one is
    written. every: seconds between two of them.
    """

    def __init__(self, path: Path, every: float = CHECKPOINT_SECONDS) -> None:
        check_seconds(every)
        self._path, self._previous = path, path.with_name(f"{path.stem}.previous{path.suffix}")
        self._every, self._last = every, time.perf_counter()
        self._goes_on = False  # what is there belongs to this scan

    @property
    def names(self) -> set[str]:
        """The names of both files."""
        return {self._path.name, self._previous.name}

    @property
    def exist(self) -> bool:
        """Whether there is a checkpoint, damaged or not."""
        return self._path.exists() or self._previous.exists()

    @property
    def due(self) -> bool:
        """Whether it is time for another one."""
        return time.perf_counter() - self._last >= self._every

    def write(self, arrays: Arrays) -> None:
        """Write a checkpoint; it is on the disk when this returns. OSError where it cannot be written."""
        with replacing(self._path) as part:
            write_arrays(part, arrays)
            with suppress(FileNotFoundError):
                self._path.replace(self._previous)
        if not self._goes_on:
            self._previous.unlink(missing_ok=True)
        self._last, self._goes_on = time.perf_counter(), True

    def read(self, parse: Callable[[Arrays], _Parsed], names: Collection[str]) -> _Parsed | None:
        """What `parse` makes of the newest whole checkpoint, None without one; UnitvisError where none is whole.

        `parse` may raise anything for arrays that are no checkpoint, and UnitvisError for those of another version.
        names: of the arrays that a checkpoint may hold.
        """
        damaged = None
        for path in (self._path, self._previous):
            if not path.exists():
                continue
            try:
                parsed = parse(read_arrays(path, names))
            except UnitvisError as error:
                raise UnitvisError(f"{path} {error}; start again with --overwrite") from error
            except Exception as error:  # a damaged file makes numpy and zipfile raise nearly anything
                damaged = damaged or f"{path} is damaged ({' '.join(str(error).split())})"
                continue
            if damaged:
                warnings.warn(f"{damaged}; going on with the checkpoint before it")
            self._goes_on = True
            return parsed
        if damaged:
            raise UnitvisError(f"{damaged}, and there is no other checkpoint; start again with --overwrite")
        return None

    def remove(self) -> None:
        """Remove both files: their scan or pack is finished, or is not to be gone on with."""
        self._path.unlink(missing_ok=True)
        self._previous.unlink(missing_ok=True)


def check_seconds(every: float) -> None:
    """UnitvisError unless it is a number of seconds between checkpoints."""
    if not every > 0:
        raise UnitvisError(f"checkpoints come every {every} seconds; more than 0 are needed")
