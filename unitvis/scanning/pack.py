"""pack: decode and resize a data set once, into an array that any number of scans read from memory."""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from unitvis.errors import Interrupted, UnitvisError
from unitvis.files import flush_to_disk, replacing, write_arrays
from unitvis.network.forward import COMPUTE_BATCH
from unitvis.scanning.signals import Signals
from unitvis.sources import Batch, PackSource, Source, open_source
from unitvis.sources.base import ImageInfo, ImageInfoTable
from unitvis.sources.encoded import EncodedSource
from unitvis.sources.names import Names
from unitvis.sources.packed import BAKED_FIELDS, FORMAT, FORMAT_KEY, pack_source, pixels_hash, read_about, tables_hash
from unitvis.sources.transform import Transform
from unitvis.state.checkpoints import CHECKPOINT_SECONDS, HOW_TO_RESUME, Arrays, Checkpoints, check_interval
from unitvis.state.partial import refuse_differences


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
    workers: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    every: float = CHECKPOINT_SECONDS,
    progress: bool = True,
) -> PackSource:
    """Decode, resize and crop images once, into FILE.npy, uint8 [images, H, W, 3]; FILE.json and FILE.npz know of what.

    images: a folder, a text list or tar archives. path: FILE.npy; a scan of it is one of the images: same ids, names,
    failures and result bytes, and patches are cut from the original files. transform: resize, crop and interpolation
    are done here for good; mean and std are not, each scan gives its own. An image that cannot be read keeps its id,
    and zeros. every: seconds between checkpoints; SIGINT and SIGTERM write one and raise `Interrupted`; resume: go on
    from there, also after a crash. The other options are those of `scan`. Returns the pack, as `scan` takes it. Raises
    UnitvisError for whatever the caller can mend.
    """
    check_interval(every)
    target = _target(Path(path), overwrite, resume)
    source = open_source(
        images,
        transform,
        on_error=on_error,
        max_failures=max_failures,
        decoder=decoder,
        scaled=scaled,
        allow_truncated=allow_truncated,
    )
    if not isinstance(source, EncodedSource) or source.describe()["path"] is None:
        raise UnitvisError(
            f"images of the kind {source.kind!r} cannot be packed; give a folder, a .txt list of paths or .tar archives"
        )
    packing = _Packing(target, source, every)
    with packing.explained(), Signals() as signals:
        if not (resume and packing.resume()):
            ids = range(packing.done, packing.images) if packing.done else None
            begin, off = packing.done, None if progress else True
            with (
                closing(source.batches(4 * COMPUTE_BATCH, workers=workers, ids=ids)) as batches,
                tqdm(total=packing.images, initial=begin, desc="pack", unit=" images", disable=off, leave=False) as bar,
            ):
                for batch in batches:
                    packing.add(batch)
                    bar.update(packing.done - bar.n)
                    if signals.came is not None:
                        packing.checkpoint()
                        raise Interrupted(f"interrupted after {packing.count}; {HOW_TO_RESUME}", signals.came)
            packing.finish()
    packed = pack_source(str(target), source.transform, on_error=on_error)
    assert packed is not None  # noqa: S101  it is whole now
    return packed


class _Packing:
    """A pack while it is made. Until it is whole its pixels are in FILE.npy.part, what else is known of them, as of the
    last checkpoint, in FILE.npy.progress. FILE.npy comes last: it is never there without all the rest.
    """

    def __init__(self, target: Path, source: Source, every: float) -> None:
        self._target, self._source = target, source
        self._part, self._checkpoints = _part(target), Checkpoints(_checkpoint(target), every)
        self.images = source.length or 0
        self.done = 0  # ids below it are in the array, or known as failures
        self._seen = np.zeros(self.images, ImageInfoTable.ROW)
        self._table = ImageInfoTable.of(self._seen)
        self._row: tuple[int, ...] = ()  # height, width, 3; known from the first image on
        self._start = 0  # bytes of the header
        self._file: io.FileIO | None = None  # once it can be written
        self._held: io.FileIO | None = None  # the same, from when it is open

    @property
    def count(self) -> str:
        """How far it is, in words."""
        return f"{self.done:,} of {self.images:,} images"

    def resume(self) -> bool:
        """Go on with what is there, if anything; True where it is whole. UnitvisError where it is another pack."""
        if not self._part.exists():
            if (about := read_about(self._target)) is None or not self._target.exists():
                return False
            self._refuse_another(f"{self._target} is another pack", about)
            self._checkpoints.remove()
            return True
        if not self._checkpoints.exist:
            return False
        file = self._opened()
        found = self._checkpoints.read(self._checkpointed)
        assert found is not None  # noqa: S101  there is one
        about, seen = found
        self._refuse_another(f"the pack {self._target} cannot be gone on with", about)
        self.done, self._file = len(seen), file
        self._seen[: self.done] = seen
        self._source.add_failures({int(id): reason for id, reason in about["failures"].items()})
        file.truncate(self._bytes(self.done))  # what came after the checkpoint is made again
        return False

    def _checkpointed(self, arrays: Arrays) -> tuple[dict[str, Any], NDArray[np.void]]:
        """What a checkpoint says of the pack and of its images so far."""
        about, seen = json.loads(arrays["about"].tobytes()), arrays["seen"]
        self._has_rows_of(tuple(about["row"]))
        if self._part.stat().st_size < self._bytes(len(seen)):
            raise ValueError(f"{self._part} is shorter than it says")
        return about, seen

    def _refuse_another(self, what: str, about: Mapping[str, Any]) -> None:
        aside = {"path": None, "others": None}  # files that are no images may come and go: the pack may be one of them
        there, here = (
            {"source": one["source"] | aside, "transform": one["transform"]} for one in (about, self._about())
        )
        refuse_differences(f"{what} (there and now)", there, json.loads(json.dumps(here)))

    def _about(self) -> dict[str, Any]:
        assert self._source.transform is not None  # noqa: S101  files have one
        values = self._source.transform.to_json()
        return {"source": self._source.describe(), "transform": {name: values[name] for name in BAKED_FIELDS}}

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Whatever ends the packing, what is done is kept; an error of the disk says how to go on."""
        try:
            yield
        except OSError as error:
            self._keep()
            raise UnitvisError(
                f"after {self.count} {self._target} could not be written: {error.strerror}; "
                f"mend that, then {HOW_TO_RESUME}"
            ) from error
        except UnitvisError:
            self._keep()
            raise
        finally:
            if self._held is not None:
                self._held.close()

    def _keep(self) -> None:
        with suppress(OSError):
            self.checkpoint()

    def add(self, batch: Batch) -> None:
        """Write down the next images; ids between them have failed."""
        pixels = batch.pixels.numpy()
        if self._file is None:
            self._file = self._begun(pixels.shape[1:])
        if pixels.shape[1:] != self._row:
            height, width, _ = pixels.shape[1:]
            raise UnitvisError(
                f"{self._source.name(int(batch.ids[0]))!r} gives {width} x {height} pixels, those before it give "
                f"{self._row[1]} x {self._row[0]}; one size is needed, with resize=(height, width), or resize and crop"
            )
        for id, row in zip(batch.ids.tolist(), pixels, strict=True):
            self._file.seek(self._bytes(id))
            _write_all(self._file, row.data)
            record = self._source.record(id)
            self._table[id] = ImageInfo(bytes.fromhex(record["hash"]), record["width"], record["height"])
            self.done = id + 1
        if self._checkpoints.due:
            self.checkpoint()

    def _opened(self) -> io.FileIO:
        """The array's file as it is, or empty; no other process may pack into it meanwhile."""
        # unbuffered, so that no byte waits for a disk that is full later
        self._held = io.FileIO(os.open(self._part, os.O_RDWR | os.O_CREAT, 0o666), "r+")
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UnitvisError(f"another process is packing into {self._target}; wait for its end") from error
        except OSError:  # a file system without locks
            pass
        return self._held

    def _begun(self, row: tuple[int, ...]) -> io.FileIO:
        """The array's file, with its header; refused where the array will not fit."""
        file = self._opened()
        self._checkpoints.remove()
        file.truncate(0)
        header = self._has_rows_of(row)
        total, free = self._bytes(self.images), shutil.disk_usage(self._target.parent).free
        if total > free:
            self._part.unlink()
            raise UnitvisError(
                f"{self._target} will take {total:,} bytes for {self.images:,} images and {free:,} are free there; "
                "give a path on a larger disk"
            )
        _write_all(file, memoryview(header))
        return file

    def _has_rows_of(self, row: tuple[int, ...]) -> bytes:
        """The header of the array whose rows have this shape, which is noted."""
        header, shape = io.BytesIO(), (self.images, *row)
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        self._row, self._start = row, len(header.getvalue())
        return header.getvalue()

    def _bytes(self, images: int) -> int:
        """Of the file up to so many images."""
        return self._start + images * math.prod(self._row)

    def checkpoint(self) -> None:
        """Write down what is done."""
        if self._file is None:
            return
        self._file.truncate(self._bytes(self.done))
        flush_to_disk(self._file)
        failures = {id: reason for id, reason in self._source.failure_reasons.items() if id < self.done}
        about = self._about() | {"row": self._row, "failures": failures}
        self._checkpoints.write(
            {"about": np.frombuffer(json.dumps(about).encode(), np.uint8), "seen": self._seen[: self.done]}
        )

    def finish(self) -> None:
        """Make a whole pack of it."""
        self.done = self.images
        self.checkpoint()
        names = Names(os.fsencode(self._source.name(id)) for id in range(self.images))
        tables = {**names.arrays(), "seen": self._seen}
        pixels = np.load(self._part, mmap_mode="r", allow_pickle=False)
        about = {
            FORMAT_KEY: FORMAT,
            **self._about(),
            "shape": list(pixels.shape),
            "pixels": pixels_hash(pixels),
            "tables": tables_hash(tables),
            "failures": [asdict(failure) for failure in self._source.failures],
        }
        self._target.unlink(missing_ok=True)  # the pack that was there: its array and the new JSON are no pack
        with replacing(self._target.with_suffix(".npz")) as part:
            write_arrays(part, tables)
        with replacing(self._target.with_suffix(".json")) as path, open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps(about, indent=1) + "\n")
            flush_to_disk(file)
        os.replace(self._part, self._target)
        self._checkpoints.remove()


def _target(path: Path, overwrite: bool, resume: bool) -> Path:
    """The absolute path of a pack that can be written; asked before anything is read."""
    if overwrite and resume:
        raise UnitvisError("overwrite and resume exclude each other: start again, or go on")
    if path.suffix.lower() != ".npy":
        raise UnitvisError(f"{path} must end in .npy; a pack is an array")
    path = path.absolute()
    if not path.parent.is_dir():
        raise UnitvisError(f"there is no folder {path.parent} to write {path.name} into")
    known = read_about(path) is not None
    unfinished = _part(path).exists() or Checkpoints(_checkpoint(path)).exist
    for ending in (".npy", ".json") if unfinished else (".npy", ".json", ".npz"):
        if not known and (other := path.with_suffix(ending)).exists():
            raise UnitvisError(f"{other} is there and belongs to no pack, so it is not overwritten; give another path")
    if unfinished and not overwrite and not resume:
        raise UnitvisError(f"{path} is not finished; go on with it (--resume) or start again (--overwrite)")
    if path.exists() and not overwrite and not resume:
        raise UnitvisError(f"{path} holds a pack already; give another path, or overwrite it (--overwrite)")
    return path


def _part(target: Path) -> Path:
    """Where the pixels of a pack are until it is whole."""
    return target.with_name(f"{target.name}.part")


def _checkpoint(target: Path) -> Path:
    """Where the newest checkpoint of a pack is until it is whole."""
    return target.with_name(f"{target.name}.progress")


def _write_all(file: io.FileIO, data: memoryview) -> None:
    data = data.cast("B")
    while data:
        data = data[file.write(data) :]
