"""Base classes of all image sources: ids, full batches in a fixed order, bounded prefetch, list of failures.

A new kind of source subclasses `Source` or `ItemSource` (encoded files: `encoded.EncodedSource`) in a module of its
own, and `open_source` in `__init__.py` learns to recognise it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from unitvis.decoding.cutting import Cutter
from unitvis.decoding.geometry import Box
from unitvis.decoding.memory import available_memory
from unitvis.errors import ImageError, UnitvisError, whole_number
from unitvis.schema import MAX_BATCH_SIZE
from unitvis.sources.transform import Transform
from unitvis.state.partial import SEEN

Picture = tuple[Image.Image, Callable[[Box], Box]]  # and the map of a box in model-input pixels to pixels of that image
Chunks = Iterator[tuple[Sequence[int], Tensor]]  # ids and pixels of some images

_LARGE_BATCH = 2**28  # bytes of a batch for which it is looked whether there is memory
WORKERS_PER_CORE, MAX_WORKERS = 4, 64  # that may be asked for: so many a core, or so many where there are few cores

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def require_transform(transform: Transform | None) -> Transform:
    """Return the transform; UnitvisError if it is None, because pixels of 0..255 need one."""
    if transform is None:
        raise UnitvisError(
            "these images need a transform and the model names none: give transform=unitvis.Transform(resize=, crop=, "
            "mean=, std=) (on the command line --resize, --crop, --mean, --std); Transform() alone divides by 255"
        )
    return transform


@dataclass(frozen=True)
class Batch:
    """A batch of images; its tensors may be views of the user's array, so do not write into them."""

    ids: Tensor  # int64 [N], on the CPU
    pixels: Tensor  # uint8 [N, H, W, 3], for the transform to normalise, or float32 [N, C, H, W], already normalised


@dataclass(frozen=True)
class Failure:
    """An image that could not be used, with the reason."""

    id: int
    name: str
    reason: str


def same_name(one: str, other: str) -> bool:
    """Whether two names, each read under whatever locale, stand for the same bytes.

    Python gives bytes of a file's name that the locale does not know as surrogates: under C those of all but ASCII.
    """
    try:
        return one == other or one.encode("utf-8", "surrogateescape") == other.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # surrogates that stand for no byte
        return False


class Source(ABC):
    """Images with stable ids. `batches` reads them in order; the other methods read single images (if `rereadable`).

    The id of an image is its ordinal in the source. An image that cannot be used becomes a Failure (on_error="skip")
    or raises UnitvisError ("raise"); no other image gets its id. All images of a source have one size and dtype. Names
    are strings from `os.fsdecode`: bytes that are not UTF-8 become lone surrogates, which `json.dumps` writes with its
    default `ensure_ascii=True`; print them with `!r`.
    """

    rereadable = True  # False: a stream, which is read once and in one order
    threads = True  # True: several threads may read images at once
    separate_originals = False  # True: the files that `record` describes are not those that pixels are read from
    length: int | None  # number of images; None while it is unknown
    kind: str  # name of the kind of source, in messages and the manifest
    others: Mapping[str, int] = {}  # files beside the images that are not read: number by the ending of their names
    max_failures: int | None = None  # one more failure stops the scan; None: any number
    _changed_message = "is no longer the image that was scanned"  # follows the name of a changed image
    _remedy = "scan again"

    def __init__(self, transform: Transform | None, length: int | None, on_error: str) -> None:
        if on_error not in ("skip", "raise"):
            raise UnitvisError(f"on_error={on_error!r}; it must be 'skip' or 'raise'")
        if length == 0:
            raise UnitvisError(f"the {self.kind} holds no image")
        self.transform = transform
        self.length = length
        self.on_error = on_error
        self._reasons: dict[int, str] = {}
        self._first_image: tuple[int, tuple[int, ...], torch.dtype] | None = None  # id, shape, dtype

    def batches(
        self,
        batch_size: int,
        *,
        workers: int | None = None,
        ids: Iterable[int] | None = None,
        pinned: bool = False,
    ) -> Generator[Batch]:
        """Read all images in the order of their ids, or those of `ids` in that order, each once.

        Every batch but the last has `batch_size` images, even if some fail. Files and arrays are read by `workers`
        threads, or many image files by as many processes (None: one a core, 0: the caller's thread), about two batches
        ahead; results do not depend on it. pinned: gather images in pinned memory, which a GPU copies from while the
        host goes on; in ordinary memory where none can be had.
        """
        batch_size = whole_number("batch_size", batch_size, 1, MAX_BATCH_SIZE)
        if ids is not None and not self.rereadable:
            raise UnitvisError(f"the {self.kind} can be read once only, so no image can be asked for by its id")
        return self._batches(batch_size, checked_workers(workers), ids, pinned=pinned)

    @property
    def failures(self) -> list[Failure]:
        """Images that could not be used so far, sorted by id."""
        return [Failure(id, self.name(id), self._reasons[id]) for id in sorted(self._reasons)]

    @property
    def failure_reasons(self) -> dict[int, str]:
        """Reasons of the failures so far, by image id."""
        return dict(self._reasons)

    def add_failures(self, reasons: Mapping[int, str]) -> None:
        """Add the failures of an earlier part of the same scan, reasons by image id; UnitvisError as for new ones."""
        for id, reason in reasons.items():
            self._note_failure(id, reason)

    def files(self) -> Iterable[bytes]:
        """Paths of the image files, each of which is one image; none where images come from elsewhere."""
        return ()

    def name(self, id: int) -> str:
        """Name of the image in messages and the manifest."""
        return f"image {id}"

    @abstractmethod
    def read(self, id: int) -> Tensor:
        """Read one image, resized and cropped: uint8 [H, W, 3], or float32 [C, H, W] already normalised."""

    def is_readable(self, id: int) -> bool:
        """Whether an image can be read now."""
        try:
            self.read(id)
        except UnitvisError:
            return False
        return True

    @abstractmethod
    def picture(self, id: int, value_range: tuple[float, float] = (0.0, 1.0)) -> Picture:
        """Read the RGB image that patches are cut from, with the map of a box in model-input pixels to its pixels.

        Files, PIL images and uint8 arrays give the original image; the map undoes resize and crop. Normalised floats
        give the model's input: `mean` and `std` are undone if the transform has them, otherwise the values of
        `value_range` become black to white. Use one range for a whole sheet (the method `value_range` finds it).
        """

    @abstractmethod
    def record(self, id: int) -> dict[str, Any]:
        """Identify the image: id, name, width, height, hash (of the file that was read, or of the pixels)."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Describe the source for the manifest, with what `reopen_source` needs."""

    def cutter(self, input_size: tuple[int, int], *, grey: bool) -> Cutter | None:
        """What cuts patches from files in other processes; None where `picture` does not read files."""
        return None

    def place(self, id: int) -> Any:
        """Where the file of an image is, for a `Cutter` or `Contents.read`."""
        raise NotImplementedError(f"images of a {self.kind} are no files")

    def packed(self, id: int) -> NDArray[np.uint8] | None:
        """Pixels [H, W, 3] that the file of an image must give to a `Cutter`; None if it was not packed."""
        return None

    def check_name(self, record: Mapping[str, Any]) -> None:
        """Raise UnitvisError unless the image has the name and the id that `record` describes."""
        id, name = record["id"], record["name"]
        if self.length is None or not 0 <= id < self.length or not same_name(self.name(id), name):
            raise UnitvisError(
                f"{name!r} {self._changed_message}: image {id} is another one here; give the images of the scan, or "
                f"{self._remedy}"
            )

    def check(self, record: Mapping[str, Any]) -> None:
        """Raise UnitvisError unless the image is still the one that `record` describes."""
        self.check_name(record)
        changed = f"{record['name']!r} {self._changed_message}"
        try:
            same = self._hash(record["id"]) == record.get("hash")
        except ImageError as error:
            raise UnitvisError(f"{changed}: {error}") from error
        if not same:
            raise UnitvisError(f"{changed}: its content has changed; restore it, or {self._remedy}")

    def noted(self, ids: NDArray[np.int64]) -> NDArray[np.void]:
        """Digest and size, `state.partial.SEEN` [n], of those images that were read and are noted; nothing is read."""
        return np.zeros(0, SEEN)

    def note(self, seen: NDArray[np.void]) -> None:  # noqa: B027  a source that notes nothing takes nothing over
        """Take over what `noted` gave in another process: an image that is not the same raises when it is read."""

    def check_noted(self, ids: Iterable[int]) -> None:
        """Read images again, in threads; UnitvisError about the first one that is not as `note` was told."""
        workers = usable_cores() if self.threads else 0
        for id, result in map_in_order(self._read_noted, self._checked_ids(ids), workers, ahead=2 * workers):
            try:
                result()
            except ImageError as error:
                raise UnitvisError(f"{self.name(id)!r} {self._changed_message}: {error}") from error

    def value_range(self, ids: Iterable[int]) -> tuple[float, float]:
        """Smallest and largest finite value of these images if `picture` needs them, otherwise 0 and 1."""
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
        """Read images in order, any number at a time: their ids and their pixels."""

    @abstractmethod
    def _hash(self, id: int) -> str:
        """Hash of the image as it is now."""

    def _read_noted(self, id: int) -> object:
        """Read as much of an image as tells whether it is the one that was noted; UnitvisError if it is not."""
        return self.read(id)

    def _batches(self, batch_size: int, workers: int, ids: Iterable[int] | None, *, pinned: bool) -> Generator[Batch]:
        """Regroup the images of `_chunks` into batches; a chunk that is a whole batch is not copied."""
        found, filled = False, 0
        most = len(ids) if isinstance(ids, Sized) else self.length  # an id may be asked for again in a list
        if most:  # memory for more would stay unused
            batch_size = min(batch_size, most)
        for numbers, pixels in self._chunks(ids, batch_size, workers):
            self._check_same_size(numbers, pixels)
            found = True
            if not filled and len(numbers) == batch_size:
                yield Batch(torch.tensor(numbers, device="cpu"), pixels.contiguous())  # a crop may be a view
                continue
            done = 0
            while done < len(numbers):
                if not filled:
                    buffer = _room_for(batch_size, pixels, pinned=pinned)
                    order = torch.empty(batch_size, dtype=torch.int64, device="cpu")
                take = min(batch_size - filled, len(numbers) - done)
                _copy_pixels(buffer[filled : filled + take], pixels[done : done + take])
                order[filled : filled + take] = torch.tensor(numbers[done : done + take], device="cpu")
                done, filled = done + take, (filled + take) % batch_size
                if not filled:
                    yield Batch(order, buffer)
        if filled:
            yield Batch(order[:filled], buffer[:filled])
        if ids is None and not found:
            raise UnitvisError(f"no image of the {self.kind} could be read{self._first_failure()}")

    def _checked_ids(self, ids: Iterable[int] | None) -> Iterable[int]:
        """Check ids that were asked for; None gives all of them."""
        if ids is None:
            return range(self.length or 0)
        return (self._checked_id(id) for id in ids)

    def _checked_id(self, id: int) -> int:
        id = int(id)
        if self.length is None or not 0 <= id < self.length:
            raise UnitvisError(f"there is no image {id}; the {self.kind} has {self.length}")
        return id

    def _check_same_size(self, ids: Sequence[int], pixels: Tensor) -> None:
        shape = tuple(pixels.shape[1:])
        if self._first_image is None:
            self._first_image = ids[0], shape, pixels.dtype
        first, known, dtype = self._first_image
        if (shape, pixels.dtype) != (known, dtype):
            raise UnitvisError(
                f"{self.name(first)!r} gives {_describe_shape(known, dtype)}, {self.name(ids[0])!r} gives "
                f"{_describe_shape(shape, pixels.dtype)}; one size is needed: give the transform "
                "resize=(height, width), or resize and crop (--resize HxW, or --resize R and --crop S)"
            )

    def _note_failure(self, id: int, reason: str) -> None:
        """Record a failure; UnitvisError if on_error is "raise" or there are more than max_failures."""
        if self.on_error == "raise":
            raise UnitvisError(f"{self.name(id)!r} cannot be used: {reason}")
        self._reasons.setdefault(id, sys.intern(reason))  # one shared string for many equal reasons
        if self.max_failures is not None and len(self._reasons) > self.max_failures:
            raise UnitvisError(
                f"{len(self._reasons)} images could not be used, more than max_failures={self.max_failures}; the last "
                f"is {self.name(id)!r} ({reason})"
            )

    @contextmanager
    def _failure_as_error(self, id: int) -> Iterator[None]:
        """Raise an ImageError of the block as UnitvisError: the caller asked for this one image."""
        try:
            yield
        except ImageError as error:
            raise UnitvisError(f"{self.name(id)!r} cannot be used: {error}") from error

    def _first_failure(self) -> str:
        """End of a message: number of failures and the first one; empty if there is none."""
        if not self._reasons:
            return ""
        id = min(self._reasons)
        return f": {len(self._reasons)} failed, the first is {self.name(id)!r} ({self._reasons[id]})"


class ImageInfo(NamedTuple):
    """Hash and original size of an image, noted when it was read."""

    digest: bytes  # 16 bytes of BLAKE2b
    width: int
    height: int


class ImageInfoTable:
    """The ImageInfo of each image read so far, by id, in an unnamed temporary file: 24 bytes of disk an image."""

    ROW = np.dtype([("digest", "V16"), ("width", "<u4"), ("height", "<u4")])

    def __init__(self, length: int) -> None:
        size = length * self.ROW.itemsize
        try:
            with tempfile.TemporaryFile(prefix="unitvis-") as file:
                if hasattr(os, "posix_fallocate"):  # so that a full disk raises here and does not crash the scan later
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
                self._rows = np.asarray(np.memmap(file, self.ROW, "r+", shape=(length,)))
        except OSError as error:
            raise UnitvisError(
                f"{size} bytes are needed in {tempfile.gettempdir()!r}: {error.strerror}; set TMPDIR"
            ) from error

    @classmethod
    def of(cls, rows: NDArray[np.void]) -> ImageInfoTable:
        """Wrap rows noted earlier: dtype `ROW` [images], width 0 for an image that was not read."""
        table = cls.__new__(cls)
        table._rows = rows
        return table

    def __setitem__(self, id: int, info: ImageInfo) -> None:
        self._rows[id] = np.array((np.void(info.digest), info.width, info.height), self.ROW)

    def __getitem__(self, id: int) -> ImageInfo | None:
        row = self._rows[id]
        return ImageInfo(row["digest"].tobytes(), int(row["width"]), int(row["height"])) if row["width"] else None

    def note_new(self, ids: Sequence[int], read: NDArray[np.void]) -> bool:
        """Take over images that were just read, an array [n] with the fields of `ROW`.

        Returns False, and takes over none, if one was read before with another digest.
        """
        known = self._rows[ids]
        if ((known["width"] > 0) & (known["digest"] != read["digest"])).any():
            return False
        for name in self.ROW.names or ():
            self._rows[name][ids] = read[name]
        return True

    def noted(self, ids: NDArray[np.int64]) -> NDArray[np.void]:
        """`SEEN` [n] of those images that were read."""
        rows = self._rows[ids]
        read = rows["width"] > 0
        found = np.zeros(read.sum(), SEEN)
        found["id"] = ids[read]
        for name in self.ROW.names or ():
            found[name] = rows[name][read]
        return found

    def note(self, seen: NDArray[np.void]) -> None:
        """Take over `SEEN` [n], of images of this table."""
        for name in self.ROW.names or ():
            self._rows[name][seen["id"]] = seen[name]


class ItemSource(Source):
    """Source that reads images one at a time; each may fail alone, and must be unchanged when it is read again."""

    def __init__(
        self, transform: Transform | None, length: int, on_error: str, infos: ImageInfoTable | None = None
    ) -> None:
        super().__init__(transform, length, on_error)
        self._infos = ImageInfoTable(length) if infos is None else infos

    def read(self, id: int) -> Tensor:
        """Read one image: uint8 [H, W, 3], or float32 [C, H, W] already normalised."""
        with self._failure_as_error(id):
            return self._load(self._checked_id(id))[0]

    @abstractmethod
    def _load(self, id: int) -> tuple[Tensor, ImageInfo]:
        """Read one image, resized and cropped, with its info; ImageError if it cannot be used."""

    def _chunks(self, ids: Iterable[int] | None, batch_size: int, workers: int) -> Chunks:
        workers = workers if self.threads else 0
        for id, result in map_in_order(self._load, self._checked_ids(ids), workers, ahead=2 * batch_size):
            try:
                pixels, info = result()
            except ImageError as error:
                self._note_unusable(id, error)
            else:
                self._infos[id] = info
                yield [id], pixels[None]

    def noted(self, ids: NDArray[np.int64]) -> NDArray[np.void]:
        """Digest and size of those images that were read."""
        return self._infos.noted(ids)

    def note(self, seen: NDArray[np.void]) -> None:
        """Take over digests and sizes; UnitvisError for an image that there is not."""
        for id in seen["id"][[0, -1]].tolist() if len(seen) else ():  # they ascend
            self._checked_id(id)
        self._infos.note(seen)

    def _read_noted(self, id: int) -> object:
        return self._load(id)

    def _note_unusable(self, id: int, error: ImageError) -> None:
        """Record a failure; UnitvisError if the image could be used before."""
        if self._infos[id]:
            raise UnitvisError(f"{self.name(id)!r} {self._changed_message}: {error}") from error
        self._note_failure(id, str(error))

    def _check_unchanged(self, id: int, digest: bytes) -> bytes:
        """Return the digest; UnitvisError if the image was read before with another one."""
        info = self._infos[id]
        if info and info.digest != digest:
            raise UnitvisError(
                f"{self.name(id)!r} {self._changed_message}: read again, it differs; restore it, or {self._remedy}"
            )
        return digest


def map_in_order(
    function: Callable[[_Item], _Result], items: Iterable[_Item], workers: int, ahead: int
) -> Iterator[tuple[_Item, Callable[[], _Result]]]:
    """Apply a function to items in threads, and yield (item, a call that waits for its result) in the items' order.

    workers: number of threads; 0 computes in the caller's, when the call is made. ahead: items computed in advance.
    """
    if workers < 1:
        for item in items:
            yield item, partial(function, item)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="unitvis-read")
    try:
        waiting = deque[tuple[_Item, Callable[[], _Result]]]()
        for item in items:
            waiting.append((item, pool.submit(function, item).result))
            if len(waiting) > ahead:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def id_groups(ids: Iterable[int], size: int) -> Iterator[list[int]]:
    """Split ids into lists of `size`; the last one may be shorter."""
    remaining = iter(ids)
    while group := list(islice(remaining, size)):
        yield group


def _room_for(images: int, like: Tensor, *, pinned: bool) -> Tensor:
    """An uninitialised batch of so many images like these; UnitvisError where memory does not hold it.

    pinned: in pinned memory if it can be had. PyTorch gives that of a batch which was dropped to nobody else before the
    copies from it have ended.
    """
    shape = (images, *like.shape[1:])
    need = images * like[0].numel() * like.element_size()
    too_large = (
        f"a batch of {images:,} images takes {need / 2**30:,.0f} GiB, which cannot be had; give a smaller batch size"
    )
    if (
        like.device.type == "cpu" and need > _LARGE_BATCH and need > available_memory()
    ):  # Linux would grant it, and kill whoever fills it
        raise UnitvisError(too_large)
    if pinned and like.device.type == "cpu":
        with suppress(RuntimeError):  # there is no GPU, or the system pins no more
            return torch.empty(shape, dtype=like.dtype, device="cpu", pin_memory=True)
    try:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    except RuntimeError as error:
        raise UnitvisError(too_large) from error


def _copy_pixels(to: Tensor, pixels: Tensor) -> None:
    """Copy pixels into a tensor of the same shape, in place."""
    if to.device.type == "cpu":  # torch would start all its threads for each image, which is slower than the copy
        np.copyto(to.numpy(), pixels.numpy())
    else:
        to.copy_(pixels)


def _describe_shape(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """Size of an image in words: "W x H pixels" for uint8, dtype and shape for floats."""
    return f"{shape[1]} x {shape[0]} pixels" if dtype == torch.uint8 else f"{dtype} {list(shape)}"


def usable_cores() -> int:
    """Number of cores that this process may run on; under torchrun, its share of those of the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    sharing = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, cores // int(sharing)) if sharing.isdecimal() and int(sharing) else cores


def checked_workers(workers: int | None) -> int:
    """The number of workers that was asked for, None for one a core; UnitvisError for what is none, or too many."""
    cores = usable_cores()
    return cores if workers is None else whole_number("workers", workers, 0, max(MAX_WORKERS, WORKERS_PER_CORE * cores))
