"""Source of images in tar archives (plain, or WebDataset shards), read in any order through an index of offsets."""

from __future__ import annotations

import itertools
import math
import os
import re
import tarfile
import time
import warnings
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from unitvis.decoding.contents import TarContents
from unitvis.decoding.options import Decoding
from unitvis.errors import UnitvisError, abridged, first_line
from unitvis.sources.encoded import EncodedSource
from unitvis.sources.image_names import ImageNames, others_in_words
from unitvis.sources.names import MIN_SAVED_NAMES, SETTLE_NS, Names, listing_key, load_listing, save_listing, stamp
from unitvis.sources.transform import Transform

MAX_SHARDS = 1_000_000  # archives that patterns may name
_MAX_PATHS = 2**28  # characters of the paths of all archives
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
# first bytes of compressed archives, which are refused
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_MAX_SIZE = 2**50  # bytes of a member
_MAX_HEADER = 2**20  # bytes of one extended header; one with a file's attributes takes some 64 kB
_MAX_LONG_NAME = 2**16  # bytes of a header that holds a name alone, as GNU tar writes it
_MAX_NAME = 2**12  # bytes of a name; file systems take no longer path
_MAX_NUMBER = 1000  # digits in a row in an extended header; tarfile takes their number squared in steps
_TYPE = 156  # the byte of a header that holds the type of the member
_RECORD_LENGTH = re.compile(rb"(\d{1,9}) ")  # with which each record of an extended header begins
_MAX_PATTERN = 2**24  # characters of a path with braces
_MAX_DIGITS = 18  # of a number in braces
_MAX_PADDING = 16 * 2**20  # zeros after the end: writers fill up a record, of 10 kB or, on tapes, of some megabytes
# arrays of a saved index
_SAVED_INDEX = ("names", "starts", "offsets", "sizes", "ends", "stamps", "chosen", "rewritten")
_NOT_A_PLAIN_FILE = -1  # in place of the size of a link or a sparse member


class TarSource(EncodedSource):
    """Members of tar archives whose names end as those of images, in the order of the shards and of their members.

    The name of an image is SHARD.tar/MEMBER. A member that was written again keeps its place and has its last content,
    as after extraction. Every image of a WebDataset sample counts unless endings are given; its other entries (.cls,
    .json) are not read.
    """

    def __init__(
        self, path: str | list[str], shards: Sequence[str], index: Index, transform: Transform | None, **options: Any
    ) -> None:
        contents = TarContents(shards)
        super().__init__("tar", index.names, contents, transform, others=index.chosen.others, **options)
        self.path, self._shards, self._index = path, shards, index

    def describe(self) -> dict[str, Any]:
        """Describe the archives as `EncodedSource.describe` does, with the number of shards."""
        return super().describe() | {"shards": len(self._shards)}

    def _origin(self) -> str | list[str]:
        return self.path

    def place(self, id: int) -> tuple[int, int, int]:
        shard = int(np.searchsorted(self._index.ends, id, "right"))
        return shard, int(self._index.offsets[id]), int(self._index.sizes[id])


@dataclass(frozen=True)
class Index:
    """Names, offsets and sizes of the images in the shards."""

    names: Names
    offsets: NDArray[np.int64]  # [images], in bytes from the start of the shard
    sizes: NDArray[np.int64]  # [images], in bytes
    ends: NDArray[np.int64]  # [shards], one past the last id in each
    chosen: ImageNames  # has counted the members that are not images by their names
    rewritten: list[str]  # names of images that were written more than once


def is_tar_name(path: str) -> bool:
    """True if the path ends as that of a tar archive, compressed or not."""
    return path.lower().endswith((".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2"))


def archives_of(path: str | Sequence[str]) -> list[str]:
    """The paths that one path, or several, stand for: {000..146} counts, with as many digits as written; {a,b} lists.

    UnitvisError, before anything is expanded, where they are more than `MAX_SHARDS`, or take hundreds of megabytes.
    """
    count = length = 0
    expansions: list[list[Iterable[str]]] = []
    for one in [path] if isinstance(path, str) else path:
        choices = _choices(one)
        number = math.prod(names for names, *_ in choices)
        count, length = count + number, length + number * sum(longest for _, longest, _ in choices)
        together = f"{one[:80]!r} {'with the paths before it ' if expansions else ''}names"
        if count > MAX_SHARDS:
            raise UnitvisError(f"{together} more than {MAX_SHARDS:,} archives")
        if length > _MAX_PATHS:
            raise UnitvisError(f"{together} archives whose paths have {length:,} characters; {_MAX_PATHS:,} are taken")
        expansions.append([names for *_, names in choices])
    return ["".join(chosen) for each in expansions for chosen in itertools.product(*each)]


def _choices(pattern: str) -> list[tuple[int, int, Iterable[str]]]:
    """For each part of a path with braces, what it may be: how many texts, how long the longest is, and the texts."""
    if len(pattern) > _MAX_PATTERN:
        raise UnitvisError(f"{pattern[:80]!r}... has {len(pattern):,} characters, so it is no path of archives")
    if "{" not in pattern or os.path.exists(pattern):
        return [(1, len(pattern), [pattern])]
    parts = _BRACES.split(pattern)  # text, inside of braces, text, ...
    return [_brace_names(part, pattern) if i % 2 else (1, len(part), [part]) for i, part in enumerate(parts)]


def _brace_names(inside: str, pattern: str) -> tuple[int, int, Iterable[str]]:
    """Number of names that one pair of braces stands for, the length of the longest, and the names."""
    if found := _RANGE.fullmatch(inside):
        first, last = found.groups()
        if len(last) > _MAX_DIGITS:
            raise UnitvisError(f"{pattern[:40]!r}... names more than {MAX_SHARDS:,} archives")
        width = len(first) if first[0] == "0" or len(first) == len(last) else 0
        if int(first) > int(last):
            raise UnitvisError(f"{{{inside}}} in {pattern!r} counts down; write the smaller number first")
        numbers = range(int(first), int(last) + 1)
        return int(last) + 1 - int(first), max(width, len(last)), (f"{number:0{width}}" for number in numbers)
    if "," not in inside:
        raise UnitvisError(f"{{{inside}}} in {pattern!r} is neither a range such as {{000..146}} nor a list {{a,b}}")
    if inside.count(",") >= MAX_SHARDS:
        raise UnitvisError(f"{pattern[:80]!r}... names more than {MAX_SHARDS:,} archives")
    names = inside.split(",")
    return len(names), max(map(len, names)), names


def tar_source(
    path: str | list[str],
    transform: Transform | None,
    *,
    decoding: Decoding,
    endings: Sequence[str] | None = None,
    **options: Any,
) -> TarSource:
    """Open the images in tar archives; path: one path, with or without braces, or a list of such.

    endings: of the images' names, see `ImageNames`.

    With allow_truncated, of an archive that ends early the whole members are read. Raises UnitvisError if an archive is
    missing, compressed, damaged or named twice, or if none holds an image.
    """
    given = [path] if isinstance(path, str) else path
    shards = list(map(os.path.abspath, archives_of(path)))
    if len(set(shards)) < len(shards):
        twice = next(shard for shard, times in Counter(shards).items() if times > 1)
        raise UnitvisError(f"the archive {twice!r} is named twice")
    if missing := [shard for shard in shards if not os.path.isfile(shard)]:
        raise UnitvisError(f"{len(missing)} of {len(shards)} archives are not there: {abridged(missing)}")
    index = _shard_index(shards, decoding.allow_truncated, endings)
    others = index.chosen.others
    if not len(index.names):
        found = others_in_words(others).replace("file", "member")
        raise UnitvisError(f"no image in {given[0]!r}, which holds {found}")
    if index.rewritten:
        warnings.warn(
            f"{len(index.rewritten):,} members were written more than once, and the last of each counts, as in "
            f"extraction: {abridged([repr(name) for name in index.rewritten])}"
        )
    if index.chosen.warning:
        warnings.warn(index.chosen.warning)
    absolute = [os.path.abspath(one) for one in given]
    origin = absolute[0] if isinstance(path, str) else absolute
    return TarSource(origin, shards, index, transform, decoding=decoding, endings=endings, **options)


def _shard_index(shards: list[str], allow_truncated: bool, endings: Sequence[str] | None) -> Index:
    """Load the index of an earlier run if the archives have not changed since, otherwise read all their headers."""
    key = listing_key([str(allow_truncated).encode(), *map(os.fsencode, shards)], endings)
    status = [os.stat(shard) for shard in shards]
    stamps = np.array([(one.st_size, *stamp(one)) for one in status], np.int64)
    saved = load_listing("tar", key, lambda arrays: _restored_index(arrays, stamps), _SAVED_INDEX)
    if saved is not None:
        return saved
    offsets, sizes, hashes, ends = array("q"), array("q"), array("q"), array("q")
    chosen = ImageNames(endings)

    root = os.path.dirname(shards[0]) if len(shards) == 1 else os.path.commonpath(shards)
    prefixes = [os.fsencode(os.path.relpath(shard, root)) + b"/" for shard in shards]

    def images() -> Iterator[bytes]:
        for shard, prefix in zip(shards, prefixes, strict=True):
            for member, name in _members(shard, allow_truncated):
                hidden = any(part[:1] == b"." for part in name.split(b"/") if part not in (b".", b".."))
                if not chosen.take(prefix + name, hidden=hidden):  # macOS puts a hidden ._NAME beside NAME
                    continue
                offsets.append(member.offset_data)
                sizes.append(member.size if member.isreg() and not member.issparse() else _NOT_A_PLAIN_FILE)
                hashes.append(hash((prefix, _extracted(name))))
                yield prefix + name
            ends.append(len(offsets))

    names = Names(images())
    members = {"offsets": np.array(offsets), "sizes": np.array(sizes), "ends": np.array(ends)}
    index = Index(names, **members, chosen=chosen, rewritten=[])
    index = _without_earlier_versions(index, prefixes, np.array(hashes, np.int64))
    settled = time.time_ns() - int(stamps[:, -2:].max()) > SETTLE_NS
    if len(names) + chosen.others.total() >= MIN_SAVED_NAMES and settled:
        found: dict[str, NDArray[Any]] = {"offsets": index.offsets, "sizes": index.sizes, "ends": index.ends}
        found |= {"stamps": stamps, "chosen": chosen.array(), "rewritten": np.array(index.rewritten, np.str_)}
        save_listing("tar", key, {**index.names.arrays(), **found})
    return index


def _restored_index(saved: dict[str, NDArray[Any]], stamps: NDArray[np.int64]) -> Index | None:
    """The index of an earlier run; None if an archive has changed since, and nearly any error for other arrays."""
    if not np.array_equal(saved["stamps"], stamps):
        return None
    names, lists = Names.from_arrays(saved), [saved[name].astype(np.int64) for name in ("offsets", "sizes", "ends")]
    offsets, sizes, ends = lists
    whole = [len(names)], [len(names)], [len(stamps)]
    if (
        tuple(list(one.shape) for one in lists) != whole
        or (np.diff(ends, prepend=0) < 0).any()
        or ends[-1] != len(names)
    ):
        raise ValueError("the lists of offsets, sizes and ends are not those of the names")
    if (offsets < 0).any() or (sizes < _NOT_A_PLAIN_FILE).any():
        raise ValueError("an image begins before its archive")
    if saved["rewritten"].dtype.kind != "U" or saved["rewritten"].ndim != 1:
        raise ValueError("the names of rewritten members are no list of texts")
    chosen, rewritten = ImageNames.restored(saved["chosen"]), saved["rewritten"].tolist()
    return Index(names, offsets, sizes, ends, chosen, rewritten)


def _extracted(member: bytes) -> bytes:
    """The path to which a member would be extracted: a.png, /a.png and x/../a.png are one file."""
    return os.path.normpath(b"/" + member.lstrip(b"/"))


def _without_earlier_versions(index: Index, prefixes: list[bytes], hashes: NDArray[np.int64]) -> Index:
    """Give images that were written more than once the place of the first version and the content of the last.

    prefixes: of the names in each shard. hashes: of shard and path after extraction, [images]; only images with equal
    ones are compared, so that the names of all others need no memory.
    """
    values, counts = np.unique(hashes, return_counts=True)
    repeated = np.flatnonzero(np.isin(hashes, values[counts > 1]))
    versions: dict[tuple[int, bytes], list[int]] = {}
    for id, shard in zip(repeated.tolist(), np.searchsorted(index.ends, repeated, "right").tolist(), strict=True):
        path = _extracted(index.names[id].removeprefix(prefixes[shard]))
        versions.setdefault((shard, path), []).append(id)
    offsets, sizes, kept = index.offsets, index.sizes, np.ones(len(hashes), np.bool_)
    rewritten = []
    for ids in versions.values():
        if len(ids) > 1:
            rewritten.append(os.fsdecode(index.names[ids[0]]))
            offsets[ids[0]], sizes[ids[0]] = offsets[ids[-1]], sizes[ids[-1]]
            kept[ids[1:]] = False
    if not rewritten:
        return index
    names = Names(index.names[id] for id in np.flatnonzero(kept).tolist())
    ends = np.concatenate([[0], np.cumsum(kept)])[index.ends]
    return Index(names, offsets[kept], sizes[kept], ends, index.chosen, rewritten)


def _members(shard: str, allow_truncated: bool) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Yield the files of an archive with their names; UnitvisError if it is compressed, damaged or cut short."""
    count = 0
    try:
        with open(shard, "rb", buffering=1 << 16) as file:
            if kind := _compression(file.read(tarfile.BLOCKSIZE)):
                raise UnitvisError(f"{shard!r} is compressed ({kind}); unpack it to a plain tar")
            file.seek(0)
            headers: Any = _HeaderReader(file)
            options: dict[str, Any] = {"tarinfo": _Member, "encoding": "utf-8", "errors": "surrogateescape"}
            with tarfile.open(fileobj=headers, mode="r:", **options) as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
                    if not member.isdir():
                        name = os.fsencode(member.name).removeprefix(b"./")
                        if len(name) > _MAX_NAME:
                            raise tarfile.ReadError(
                                f"a name of {len(name):,} bytes; more than {_MAX_NAME:,} are refused"
                            )
                        count += 1
                        yield member, name
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


class _Member(tarfile.TarInfo):
    """A member whose size cannot go backwards: with a negative one tarfile would read the same header for ever."""

    @property
    def size(self) -> int:
        """Size in bytes, as a header or an extended header gives it."""
        return self._size

    @size.setter
    def size(self, value: int) -> None:
        if not 0 <= value <= _MAX_SIZE:
            raise tarfile.ReadError(f"a file of {value} bytes")
        self._size = value


class _HeaderReader:
    """What tarfile reads headers from: a file whose reads are bounded, so that no claimed length takes memory.

    What is longer than a block is the body of an extended header or a long name, as the block before it says. One
    block is a header, or a body too short to take time. One byte is a file's last, read to see whether it is there.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.seek, self.tell = file, file.seek, file.tell
        self._type = b""  # of the member whose block was read last

    def read(self, size: int) -> bytes:
        """Read at most `size` bytes; tarfile.ReadError where they are too many, or no extended header."""
        is_name = self._type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        if size > (_MAX_LONG_NAME if is_name else _MAX_HEADER):
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        data = self._file.read(size)
        if size == tarfile.BLOCKSIZE:
            self._type = data[_TYPE : _TYPE + 1]
        elif size > tarfile.BLOCKSIZE and not is_name:
            _check_records(data)
        return data


def _check_records(body: bytes) -> None:
    """Raise tarfile.ReadError unless an extended header is a list of records, which tarfile reads in linear time.

    A record is "LENGTH KEY=VALUE" with a line break; zeros follow the last one. Before Python 3.11.10, tarfile looks
    for the "=" beyond the record's end, and for numbers from each of their digits on (CVE-2024-6232).
    """
    if (longest := max(map(len, re.findall(rb"\d+", body)), default=0)) > _MAX_NUMBER:
        raise tarfile.ReadError(f"an extended header with a number of {longest:,} digits")
    start = 0
    while start < len(body) and body[start]:
        found = _RECORD_LENGTH.match(body, start)
        stop = start + int(found[1]) if found else 0
        if not found or body[stop - 1 : stop] != b"\n" or body.find(b"=", found.end(), stop) < 0:
            raise tarfile.ReadError(f"an extended header whose byte {start:,} begins no record")
        start = stop


def _compression(start: bytes) -> str | None:
    """How a file that begins with these bytes is compressed; None if they are the header of a plain archive, or else.

    start: one block; the name of an archive's first member is at its beginning, and may begin as a compressed file.
    """
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None)
    return None


def _check_end(file: BinaryIO, offset: int) -> None:
    """Raise tarfile.ReadError unless some zeros follow alone: tarfile takes a damaged header for the archive's end."""
    file.seek(offset)
    first = file.read(tarfile.BLOCKSIZE)
    if len(first) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("unexpected end of data")
    if first.strip(b"\0"):
        raise tarfile.ReadError(f"no header of a file at byte {offset:,}")
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            raise tarfile.ReadError("something follows its end; archives joined into one file must be named one by one")
        if file.tell() > offset + _MAX_PADDING:
            raise tarfile.ReadError(
                f"more than {_MAX_PADDING:,} bytes of zeros follow its end at byte {offset:,}; cut them off, as by "
                f"truncate --size={offset + 2 * tarfile.BLOCKSIZE}"
            )
