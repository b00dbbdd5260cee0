"""Sources of images from Python: a dataset, a DataLoader, any iterable of batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from unitvis.decoding.decode import to_rgb
from unitvis.errors import ImageError, UnitvisError
from unitvis.sources.arrays import as_pixels, picture_from_pixels, pixel_hash, resize_and_crop, size_of
from unitvis.sources.base import Chunks, ImageInfo, ItemSource, Picture, Source, require_transform
from unitvis.sources.entries import ImageEntry, is_batch
from unitvis.sources.transform import Transform

_HASHED_VALUES = 4096  # number of values of an image that are hashed, to notice a change when it is read again


class DatasetSource(ItemSource):
    """Images of a map-style dataset or any sequence; the image is the item, or one of its entries (see `ImageEntry`).

    A PIL image or uint8 [H, W, 3] is transformed; float [C, H, W] is taken as already normalised. Items are read by the
    caller's thread, as most datasets expect (a DataLoader has its own workers). An exception of the dataset is that
    image's failure; an image that differs when it is read again raises UnitvisError.
    """

    kind = "dataset"
    threads = False
    _changed_message = "is no longer the image that was scanned (a dataset must not augment at random)"

    def __init__(
        self, dataset: Any, transform: Transform | None, *, on_error: str = "skip", entry: str | int | None = None
    ) -> None:
        super().__init__(transform, len(dataset), on_error)
        self._dataset, self._given_entry = dataset, entry
        self._entry = ImageEntry(entry, ndim=3)

    def picture(self, id: int, value_range: tuple[float, float] = (0.0, 1.0)) -> Picture:
        """PIL image or uint8 array: the original; float: the model's input, see `Source.picture`."""
        with self._failure_as_error(id):
            image = self._image(self._checked_id(id))
            if isinstance(image, Image.Image):
                transform = require_transform(self.transform)
                return to_rgb(image), partial(transform.to_source, width=image.width, height=image.height)
        return picture_from_pixels(as_pixels(image, 3, self.name(id)), self.transform, value_range)

    def record(self, id: int) -> dict[str, Any]:
        """Identify the image: id, name, width, height, hash of its pixels after resize and crop."""
        with self._failure_as_error(id):
            pixels, info = self._load(self._checked_id(id))
        size = {"width": info.width, "height": info.height}
        return {"id": id, "name": self.name(id), **size, "hash": pixel_hash(pixels)}

    def describe(self) -> dict[str, Any]:
        """Describe the dataset: kind, class, number of images, the entry of its items that was given."""
        described = {"kind": self.kind, "path": None, "images": self.length, "class": type(self._dataset).__name__}
        return described if self._given_entry is None else described | {"entry": self._given_entry}

    def _hash(self, id: int) -> str:
        return pixel_hash(self._load(id)[0])

    def _load(self, id: int) -> tuple[Tensor, ImageInfo]:
        image = self._image(id)
        if isinstance(image, Image.Image):
            pixels, size = torch.from_numpy(require_transform(self.transform)(image)), image.size
        else:
            original = as_pixels(image, 3, f"{self.name(id)} of the {self.kind}")
            pixels, size = resize_and_crop(original[None], self.transform)[0], size_of(original)
        return pixels, ImageInfo(self._check_unchanged(id, _sample_hashes(pixels[None])[0]), *size)

    def _image(self, id: int) -> object:
        """Read the image of one item, not yet transformed; ImageError with what the dataset raised."""
        try:
            return self._entry(self._dataset[id])
        except UnitvisError:
            raise
        except Exception as error:  # a dataset may raise anything for one image
            raise ImageError(_error_in_one_line(error)) from error


class LoaderSource(DatasetSource):
    """Images of a DataLoader in its dataset's order: a full pass reads the loader, single ids read its dataset."""

    kind = "DataLoader"

    def __init__(
        self,
        loader: DataLoader[Any],
        transform: Transform | None,
        *,
        on_error: str = "skip",
        entry: str | int | None = None,
    ) -> None:
        super().__init__(loader.dataset, transform, on_error=on_error, entry=entry)
        self._loader, self._entry = loader, ImageEntry(entry, ndim=4)
        self._size: int = getattr(loader.batch_sampler, "batch_size", 1)

    def _image(self, id: int) -> object:
        try:
            return as_pixels(self._entry(self._loader.collate_fn([self._dataset[id]])), 4, "the batch")[0]
        except UnitvisError:
            raise
        except Exception as error:
            raise ImageError(_error_in_one_line(error)) from error

    def _chunks(self, ids: Iterable[int] | None, batch_size: int, workers: int) -> Chunks:
        if ids is not None:
            yield from super()._chunks(ids, batch_size, workers)
            return
        start, total = 0, len(self._dataset)
        for count, batch in enumerate(_read_in_order(self._loader, self.kind)):
            pixels = as_pixels(self._entry(batch), 4, f"batch {count} of the {self.kind}")
            stop = min(start + self._size, total)
            if len(pixels) != stop - start:
                raise UnitvisError(
                    f"the DataLoader gave {len(pixels)} images where it draws {stop - start}, from image {start} on; a "
                    "collate_fn that drops images shifts the ids of the others: give the dataset itself"
                )
            pixels = resize_and_crop(pixels, self.transform)
            width, height = size_of(pixels[0])
            for id, digest in zip(range(start, stop), _sample_hashes(pixels), strict=True):
                self._infos[id] = ImageInfo(self._check_unchanged(id, digest), width, height)
            yield range(start, stop), pixels
            start = stop
        if start < total:
            raise UnitvisError(f"the DataLoader ended after {start} of {total} images; give the dataset itself")


class StreamSource(Source):
    """Images of an iterable of batches, or of PIL images, which is read once: ids are ordinals.

    The batch or picture is what the iterable yields, or one of its entries (see `ImageEntry`).
    """

    kind = "stream"
    rereadable = False

    def __init__(
        self,
        batches: Iterable[Any],
        transform: Transform | None,
        *,
        on_error: str = "skip",
        entry: str | int | None = None,
    ) -> None:
        super().__init__(transform, None, on_error)
        self._stream: Iterable[Any] | None = batches
        self._batch_entry, self._image_entry = ImageEntry(entry, ndim=4), ImageEntry(entry, ndim=3)

    def read(self, id: int) -> Tensor:
        """Raise UnitvisError: a stream is read once."""
        raise self._read_once_error(id)

    def picture(self, id: int, value_range: tuple[float, float] = (0.0, 1.0)) -> Picture:
        """Raise UnitvisError: a stream is read once."""
        raise self._read_once_error(id)

    def record(self, id: int) -> dict[str, Any]:
        """Identify the image: id, name, width and height after resize and crop; hash is None."""
        if self._first_image is None:
            raise self._read_once_error(id)
        width, height = size_of(torch.empty(self._first_image[1], dtype=self._first_image[2], device="meta"))
        return {"id": id, "name": self.name(id), "width": width, "height": height, "hash": None}

    def check(self, record: Mapping[str, Any]) -> None:
        """Raise UnitvisError: a stream is read once."""
        raise self._read_once_error(record["id"])

    def describe(self) -> dict[str, Any]:
        """Describe the stream: kind, number of images (None before the end)."""
        return {"kind": self.kind, "path": None, "images": self.length}

    def _hash(self, id: int) -> str:
        raise self._read_once_error(id)

    def _read_once_error(self, id: int) -> UnitvisError:
        return UnitvisError(f"{self.name(id)} came from a stream, which is read once; give a folder, array or dataset")

    def _chunks(self, ids: Iterable[int] | None, batch_size: int, workers: int) -> Chunks:
        stream, self._stream = self._stream, None
        if stream is None:
            raise UnitvisError("the stream has been read; give a new one")
        start = 0
        for count, item in enumerate(_read_in_order(stream, self.kind)):
            try:
                pixels = self._pixels(item, f"batch {count} of the {self.kind}")
            except ImageError as error:
                self._note_failure(start, str(error))
                start += 1
                continue
            if len(pixels):
                yield range(start, start + len(pixels)), pixels
                start += len(pixels)
        self.length = start

    def _pixels(self, item: Any, what: str) -> Tensor:
        """Resized and cropped pixels of a batch, or of a picture as a batch of one; what: names it in messages."""
        if is_batch(item):
            return resize_and_crop(as_pixels(self._batch_entry(item), 4, what), self.transform)
        if isinstance(item, list) and sum(isinstance(one, Image.Image) for one in item) > 1:
            raise UnitvisError(f"{what} is a list of pictures; yield them one at a time, or as an array [N, H, W, 3]")
        image = self._image_entry(item)
        if isinstance(image, Image.Image):
            return torch.from_numpy(require_transform(self.transform)(image))[None]
        return as_pixels(image, 4, what)


def loader_source(
    loader: DataLoader[Any], transform: Transform | None, *, on_error: str = "skip", entry: str | int | None = None
) -> Source:
    """Open a DataLoader; UnitvisError if it shuffles, drops or repeats images."""
    dataset: Any = loader.dataset
    batching: Any = loader.batch_sampler
    iterable = isinstance(dataset, IterableDataset)
    sampler: Any = getattr(batching, "sampler", loader.sampler)
    odd = None
    if not iterable and type(sampler) is not SequentialSampler:
        odd = type(sampler).__name__
    elif type(batching) not in (BatchSampler, type(None)):
        odd = type(batching).__name__
    elif loader.num_workers and not getattr(loader, "in_order", True):
        odd = "in_order=False"
    if odd:
        raise UnitvisError(
            f"the DataLoader draws in an order of its own ({odd}), so ids would mean nothing; build it with "
            "shuffle=False and no sampler, or give its dataset"
        )
    if getattr(batching, "drop_last", False) and (iterable or len(dataset) % batching.batch_size):
        raise UnitvisError("the DataLoader drops its last images; build it with drop_last=False")
    if not iterable and len(sampler) != len(dataset):
        raise UnitvisError(f"the DataLoader draws {len(sampler)} of {len(dataset)} images; give it a Subset")
    kind = StreamSource if iterable or batching is None else LoaderSource
    return kind(loader, transform, on_error=on_error, entry=entry)


def _read_in_order(stream: Iterable[Any], kind: str) -> Iterator[Any]:
    """Yield what an iterable yields; UnitvisError with its number for whatever it raises."""
    count = 0
    items = iter(stream)
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except Exception as error:
            raise UnitvisError(f"the {kind} failed after {count} batches: {_error_in_one_line(error)}") from error
        yield item
        count += 1


def _sample_hashes(pixels: Tensor) -> list[bytes]:
    """Hash about 4,096 values of each image: a random crop, flip or change of colour gives another hash."""
    values = pixels.flatten(1)
    chosen = values[:, :: max(1, values.shape[1] // _HASHED_VALUES)].cpu().contiguous().numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in chosen]


def _error_in_one_line(error: BaseException) -> str:
    """Type and message of an exception in one line, also of one that a DataLoader's worker raised."""
    text = str(error)
    if text.startswith("Caught "):  # from a worker: "Caught ...", its traceback, then the message
        text = text.strip().splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
    return f"{type(error).__name__}: {' '.join(text.split())[:200]}" if text else type(error).__name__
