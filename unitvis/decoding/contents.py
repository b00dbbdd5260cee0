"""Reading the bytes of image files: by a path, or by a place in a tar archive."""

from __future__ import annotations

import errno
import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import Any

from unitvis.errors import ImageError, UnitvisError
from unitvis.files import open_regular

MAX_BYTES = 1 << 29  # of one file, which is read whole; no image within the limit of pixels needs more
_MAX_OPEN_SHARDS = 64  # file descriptors kept open at once


class Contents:
    """Base class: `read` gives the bytes of the image at a place, which is a path or whatever a subclass understands.

    A subclass can be pickled, since worker processes get a copy.
    """

    def read(self, place: Any) -> bytes:
        """Read the bytes; ImageError with the reason if they cannot be read."""
        try:
            return self._read(place)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):  # nothing is wrong with the file
                raise UnitvisError(f"files cannot be read: {error.strerror}; raise the limit (ulimit -n)") from error
            raise ImageError(error.strerror or type(error).__name__) from error

    def _read(self, place: Any) -> bytes:
        raise NotImplementedError


class FileContents(Contents):
    """Files; a place is a path relative to a folder, root."""

    def __init__(self, root: bytes) -> None:
        self.root = root

    def _read(self, place: bytes) -> bytes:
        with open_regular(os.path.join(self.root, place)) as file:
            size = os.fstat(file.fileno()).st_size
            check_size(size)
            data = file.read(size or MAX_BYTES)  # memory for so many is taken at once; 0: a file system may not know
        if data is None:  # as from a log of the system, which has no end
            raise ImageError("a file whose bytes are not there yet")
        return data


class TarContents(Contents):
    """Members of tar archives; a place is (number of the archive, offset in bytes, size in bytes)."""

    def __init__(self, shards: Sequence[str]) -> None:
        self.shards = shards
        self._open: OrderedDict[int, _Descriptor] = OrderedDict()
        self._lock = Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return TarContents, (self.shards,)

    def _read(self, place: tuple[int, int, int]) -> bytes:
        shard, offset, size = place
        if size < 0:
            raise ImageError("a link or a file with holes inside a tar; make it with tar --dereference")
        check_size(size)
        return self._descriptor(shard).read(offset, size)

    def _descriptor(self, shard: int) -> _Descriptor:
        """Open a shard, or return it if it is open; the one that was not used for longest is dropped."""
        with self._lock:
            found = self._open.pop(shard, None) or _Descriptor(self.shards[shard])
            self._open[shard] = found  # the most recently used comes last
            if len(self._open) > _MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
            return found


class _Descriptor:
    """Open file that closes with its last reference: a thread may still read from one that was dropped."""

    def __init__(self, path: str) -> None:
        self._number = os.open(path, os.O_RDONLY)
        self._length = os.fstat(self._number).st_size

    def read(self, offset: int, size: int) -> bytes:
        """Read `size` bytes from `offset`, fewer at the end of the file."""
        size = min(size, self._length - offset)  # pread allocates all that it is asked for
        parts = []
        while size > 0 and (part := os.pread(self._number, size, offset)):
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return b"".join(parts)

    def __del__(self) -> None:
        if hasattr(self, "_number"):
            os.close(self._number)


def digest(data: bytes) -> bytes:
    """Hash of a file's bytes: 16 bytes of BLAKE2b."""
    return hashlib.blake2b(data, digest_size=16).digest()


def check_size(size: int) -> None:
    """Raise ImageError for a file that is too large to be read whole."""
    if size > MAX_BYTES:
        raise ImageError(f"a file of {size:,} bytes; more than {MAX_BYTES:,} are refused")
