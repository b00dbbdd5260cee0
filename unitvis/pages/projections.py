"""Projections that a run's folder keeps: each is computed once, for the run's gallery and its figures alike.

They are projections/LAYER/METHOD-CROP/UNIT.jpg: METHOD is "deconvnet" or "guided", CROP what they are cut to, and the
picture is the unit's tile, as sprites of the gallery hold those of a block of units. The file's comment has a label:
hashes of what the projections belong to (the run, its winners and their boxes) and of the picture, which both must be
right, as those in a run's manifest; and the method in words.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unitvis.attribution.deconvnet import CONTRAST, project
from unitvis.bars import bar
from unitvis.choices import PROJECTIONS
from unitvis.decoding.contents import FileContents
from unitvis.decoding.decode import decode
from unitvis.decoding.mosaic import cell_scan
from unitvis.drawing.patches import Cells, Scans, crop_of, drawn_box
from unitvis.drawing.sheets import PATCH_SIZE
from unitvis.errors import ImageError, UnitvisError
from unitvis.files import file_name, is_linked, make_folder, parsed_json, replacing
from unitvis.pages.earlier import run_digest
from unitvis.pages.sprites import (
    PROJECTION_CELL,
    layer_folder,
    projections_of,
    tile_cells,
    write_projections,
)
from unitvis.results.data import RunData
from unitvis.results.schemas import LABEL
from unitvis.schema import problem

FOLDER = "projections"  # in a run's folder
_COMMENT = b"\xff\xfe"  # marker of a comment in a JPEG file


@dataclass(frozen=True)
class Projected:
    """The projections of one unit's winners that fired."""

    layer: str
    unit: int
    method: str  # in words, see `Projection`
    tile: bytes  # a JPEG file: one cell of `PATCH_SIZE` pixels for each winner

    def cells(self, k: int) -> Cells:
        """The cells as {(unit, rank): picture}; k: winners of a unit."""
        tile, (columns, _) = decode(self.tile), tile_cells(k)
        corners = [(rank, rank % columns * PATCH_SIZE, rank // columns * PATCH_SIZE) for rank in range(k)]
        return {(self.unit, rank): tile.crop((x, y, x + PATCH_SIZE, y + PATCH_SIZE)) for rank, x, y in corners}


def method_asked_for(project: bool | str) -> str | None:
    """The method that an argument `project` names: True is the deconvnet, False none; UnitvisError for another word."""
    if isinstance(project, bool):
        return PROJECTIONS[0] if project else None
    if project not in PROJECTIONS:
        raise UnitvisError(f"project must be one of {', '.join(PROJECTIONS)}, not {project!r}")
    return project


def projected(
    run: RunData,
    units: Mapping[str, Iterable[int]],
    method: str,
    crop: str | None,
    model: nn.Module | None = None,
    device: torch.device | str | None = None,
) -> Iterator[Projected]:
    """Yield the projections of units that fired: those that the run keeps, then others, kept as soon as they are there.

    units: {layer: units}. model: the one that was scanned. Raises UnitvisError for projections that are not kept, or
    whose files are not those that were written, if there is no model to compute them.
    """
    stores = _stores(run, units, method, crop)
    missing: dict[str, list[int]] = {}
    for layer, store in stores.items():
        fired = run[layer].fired
        for unit in dict.fromkeys(units[layer]):
            if not fired[unit].any():
                continue
            try:
                found = store.read(unit)
            except UnitvisError:
                if model is None:
                    raise
                found = None
            if found is not None:
                yield found
            else:
                missing.setdefault(layer, []).append(unit)
    if not missing:
        return
    if model is None:
        layer, (first, *_) = next(iter(missing.items()))
        raise UnitvisError(
            f"the run has no projections of layer {layer!r} that are cut as its patches are ({stores[layer].crop}) by "
            f"the method {method}, of unit {first} for one; give the network: --model MODEL (model=)"
        )
    yield from _computed(run, missing, stores, method, model, device)


def draw_projections(
    run: RunData,
    folder: Path,
    units: Mapping[str, Iterable[int]],
    method: str,
    crop: str | None,
    model: nn.Module,
    device: torch.device | str | None,
) -> dict[str, dict[str, Any]]:
    """Write sprites of projections, of the given units and those of `run` that are kept already.

    Returns {layer: {"projections": method in words, "projected": units}} for drawn.json.
    """
    drawn: dict[str, dict[str, Any]] = {}
    stores = _stores(run, run, method, crop)
    wanted = {layer: sorted({*units.get(layer, ()), *store.units}) for layer, store in stores.items()}
    fired = {layer: run[layer].fired for layer in run}
    missing = {layer: int(fired[layer][own].any(axis=1).sum()) for layer, own in wanted.items()}
    scans: dict[str, Scans] = {layer: {} for layer in run}
    for one in projected(run, wanted, method, crop, model, device):
        layer = one.layer
        for winner, cell in one.cells(run.manifest["k"]).items():
            if fired[layer][winner]:
                scans[layer][winner] = cell_scan(cell, PROJECTION_CELL)
        missing[layer] -= 1
        if not missing[layer]:
            own = scans.pop(layer)
            write_projections(run[layer], layer_folder(folder, layer), own)
            drawn[layer] = {"projections": one.method, "projected": sorted({unit for unit, _ in own})}
    return drawn


class _Store:
    """A layer's projections by one method, cut to one crop, in the run's folder; a run without a folder keeps none.

    digest: of the run.
    """

    def __init__(self, run: RunData, digest: str, layer: str, method: str, crop: str) -> None:
        self._run, self._layer, self.crop = run, layer, crop
        self._path = Path(FOLDER, file_name(layer), f"{method}-{crop}")
        drawn = [layer, method, crop, run[layer].info["effective_box"], run.input_size, CONTRAST, PATCH_SIZE]
        self._owner = _hash(json.dumps([digest, *drawn]).encode() + run[layer].boxes.tobytes())

    @property
    def units(self) -> list[int]:
        """Those that are kept, ascending."""
        found = []
        if self._run.folder is not None and not is_linked(self._run.folder, self._path):
            with suppress(OSError):  # there is no such folder
                found = [Path(name).stem for name in os.listdir(self._run.folder / self._path)]
        known = sorted({int(name) for name in found if name.isdecimal()} & set(range(len(self._run[self._layer]))))
        return [unit for unit in known if self._is_kept(unit)]

    def _is_kept(self, unit: int) -> bool:
        try:
            return self.read(unit) is not None
        except UnitvisError:
            return False

    def read(self, unit: int) -> Projected | None:
        """A unit's projections; None if there are none, or none of this run. UnitvisError for what nobody kept."""
        if self._run.folder is None:
            return None
        path = self._path / f"{unit}.jpg"
        if is_linked(self._run.folder, path):
            raise _unusable(self._run.folder / path, "it is reached through a link")
        if not os.path.lexists(self._run.folder / path):
            return None
        try:
            label, tile = _unlabelled(FileContents(os.fsencode(self._run.folder)).read(os.fsencode(path)))
            if label["of"] != self._hash_of(unit, b""):
                return None
            if label["hash"] != self._hash_of(unit, label["method"].encode() + tile):
                raise ImageError("it is not the picture that was kept")
            across, down = tile_cells(self._run.manifest["k"])
            if (size := decode(tile).size) != (shape := (across * PATCH_SIZE, down * PATCH_SIZE)):
                raise ImageError(f"{size[0]} x {size[1]} pixels, not {shape[0]} x {shape[1]}")
        except ImageError as error:
            raise _unusable(self._run.folder / path, str(error)) from error
        return Projected(self._layer, unit, label["method"], tile)

    def keep(self, one: Projected) -> None:
        """Write a unit's projections; OSError where that is not possible."""
        if self._run.folder is None:
            return
        folder = self._run.folder / self._path
        for above in (folder.parent.parent, folder.parent, folder):
            make_folder(above)
        text = one.method.encode()
        hashes = {"of": self._hash_of(one.unit, b""), "hash": self._hash_of(one.unit, text + one.tile)}
        with replacing(folder / f"{one.unit}.jpg") as part:
            part.write_bytes(_labelled(hashes | {"method": one.method}, one.tile))

    def _hash_of(self, unit: int, content: bytes) -> str:
        """A hash of some content and of all that a unit's projections depend on."""
        return _hash(f"{self._owner} {unit} ".encode() + content)


def _stores(run: RunData, layers: Iterable[str], method: str, crop: str | None) -> dict[str, _Store]:
    """By layer. crop: see `Run.patch`."""
    digest = run_digest(run)
    return {layer: _Store(run, digest, layer, method, crop_of(run, layer, crop)) for layer in layers}


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _labelled(label: dict[str, str], tile: bytes) -> bytes:
    """A JPEG file with a comment that holds the label."""
    text = json.dumps(label).encode()
    return tile[:2] + _COMMENT + (2 + len(text)).to_bytes(2, "big") + text + tile[2:]


def _unlabelled(data: bytes) -> tuple[dict[str, str], bytes]:
    """The label of a JPEG file, and the file without it; ImageError for a file without one."""
    end = 4 + int.from_bytes(data[4:6], "big")
    try:
        if data[2:4] != _COMMENT:
            raise ValueError
        label = parsed_json(data[6:end])
    except (ValueError, RecursionError):
        label = None
    if problem(label, LABEL):
        raise ImageError("it is not a picture that was kept")
    return label, data[:2] + data[end:]


def _unusable(path: Path, reason: str) -> UnitvisError:
    return UnitvisError(f"the picture {path} cannot be used: {reason}; draw it again with the network: --model MODEL")


def _computed(
    run: RunData,
    units: Mapping[str, list[int]],
    stores: Mapping[str, _Store],
    method: str,
    model: nn.Module,
    device: torch.device | str | None,
) -> Iterator[Projected]:
    """Compute projections, and yield and keep those of a unit when it has all of them."""
    keeping, scans = True, {}
    fired = {layer: run[layer].fired for layer in units}
    with bar(sum(int(fired[layer][own].sum()) for layer, own in units.items()), "project", unit="") as counted:
        for projection in project(model, run, units=units, method=method, device=device):
            layer, unit, rank = projection.layer, projection.unit, projection.rank
            assert rank is not None  # noqa: S101 - for mypy: projections of a run have a rank
            box = drawn_box(run[layer], unit, rank, stores[layer].crop, run.input_size)
            scans[unit, rank] = cell_scan(projection.picture(box, PATCH_SIZE), PROJECTION_CELL)
            counted.update()
            if len(scans) < int(fired[layer][unit].sum()):
                continue
            one, scans = Projected(layer, unit, projection.method, projections_of(run[layer], unit, scans)), {}
            if keeping:
                try:
                    stores[layer].keep(one)
                except OSError as error:
                    keeping = False
                    told = f"projections cannot be kept in {run.folder}: {error.strerror or error}"
                    warnings.warn(f"{told}; they are computed again when they are drawn again", stacklevel=2)
            yield one
