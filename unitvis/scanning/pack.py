"""Pack: decode and resize a data set once, into an array that many scans can read."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unitvis.bars import bar, no_bars
from unitvis.choices import CHECKPOINT_SECONDS
from unitvis.errors import Interrupted, UnitvisError
from unitvis.files import flush_to_disk, lock, parsed_json, replacing, unoccupied, write_arrays
from unitvis.network.forward import COMPUTE_BATCH
from unitvis.scanning.signals import Signals
from unitvis.schema import OBJECT, TEXT, ByName, problem, whole
from unitvis.sources import Batch, PackSource, Source, open_source
from unitvis.sources.base import ImageInfo, ImageInfoTable, checked_workers
from unitvis.sources.encoded import EncodedSource
from unitvis.sources.names import Names
from unitvis.sources.packed import (
    BAKED_FIELDS,
    FORMAT,
    FORMAT_KEY,
    pack_source,
    pixels_hash,
    read_about,
    refuse_unreadable,
    tables_hash,
)
from unitvis.sources.transform import Transform
from unitvis.state.checkpoints import HOW_TO_RESUME, Arrays, Checkpoints, check_seconds
from unitvis.state.partial import refuse_differences, same_images

_SIDE = whole(1, 10**6)  # pixels
_CHECKPOINT = {  # the JSON of a checkpoint; row: height, width and colours of an image; failures: reasons by id
    "source": OBJECT,
    "transform": OBJECT,
    "row": (_SIDE, _SIDE, whole(3, 3)),
    "failures": ByName(TEXT),
}


def pack(
    images: object,
    path: str | Path,
    transform: Transform | None = None,
    *,
    on_error: str = "skip",
    max_failures: int | None = None,
    decoder: str = "pillow",
    scaled: bool = False,
    allow_truncated: bool = False,
    images_ending: str | Sequence[str] | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    every: float = CHECKPOINT_SECONDS,
    progress: bool = True,
) -> PackSource:
    """Decode, resize and crop images once, into FILE.npy, uint8 [images, H, W, 3], described by FILE.json and FILE.npz.

    A scan of the pack gives the same ids, names, failures and result bytes as a scan of the images; patches are cut
    from the original files. An image that cannot be read keeps its id; its pixels are zeros.

    Args:
        images: a folder, a text list or tar archives.
        path: FILE.npy.
        transform: its resize, crop and interpolation are applied; mean and std are not, each scan gives its own.
        on_error, max_failures, decoder, scaled, allow_truncated, images_ending, workers, progress: as for `scan`.
        overwrite: replace a pack at `path`.
        resume: continue from the last checkpoint, also after a crash.
        every: seconds between checkpoints; SIGINT and SIGTERM write one and raise `Interrupted`.

    Returns the pack, as `scan` takes it. Raises UnitvisError for errors that the user can fix.
    """
    check_seconds(every)
    workers = checked_workers(workers)
    target = _checked_target(Path(path), overwrite, resume)
    source = open_source(
        images,
        transform,
        on_error=on_error,
        max_failures=max_failures,
        decoder=decoder,
        scaled=scaled,
        allow_truncated=allow_truncated,
        images_ending=images_ending,
    )
    if not isinstance(source, EncodedSource) or source.describe()["path"] is None:
        raise UnitvisError(
            f"images of the kind {source.kind!r} cannot be packed; give a folder, a .txt list of paths or .tar archives"
        )
    packing = _Packing(target, source, every)
    refuse_unreadable(packing.about())  # it is written hours later
    with packing.keeping_progress(), Signals() as signals:
        if not (resume and packing.resume()):
            ids = range(packing.done, packing.images) if packing.done else None
            with (
                closing(source.batches(4 * COMPUTE_BATCH, workers=workers, ids=ids)) as batches,
                nullcontext() if progress else no_bars(),
                bar(packing.images, "pack", initial=packing.done, delay=0) as counted,
            ):
                for batch in batches:
                    packing.add(batch)
                    counted.update(packing.done - counted.n)
                    if signals.received is not None:
                        packing.checkpoint()
                        raise Interrupted(f"interrupted after {packing.count}; {HOW_TO_RESUME}", signals.received)
            packing.finish()
    packed = pack_source(str(target), source.transform, on_error=on_error)
    assert packed is not None  # noqa: S101  it is finished
    packed.others = source.others
    return packed


class _Packing:
    """A pack that is being made: its pixels are in FILE.npy.part, its last checkpoint is in FILE.npy.progress.

    FILE.npy is created last, after FILE.json and FILE.npz are complete.
    """

    def __init__(self, target: Path, source: Source, every: float) -> None:
        self._target, self._source = target, source
        self._part, self._checkpoints = _part_path(target), Checkpoints(_checkpoint_path(target), every)
        self.images = source.length or 0
        self.done = 0  # ids below it are in the array or are failures
        self._rows = np.zeros(self.images, ImageInfoTable.ROW)
        self._infos = ImageInfoTable.of(self._rows)
        self._row_shape: tuple[int, ...] = ()  # height, width, 3, from the first image on
        self._header_bytes = 0  # of the .npy format, before the pixels
        self._file: io.FileIO | None = None  # the array's file, once its header is written
        self._open_file: io.FileIO | None = None  # the same file, to be closed

    @property
    def count(self) -> str:
        """Progress in words: "N of M images"."""
        return f"{self.done:,} of {self.images:,} images"

    def resume(self) -> bool:
        """Continue from a checkpoint, if any; True if the pack is finished, UnitvisError if it is another pack."""
        if not self._part.exists():
            if (about := read_about(self._target)) is None or not self._target.exists():
                return False
            self._refuse_other_pack(f"{self._target} is another pack", about)
            self._checkpoints.remove()
            return True
        if not self._checkpoints.exist:
            return False
        file = self._open_locked(new=False)
        found = self._checkpoints.read(self._parse_checkpoint, ("about", "seen"))
        assert found is not None  # noqa: S101  it exists
        about, seen = found
        self._refuse_other_pack(f"the pack {self._target} cannot be resumed", about)
        self.done, self._file = len(seen), file
        self._rows[: self.done] = seen
        self._source.add_failures({int(id): reason for id, reason in about["failures"].items()})
        file.truncate(self._file_size(self.done))  # drop the images written after the checkpoint
        return False

    def _parse_checkpoint(self, arrays: Arrays) -> tuple[dict[str, Any], NDArray[np.void]]:
        """Read a checkpoint: description of the pack, and the `ImageInfoTable` rows of its images so far."""
        about, seen = parsed_json(arrays["about"].tobytes()), arrays["seen"]
        if wrong := problem(about, _CHECKPOINT):
            raise ValueError(wrong)
        if seen.dtype != ImageInfoTable.ROW or seen.ndim != 1 or len(seen) > self.images:
            raise ValueError(f"its table of images is {seen.dtype} {list(seen.shape)}, of {self.images:,} images")
        if beyond := [id for id in about["failures"] if not (id.isdecimal() and int(id) < len(seen))]:
            raise ValueError(f"image {beyond[0]} is said to have failed, of {len(seen):,}")
        self._set_row_shape(tuple(about["row"]))
        if self._part.stat().st_size < self._file_size(len(seen)):
            raise ValueError(f"{self._part} is shorter than it says")
        return about, seen

    def _refuse_other_pack(self, what: str, about: Mapping[str, Any]) -> None:
        """Raise UnitvisError unless `about` has this pack's source and transform."""
        there, here = (
            {"source": same_images(one["source"]), "transform": one["transform"]} for one in (about, self.about())
        )
        refuse_differences(f"{what} (then and now)", there, json.loads(json.dumps(here)))

    def about(self) -> dict[str, Any]:
        """Source and transform, as the JSON file and the checkpoints keep them."""
        assert self._source.transform is not None  # noqa: S101  files have one
        values = self._source.transform.to_json()
        return {"source": self._source.describe(), "transform": {name: values[name] for name in BAKED_FIELDS}}

    @contextmanager
    def keeping_progress(self) -> Iterator[None]:
        """Context of the packing: on an error write a checkpoint; an OSError becomes one that says how to resume."""
        try:
            yield
        except OSError as error:
            self._try_checkpoint()
            raise UnitvisError(
                f"after {self.count} {self._target} could not be written: {error.strerror}; "
                f"fix that, then {HOW_TO_RESUME}"
            ) from error
        except UnitvisError:
            self._try_checkpoint()
            raise
        finally:
            if self._open_file is not None:
                self._open_file.close()

    def _try_checkpoint(self) -> None:
        """Write a checkpoint unless the disk refuses."""
        with suppress(OSError):
            self.checkpoint()

    def add(self, batch: Batch) -> None:
        """Write the next images; ids left out between them have failed."""
        pixels = batch.pixels.numpy()
        if self._file is None:
            self._file = self._create_array(pixels.shape[1:])
        if pixels.shape[1:] != self._row_shape:
            height, width, _ = pixels.shape[1:]
            raise UnitvisError(
                f"{self._source.name(int(batch.ids[0]))!r} gives {width} x {height} pixels, those before it give "
                f"{self._row_shape[1]} x {self._row_shape[0]}; one size is needed: give "
                "resize=(height, width), or resize and crop"
            )
        for id, row in zip(batch.ids.tolist(), pixels, strict=True):
            self._file.seek(self._file_size(id))
            _write_all(self._file, row.data)
            record = self._source.record(id)
            self._infos[id] = ImageInfo(bytes.fromhex(record["hash"]), record["width"], record["height"])
            self.done = id + 1
        if self._checkpoints.due:
            self.checkpoint()

    def _open_locked(self, *, new: bool) -> io.FileIO:
        """Open the array's file, or a new one, and lock it; UnitvisError if another process packs into it.

        A link that stands there would lead to another file: it is replaced by a new one, or refused unless `new`.
        """
        if not _is_lone_file(self._part):
            if not new:
                raise UnitvisError(
                    f"{self._part} is a link or a file of several names, so nothing is written into it; start again "
                    "(--overwrite)"
                )
            unoccupied(self._part)
        flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | (os.O_CREAT if new else 0)
        # unbuffered, so that a full disk raises at the write that fails
        self._open_file = io.FileIO(os.open(self._part, flags, 0o666), "r+")
        if not lock(self._open_file):
            raise UnitvisError(f"another process is packing into {self._target}; wait for its end")
        return self._open_file

    def _create_array(self, row: tuple[int, ...]) -> io.FileIO:
        """Start the array's file with its header; UnitvisError if the disk has no room for the whole array."""
        file = self._open_locked(new=True)
        self._checkpoints.remove()
        file.truncate(0)
        header = self._set_row_shape(row)
        total, free = self._file_size(self.images), shutil.disk_usage(self._target.parent).free
        if total > free:
            self._part.unlink()
            raise UnitvisError(
                f"{self._target} will take {total:,} bytes for {self.images:,} images and {free:,} are free there; "
                "give a path on a larger disk"
            )
        _write_all(file, memoryview(header))
        return file

    def _set_row_shape(self, row: tuple[int, ...]) -> bytes:
        """Set the shape of an image; returns the .npy header of the array."""
        header, shape = io.BytesIO(), (self.images, *row)
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        self._row_shape, self._header_bytes = row, len(header.getvalue())
        return header.getvalue()

    def _file_size(self, images: int) -> int:
        """Bytes of the array's file up to so many images."""
        return self._header_bytes + images * math.prod(self._row_shape)

    def checkpoint(self) -> None:
        """Flush the pixels to the disk and write a checkpoint."""
        if self._file is None:
            return
        self._file.truncate(self._file_size(self.done))
        flush_to_disk(self._file)
        failures = {id: reason for id, reason in self._source.failure_reasons.items() if id < self.done}
        about = self.about() | {"row": self._row_shape, "failures": failures}
        self._checkpoints.write(
            {"about": np.frombuffer(json.dumps(about).encode(), np.uint8), "seen": self._rows[: self.done]}
        )

    def finish(self) -> None:
        """Write FILE.npz and FILE.json, and rename the pixels to FILE.npy."""
        self.done = self.images
        self.checkpoint()
        names = Names(os.fsencode(self._source.name(id)) for id in range(self.images))
        tables = {**names.arrays(), "seen": self._rows}
        pixels = np.load(self._part, mmap_mode="r", allow_pickle=False)
        about = {
            FORMAT_KEY: FORMAT,
            **self.about(),
            "shape": list(pixels.shape),
            "pixels": pixels_hash(pixels),
            "tables": tables_hash(tables),
            "failures": [asdict(failure) for failure in self._source.failures],
        }
        refuse_unreadable(about)
        self._target.unlink(missing_ok=True)  # the old array must never stand beside the new JSON file
        with replacing(self._target.with_suffix(".npz")) as part:
            write_arrays(part, tables)
        with replacing(self._target.with_suffix(".json")) as path, open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps(about, indent=1) + "\n")
            flush_to_disk(file)
        os.replace(self._part, self._target)
        self._checkpoints.remove()


def _checked_target(path: Path, overwrite: bool, resume: bool) -> Path:
    """Check that a pack may be written to the path, before anything is read; returns it absolute."""
    if overwrite and resume:
        raise UnitvisError("overwrite and resume exclude each other: start again, or go on")
    if path.suffix.lower() != ".npy":
        raise UnitvisError(f"{path} must end in .npy; a pack is an array")
    path = path.absolute()
    if not path.parent.is_dir():
        raise UnitvisError(f"there is no folder {path.parent} to write {path.name} into")
    known = read_about(path) is not None
    unfinished = _part_path(path).exists() or Checkpoints(_checkpoint_path(path)).exist
    for ending in (".npy", ".json") if unfinished else (".npy", ".json", ".npz"):
        if not known and (other := path.with_suffix(ending)).exists():
            raise UnitvisError(f"{other} is there and belongs to no pack, so it is not overwritten; give another path")
    if unfinished and not overwrite and not resume:
        raise UnitvisError(f"{path} is not finished; resume it (--resume) or start again (--overwrite)")
    if path.exists() and not overwrite and not resume:
        raise UnitvisError(f"{path} holds a pack already; give another path, or overwrite it (--overwrite)")
    return path


def _is_lone_file(path: Path) -> bool:
    """Whether a path is a regular file without other names (hard links), and no link to a file elsewhere."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink <= 1


def _part_path(target: Path) -> Path:
    """Path of the pixels of an unfinished pack."""
    return target.with_name(f"{target.name}.part")


def _checkpoint_path(target: Path) -> Path:
    """Path of the newest checkpoint of an unfinished pack."""
    return target.with_name(f"{target.name}.progress")


def _write_all(file: io.FileIO, data: memoryview) -> None:
    """Write all bytes; one call of `write` may write fewer."""
    data = data.cast("B")
    while data:
        data = data[file.write(data) :]
