"""A run: what a scan found, in memory and as a folder.

manifest.json, top.npz and images.jsonl are the run; all else in the folder is drawn from them and can be drawn again:
sheets/LAYER.png; index.html and gallery/ (its script, style and data; images/ID.jpg, what the model sees of an image;
layers/LAYER/UNIT.jpg, the unit's patches as one picture, and beside it, where the model was there to make them,
UNIT-projections.jpg, UNIT-responses.png and UNIT-filter.png; drawn.json, which of these there are).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import urllib.parse
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from unitvis.drawing.notebook import Unit, layer_html, run_html
from unitvis.errors import UnitvisError, check_unit
from unitvis.state.partial import Partial, read_partial

if TYPE_CHECKING:
    from PIL import Image

    from unitvis.sources import Source

FORMAT = 1
SEPARATED, TIED, UNSEPARATED = "separated", "tied", "unseparated"
PROGRESS, PREVIOUS = "progress.npz", "progress.previous.npz"  # checkpoints of a scan that is not finished
ARRAYS = ("values", "images", "positions", "boxes", "status")


@dataclass(frozen=True)
class LayerTop:
    """The top-k of one layer's units."""

    name: str
    values: NDArray[np.float32]  # [units, k], descending; NaN where blank
    images: NDArray[np.int64]  # [units, k]; -1 where blank
    positions: NDArray[np.int32]  # [units, k, 2]: row, column; -1 where blank
    boxes: NDArray[np.int32]  # [units, k, 4]: left, top, right, bottom in model-input pixels; 0 where blank
    status: NDArray[np.str_]  # [units]: separated | tied | unseparated
    info: Mapping[str, Any]  # the layer's entry in the manifest
    run: Run | None = field(default=None, repr=False, compare=False)  # that it belongs to

    def __getitem__(self, unit: int) -> Unit:
        """One unit, which shows itself in a notebook."""
        check_unit(self.name, unit, len(self))
        return Unit(self, int(unit))

    def __iter__(self) -> Iterator[Unit]:
        return (Unit(self, unit) for unit in range(len(self)))

    def _repr_html_(self) -> str:
        return layer_html(self)

    @property
    def separated(self) -> NDArray[np.bool_]:
        """[units]: the k winners are exactly brute force's."""
        return self.status == SEPARATED

    @property
    def fired(self) -> NDArray[np.bool_]:
        """[units, k]: not blank, and above 0 where the layer feeds a ReLU and nothing else."""
        floor = 0.0 if self.info["feeds_relu"] else -np.inf
        return (self.images >= 0) & ((self.values > floor) | (floor < 0))

    @property
    def dead(self) -> NDArray[np.bool_]:
        """[units]: there are responses, and not even the strongest gets through the ReLU that follows."""
        return (self.images[:, 0] >= 0) & ~self.fired[:, 0]

    def __len__(self) -> int:
        return len(self.values)


class Run:
    """The top-k of every scanned layer: `run["features.10"].values`, `run.tile("features.10", 7)`."""

    def __init__(
        self,
        tops: Mapping[str, LayerTop],
        manifest: dict[str, Any],
        records: Mapping[int, dict[str, Any]],
        source: Source | None = None,
        partial: Partial | None = None,
    ) -> None:
        self.tops = {name: replace(top, run=self) for name, top in tops.items()}
        self.manifest, self.records = manifest, dict(records)
        self._source = source
        self.partial = partial  # of a shard's run, which has nothing else, and of one that was merged
        self.folder: Path | None = None  # where it was read from or written to last

    def __getitem__(self, layer: str) -> LayerTop:
        self.need_winners()
        if layer not in self.tops:
            raise UnitvisError(f"the run has no layer {layer!r}; it has {', '.join(self.tops)}")
        return self.tops[layer]

    def need_winners(self) -> None:
        """UnitvisError for the run of a shard."""
        if not self.tops:
            raise UnitvisError("this is the run of a shard, which has no winners yet; merge it with the others")

    def __iter__(self) -> Iterator[str]:
        return iter(self.tops)

    def __len__(self) -> int:
        return len(self.tops)

    @property
    def layers(self) -> list[str]:
        """Names, in the order of the forward pass."""
        return list(self.tops)

    @property
    def winners(self) -> NDArray[np.int64]:
        """The ids of all images that hold a place somewhere, ascending."""
        ids = np.unique(np.concatenate([top.images.ravel() for top in self.tops.values()]))
        return ids[ids >= 0]

    @property
    def source(self) -> Source:
        """Where the pictures come from; opened again from the manifest if need be."""
        if self._source is None:
            from unitvis.sources import reopen_source

            self._source = reopen_source(self.manifest["source"], self.manifest["transform"])
        return self._source

    def attach(self, source: Source, known: Mapping[int, dict[str, Any]] | None = None) -> None:
        """Say where the pictures come from, and keep what is known of each winner's image, or of a shard's candidates.

        known: records made when the images were scanned; the others are looked up now.
        """
        self._source = source
        self.manifest["source"] = source.describe()
        known = known or {}
        if source.rereadable:
            wanted = self.winners if self.partial is None or self.tops else self.partial.candidates
            self.records = {id: known[id] if id in known else source.record(id) for id in wanted.tolist()}

    def set_effective_box(self, layer: str, side: int | None) -> None:
        """Keep the side of a layer's effective box, in model-input pixels; None where it has none."""
        self.manifest["layers"][layer]["effective_box"] = side

    def patch(self, layer: str, unit: int, rank: int, *, crop: str | None = None, size: int = 96) -> Image.Image:
        """One winner's patch, `size` pixels high and wide. crop: rf, effective or image; None: as the sheet does."""
        from unitvis.drawing import sheets

        return sheets.patch(self, layer, unit, rank, crop=crop, size=size)

    def tile(self, layer: str, unit: int, *, crop: str | None = None, size: int = 96) -> Image.Image:
        """A unit's patches as a 3x3 tile, strongest first; `size` is one patch's."""
        from unitvis.drawing import sheets

        return sheets.tile(self, layer, unit, crop=crop, size=size)

    def sheet(
        self, layer: str, units: list[int] | None = None, *, crop: str | None = None, size: int | None = None
    ) -> Image.Image:
        """A page of tiles with unit numbers and values; all units by default."""
        from unitvis.drawing import sheets

        return sheets.sheet(self, layer, units, crop=crop, size=size)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the run into a folder: a new one, or (with `overwrite`) one that holds a run already."""
        return self.write(check_output(path, overwrite=overwrite))

    def write(self, folder: Path) -> Path:
        """Write manifest.json, top.npz and images.jsonl into a folder that `check_output` gave, the manifest last: a
        run is there only once all three are. What merges goes into state.npz.
        """
        try:
            self._write(folder)
        except OSError as error:
            raise UnitvisError(f"the run could not be written into {folder}: {error.strerror}") from error
        self.folder = folder
        return folder

    def _write(self, folder: Path) -> None:
        for name in ("manifest.json", "top.npz", "state.npz", "index.html"):
            (folder / name).unlink(missing_ok=True)
        for drawn in ("sheets", "gallery"):  # of the run that was there
            shutil.rmtree(folder / drawn, ignore_errors=True)
        arrays = {f"{name}/{key}": getattr(top, key) for name, top in self.tops.items() for key in ARRAYS}
        if arrays:
            with replacing(folder / "top.npz") as target, open(target, "wb") as file:
                np.savez_compressed(file, **arrays)
        if self.partial is not None:
            with replacing(folder / "state.npz") as target:
                self.partial.write(target)
        with replacing(folder / "images.jsonl") as target, open(target, "w", encoding="utf-8") as file:
            for _, record in sorted(self.records.items()):
                file.write(json.dumps(record) + "\n")
        with replacing(folder / "manifest.json") as target:
            target.write_text(json.dumps(self.manifest, indent=1) + "\n", encoding="utf-8")

    def _repr_html_(self) -> str:
        return run_html(self)

    def __repr__(self) -> str:
        if not self.tops:
            return f"<Run: a shard, {self.manifest['images']} images, to be merged>"
        units = sum(len(top) for top in self.tops.values())
        return (
            f"<Run: {units} units of {len(self)} layers, top {self.manifest['k']} of {self.manifest['images']} images>"
        )


def load(path: str | Path, images: object = None) -> Run:
    """Read a run folder. `images`: the images that were scanned, where the manifest's own path no longer holds."""
    folder = Path(path)
    manifest = read_manifest(folder)
    state = folder / "state.npz"
    try:
        partial = read_partial(state) if state.exists() else None
    except UnitvisError as error:
        raise UnitvisError(f"{error}; scan that shard again with --overwrite") from error
    if manifest.get("partial") and partial is None:
        raise UnitvisError(f"{folder} is not a whole run (there is no {state.name}); scan that shard again")
    try:
        tops = {} if manifest.get("partial") else _read_tops(folder / "top.npz", manifest)
        lines = (folder / "images.jsonl").read_text(encoding="utf-8").splitlines()
        records = {record["id"]: record for record in map(json.loads, lines)}
    except (OSError, EOFError, LookupError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise UnitvisError(f"{folder} is not a whole run ({error}); scan again with --overwrite") from error
    source = None
    if images is not None:
        from unitvis.sources import open_source
        from unitvis.sources.transform import Transform

        transform = manifest["transform"]
        source = open_source(images, Transform.from_json(transform) if transform else None)
    run = Run(tops, manifest, records, source, partial)
    run.folder = folder
    return run


def _read_tops(path: Path, manifest: Mapping[str, Any]) -> dict[str, LayerTop]:
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
        return {
            name: LayerTop(name, **{key: arrays[f"{name}/{key}"] for key in ARRAYS}, info=info)
            for name, info in manifest["layers"].items()
        }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run folder, its format checked."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UnitvisError(f"{folder} is not a run: there is no {path.name} in it") from None
    except OSError as error:
        raise UnitvisError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UnitvisError(f"{path} is damaged ({error}); scan again with --overwrite") from error
    if not isinstance(manifest, dict):
        raise UnitvisError(f"{path} is damaged (it holds no object); scan again with --overwrite")
    if manifest.get("format") != FORMAT:
        raise UnitvisError(f"{path} has format {manifest.get('format')}; this version of unitvis reads format {FORMAT}")
    return manifest


def check_output(path: str | Path, *, overwrite: bool = False, resume: bool = False) -> Path:
    """The folder, made if need be, that a run can be written into; it is asked before a scan, not after.

    A run that is there stays there until the new one is saved; a folder that holds anything else is never touched.
    """
    if overwrite and resume:
        raise UnitvisError("overwrite and resume exclude each other: start again, or go on")
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise UnitvisError(f"{folder} is a file; a run is a folder: give another path")
    if folder.is_dir() and (names := {entry.name for entry in folder.iterdir()}):
        unfinished = {PROGRESS, PREVIOUS} & names or all(name.endswith(".part") for name in names)
        if not unfinished and "manifest.json" not in names:
            raise UnitvisError(f"{folder} is not empty and holds no run, so it is not overwritten; give another path")
        if not overwrite and not resume:
            if unfinished:
                raise UnitvisError(
                    f"{folder} holds a scan that is not finished; go on with it (--resume) or start again (--overwrite)"
                )
            raise UnitvisError(f"{folder} holds a run already; give another path, or overwrite it (--overwrite)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UnitvisError(f"cannot write into {folder}: {error.strerror}; give another path") from error
    return folder


def file_name(layer: str) -> str:
    """The layer's name as the name of a file: whatever a file system might mind is percent-encoded."""
    return urllib.parse.quote(layer, safe=" ")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` only when all of it is written."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
