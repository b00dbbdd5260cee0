"""Image files: a folder, a text list, paths."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from array import array
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unitvis.decode import decode
from unitvis.errors import ImageError, UnitvisError
from unitvis.sources.base import ItemSource, Picture, Seen, needed
from unitvis.transform import Transform

MAX_BYTES = 1 << 29  # a file is read whole; below the limit of pixels no sensible image needs more
_IMAGE = re.compile(rb"\.(jpe?g|jpe|jfif|png|webp|bmp|gif|tiff?|p[bgpn]m)$", re.IGNORECASE)


class FileSource(ItemSource):
    """Files named relative to a folder. A pass reads each once: its bytes are hashed, then decoded from memory.

    `others` counts the folder's files that are no images by their name; they are not read.
    """

    _changed = "is no longer the file that was scanned"

    def __init__(
        self,
        kind: str,
        path: str | None,
        root: bytes,
        names: Names,
        transform: Transform | None,
        *,
        on_error: str = "skip",
        allow_truncated: bool = False,
        others: int = 0,
    ) -> None:
        self.kind, self.path, self.others = kind, path, others
        super().__init__(transform, len(names), on_error)
        self._transform, self._allow_truncated = needed(transform), allow_truncated
        self._root, self._names = root, names

    def name(self, id: int) -> str:
        """The path as the folder or the list has it."""
        return os.fsdecode(self._names[id])

    def picture(self, id: int, value_range: tuple[float, float] = (0.0, 1.0)) -> Picture:
        """The file as it is, upright, and where a box of the model's pixels lies in it."""
        with self._named(id):
            image = decode(self._bytes(self._valid(id))[0], allow_truncated=self._allow_truncated)
        return image, partial(self._transform.to_source, width=image.width, height=image.height)

    def record(self, id: int) -> dict[str, Any]:
        """id, name, width and height (upright), hash of the bytes that were ranked."""
        seen = self._seen[self._valid(id)]
        if seen is None:
            with self._named(id):
                seen = self._load(id)[1]
        size = {"width": seen.width, "height": seen.height}
        return {"id": id, "name": self.name(id), **size, "hash": seen.digest.hex()}

    def describe(self) -> dict[str, Any]:
        """Kind, absolute path (None for paths), what was found, hash of the names in order, how it is read."""
        names = {"images": self.length, "names": self._names.hash(), "others": self.others}
        return {"kind": self.kind, "path": self.path, **names, "allow_truncated": self._allow_truncated}

    def _hash(self, id: int) -> str:
        return _digest(self._contents(id)).hex()

    def _load(self, id: int) -> tuple[Tensor, Seen]:
        data, digest = self._bytes(id)
        image = decode(data, allow_truncated=self._allow_truncated)
        return torch.from_numpy(self._transform(image)), Seen(digest, *image.size)

    def _bytes(self, id: int) -> tuple[bytes, bytes]:
        data = self._contents(id)
        return data, self._unchanged(id, _digest(data))

    def _contents(self, id: int) -> bytes:
        try:
            with open(os.path.join(self._root, self._names[id]), "rb", opener=_without_waiting) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise ImageError("not a regular file")
                if status.st_size > MAX_BYTES:
                    raise ImageError(f"a file of {status.st_size:,} bytes; more than {MAX_BYTES:,} are refused")
                return file.read()
        except OSError as error:
            raise ImageError(error.strerror or type(error).__name__) from error


class Names:
    """File names in order, in one block of bytes: a million of them as Python strings would cost 100 MB more."""

    def __init__(self, names: Iterable[bytes]) -> None:
        block, self._starts = bytearray(), array("q", [0])
        for name in names:
            block += name + b"\0"
            self._starts.append(len(block))
        self._block = bytes(block)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, id: int) -> bytes:
        return self._block[self._starts[id] : self._starts[id + 1] - 1]

    def hash(self) -> str:
        """Of all names and their order."""
        return _digest(self._block).hex()


def is_image_name(name: str) -> bool:
    """Whether a folder's file of this name would be taken for an image."""
    return bool(_IMAGE.search(os.fsencode(name)))


def folder_source(folder: str, transform: Transform | None, **options: Any) -> FileSource:
    """All images below a folder, sorted by their relative path; the end of a name tells what is an image."""
    root, others = os.fsencode(os.path.abspath(folder)), 0

    def images() -> Iterator[bytes]:
        nonlocal others
        for name in _walk(root):
            if _IMAGE.search(name):
                yield name
            else:
                others += 1

    names = Names(images())
    if not names:
        found = f"{others} other files" if others else "nothing"
        raise UnitvisError(f"no image (.jpg .png .webp .bmp .gif .tif .ppm) below {folder!r}, which holds {found}")
    return FileSource("folder", os.fsdecode(root), root, names, transform, others=others, **options)


def list_source(path: str, transform: Transform | None, **options: Any) -> FileSource:
    """The files that a text list names, one a line, relative to the list's folder, in the list's order."""
    with open(path, "rb") as file:
        lines = file.read().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    names = [line.removesuffix(b"\r") for line in lines if line.strip()]
    if not names:
        raise UnitvisError(f"the list {path!r} names no file; one path a line is needed")
    return _listed("list", os.path.abspath(path), names, transform, options)


def paths_source(paths: Iterable[str | os.PathLike[str]], transform: Transform | None, **options: Any) -> FileSource:
    """These files, in this order."""
    names = [os.fsencode(path) for path in paths]
    return _listed("paths", None, names, transform, options)


def _listed(
    kind: str, path: str | None, names: list[bytes], transform: Transform | None, options: dict[str, Any]
) -> FileSource:
    where = f"the list {path!r}" if path else "the paths"
    first: dict[bytes, int] = {}
    for number, name in enumerate(names, start=1):
        if b"\0" in name:
            raise UnitvisError(f"entry {number} of {where} holds a NUL byte; plain text is needed")
        if (earlier := first.setdefault(os.path.normpath(name), number)) != number:
            raise UnitvisError(f"entries {earlier} and {number} of {where} are both {os.fsdecode(name)!r}")
    root = os.path.dirname(path) if path else os.getcwd()
    return FileSource(kind, path, os.fsencode(root), Names(names), transform, **options)


def _walk(root: bytes) -> Iterator[bytes]:
    """Relative paths of all files below, sorted as bytes; nothing hidden, and no folder twice, whatever links to it."""
    been: set[tuple[int, int]] = set()
    waiting = [b""]
    while waiting:
        name = waiting.pop()
        if name and not name.endswith(b"/"):
            yield name
            continue
        folder = os.path.join(root, name)
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in been:
                continue
            been.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                # the slash makes folders sort where their contents belong among the paths
                inside = [entry.name + b"/" * _is_folder(entry) for entry in entries if entry.name[:1] != b"."]
        except OSError as error:
            raise UnitvisError(f"cannot read the folder {os.fsdecode(folder)!r}: {error.strerror}") from error
        waiting.extend(name + entry for entry in sorted(inside, reverse=True))


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: a file that will fail with this reason
        return False


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # or a pipe named like an image would hang the scan


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
