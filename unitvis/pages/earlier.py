"""Pictures of an earlier gallery: which of them belong to a run, reading them back, and copying them.

A run folder is data: its pictures are decoded as an image of a data set is, and none is read through a link.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from unitvis.decoding.contents import FileContents, check_size
from unitvis.decoding.decode import decode
from unitvis.errors import ImageError, UnitvisError
from unitvis.files import is_linked, read_json, unoccupied
from unitvis.pages.sprites import (
    BY_MODEL,
    FILTERS,
    Place,
    layer_folder,
    layer_path,
    place_of,
    sprite_name,
    sprite_names,
    sprite_tiles,
)
from unitvis.results.data import RunData
from unitvis.results.schemas import DRAWN
from unitvis.schema import problem


def run_digest(run: RunData) -> str:
    """A hexadecimal hash that identifies the run: of its model's weights and all winners."""
    digest = hashlib.blake2b(run.manifest["model"]["weights"].encode(), digest_size=16)
    for layer, top in run.tops.items():
        digest.update(layer.encode())
        for array in (top.values, top.images, top.positions):
            digest.update(array.tobytes())
    return digest.hexdigest()


def drawings(run: RunData, folder: Path) -> dict[str, dict[str, Any]]:
    """Entries of a gallery's drawn.json, {layer: {"crop", "filters", ...}}; empty unless it was drawn from this run."""
    path = Path("gallery", "drawn.json")
    if is_linked(folder, path):
        return {}
    try:
        drawn = read_json(folder / path)
    except (OSError, ValueError, RecursionError):
        return {}
    of_now = described(run, {})
    if problem(drawn, DRAWN) or any(drawn[key] != of_now[key] for key in ("run", "sprite")):
        return {}
    return drawn["layers"]


def is_gallery(folder: Path) -> bool:
    """Whether a folder holds a gallery, of any run."""
    try:
        return problem(read_json(folder / "gallery" / "drawn.json"), DRAWN) is None
    except (OSError, ValueError, RecursionError):
        return False


def described(run: RunData, layers: Mapping[str, Any]) -> dict[str, Any]:
    """The content of drawn.json. layers: {layer: {"crop", "filters", ...}}."""
    return {"run": run_digest(run), "sprite": list(sprite_tiles(run.manifest["k"])), "layers": layers}


def filter_of(run: RunData, layer: str, unit: int) -> Image.Image | None:
    """Read a unit's filter from the run's own folder, one pixel for each weight; None without one."""
    if run.folder is None or not _own_drawings(run, layer).get("filters"):
        return None
    path, place = _sprite_of(run, layer, unit, FILTERS)
    image = _read_picture(run.folder, path)
    field = run[layer].info["receptive_field"]
    height, width = field["size"]  # a filter's weights lie in it, next to each other or dilated
    if field["whole_image"] or field["method"] == "unknown":
        height, width = max(height, run.input_size[0]), max(width, run.input_size[1])
    most = place.columns * width, place.rows * height
    if image.width > most[0] or image.height > most[1]:
        raise _unusable(run.folder / path, f"{_extent(image.size)} pixels, more than {_extent(most)}")
    if image.width % place.columns or image.height % place.rows:
        raise _unusable(run.folder / path, f"{_extent(image.size)} pixels, not {place.columns} x {place.rows} filters")
    wide, high = image.width // place.columns, image.height // place.rows
    left, upper = place.column * wide, place.row * high
    return image.crop((left, upper, left + wide, upper + high))


def copy_drawings(run: RunData, folder: Path) -> dict[str, dict[str, Any]]:
    """Copy the pictures that a model drew from the run's own folder into another; returns their `drawings`.

    Raises UnitvisError where a link, or anything but a file, stands in the place of one, or a file too large for one.
    """
    if run.folder is None:
        return {}
    found = drawings(run, run.folder)
    for layer in [layer for layer in run if layer in found]:
        target = layer_folder(folder, layer)
        for name in chain.from_iterable(sprite_names(kind, len(run[layer]), run.manifest["k"]) for kind in BY_MODEL):
            path = run.folder / layer_path(layer) / name
            if not os.path.lexists(path):
                continue
            if is_linked(run.folder, layer_path(layer) / name) or not path.is_file():
                raise _unusable(path, "it is no regular file in the folder of the run")
            try:
                check_size(path.stat().st_size)
            except ImageError as error:
                raise _unusable(path, str(error)) from error
            shutil.copyfile(path, unoccupied(target / name))
    return found


def _sprite_of(run: RunData, layer: str, unit: int, kind: str) -> tuple[Path, Place]:
    """The sprite of a unit, relative to the run's folder, and where the unit is in it."""
    place = place_of(unit, len(run[layer]), run.manifest["k"])
    return layer_path(layer) / sprite_name(kind, place.first), place


def _own_drawings(run: RunData, layer: str) -> dict[str, Any]:
    """The layer's entry in `drawings` of the run's own folder."""
    return drawings(run, run.folder).get(layer, {}) if run.folder else {}


def _read_picture(folder: Path, path: Path) -> Image.Image:
    """Decode a picture, given relative to the run's folder; UnitvisError where that is not possible."""
    if is_linked(folder, path):
        raise _unusable(folder / path, "it is reached through a link")
    try:
        return decode(FileContents(os.fsencode(folder)).read(os.fsencode(path)))
    except ImageError as error:
        raise _unusable(folder / path, str(error)) from error


def _unusable(path: Path, reason: str) -> UnitvisError:
    return UnitvisError(f"the picture {path} cannot be used: {reason}; draw it again: unitvis render RUN --model MODEL")


def _extent(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
