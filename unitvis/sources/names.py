"""Names of many images in little memory, and listings of large sources saved between runs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from array import array
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from unitvis.files import read_arrays

MIN_SAVED_NAMES = 20_000  # a shorter listing is not saved: making it again takes a moment
SETTLE_NS = 2_000_000_000  # ns; after a change as recent as that, another one may leave the time stamp as it is
_LISTING_FORMAT = b"3"  # part of a saved listing's file name
_Parsed = TypeVar("_Parsed")


class Names:
    """List of names in one block of bytes: a million Python strings would take 100 MB more."""

    def __init__(self, names: Iterable[bytes]) -> None:
        block, starts = bytearray(), array("q", [0])
        for name in names:
            block += name + b"\0"
            starts.append(len(block))
        self._block: bytes | bytearray = block
        self._starts = np.frombuffer(starts, np.int64)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, id: int) -> bytes:
        return bytes(self._block[self._starts[id] : self._starts[id + 1] - 1])

    def hash(self) -> str:
        """BLAKE2b hash of all names in order, 32 hexadecimal digits."""
        return hashlib.blake2b(self._block, digest_size=16).hexdigest()

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Arrays that `from_arrays` takes: uint8 bytes, and int64 [names + 1], where each name starts."""
        return {"names": np.frombuffer(self._block, np.uint8), "starts": self._starts}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Names:
        """Make the list of names from the arrays of `arrays`; ValueError or KeyError for others."""
        names, (block, starts) = cls(()), (arrays[name] for name in ("names", "starts"))
        if block.dtype != np.uint8 or block.ndim != 1 or starts.dtype != np.int64:
            raise ValueError(f"names are {block.dtype} {list(block.shape)}, their starts {starts.dtype}")
        ends = np.flatnonzero(block == 0)  # a name holds no NUL and ends with one
        if not np.array_equal(starts, np.append(0, ends + 1)) or starts[-1] != len(block):
            raise ValueError("names do not start where others end")
        names._block, names._starts = block.tobytes(), starts.astype(np.int64)
        return names


Stamp = tuple[int, int, int, int]  # device, inode, time of the last write and of the last change of any kind, in ns


def stamp(status: os.stat_result) -> Stamp:
    """What changes with an archive's bytes or a folder's names: programs can set the time of the last write back."""
    bits = 2**63 - 1  # that int64 holds; some file systems number their files by 64
    return status.st_dev & bits, status.st_ino & bits, status.st_mtime_ns, status.st_ctime_ns


def listing_key(parts: Iterable[bytes], endings: Sequence[str] | None) -> bytes:
    """Key of a listing: what was listed, and the endings of images if they were chosen."""
    chosen = b"" if endings is None else b"\0".join([b"", b"endings", *map(os.fsencode, endings)])
    return b"\0".join(parts) + chosen


def load_listing(
    kind: str, key: bytes, parse: Callable[[dict[str, NDArray[Any]]], _Parsed | None], names: Collection[str]
) -> _Parsed | None:
    """What `parse` makes of the arrays saved under a key: None where they are absent, damaged or no longer true.

    `parse` may raise anything for other arrays than were saved. names: of all arrays that are saved. A listing that
    somebody else may have written is not believed.
    """
    path = _listing_file(kind, key)
    try:
        if not (_is_own(path.parent) and _is_own(path)):
            return None
        return parse(read_arrays(path, names))
    except Exception:  # absent or damaged, which makes numpy and zipfile raise nearly anything: list again
        return None


def save_listing(kind: str, key: bytes, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Save arrays in the user's cache folder; if it cannot be written, the next run lists again."""
    target = _listing_file(kind, key)
    with contextlib.suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not _is_own(target.parent):
            return
        # a unique name, because several processes of one scan may save the same listing at once
        handle, part = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
        try:
            with open(handle, "wb") as file:
                np.savez_compressed(file, allow_pickle=False, **arrays)
            os.replace(part, target)
        finally:
            Path(part).unlink(missing_ok=True)


def _is_own(path: Path) -> bool:
    """Whether a file or folder is this user's, no link, and not writable for everybody."""
    found = path.lstat()
    mine = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    return mine and not stat.S_ISLNK(found.st_mode) and not found.st_mode & stat.S_IWOTH


def _listing_file(kind: str, key: bytes) -> Path:
    """Path of a saved listing in the cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    digest = hashlib.blake2b(_LISTING_FORMAT + key, digest_size=16).hexdigest()
    return Path(home, "unitvis", f"{kind}-{digest}.npz")
