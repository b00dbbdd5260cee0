"""Removing what was drawn of a run: only files that unitvis writes, told by their places and names.

Files of the user in the folders of pictures stay where they are.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from unitvis.choices import CROPS, PROJECTIONS
from unitvis.errors import UnitvisError, abridged, printable
from unitvis.files import array_names, file_name, read_json
from unitvis.sources.base import Source

FOLDERS = ("sheets", "gallery", "projections")  # of pictures of a run

_NUMBER = r"(0|[1-9]\d*)"  # as unitvis writes one: no picture of it is called 007.jpg
_PART = r"(\.part)?"  # of a file that was being written when its command was killed
_SHEET = re.compile(rf"(?P<layer>[^+/]+?)(\+{_NUMBER})?\.png{_PART}")  # of any layer; + is encoded in a layer's name
# Paths relative to the folder of that name; see `results.folder`.
_DRAWN = {
    "gallery": re.compile(
        rf"(drawn\.json|(index|images|gallery|search)\.js|gallery\.css){_PART}|sample\.jpg|images/{_NUMBER}\.jpg"
        rf"|layers/[^/]+/(layer\.js{_PART}|strip\.jpg|(patches|projections)-{_NUMBER}\.jpg"
        rf"|(responses|filters)-{_NUMBER}\.png)"
    ),
    "projections": re.compile(rf"[^/]+/({'|'.join(PROJECTIONS)})-({'|'.join(CROPS)})/{_NUMBER}\.jpg{_PART}"),
}


def remove_drawn(folder: Path, within: Collection[str] = FOLDERS) -> list[Path]:
    """Remove the pictures of the run in a folder, and the folders that this empties; returns the files that stay.

    within: those of `FOLDERS` that are emptied.
    """
    within = [name for name in within if not (folder / name).is_symlink()]
    own, others = _told_apart(folder, within)
    for path in own:
        with suppress(OSError):  # another command removed it, or it cannot be removed
            path.unlink()
    above = {parent for path in own for parent in path.parents if folder in parent.parents}
    above |= {folder / name for name in (*within, "gallery/images", "gallery/layers") if name.split("/")[0] in within}
    for path in sorted(above, key=lambda path: len(path.parts), reverse=True):
        with suppress(OSError):  # it holds other files, or is not there
            path.rmdir()
    return others


def warn_of_kept(folder: Path, kept: Iterable[Path]) -> None:
    """Warn of files, if any, that `remove_drawn` left in a folder."""
    if names := [printable(path.relative_to(folder).as_posix()) for path in kept]:
        warnings.warn(f"kept in {folder}, because unitvis did not write it: {abridged(names)}")


def refuse_scanned_pictures(folder: Path, source: Source) -> None:
    """Raise UnitvisError where a picture of the run in a folder is one of the images: it would be replaced."""
    if (image := scanned_file(source, _told_apart(folder, FOLDERS)[0])) is not None:
        raise UnitvisError(
            f"{image} is one of the images and has the name of a picture of the run in {folder}, which would replace "
            "it; move the images, or give another path"
        )


def scanned_file(source: Source, paths: Iterable[Path]) -> Path | None:
    """The first of these files that is an image of the source, by whatever name; None where none is."""
    files: dict[tuple[int, int], Path] = {}
    for path in paths:
        if (place := _place(path)) is not None:
            files.setdefault(place, path)
    if not files:
        return None
    return next((files[place] for path in source.files() if (place := _place(path)) in files), None)


def _place(path: Path | bytes) -> tuple[int, int] | None:
    """Device and number of the file that a path leads to; None where it leads to none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _told_apart(folder: Path, within: Iterable[str]) -> tuple[list[Path], list[Path]]:
    """The pictures of the run in a folder, drawn.json first, and all other files there, both sorted."""
    layers = _file_names_of_layers(folder)
    own: list[Path] = []
    others: list[Path] = []
    for name in within:
        for path in sorted(_files_below(folder / name)):
            inside = path.relative_to(folder / name).as_posix()
            if name == "sheets":
                sheet = _SHEET.fullmatch(inside)
                is_own = sheet is not None and sheet["layer"] in layers
            else:
                is_own = _DRAWN[name].fullmatch(inside) is not None
            (own if is_own and not path.is_symlink() else others).append(path)
    # Without drawn.json nothing says that pictures are there, should this be interrupted.
    return sorted(own, key=lambda path: path.name != "drawn.json"), others


def _files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder, and links, which are not followed; none where the folder itself is a link."""
    if folder.is_symlink():
        return
    for above, folders, files in os.walk(folder):
        here = Path(above)
        yield from (here / name for name in files)
        yield from (here / name for name in folders if (here / name).is_symlink())


def _file_names_of_layers(folder: Path) -> set[str]:
    """The layers' names in names of files, from the manifest of the run that was drawn or, if damaged, its arrays."""
    try:
        names = set(read_json(folder / "manifest.json")["layers"])
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        names = {name.rpartition("/")[0] for name in array_names(folder / "top.npz") or ()}
    return {file_name(name) for name in names if isinstance(name, str)}
