"""What all sources share: ids, full batches in a fixed order, bounded prefetch, the list of failures."""

from __future__ import annotations

import os
import sys
import tempfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from unitvis.errors import ImageError, UnitvisError
from unitvis.sources.transform import Box, Transform

Picture = tuple[Image.Image, Callable[[Box], Box]]  # and where a box of the model's pixels lies in it
Chunks = Iterator[tuple[Sequence[int], Tensor]]  # ids and pixels of some images

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


def needed(transform: Transform | None) -> Transform:
    """The transform that pixels of 0..255 cannot do without."""
    if transform is None:
        raise UnitvisError(
            "these images need a transform and the model names none: give transform=unitvis.Transform(resize=, crop=, "
            "mean=, std=) (on the command line --resize, --crop, --mean, --std); Transform() alone divides by 255"
        )
    return transform


@dataclass(frozen=True)
class Batch:
    """Some images as they were read; the tensors may be views of the caller's, so do not write into them."""

    ids: Tensor  # int64 [N], on the CPU
    pixels: Tensor  # uint8 [N, H, W, 3], for the transform to normalise, or float32 [N, C, H, W], already normalised


@dataclass(frozen=True)
class Failure:
    """An image that could not be used, and why."""

    id: int
    name: str
    reason: str


class Source(ABC):
    """Images with stable ids. `batches` reads them; the other methods look at single ones (if `rereadable`).

    An id is the image's ordinal in the source. An image that cannot be used becomes a Failure (`on_error="skip"`) or
    raises UnitvisError (`"raise"`); nothing takes its place. All images of a source have one size and type. Names are
    strings as `os.fsdecode` makes them: bytes that are no UTF-8 are lone surrogates, which survive `json.dumps` with
    its default `ensure_ascii=True`; print them with `!r`.
    """

    rereadable = True  # False: a stream, which is read once and in one order
    apart = False  # True: pixels are not read from what the records describe, which may have changed unseen
    length: int | None  # number of images, None where only the end will tell
    kind: str  # what messages and the manifest call it
    max_failures: int | None = None  # one more stops the scan; None: any number
    _changed = "is no longer the image that was scanned"
    _again = "scan again"  # what mends that

    def __init__(self, transform: Transform | None, length: int | None, on_error: str) -> None:
        if on_error not in ("skip", "raise"):
            raise UnitvisError(f"on_error={on_error!r}; it must be 'skip' or 'raise'")
        if length == 0:
            raise UnitvisError(f"the {self.kind} holds no image")
        self.transform = transform
        self.length = length
        self.on_error = on_error
        self._reasons: dict[int, str] = {}
        self._first: tuple[int, tuple[int, ...], torch.dtype] | None = None  # the image that all others must match

    def batches(
        self, batch_size: int, *, workers: int | None = None, ids: Iterable[int] | None = None
    ) -> Generator[Batch]:
        """All images in the order of their ids, or those of `ids` in that order, each once.

        Every batch but the last has `batch_size` images, whatever failed. Files and arrays are read by `workers`
        threads (None: one a core, 0: the caller's), at most two batches ahead; their number changes nothing else.
        """
        if batch_size < 1:
            raise UnitvisError(f"batch_size={batch_size}; at least 1 is needed")
        if ids is not None and not self.rereadable:
            raise UnitvisError(f"the {self.kind} can be read once only, so no image can be asked for by its id")
        return self._batches(batch_size, _cores() if workers is None else workers, ids)

    @property
    def failures(self) -> list[Failure]:
        """What could not be used so far, by id; kept as one number and one shared string each."""
        return [Failure(id, self.name(id), self._reasons[id]) for id in sorted(self._reasons)]

    @property
    def reasons(self) -> dict[int, str]:
        """Why each image that could not be used so far could not, by id."""
        return dict(self._reasons)

    def take_failures(self, reasons: Mapping[int, str]) -> None:
        """Count what an earlier part of the same scan could not use."""
        self._reasons.update((id, sys.intern(reason)) for id, reason in reasons.items())

    def name(self, id: int) -> str:
        """What messages and the manifest call the image."""
        return f"image {id}"

    @abstractmethod
    def read(self, id: int) -> Tensor:
        """One image as the model gets it: uint8 [H, W, 3], or float32 [C, H, W] already normalised."""

    @abstractmethod
    def picture(self, id: int, value_range: tuple[float, float] = (0.0, 1.0)) -> Picture:
        """What patches are cut from: an RGB image, and the map of a box in model-input pixels to that image's pixels.

        Files, PIL images and uint8 arrays give the original, with resize and crop undone by the map. Of normalised
        floats the model's input is shown: `mean` and `std` undone where the transform has them, otherwise
        `value_range` from black to white, one range for a whole sheet (`value_range(ids)` finds it).
        """

    @abstractmethod
    def record(self, id: int) -> dict[str, Any]:
        """What identifies the image: id, name, width, height, hash (of the file that was read, or of the pixels)."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The source, for the manifest."""

    def check(self, record: Mapping[str, Any]) -> None:
        """UnitvisError unless the image is still the one that `record` describes."""
        id, name = record["id"], record["name"]
        changed = f"{name!r} {self._changed}"
        if self.length is None or not 0 <= id < self.length or self.name(id) != name:
            raise UnitvisError(
                f"{changed}: image {id} is another one here; give the images of the scan, or {self._again}"
            )
        try:
            same = self._hash(id) == record["hash"]
        except ImageError as error:
            raise UnitvisError(f"{changed}: {error}") from error
        if not same:
            raise UnitvisError(f"{changed}: its content has changed; restore it, or {self._again}")

    def value_range(self, ids: Iterable[int]) -> tuple[float, float]:
        """The smallest and the largest finite value of these images where `picture` needs them, else 0 and 1."""
        low, high = float("inf"), float("-inf")
        for id in ids if self.transform is None or self.transform.mean is self.transform.std is None else ():
            values = self.read(id)
            if values.dtype == torch.uint8:
                break
            values = values[values.isfinite()]
            if len(values):
                low, high = min(low, float(values.min())), max(high, float(values.max()))
        return (low, high) if low < high else (0.0, 1.0)

    @abstractmethod
    def _chunks(self, ids: Iterable[int] | None, batch_size: int, workers: int) -> Chunks:
        """Images in order, any number at a time: their ids and their pixels."""

    @abstractmethod
    def _hash(self, id: int) -> str:
        """Of the image as it is now."""

    def _batches(self, batch_size: int, workers: int, ids: Iterable[int] | None) -> Generator[Batch]:
        found, filled = False, 0
        for numbers, pixels in self._chunks(ids, batch_size, workers):
            self._same_size(numbers, pixels)
            found = True
            if not filled and len(numbers) == batch_size:
                yield Batch(torch.tensor(numbers, device="cpu"), pixels)
                continue
            done = 0
            while done < len(numbers):
                if not filled:
                    buffer = torch.empty((batch_size, *pixels.shape[1:]), dtype=pixels.dtype, device=pixels.device)
                    order = torch.empty(batch_size, dtype=torch.int64, device="cpu")
                take = min(batch_size - filled, len(numbers) - done)
                _copy(buffer[filled : filled + take], pixels[done : done + take])
                order[filled : filled + take] = torch.tensor(numbers[done : done + take], device="cpu")
                done, filled = done + take, (filled + take) % batch_size
                if not filled:
                    yield Batch(order, buffer)
        if filled:
            yield Batch(order[:filled], buffer[:filled])
        if ids is None and not found:
            raise UnitvisError(f"no image of the {self.kind} could be read{self._for_instance()}")

    def _ids(self, ids: Iterable[int] | None) -> Iterable[int]:
        if ids is None:
            return range(self.length or 0)
        return (self._valid(id) for id in ids)

    def _valid(self, id: int) -> int:
        id = int(id)
        if self.length is None or not 0 <= id < self.length:
            raise UnitvisError(f"there is no image {id}; the {self.kind} has {self.length}")
        return id

    def _same_size(self, ids: Sequence[int], pixels: Tensor) -> None:
        shape = tuple(pixels.shape[1:])
        if self._first is None:
            self._first = ids[0], shape, pixels.dtype
        first, known, dtype = self._first
        if (shape, pixels.dtype) != (known, dtype):
            raise UnitvisError(
                f"{self.name(first)!r} gives {_shape(known, dtype)}, {self.name(ids[0])!r} gives "
                f"{_shape(shape, pixels.dtype)}; one size is needed: give the transform "
                "resize=(height, width), or resize and crop (--resize HxW, or --resize R and --crop S)"
            )

    def _fail(self, id: int, reason: str) -> None:
        if self.on_error == "raise":
            raise UnitvisError(f"{self.name(id)!r} cannot be used: {reason}")
        self._reasons.setdefault(id, sys.intern(reason))
        if self.max_failures is not None and len(self._reasons) > self.max_failures:
            raise UnitvisError(
                f"{len(self._reasons)} images could not be used, more than max_failures={self.max_failures}; the last "
                f"is {self.name(id)!r} ({reason})"
            )

    @contextmanager
    def _named(self, id: int) -> Iterator[None]:
        """One image alone: its failure is the caller's error."""
        try:
            yield
        except ImageError as error:
            raise UnitvisError(f"{self.name(id)!r} cannot be used: {error}") from error

    def _for_instance(self) -> str:
        if not self._reasons:
            return ""
        id = min(self._reasons)
        return f": {len(self._reasons)} failed, the first is {self.name(id)!r} ({self._reasons[id]})"


class Seen(NamedTuple):
    """What was noted of an image when it was read."""

    digest: bytes
    width: int
    height: int


class SeenTable:
    """A Seen for each id read, in an unnamed temporary file: a million images cost 24 MB of disk and no memory."""

    ROW = np.dtype([("digest", "V16"), ("width", "<u4"), ("height", "<u4")])

    def __init__(self, length: int) -> None:
        size = length * self.ROW.itemsize
        try:
            with tempfile.TemporaryFile(prefix="unitvis-") as file:
                if hasattr(os, "posix_fallocate"):  # a full disk is an error now instead of a crash in the middle
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
                self._rows = np.asarray(np.memmap(file, self.ROW, "r+", shape=(length,)))
        except OSError as error:
            raise UnitvisError(
                f"{size} bytes are needed in {tempfile.gettempdir()!r}: {error.strerror}; set TMPDIR"
            ) from error

    @classmethod
    def of(cls, rows: NDArray[np.void]) -> SeenTable:
        """A table of what was noted before; rows: `ROW` [length], width 0 where nothing was."""
        table = cls.__new__(cls)
        table._rows = rows
        return table

    def __setitem__(self, id: int, seen: Seen) -> None:
        self._rows[id] = np.array((np.void(seen.digest), seen.width, seen.height), self.ROW)

    def __getitem__(self, id: int) -> Seen | None:
        row = self._rows[id]
        return Seen(row["digest"].tobytes(), int(row["width"]), int(row["height"])) if row["width"] else None


class ItemSource(Source):
    """Images that are read one at a time, each alone able to fail; what is read again must be what it was."""

    threads = True  # whether several images may be read at once

    def __init__(self, transform: Transform | None, length: int, on_error: str, seen: SeenTable | None = None) -> None:
        super().__init__(transform, length, on_error)
        self._seen = SeenTable(length) if seen is None else seen

    def read(self, id: int) -> Tensor:
        """uint8 [H, W, 3], or float32 [C, H, W] already normalised."""
        with self._named(id):
            return self._load(self._valid(id))[0]

    @abstractmethod
    def _load(self, id: int) -> tuple[Tensor, Seen]:
        """One image as the model gets it; ImageError if it cannot be used."""

    def _chunks(self, ids: Iterable[int] | None, batch_size: int, workers: int) -> Chunks:
        for id, result in in_order(self._load, self._ids(ids), workers if self.threads else 0, ahead=2 * batch_size):
            try:
                pixels, seen = result()
            except ImageError as error:
                if self._seen[id]:
                    raise UnitvisError(f"{self.name(id)!r} {self._changed}: {error}") from error
                self._fail(id, str(error))
            else:
                self._seen[id] = seen
                yield [id], pixels[None]

    def _unchanged(self, id: int, digest: bytes) -> bytes:
        seen = self._seen[id]
        if seen and seen.digest != digest:
            raise UnitvisError(f"{self.name(id)!r} {self._changed}: read again, it differs")
        return digest


def in_order(
    job: Callable[[_Job], _Result], todo: Iterable[_Job], workers: int, ahead: int
) -> Iterator[tuple[_Job, Callable[[], _Result]]]:
    """Each of `todo` with a call that waits for what `job` made of it, in order, at most `ahead` done in advance."""
    if workers < 1:
        for one in todo:
            yield one, partial(job, one)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="unitvis-read")
    try:
        waiting = deque[tuple[_Job, Callable[[], _Result]]]()
        for one in todo:
            waiting.append((one, pool.submit(job, one).result))
            if len(waiting) > ahead:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def grouped(ids: Iterable[int], size: int) -> Iterator[list[int]]:
    """Lists of `size` ids, the last one shorter."""
    left = iter(ids)
    while group := list(islice(left, size)):
        yield group


def _copy(to: Tensor, pixels: Tensor) -> None:
    if to.device.type == "cpu":  # torch would wake all its threads for every image, which takes longer than the copy
        np.copyto(to.numpy(), pixels.numpy())
    else:
        to.copy_(pixels)


def _shape(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{shape[1]} x {shape[0]} pixels" if dtype == torch.uint8 else f"{dtype} {list(shape)}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
