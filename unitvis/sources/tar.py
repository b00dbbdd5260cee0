"""Source of images in tar archives (plain, or WebDataset shards), read in any order through an index of offsets."""

from __future__ import annotations

import itertools
import math
import os
import re
import tarfile
import time
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from unitvis.errors import ImageError, UnitvisError, abridged, first_line
from unitvis.sources.decoding import Decoding
from unitvis.sources.encoded import MAX_BYTES, EncodedSource
from unitvis.sources.files import IMAGE_NAME
from unitvis.sources.names import MIN_SAVED_NAMES, SETTLE_NS, Names, load_listing, save_listing
from unitvis.sources.transform import Transform

_MAX_OPEN_SHARDS = 64  # file descriptors kept open at once
MAX_SHARDS = 1_000_000  # archives that a pattern may name
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
# first bytes of compressed archives, which are refused
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
_NOT_A_PLAIN_FILE = -1  # in place of the size of a link or a sparse member


class TarSource(EncodedSource):
    """Members of tar archives whose names end as those of images, in the order of the shards and of their members.

    The name of an image is SHARD.tar/MEMBER. Every image of a WebDataset sample counts; its other entries (.cls, .json)
    are not read.
    """

    def __init__(
        self, path: str | list[str], shards: Sequence[str], index: Index, transform: Transform | None, **options: Any
    ) -> None:
        super().__init__("tar", index.names, transform, other_files=index.other_members, **options)
        self.path, self._shards, self._index = path, shards, index
        self._open: OrderedDict[int, _Descriptor] = OrderedDict()
        self._lock = Lock()

    def describe(self) -> dict[str, Any]:
        """Describe the archives as `EncodedSource.describe` does, with the number of shards."""
        return super().describe() | {"shards": len(self._shards)}

    def _origin(self) -> str | list[str]:
        return self.path

    def _contents(self, id: int) -> bytes:
        offset, size = int(self._index.offsets[id]), int(self._index.sizes[id])
        if size < 0:
            raise ImageError("a link or a file with holes inside a tar; make it with tar --dereference")
        if size > MAX_BYTES:
            raise ImageError(f"a file of {size:,} bytes; more than {MAX_BYTES:,} are refused")
        shard = int(np.searchsorted(self._index.ends, id, "right"))
        try:
            return self._descriptor(shard).read(offset, size)
        except OSError as error:
            raise ImageError(error.strerror or type(error).__name__) from error

    def _descriptor(self, shard: int) -> _Descriptor:
        """Open a shard, or return it if it is open; the one that was not used for longest is dropped."""
        with self._lock:
            found = self._open.pop(shard, None) or _Descriptor(self._shards[shard])
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


@dataclass(frozen=True)
class Index:
    """Names, offsets and sizes of the images in the shards."""

    names: Names
    offsets: NDArray[np.int64]  # [images], in bytes from the start of the shard
    sizes: NDArray[np.int64]  # [images], in bytes
    ends: NDArray[np.int64]  # [shards], one past the last id in each
    other_members: int  # number of members that are not images by their names


def is_tar_name(path: str) -> bool:
    """True if the path ends as that of a tar archive, compressed or not."""
    return path.lower().endswith((".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2"))


def expand_braces(pattern: str) -> list[str]:
    """Expand a path with braces: {000..146} counts, with as many digits as written; {a,b} lists names."""
    if os.path.exists(pattern):
        return [pattern]
    parts = _BRACES.split(pattern)  # text, inside of braces, text, ...
    choices = [_brace_names(part, pattern) if i % 2 else (1, [part]) for i, part in enumerate(parts)]
    if math.prod(count for count, _ in choices) > MAX_SHARDS:
        raise UnitvisError(f"{pattern!r} names more than {MAX_SHARDS:,} archives")
    return ["".join(chosen) for chosen in itertools.product(*(names for _, names in choices))]


def _brace_names(inside: str, pattern: str) -> tuple[int, Iterable[str]]:
    """Number of names that one pair of braces stands for, and the names."""
    if found := _RANGE.fullmatch(inside):
        first, last = found.groups()
        width = len(first) if first[0] == "0" or len(first) == len(last) else 0
        if int(first) > int(last):
            raise UnitvisError(f"{{{inside}}} in {pattern!r} counts down; write the smaller number first")
        numbers = range(int(first), int(last) + 1)
        return int(last) + 1 - int(first), (f"{number:0{width}}" for number in numbers)
    if "," not in inside:
        raise UnitvisError(f"{{{inside}}} in {pattern!r} is neither a range such as {{000..146}} nor a list {{a,b}}")
    names = inside.split(",")
    return len(names), names


def tar_source(path: str | list[str], transform: Transform | None, *, decoding: Decoding, **options: Any) -> TarSource:
    """Open the images in tar archives; path: one path, with or without braces, or a list of such.

    With allow_truncated, of an archive that ends early the whole members are read. Raises UnitvisError if an archive is
    missing, compressed, damaged or named twice, or if none holds an image.
    """
    given = [path] if isinstance(path, str) else path
    shards = [os.path.abspath(shard) for one in given for shard in expand_braces(one)]
    if missing := [shard for shard in shards if not os.path.isfile(shard)]:
        raise UnitvisError(f"{len(missing)} of {len(shards)} archives are not there: {abridged(missing)}")
    if len(set(shards)) < len(shards):
        twice = next(shard for i, shard in enumerate(shards) if shard in shards[:i])
        raise UnitvisError(f"the archive {twice!r} is named twice")
    index = _shard_index(shards, decoding.allow_truncated)
    if not len(index.names):
        raise UnitvisError(f"no image in {given[0]!r}, which holds {index.other_members} other members")
    absolute = [os.path.abspath(one) for one in given]
    return TarSource(
        absolute[0] if isinstance(path, str) else absolute, shards, index, transform, decoding=decoding, **options
    )


def _shard_index(shards: list[str], allow_truncated: bool) -> Index:
    """Load the index of an earlier run if the archives have not changed since, otherwise read all their headers."""
    key = "\0".join([str(allow_truncated), *shards]).encode("utf-8", "surrogateescape")
    status = [os.stat(shard) for shard in shards]
    stamps = np.array([(one.st_size, one.st_mtime_ns) for one in status], np.int64)
    saved = load_listing("tar", key)
    if saved is not None and np.array_equal(saved["stamps"], stamps):
        members = {name: saved[name].astype(np.int64) for name in ("offsets", "sizes", "ends")}
        return Index(Names.from_arrays(saved), **members, other_members=int(saved["others"]))
    offsets, sizes, ends = array("q"), array("q"), array("q")
    others = 0

    def images() -> Iterator[bytes]:
        nonlocal others
        root = os.path.dirname(shards[0]) if len(shards) == 1 else os.path.commonpath(shards)
        for shard in shards:
            prefix = os.fsencode(os.path.relpath(shard, root)) + b"/"
            for member, name in _members(shard, allow_truncated):
                hidden = any(part[:1] == b"." for part in name.split(b"/") if part not in (b".", b".."))
                if hidden or not IMAGE_NAME.search(name):  # macOS puts a hidden ._NAME beside NAME
                    others += 1
                    continue
                offsets.append(member.offset_data)
                sizes.append(member.size if member.isreg() and not member.issparse() else _NOT_A_PLAIN_FILE)
                yield prefix + name
            ends.append(len(offsets))

    names = Names(images())
    members = {"offsets": np.array(offsets), "sizes": np.array(sizes), "ends": np.array(ends)}
    settled = time.time_ns() - max(one.st_mtime_ns for one in status) > SETTLE_NS
    if len(names) + others >= MIN_SAVED_NAMES and settled:
        save_listing("tar", key, {**names.arrays(), **members, "stamps": stamps, "others": np.array(others)})
    return Index(names, **members, other_members=others)


def _members(shard: str, allow_truncated: bool) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Yield the files of an archive with their names; UnitvisError if it is compressed, damaged or cut short."""
    count = 0
    try:
        with open(shard, "rb", buffering=1 << 16) as file:
            start = file.read(2)
            if start in _COMPRESSED:
                raise UnitvisError(f"{shard!r} is compressed ({_COMPRESSED[start]}); unpack it to a plain tar")
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
                    if not member.isdir():
                        count += 1
                        yield member, os.fsencode(member.name).removeprefix(b"./")
                _check_end(file, archive.offset)
    except UnitvisError:
        raise
    except Exception as error:  # tarfile may raise anything for a hostile archive
        early = "unexpected end" in str(error) and count > 0
        if not (early and allow_truncated):
            hint = "; --allow-truncated takes what is there" if early else ""
            raise UnitvisError(
                f"the archive {shard!r} is broken after {count} files: {first_line(error)}{hint}"
            ) from error


def _check_end(file: BinaryIO, offset: int) -> None:
    """Raise tarfile.ReadError unless only zeros follow: tarfile takes a damaged header for the end of the archive."""
    file.seek(offset)
    first = file.read(tarfile.BLOCKSIZE)
    if len(first) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("unexpected end of data")
    if first.strip(b"\0"):
        raise tarfile.ReadError(f"no header of a file at byte {offset:,}")
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            raise tarfile.ReadError("something follows its end; archives joined into one file must be named one by one")
