"""Images from Python: a dataset, a DataLoader, any iterable of batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from unitvis.errors import ImageError, UnitvisError
from unitvis.sources.arrays import as_pixels, fitted, pixel_hash, shown, size_of
from unitvis.sources.base import Chunks, ItemSource, Picture, Seen, Source, needed
from unitvis.sources.decode import to_rgb
from unitvis.sources.transform import Transform

_SAMPLES = 4096  # values of an image that are compared when it is read again


class DatasetSource(ItemSource):
    """A map-style dataset, or any sequence: of each item the image, which is the item or its first entry.

    A PIL image or uint8 [H, W, 3] goes through the transform; float [C, H, W] is taken as already normalised. Items are
    read by the caller's thread, as most datasets expect (a DataLoader brings workers of its own). What the dataset
    raises is that image's failure; an image that comes out different when it is read again stops the scan.
    """

    kind = "dataset"
    threads = False
    _changed = "is no longer the image that was scanned (a dataset must not augment at random)"

    def __init__(self, dataset: Any, transform: Transform | None, *, on_error: str = "skip") -> None:
        super().__init__(transform, len(dataset), on_error)
        self._dataset = dataset

    def picture(self, id: int, value_range: tuple[float, float] = (0.0, 1.0)) -> Picture:
        """The dataset's PIL image or uint8 array; of floats the model's input."""
        with self._named(id):
            image = self._image(self._valid(id))
            if isinstance(image, Image.Image):
                return to_rgb(image), partial(needed(self.transform).to_source, width=image.width, height=image.height)
        return shown(as_pixels(image, 3, self.name(id)), self.transform, value_range)

    def record(self, id: int) -> dict[str, Any]:
        """id, name, width, height, hash of the pixels that the model gets."""
        with self._named(id):
            pixels, seen = self._load(self._valid(id))
        size = {"width": seen.width, "height": seen.height}
        return {"id": id, "name": self.name(id), **size, "hash": pixel_hash(pixels)}

    def describe(self) -> dict[str, Any]:
        """Kind, class of the dataset, number of images."""
        return {"kind": self.kind, "path": None, "images": self.length, "class": type(self._dataset).__name__}

    def _hash(self, id: int) -> str:
        return pixel_hash(self._load(id)[0])

    def _load(self, id: int) -> tuple[Tensor, Seen]:
        image = self._image(id)
        if isinstance(image, Image.Image):
            pixels, size = torch.from_numpy(needed(self.transform)(image)), image.size
        else:
            original = as_pixels(image, 3, f"{self.name(id)} of the {self.kind}")
            pixels, size = fitted(original[None], self.transform)[0], size_of(original)
        return pixels, Seen(self._unchanged(id, _samples(pixels[None])[0]), *size)

    def _image(self, id: int) -> object:
        try:
            return first_of(self._dataset[id])
        except UnitvisError:
            raise
        except Exception as error:  # whatever a dataset raises for one image
            raise ImageError(_one_line(error)) from error


class LoaderSource(DatasetSource):
    """A DataLoader that keeps the order of its map-style dataset: read whole through it, by id through its dataset."""

    kind = "DataLoader"

    def __init__(self, loader: DataLoader[Any], transform: Transform | None, *, on_error: str = "skip") -> None:
        super().__init__(loader.dataset, transform, on_error=on_error)
        self._loader = loader
        self._size: int = getattr(loader.batch_sampler, "batch_size", 1)

    def _image(self, id: int) -> object:
        try:
            return as_pixels(first_of(self._loader.collate_fn([self._dataset[id]])), 4, "the batch")[0]
        except UnitvisError:
            raise
        except Exception as error:
            raise ImageError(_one_line(error)) from error

    def _chunks(self, ids: Iterable[int] | None, batch_size: int, workers: int) -> Chunks:
        if ids is not None:
            yield from super()._chunks(ids, batch_size, workers)
            return
        start, total = 0, len(self._dataset)
        for pixels in _read(self._loader, self.kind):
            stop = min(start + self._size, total)
            if len(pixels) != stop - start:
                raise UnitvisError(
                    f"the DataLoader gave {len(pixels)} images where it draws {stop - start}, from image {start} on; a "
                    "collate_fn that drops images shifts the ids of the others: give the dataset itself"
                )
            pixels = fitted(pixels, self.transform)
            width, height = size_of(pixels[0])
            for id, digest in zip(range(start, stop), _samples(pixels), strict=True):
                self._seen[id] = Seen(self._unchanged(id, digest), width, height)
            yield range(start, stop), pixels
            start = stop
        if start < total:
            raise UnitvisError(f"the DataLoader ended after {start} of {total} images; give the dataset itself")


class StreamSource(Source):
    """An iterable of batches, read once: ids are ordinals, and no image can be looked at again."""

    kind = "stream"
    rereadable = False

    def __init__(self, batches: Iterable[Any], transform: Transform | None, *, on_error: str = "skip") -> None:
        super().__init__(transform, None, on_error)
        self._stream: Iterable[Any] | None = batches

    def read(self, id: int) -> Tensor:
        """UnitvisError."""
        raise self._gone(id)

    def picture(self, id: int, value_range: tuple[float, float] = (0.0, 1.0)) -> Picture:
        """UnitvisError."""
        raise self._gone(id)

    def record(self, id: int) -> dict[str, Any]:
        """id, name, width and height as the model gets it; hash is None."""
        if self._first is None:
            raise self._gone(id)
        width, height = size_of(torch.empty(self._first[1], dtype=self._first[2], device="meta"))
        return {"id": id, "name": self.name(id), "width": width, "height": height, "hash": None}

    def check(self, record: Mapping[str, Any]) -> None:
        """UnitvisError."""
        raise self._gone(record["id"])

    def describe(self) -> dict[str, Any]:
        """Kind, number of images (None before the end)."""
        return {"kind": self.kind, "path": None, "images": self.length}

    def _hash(self, id: int) -> str:
        raise self._gone(id)

    def _gone(self, id: int) -> UnitvisError:
        return UnitvisError(f"{self.name(id)} came from a stream, which is read once; give a folder, array or dataset")

    def _chunks(self, ids: Iterable[int] | None, batch_size: int, workers: int) -> Chunks:
        stream, self._stream = self._stream, None
        if stream is None:
            raise UnitvisError("the stream has been read; give a new one")
        start = 0
        for pixels in _read(stream, self.kind):
            if len(pixels):
                yield range(start, start + len(pixels)), fitted(pixels, self.transform)
                start += len(pixels)
        self.length = start


def loader_source(loader: DataLoader[Any], transform: Transform | None, *, on_error: str = "skip") -> Source:
    """The source over a DataLoader; refused where it would shuffle images or lose some."""
    dataset: Any = loader.dataset
    batching: Any = loader.batch_sampler
    iterable = isinstance(dataset, IterableDataset)
    drawing: Any = getattr(batching, "sampler", loader.sampler)
    odd = None
    if not iterable and type(drawing) is not SequentialSampler:
        odd = type(drawing).__name__
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
    if not iterable and len(drawing) != len(dataset):
        raise UnitvisError(f"the DataLoader draws {len(drawing)} of {len(dataset)} images; give it a Subset")
    kind = StreamSource if iterable or batching is None else LoaderSource
    return kind(loader, transform, on_error=on_error)


def first_of(item: Any) -> Any:
    """The item itself, or its first entry."""
    if isinstance(item, Mapping):
        item = list(item.values())
    if isinstance(item, tuple | list):
        if not item:
            raise UnitvisError("an item is empty; an image, or a tuple whose first entry is the image, is needed")
        return item[0]
    return item


def _read(stream: Iterable[Any], kind: str) -> Iterator[Tensor]:
    count = 0
    batches = iter(stream)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:
            raise UnitvisError(f"the {kind} failed after {count} batches: {_one_line(error)}") from error
        yield as_pixels(first_of(batch), 4, f"batch {count} of the {kind}")
        count += 1


def _samples(pixels: Tensor) -> list[bytes]:
    """For each image the hash of some of its values: enough to tell a random crop, flip or colour from the image."""
    values = pixels.flatten(1)
    some = values[:, :: max(1, values.shape[1] // _SAMPLES)].cpu().contiguous().numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in some]


def _one_line(error: BaseException) -> str:
    text = str(error)
    if text.startswith("Caught "):  # a DataLoader's worker: its traceback, then the message
        text = text.strip().splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
    return f"{type(error).__name__}: {' '.join(text.split())[:200]}" if text else type(error).__name__
