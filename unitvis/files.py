"""Files that are written whole or not at all, and only where they are meant to be."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import stat
import urllib.parse
import weakref
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from unitvis.errors import UnitvisError

try:
    import fcntl
except ImportError:  # on Windows, where no lock is taken
    fcntl = None  # type: ignore[assignment]

_UNPACKED_BYTES = 64 * 2**20  # of arrays that may be unpacked from any file
_MEMBER_BYTES = 2**10  # of an npz file for each array, beside its name twice and its contents
_MAX_RATIO = 100  # how many times as many bytes larger arrays may take unpacked; those of runs stay far below
_MAX_JSON = 2**28  # bytes of a JSON file, which is read whole: a manifest that lists two million failures
# Bytes of the Python objects that JSON becomes: those two million failures, or ten million images of which a loop
# recorded every other one, so that each has a range of its own.
_MAX_OBJECTS = 5 * 2**29
# Bytes of the objects, at most, that begin with each of these bytes of JSON.
_BYTES_OF_OBJECTS = {b"[": 160, b"{": 160, b",": 64, b":": 128}
_MAX_NAME = 180  # characters of a layer's file name: file systems take 255 bytes, with endings of ours


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` only when the block ends without an error.

    The file is a new one: a link that stands at either path is replaced, never written through.
    """
    part = part_of(path)
    try:
        yield new_file(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def part_of(path: Path) -> Path:
    """The path where the file that is to take the place of `path` is written first."""
    return path.with_name(f"{path.name}.part")


def new_file(path: Path) -> Path:
    """Make an empty file in place of whatever file or link stood there; returns the path."""
    os.close(os.open(unoccupied(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    return path


def unoccupied(path: Path) -> Path:
    """The path, after whatever file or link stood there was removed: what is written there next is a new file."""
    path.unlink(missing_ok=True)
    return path


def make_folder(path: Path) -> Path:
    """Make a folder if there is none; UnitvisError where a file stands there, or a link, which would lead elsewhere."""
    if path.is_symlink():
        raise UnitvisError(f"{path} is a link, so nothing is written into it; remove it, or give another path")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UnitvisError(f"{path} must be a folder and something else stands there; remove it") from error
    return path


@contextmanager
def only_writer(folder: Path | None) -> Iterator[None]:
    """Context that keeps a folder for one command; UnitvisError where another one holds it. None: no folder.

    The system takes the lock back from a process that dies. Some file systems have no locks; there none is held.
    """
    if folder is None or fcntl is None:
        yield
        return
    opened = _OpenFolder(folder)
    try:
        if not lock(opened):
            raise UnitvisError(f"another command is writing into {folder}; wait for its end, or give another path")
        yield
    finally:
        if not opened.closed:  # as it is in a process that was forked meanwhile
            with suppress(OSError):  # of a file system without locks
                fcntl.flock(opened, fcntl.LOCK_UN)  # a process that a library forked without Python may share it
            opened.close()


class _OpenFolder:
    """A folder that is open to be locked, with those methods of a file that `lock` needs."""

    def __init__(self, path: Path) -> None:
        self.closed, self._number = False, os.open(path, os.O_RDONLY)

    def fileno(self) -> int:
        return self._number

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            os.close(self._number)


# Open files and folders that this process has locked. A forked process inherits them, and the system keeps a lock until
# the last process that has its file open closes it: a worker would hold it after its parent was killed.
_locked: weakref.WeakSet[io.FileIO | _OpenFolder] = weakref.WeakSet()


def lock(file: io.FileIO | _OpenFolder) -> bool:
    """Lock an open file or folder until it is closed; False where another process or thread holds it.

    Processes that are forked meanwhile have it closed, so that they never hold the lock.
    """
    _locked.add(file)
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def _close_locked() -> None:
    """Close, in a process that was just forked, what its parent has locked; this releases nothing in the parent."""
    for file in list(_locked):
        file.close()
    _locked.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_locked)


def is_linked(folder: Path, path: Path) -> bool:
    """Whether a path, given relative to a folder, is a link or leads through one, so that it may lie elsewhere."""
    return any((folder / part).is_symlink() for part in (path, *path.parents[:-1]))


def flush_to_disk(file: IO[Any]) -> None:
    """Return only when the file's bytes are on the disk."""
    file.flush()
    os.fsync(file.fileno())


def write_arrays(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Write an npz file without pickle; it is on the disk when this returns."""
    with open(path, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        flush_to_disk(file)


def open_regular(path: str | bytes | Path) -> io.BufferedReader:
    """Open a file to read its bytes; OSError for a pipe or a device, which is not waited for."""
    file = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115  the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", os.fsdecode(path))
    return file


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file for `open`; a pipe without another end is opened at once."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_json(path: Path) -> Any:
    """Read a JSON file in UTF-8; OSError where it cannot be read, or is too large; otherwise as `parsed_json`."""
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > _MAX_JSON:
            raise OSError(errno.EFBIG, f"a file of {size:,} bytes; more than {_MAX_JSON:,} are refused", str(path))
        if (data := file.read(size)) is None:
            raise OSError(errno.EAGAIN, "its bytes are not there yet", str(path))
        return parsed_json(data)


def parsed_json(data: bytes) -> Any:
    """Parse JSON in UTF-8; ValueError where it is none or would take gigabytes, RecursionError where it is too deep."""
    need = len(data) * (1 if data.isascii() else 5) + sum(data.count(c) * each for c, each in _BYTES_OF_OBJECTS.items())
    if need > _MAX_OBJECTS:
        raise ValueError(f"its values would take up to {need:,} bytes; more than {_MAX_OBJECTS:,} are refused")
    return json.loads(data.decode("utf-8"))


def read_arrays(path: Path, names: Collection[str]) -> dict[str, NDArray[Any]]:
    """The arrays of an npz file, checked against its checksums; raises nearly anything where it is damaged.

    names: of all arrays that the file may hold; one more is refused. Nothing is allocated for a length that the file
    only claims, nor for holes of a sparse file.
    """
    with open_regular(path) as file:
        held = _data_bytes(file)
        with zipfile.ZipFile(file) as archive:
            sizes = {member.filename: member.file_size for member in archive.infolist()}
            found = [name.removesuffix(".npy") for name in sizes]
            if len(set(found)) < len(archive.infolist()):
                raise ValueError("two arrays have one name")
            if foreign := next((name for name in found if name not in names), None):
                raise ValueError(f"{path.name} has an array {foreign[:80]!r}, which does not belong there")
            packed = sum(member.compress_size for member in archive.infolist())
            tables = sum(_MEMBER_BYTES + 2 * len(name.encode()) for name in sizes)
            if (stray := os.fstat(file.fileno()).st_size - packed - tables) > _MEMBER_BYTES:
                raise ValueError(f"{stray:,} bytes of {path.name} belong to no array")
            packed = min(held, packed)
            if sum(sizes.values()) > max(_UNPACKED_BYTES, _MAX_RATIO * packed):
                raise ValueError(f"{sum(sizes.values()):,} bytes in {packed:,}")
            for name, size in sizes.items():
                with archive.open(name) as member:
                    shape, dtype = _npy_header(member)
                    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > size:
                        raise ValueError(f"{name} claims {dtype} {list(shape)} in {size:,} bytes")
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)


def array_names(path: Path) -> set[str] | None:
    """The names of the arrays of an npz file, which are not read; None where it is none, or cannot be read."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except Exception:  # zipfile raises nearly anything for another file
        return None


def _data_bytes(file: IO[Any]) -> int:
    """The bytes of a file that was just opened without its holes, or all of them where nothing tells of holes."""
    number, size = file.fileno(), os.fstat(file.fileno()).st_size
    if not hasattr(os, "SEEK_DATA"):
        return size
    found = end = 0
    with suppress(OSError):  # no data follows
        while end < size:
            start = os.lseek(number, end, os.SEEK_DATA)
            end = os.lseek(number, start, os.SEEK_HOLE)
            found += end - start
    os.lseek(number, 0, os.SEEK_SET)
    return found


def _npy_header(member: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an array, of which only the header is read."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(member)
    return shape, dtype


def file_name(layer: str) -> str:
    """A layer's name as the name of a file: percent-encoded where a file system might mind, and no way to elsewhere.

    Of a name that is too long for a file the first part is kept, with a hash of the whole.
    """
    name = urllib.parse.quote(layer, safe=" ", errors="surrogatepass")
    if len(name) > _MAX_NAME:
        name = (
            f"{name[:_MAX_NAME]}~{hashlib.blake2b(layer.encode('utf-8', 'surrogatepass'), digest_size=8).hexdigest()}"
        )
    return name if name.strip(".") else name.replace(".", "%2E")  # "." and ".." are folders of their own
