"""Reading and writing run folders.

manifest.json, top.npz and images.jsonl hold the run, sample.npz the responses of some of its images (see `sample`),
state.npz what `merge` needs (in runs of shards and merged runs), and labels.json the names of the network's classes, if
known. All other files are drawn from them, and can be again:

sheets/LAYER.png       LAYER+2.png and so on where the units do not fit on one page
index.html
gallery/               script, style and data of the page
  drawn.json           which of the optional files below exist
  images/ID.jpg        what the model sees of a picture, in the picture's own pixels and proportions
  sample.jpg           what the model sees of the images of the run's sample, small, see pages/usual.py
  layers/LAYER/        patches-UNIT.jpg: the patches of some dozen units from this one on as one picture, see
                       pages/sprites.py; with the model also projections-UNIT.jpg, responses-UNIT.png and
                       filters-UNIT.png; strip.jpg: those of a few units, for the first page
projections/           projections that were computed, see pages/projections.py
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from unitvis.errors import UnitvisError, abridged, first_line
from unitvis.files import (
    array_names,
    flush_to_disk,
    new_file,
    open_regular,
    parsed_json,
    part_of,
    read_arrays,
    read_json,
    replacing,
)
from unitvis.models.labels import Labels
from unitvis.results.arrays import ARRAYS, LayerArrays, winners_of
from unitvis.results.consistency import arrays_problem, manifest_problem, state_problem
from unitvis.results.data import RunData
from unitvis.results.drawn_files import FOLDERS, refuse_scanned_pictures, remove_drawn, warn_of_kept
from unitvis.results.sample import read_sample, write_sample
from unitvis.results.schemas import MANIFEST, MANIFEST_OF_A_SHARD, RECORD
from unitvis.schema import problem
from unitvis.sources import open_as_described
from unitvis.sources.base import Source
from unitvis.state.checkpoints import SCAN_CHECKPOINT, Checkpoints
from unitvis.state.partial import PARTIAL_ARRAYS, differences, identity, read_partial

FORMAT = 1  # version of the folder's format, in the manifest
# Files whose hashes the manifest has, and that must be those. It has the hash of the names of classes, too, which may
# be replaced later.
_HASHED = {"top.npz", "sample.npz", "state.npz", "images.jsonl"}
_MAX_LINE = 2**20  # bytes of a line of images.jsonl: the longest path of a text list, six characters a byte, twice over
_MANIFEST, _LABELS = "manifest.json", "labels.json"
_ARRAYS = ("top.npz", "sample.npz", "state.npz")
_FILES = (_MANIFEST, *_ARRAYS, "images.jsonl", _LABELS, "index.html")  # that a run may replace or remove
_RECORDED = {"folder", "list", "paths", "tar", "pack", "array", "dataset", "DataLoader"}  # sources that make records
_NOT_WRITTEN = "a run is not written that nothing could read again"  # begins messages
_MANIFEST_KEYS = MANIFEST_OF_A_SHARD.keys()
_Data = TypeVar("_Data", bound=RunData)


def write_run(run: RunData, folder: Path) -> Path:
    """Write a run into a folder that `check_output` returned; returns the folder.

    Wherever the process is stopped, the folder holds the run that was there or this one. Raises UnitvisError where
    writing fails.
    """
    try:
        _write(run, folder)
    except OSError as error:
        raise UnitvisError(f"the run could not be written into {folder}: {error.strerror}") from error
    run.folder = folder
    return folder


def _write(run: RunData, folder: Path) -> None:
    """Write all files beside those of a run that is there, then put them in its place, see `_new_parts`.

    Its pictures go first, while it is whole: they can be drawn again. The checkpoints of a scan go last.
    """
    _refuse_obstacles(folder)  # before the first file is removed
    refuse_unreadable(run.manifest)
    for id, record in run.records.items():
        if wrong := problem(record, RECORD, f"the record of image {id}"):
            raise UnitvisError(f"{_NOT_WRITTEN}: {wrong}")
    for name, top in run.tops.items():
        if wrong := arrays_problem(top, run.manifest):
            raise UnitvisError(f"{_NOT_WRITTEN}: layer {name!r}: {wrong}")
    if (source := _source_of(run, folder)) is not None:
        refuse_scanned_pictures(folder, source)
    arrays = {f"{name}/{key}": getattr(top, key) for name, top in run.tops.items() for key in ARRAYS}
    held = {"images.jsonl": True, "top.npz": bool(arrays), "state.npz": run.partial is not None}
    held |= {"sample.npz": run.sample is not None, _LABELS: run.labels is not None}
    _finish(folder)
    with _new_parts(folder, [name for name in held if held[name]]) as parts:
        if arrays:
            with open(parts["top.npz"], "wb") as file:
                np.savez_compressed(file, **arrays)
                flush_to_disk(file)
        if run.sample is not None:
            write_sample(run.sample, parts["sample.npz"])
        if run.partial is not None:
            run.partial.write(parts["state.npz"])
        if run.labels is not None:
            _write_json(parts[_LABELS], run.labels.to_json())
        with open(parts["images.jsonl"], "w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(record) + "\n" for _, record in sorted(run.records.items()))
            flush_to_disk(lines)
        hashes = {name: _file_hash(parts[name]) for name in held if held[name]}
        _write_json(parts[_MANIFEST], {**run.manifest, "files": hashes})
        # All is written, so no disk that fills up can cost the run that was there.
        (folder / "index.html").unlink(missing_ok=True)
        kept = remove_drawn(folder)
        for name in ("sample.npz", _LABELS):
            if not held[name] and (folder / name).exists():  # would be taken for the new run's; `_place` finds it
                os.replace(folder / name, part_of(folder / name))
    for path in (folder / name for name in held if not held[name]):  # of runs that are replaced
        path.unlink(missing_ok=True)
        part_of(path).unlink(missing_ok=True)
    Checkpoints(folder / SCAN_CHECKPOINT).remove()
    warn_of_kept(folder, kept)  # now that no filter that makes warnings errors can cost the run


@contextmanager
def _new_parts(folder: Path, names: Sequence[str]) -> Iterator[dict[str, Path]]:
    """Paths by name, to write a manifest and the files of these names to; all take their places when the block ends.

    The manifest goes first. Until then the run that was there is whole, and an error removes the parts. From then on
    the folder holds the new run, wherever this stops: `_place` finds the parts that have not moved by the manifest's
    hashes, and `_finish` moves them.
    """
    parts = {name: part_of(folder / name) for name in (_MANIFEST, *names)}
    try:
        for part in parts.values():
            new_file(part)
        yield parts
        for name, part in parts.items():
            os.replace(part, folder / name)
    except BaseException:
        if parts[_MANIFEST].exists():
            for part in reversed(parts.values()):
                part.unlink(missing_ok=True)
        raise


def _place(folder: Path, name: str, hashes: Mapping[str, str]) -> Path:
    """Where a file of a run is: at its name, or beside it as a part that was to take its place when a write stopped.

    hashes: those of the manifest, by name.
    """
    part = part_of(folder / name)
    with suppress(OSError):
        if name in hashes and not part.is_symlink() and _file_hash(part) == hashes[name]:
            return part
    return folder / name


def _finish(folder: Path) -> None:
    """Put the files of a run in their places where the command that wrote it was stopped."""
    try:
        hashes = read_json(folder / _MANIFEST)["files"]
        names = [name for name in (*_HASHED, _LABELS) if name in hashes]
    except (OSError, ValueError, RecursionError, TypeError, KeyError):  # no run, or one that cannot be read
        return
    for name in names:
        if (place := _place(folder, name, hashes)) != folder / name:
            os.replace(place, folder / name)


def _source_of(run: RunData, folder: Path) -> Source | None:
    """The images of a run that is written where there are pictures; None where it knows no way to them."""
    if not any((folder / name).exists() for name in FOLDERS):
        return None
    try:
        return run.source
    except UnitvisError:
        return None


def remove_run(folder: Path) -> None:
    """Remove a run that is not drawn, or a scan of one, and its folder unless that holds something else."""
    names = (*_FILES, *Checkpoints(folder / SCAN_CHECKPOINT).names)
    for name in (*names, *(f"{name}.part" for name in names)):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def refuse_unreadable(manifest: Mapping[str, Any]) -> None:
    """Raise UnitvisError where `read_manifest` would refuse the entries of a manifest, or JSON cannot hold them.

    A manifest without `seconds` is that of a scan that begins; of it those entries are checked that are there.
    """
    try:
        held = json.loads(json.dumps(manifest))
    except (TypeError, ValueError, RecursionError) as error:
        raise UnitvisError(f"{_NOT_WRITTEN}: {first_line(error)}") from error
    begins = "seconds" not in held
    schema = MANIFEST_OF_A_SHARD if begins or held.get("partial") is True else MANIFEST
    if begins:
        schema = {key: one for key, one in schema.items() if key.removesuffix("?") in held}
    if wrong := problem(held, schema) or (None if begins else manifest_problem(held)):
        raise UnitvisError(f"{_NOT_WRITTEN}: {wrong}")


def _refuse_obstacles(folder: Path) -> None:
    """Raise UnitvisError where a folder stands in the place of a file of a run, or a file or link in that of a folder.

    It would be found after the scan, when files of the run that was there are removed already.
    """
    for name in (*_FILES, *sorted(Checkpoints(folder / SCAN_CHECKPOINT).names)):
        for path in (folder / name, folder / f"{name}.part"):
            if path.is_dir() and not path.is_symlink():
                raise UnitvisError(
                    f"{path} is a folder, where a file of the run belongs; remove it, or give another path"
                )
    for path in (folder / name for name in FOLDERS):
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise UnitvisError(f"{path} is a file or a link, where a folder belongs; remove it, or give another path")


def read_run(kind: type[_Data], path: str | Path, images: object = None) -> _Data:
    """Read a run folder as this kind of run. images: those that were scanned, if they have left the manifest's path.

    Raises UnitvisError for a folder that holds no complete run.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    hashes = manifest.pop("files", None)
    top, sample, state, lines, labels = (
        _place(folder, name, hashes or {}) for name in (*_ARRAYS, "images.jsonl", _LABELS)
    )
    # One that the manifest does not name is of the run that was replaced, by a command that was stopped.
    has_state = state.exists() and (hashes is None or "state.npz" in hashes)
    try:
        partial = read_partial(state) if has_state else None
    except UnitvisError as error:
        raise UnitvisError(f"{error}; scan that shard again with --overwrite") from error
    if partial is not None:
        # A merged run may have been finished with images that loops did not name, and on another machine.
        own, ignored = identity(manifest), () if manifest.get("partial") else ("source", "fingerprint")
        found, wanted = (
            {k: v for k, v in one.items() if k not in ("shard", *ignored)} for one in (partial.identity, own)
        )
        if different := list(differences(found, wanted)):
            raise UnitvisError(
                f"{folder}: {state.name} does not belong to manifest.json (there and here): {abridged(different)}; "
                "scan that shard again with --overwrite"
            )
    if manifest.get("partial") and partial is None:
        raise UnitvisError(f"{folder} is not a whole run (there is no {state.name}); scan that shard again")
    try:
        tops = {} if manifest.get("partial") else _read_tops(top, manifest)
        if partial is not None and (wrong := state_problem(tops, partial, manifest)):
            raise ValueError(f"{state.name} does not belong to it: {wrong}")
        ids = winners_of(tops.values()) if tops or partial is None else partial.candidates
        if (size := lines.stat().st_size) > len(ids) * _MAX_LINE:
            raise ValueError(f"images.jsonl has {size:,} bytes, for {len(ids):,} images that won")
        places = {"top.npz": top, "sample.npz": sample, "state.npz": state, "images.jsonl": lines}
        if wrong := _files_problem(places, hashes):
            raise ValueError(wrong)
        sampled = read_sample(sample, manifest) if tops and sample.exists() else None
        records = _read_records(lines, set(ids.tolist()))
        if wrong := _records_problem(tops, records, manifest):
            raise ValueError(wrong)
    except UnitvisError:
        raise
    except Exception as error:  # damaged files make numpy and zipfile raise nearly anything
        raise UnitvisError(f"{folder} is not a whole run ({error}); scan again with --overwrite") from error
    source = None if images is None else open_as_described(images, manifest["source"], manifest["transform"])
    run = kind(tops, manifest, records, source, partial)
    run.folder, run.labels, run.sample = folder, _read_labels(labels), sampled
    return run


def write_labels(labels: Labels, folder: Path) -> None:
    """Write the names of classes into the folder of a run, in place of others there."""
    try:
        with replacing(folder / _LABELS) as path:
            _write_json(path, labels.to_json())
    except OSError as error:
        raise UnitvisError(f"the names of classes could not be written into {folder}: {error.strerror}") from error


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _read_labels(path: Path) -> Labels | None:
    """The names of a run's classes; None where it has none, UnitvisError for a link and for anything else."""
    if not os.path.lexists(path):
        return None
    try:
        if path.is_symlink():
            raise ValueError("it is a link")
        return Labels.from_json(read_json(path))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UnitvisError(f"{path} holds no names of classes ({reason}); remove it, and give --labels") from error


def _read_tops(path: Path, manifest: Mapping[str, Any]) -> dict[str, LayerArrays]:
    arrays = read_arrays(path, {f"{name}/{key}" for name in manifest["layers"] for key in ARRAYS})
    tops = {
        name: LayerArrays(name, **{key: arrays[f"{name}/{key}"] for key in ARRAYS}, info=info)
        for name, info in manifest["layers"].items()
    }
    for name, top in tops.items():
        if wrong := arrays_problem(top, manifest):
            raise ValueError(f"{path.name}: layer {name!r}: {wrong}")
    return tops


def _files_problem(places: Mapping[str, Path], hashes: Mapping[str, str] | None) -> str | None:
    """Which file is not the one that was written with the manifest; None if all are, or it is too old to say so."""
    if hashes is None:
        return None
    # A run without a sample lists none.
    for name in _HASHED & hashes.keys() | ({"sample.npz"} if places["sample.npz"].exists() else set()):
        if name not in hashes or _file_hash(places[name]) != hashes[name]:
            return f"{name} is not the one that was written with manifest.json"
    return None


def _records_problem(
    tops: Mapping[str, LayerArrays], records: Mapping[int, Any], manifest: Mapping[str, Any]
) -> str | None:
    """Whether the record of a winner's image is missing, so that nothing would tell that the image has changed."""
    if manifest["source"]["kind"] not in _RECORDED:
        return None
    missing = np.setdiff1d(winners_of(tops.values()), list(records))
    return f"images.jsonl has no line for image {missing[0]}" if len(missing) else None


def _file_hash(path: Path) -> str:
    """BLAKE2b hash of a file, 32 hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _read_records(path: Path, wanted: Container[int]) -> dict[int, dict[str, Any]]:
    """The records of images, by id; ValueError for another image than those wanted, and for one that comes again."""
    records: dict[int, dict[str, Any]] = {}
    keys = [key.removesuffix("?") for key in RECORD]
    with open_regular(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE), b""), 1):
            if len(line) == _MAX_LINE:
                raise ValueError(f"line {number} of {path.name} has {_MAX_LINE:,} bytes or more")
            record, place = parsed_json(line), f"{path.name}, line {number}"
            if wrong := problem(record, RECORD, place):
                raise ValueError(wrong)
            id = record["id"]
            if id in records or id not in wanted:
                found = "comes again" if id in records else "won nowhere"
                raise ValueError(f"{place}: image {id} {found}")
            records[id] = {key: record[key] for key in keys if key in record}
    return records


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a run folder; raises UnitvisError where it is missing, damaged or of another format."""
    path = folder / "manifest.json"
    try:
        manifest = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UnitvisError(f"{folder} is not a run: there is no {path.name} in it") from None
    except OSError as error:
        raise UnitvisError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UnitvisError(f"{path} is damaged ({error}); scan again with --overwrite") from error
    if not isinstance(manifest, dict):
        raise UnitvisError(f"{path} is damaged (it holds no object); scan again with --overwrite")
    if manifest.get("format") != FORMAT:
        raise UnitvisError(f"{path} has format {manifest.get('format')}; this version of unitvis reads format {FORMAT}")
    schema = MANIFEST_OF_A_SHARD if manifest.get("partial") is True else MANIFEST
    if wrong := problem(manifest, schema) or manifest_problem(manifest):
        raise UnitvisError(f"{path} is damaged ({wrong}); scan again with --overwrite")
    return manifest


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a run, damaged or of another format, and not files of some other program.

    Its manifest has all the entries of one or, where it cannot be read, the arrays beside it are those of a run.
    """
    try:
        manifest = read_json(folder / "manifest.json")
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError, RecursionError):
        tops = array_names(folder / "top.npz")
        of_layers = bool(tops) and {name.rpartition("/")[2] for name in tops or ()} == set(ARRAYS)
        return of_layers or array_names(folder / "state.npz") == set(PARTIAL_ARRAYS)
    return isinstance(manifest, dict) and {key for key in _MANIFEST_KEYS if not key.endswith("?")} <= set(manifest)


def _holds_scan(folder: Path, names: set[str]) -> bool:
    """Whether a folder, with files of these names, holds a scan that is not finished.

    One of its checkpoints has the arrays of one or, where none can be read, nothing else is there but files of a run,
    with a checkpoint or, where no manifest is, with a part of a run that was being written.
    """
    own = Checkpoints(folder / SCAN_CHECKPOINT).names
    held = [array_names(folder / name) for name in own & names]
    if any(found is not None for found in held):
        return set(PARTIAL_ARRAYS) in held
    files = own.union(_FILES)
    parts = {f"{name}.part" for name in files}
    begun = own if _MANIFEST in names else own | parts
    return bool(names & begun) and names <= files | parts


def check_output(path: str | Path, *, overwrite: bool = False, resume: bool = False) -> Path:
    """Make sure, before a scan, that a run can be written into a folder; creates and returns it.

    A run in it stays until the new one is saved. Raises UnitvisError for a folder that holds anything else, for one
    with a run or an unfinished scan unless `overwrite` or `resume` is given, and where nothing can be written.
    """
    if overwrite and resume:
        raise UnitvisError("overwrite and resume exclude each other: start again, or go on")
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise UnitvisError(f"{folder} is a file; a run is a folder: give another path")
    if folder.is_dir() and (names := {entry.name for entry in folder.iterdir()}):
        unfinished = _holds_scan(folder, names)
        if not unfinished and not holds_run(folder):
            raise UnitvisError(f"{folder} is not empty and holds no run, so it is not overwritten; give another path")
        if not overwrite and not resume:
            if unfinished:
                raise UnitvisError(
                    f"{folder} holds a scan that is not finished; resume it (--resume) or start again (--overwrite)"
                )
            raise UnitvisError(f"{folder} holds a run already; give another path, or overwrite it (--overwrite)")
    _refuse_obstacles(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UnitvisError(f"cannot write into {folder}: {error.strerror}; give another path") from error
    return folder
