"""Many names in little memory, and listings of large sources kept between runs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import zipfile
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

LARGE = 20_000  # names from which a listing is kept; a smaller one is made in a moment and leaves no trace
SETTLED = 2_000_000_000  # ns; a folder or file changed less than that before it was listed may have changed unseen
_FORMAT = b"1"


class Names:
    """Names in order, in one block of bytes: a million of them as Python strings would cost 100 MB more."""

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
        """Of all names and their order."""
        return hashlib.blake2b(self._block, digest_size=16).hexdigest()

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """What `from_arrays` makes the same names of."""
        return {"names": np.frombuffer(self._block, np.uint8), "starts": self._starts}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> Names:
        """The names that gave the arrays."""
        names = cls(())
        names._block, names._starts = arrays["names"].tobytes(), arrays["starts"].astype(np.int64)
        return names


def load_listing(kind: str, key: bytes) -> dict[str, NDArray[np.generic]] | None:
    """The arrays that were kept under the key; whether they still hold is for the caller to see."""
    try:
        with open(_file(kind, key), "rb") as file, np.load(file, allow_pickle=False) as kept:
            return dict(kept)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):  # none yet, or a damaged one: list again
        return None


def keep_listing(kind: str, key: bytes, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Keep arrays in the user's cache folder; where that cannot be written, the next run lists again."""
    target = _file(kind, key)
    with contextlib.suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        # a name of its own: several processes of one scan may write the same listing at once
        handle, part = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
        try:
            with open(handle, "wb") as file:
                np.savez_compressed(file, allow_pickle=False, **arrays)
            os.replace(part, target)
        finally:
            Path(part).unlink(missing_ok=True)


def _file(kind: str, key: bytes) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    digest = hashlib.blake2b(_FORMAT + key, digest_size=16).hexdigest()
    return Path(home, "unitvis", f"{kind}-{digest}.npz")
