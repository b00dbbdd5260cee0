"""Base class of sources of encoded image files: their bytes are hashed, then decoded from memory."""

from __future__ import annotations

import os
import threading
import warnings
from abc import abstractmethod
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unitvis.decoding.board import BROKEN, ERROR, JOB_IMAGES, OTHER_SIZE, READ, UNUSABLE
from unitvis.decoding.contents import Contents, digest
from unitvis.decoding.cutting import Cutter
from unitvis.decoding.decode import changed_globals
from unitvis.decoding.options import Decoding
from unitvis.decoding.pool import Done, Pool, PoolError
from unitvis.decoding.processes import may_start
from unitvis.errors import ImageError, UnitvisError
from unitvis.sources.base import Chunks, ImageInfo, ImageInfoTable, ItemSource, Picture, id_groups, require_transform
from unitvis.sources.names import Names
from unitvis.sources.transform import Transform

MIN_IMAGES = 256  # fewer are read by threads before processes have started


class EncodedSource(ItemSource):
    """Named image files; a pass over them reads each file once, hashes its bytes and decodes them from memory.

    contents: reads them. others: number of files beside them that are not read, by the ending of their names. endings:
    those that the user chose for images. infos: hashes and sizes that the files must have; None: they are noted as the
    files are read.
    """

    _changed_message = "is no longer the file that was scanned"

    def __init__(
        self,
        kind: str,
        names: Names,
        contents: Contents,
        transform: Transform | None,
        *,
        on_error: str = "skip",
        decoding: Decoding | None = None,
        others: Mapping[str, int] | None = None,
        endings: Sequence[str] | None = None,
        infos: ImageInfoTable | None = None,
    ) -> None:
        self.kind, self.others, self._endings = kind, others or {}, endings
        super().__init__(transform, len(names), on_error, infos)
        self._transform, self._decoding = require_transform(transform), decoding or Decoding()
        self._names, self._contents = names, contents
        self._may_decode = threading.Event()
        self._may_decode.set()
        self._pools: set[Pool] = set()

    @property
    def other_files(self) -> int:
        """Number of files beside the images that are not read."""
        return sum(self.others.values())

    @contextmanager
    def pause_decoding(self) -> Iterator[None]:
        """Start no decoding while the block runs, so that the cores are free to compute; files are still read."""
        self._may_decode.clear()
        for pool in self._pools:
            pool.pause()
        try:
            yield
        finally:
            for pool in self._pools:
                pool.go_on()
            self._may_decode.set()

    def name(self, id: int) -> str:
        """Path of the file, relative to the source."""
        return os.fsdecode(self._names[id])

    def picture(self, id: int, value_range: tuple[float, float] = (0.0, 1.0)) -> Picture:
        """Decode the original image, upright; see `Source.picture`."""
        with self._failure_as_error(id):
            image = self._decoding.picture(self._checked_contents(self._checked_id(id))[0])
        return image, partial(self._transform.to_source, width=image.width, height=image.height)

    def cutter(self, input_size: tuple[int, int], *, grey: bool) -> Cutter:
        """What cuts patches from the files in other processes."""
        return Cutter(self._contents, self._decoding, self._transform.geometry, input_size, grey)

    def check_pixels(self, id: int, pixels: NDArray[np.uint8]) -> None:
        """Raise UnitvisError unless the file gives these pixels, resized and cropped; see `Decoding.check`."""
        with self._failure_as_error(id):
            self._decoding.check(self._checked_contents(self._checked_id(id))[0], self._transform, pixels)

    @abstractmethod
    def place(self, id: int) -> Any:
        """Where the file of an image is, as `Contents.read` takes it."""

    def record(self, id: int) -> dict[str, Any]:
        """Identify the image: id, name, width and height (upright), hash of the file's bytes."""
        info = self._infos[self._checked_id(id)]
        if info is None:
            with self._failure_as_error(id):
                info = self._load(id)[1]
        size = {"width": info.width, "height": info.height}
        return {"id": id, "name": self.name(id), **size, "hash": info.digest.hex()}

    def describe(self) -> dict[str, Any]:
        """Describe the files: kind, path, number of images and of others, hash of the names, options for reading."""
        described: dict[str, Any] = {"kind": self.kind, "path": self._origin(), "images": self.length}
        described |= {"names": self._names.hash(), "others": self.other_files, "decoding": self._decoding.to_json()}
        if changed := changed_globals():
            described["pillow"] = changed
        if self._endings is not None:
            described["images_ending"] = list(self._endings)
        return described

    @abstractmethod
    def _origin(self) -> str | list[str] | None:
        """Path or paths that open the source again; None if there is none."""

    def _hash(self, id: int) -> str:
        return digest(self._contents.read(self.place(id))).hex()

    def _read_noted(self, id: int) -> object:
        return self._checked_contents(id)

    def _load(self, id: int) -> tuple[Tensor, ImageInfo]:
        data, hashed = self._checked_contents(id)
        self._may_decode.wait()
        pixels, size = self._decoding.pixels(data, self._transform)
        return torch.from_numpy(pixels), ImageInfo(hashed, *size)

    def _checked_contents(self, id: int) -> tuple[bytes, bytes]:
        """Read the file's bytes and their hash; UnitvisError if the file changed since it was read before."""
        data = self._contents.read(self.place(id))
        return data, self._check_unchanged(id, digest(data))

    def _chunks(self, ids: Iterable[int] | None, batch_size: int, workers: int) -> Chunks:
        """Read images in worker processes, or in threads where there are few, or where there can be no processes."""
        left = iter(self._checked_ids(ids))
        first = list(islice(left, MIN_IMAGES))
        left = chain(first, left)
        if workers > 0 and len(first) == MIN_IMAGES and type(self._transform) is Transform and may_start():
            for numbers, pixels in super()._chunks(left, batch_size, 0):  # until one image has told its size
                yield numbers, pixels
                left = yield from self._chunks_of_processes(left, pixels, batch_size, workers)
                break
        yield from super()._chunks(left, batch_size, workers)

    def _chunks_of_processes(
        self, ids: Iterator[int], pixels: Tensor, batch_size: int, workers: int
    ) -> Generator[tuple[Sequence[int], Tensor], None, Iterator[int]]:
        """Read images in processes; return the ids that are left where there can be none. pixels: of one image."""
        under_way = deque[list[int]]()
        size = (pixels.shape[1], pixels.shape[2])
        reading = self._contents, self._decoding, self._transform.geometry, size
        try:
            with (
                Pool(*reading, workers=workers, ahead=2 * batch_size, images=self.length or 0) as pool,
                self._pausing(pool),
            ):
                for numbers in id_groups(ids, JOB_IMAGES):
                    under_way.append(numbers)
                    pool.issue([self.place(id) for id in numbers])
                    while pool.full:
                        yield from self._received(under_way[0], pool.receive(), batch_size)
                        under_way.popleft()
                while under_way:
                    yield from self._received(under_way[0], pool.receive(), batch_size)
                    under_way.popleft()
        except PoolError as error:
            warnings.warn(f"images are decoded in threads, since worker processes cannot be had: {error}")
        return chain(*under_way, ids)

    @contextmanager
    def _pausing(self, pool: Pool) -> Iterator[None]:
        """Let `pause_decoding` reach a pool while the block runs."""
        self._pools.add(pool)
        try:
            yield
        finally:
            self._pools.discard(pool)

    def _received(self, ids: list[int], done: Done, batch_size: int) -> Chunks:
        """Note what a job of a pool found out about its images, and yield those that have pixels."""
        pixels = torch.from_numpy(done.pixels)
        if (done.records["state"] == READ).all() and self._infos.note_new(ids, done.records):
            # A chunk that is a batch goes to the caller as it is, and the next job overwrites this memory.
            yield ids, pixels if len(ids) < batch_size else pixels.clone()
            return
        for id, record, one in zip(ids, done.records, pixels, strict=True):
            try:
                self._infos[id] = self._info_of(id, record)
            except ImageError as error:
                self._note_unusable(id, error)
            else:
                yield [id], one[None].clone()

    def _info_of(self, id: int, record: np.void) -> ImageInfo:
        """What a worker has written about an image; raises what it raised there."""
        state, reason = record["state"], record["reason"].decode("utf-8", "replace")
        if state == UNUSABLE:
            raise ImageError(reason)
        if state == ERROR:
            raise UnitvisError(reason)
        if state == BROKEN:
            raise RuntimeError(f"reading {self.name(id)!r} failed: {reason}")
        width, height = int(record["width"]), int(record["height"])
        if state == OTHER_SIZE:
            self._check_same_size([id], torch.empty((1, height, width, 3), dtype=torch.uint8, device="cpu"))
        return ImageInfo(self._check_unchanged(id, record["digest"].tobytes()), width, height)
