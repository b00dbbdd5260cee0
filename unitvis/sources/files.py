"""Sources of image files: a folder, a text list, a list of paths."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unitvis.decoding.contents import FileContents
from unitvis.errors import UnitvisError
from unitvis.files import open_regular
from unitvis.sources.encoded import EncodedSource
from unitvis.sources.image_names import ImageNames, others_in_words
from unitvis.sources.names import (
    MIN_SAVED_NAMES,
    SETTLE_NS,
    Names,
    Stamp,
    listing_key,
    load_listing,
    save_listing,
    stamp,
)
from unitvis.sources.transform import Transform

# arrays of a saved listing of a folder
_LISTING = ("names", "starts", "folder_names", "folder_starts", "stamps", "chosen")
_MAX_LINE = 2**16  # bytes of a line of a text list; file systems take paths of 4,096


class FileSource(EncodedSource):
    """Image files named relative to a folder, root; path: what opens the source again, or None."""

    def __init__(
        self, kind: str, path: str | None, root: bytes, names: Names, transform: Transform | None, **options: Any
    ) -> None:
        super().__init__(kind, names, FileContents(root), transform, **options)
        self.path, self._root = path, root

    def _origin(self) -> str | None:
        return self.path

    def place(self, id: int) -> bytes:
        return self._names[id]

    def files(self) -> Iterator[bytes]:
        return (os.path.join(self._root, self._names[id]) for id in range(len(self._names)))


def folder_source(
    folder: str, transform: Transform | None, *, endings: Sequence[str] | None = None, **options: Any
) -> FileSource:
    """Open all images below a folder, sorted by relative path; endings: of their names, see `ImageNames`."""
    root = os.fsencode(os.path.abspath(folder))
    names, chosen = _saved_listing(root, endings) or _new_listing(root, endings)
    if not names:
        found = others_in_words(chosen.others) if chosen.others else "nothing"
        wanted = ".jpg .png .webp .avif .bmp .gif .tif .ppm" if endings is None else " ".join(map(repr, endings))
        raise UnitvisError(f"no image ({wanted}) below {folder!r}, which holds {found}")
    if chosen.warning:
        warnings.warn(chosen.warning)
    path = os.fsdecode(root)
    return FileSource("folder", path, root, names, transform, others=chosen.others, endings=endings, **options)


def _new_listing(root: bytes, endings: Sequence[str] | None) -> tuple[Names, ImageNames]:
    """List the names of all images below, and count the other files; a long listing is saved for the next run."""
    folders, start = dict[bytes, Stamp](), time.time_ns()
    chosen = ImageNames(endings)
    names = Names(filter(chosen.take, _walk(root, folders, lambda name: chosen.take(name, hidden=True))))
    newest = max(max(written, changed) for _, _, written, changed in folders.values())
    if len(names) + chosen.others.total() >= MIN_SAVED_NAMES and start - newest > SETTLE_NS:
        inside = {f"folder_{key}": value for key, value in Names(folders).arrays().items()}
        stamps = np.array(list(folders.values()), np.int64)
        found = {**names.arrays(), **inside, "stamps": stamps, "chosen": chosen.array()}
        save_listing("folder", listing_key([root], endings), found)
    return names, chosen


def _saved_listing(root: bytes, endings: Sequence[str] | None) -> tuple[Names, ImageNames] | None:
    """Load the listing of an earlier run; None if any folder has changed since (its time changes with its names)."""

    def parse(saved: dict[str, NDArray[Any]]) -> tuple[Names, ImageNames] | None:
        folders = Names.from_arrays({"names": saved["folder_names"], "starts": saved["folder_starts"]})
        stamps = [list(stamp(os.stat(os.path.join(root, folders[i])))) for i in range(len(folders))]
        if not stamps or stamps != saved["stamps"].tolist():
            return None
        return Names.from_arrays(saved), ImageNames.restored(saved["chosen"])

    return load_listing("folder", listing_key([root], endings), parse, _LISTING)


def list_source(path: str, transform: Transform | None, **options: Any) -> FileSource:
    """Open the files that a text list names, one a line, relative to the list's folder, in the list's order."""
    names = []
    with open_regular(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE), b""), 1):
            if len(line) == _MAX_LINE:
                raise UnitvisError(
                    f"line {number} of the list {path!r} has {_MAX_LINE:,} bytes or more, so it is no path"
                )
            name = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if name.strip():
                names.append(name.removesuffix(b"\n").removesuffix(b"\r"))
    if not names:
        raise UnitvisError(f"the list {path!r} names no file; one path a line is needed")
    return _listed_files("list", os.path.abspath(path), names, transform, options)


def paths_source(paths: Iterable[str | os.PathLike[str]], transform: Transform | None, **options: Any) -> FileSource:
    """Open these files, in this order."""
    names = [os.fsencode(path) for path in paths]
    return _listed_files("paths", None, names, transform, options)


def _listed_files(
    kind: str, path: str | None, names: list[bytes], transform: Transform | None, options: dict[str, Any]
) -> FileSource:
    """Check the names of a list (no name twice, no NUL byte) and make its source."""
    where = f"the list {path!r}" if path else "the paths"
    first: dict[bytes, int] = {}
    for number, name in enumerate(names, start=1):
        if b"\0" in name:
            raise UnitvisError(f"entry {number} of {where} holds a NUL byte; plain text is needed")
        if (earlier := first.setdefault(os.path.normpath(name), number)) != number:
            raise UnitvisError(f"entries {earlier} and {number} of {where} are both {os.fsdecode(name)!r}")
    root = os.path.dirname(path) if path else os.getcwd()
    return FileSource(kind, path, os.fsencode(root), Names(names), transform, **options)


def _walk(root: bytes, folders: dict[bytes, Stamp], skip: Callable[[bytes], object]) -> Iterator[bytes]:
    """Yield relative paths of all files below, sorted as bytes; hidden names are left out, no folder is visited twice.

    Folders of runs are left out: a run written into the images' own folder must not become part of the images.
    folders: filled with the stamp that each folder had before it was listed. skip: called with each hidden name, those
    inside of hidden folders excepted.
    """
    visited: set[tuple[int, int]] = set()
    waiting = [(b"", [b""])]  # open folders, each with its names not yet visited, last name first
    while waiting:
        folder, unvisited = waiting[-1]
        if not unvisited:
            waiting.pop()
            continue
        name = folder + unvisited.pop()
        if name and not name.endswith(b"/"):
            yield name
            continue
        path = os.path.join(root, name)
        try:
            found_stamp = stamp(os.stat(path))
            if found_stamp[:2] in visited:
                continue
            visited.add(found_stamp[:2])
            folders[name] = found_stamp
            with os.scandir(path) as entries:
                # the slash makes a folder sort as the paths of its contents do
                found = [entry.name + b"/" * _is_folder(entry) for entry in entries]
        except OSError as error:
            raise UnitvisError(f"cannot read the folder {os.fsdecode(path)!r}: {error.strerror}") from error
        inside = [one for one in found if one[:1] != b"."]
        if name and _is_run(set(inside)):
            continue
        for one in found:
            if one[:1] == b".":
                skip(name + one)
        inside.sort(reverse=True)
        waiting.append((name, inside))


def _is_run(names: set[bytes]) -> bool:
    """True for the names in the folder of a run: its pictures are drawn from images, and are none themselves."""
    return {b"manifest.json", b"images.jsonl"} <= names and not names.isdisjoint((b"top.npz", b"state.npz"))


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    """True for a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; reading it will fail with this reason
        return False
