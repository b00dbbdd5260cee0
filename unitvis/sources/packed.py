"""Packs: images decoded, resized and cropped once, by `unitvis.pack`, and read from an array as often as one likes.

FILE.npy holds the pixels, uint8 [images, H, W, 3], zeros where an image could not be read. FILE.json says what it is:
where the images came from, what was done to them, which failed and why. FILE.npz holds what there is of every image:
`names` and `starts` (see `Names`) and `seen` (see `SeenTable`: hash of the file, original width and height), 24 bytes
and the name an image.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unitvis.errors import UnitvisError, first_line, some
from unitvis.sources.arrays import ArraySource
from unitvis.sources.base import Chunks, Picture, SeenTable, Source
from unitvis.sources.decoding import Decoding
from unitvis.sources.encoded import EncodedSource
from unitvis.sources.files import FileSource
from unitvis.sources.names import Names
from unitvis.sources.tar import expand, tar_source
from unitvis.sources.transform import Transform

Arrays = Mapping[str, NDArray[Any]]

FORMAT = 1
MARK = "unitvis pack"  # the key of the format's number, by which the JSON file of a pack is known
BAKED = ("resize", "crop", "interpolation")  # of a transform: what the pixels of a pack have behind them
_FEW = 16  # images that stand for all where all would be too many to look at
_KEYS = {MARK, "source", "transform", "shape", "pixels", "tables", "failures"}


class PackSource(Source):
    """A pack: ids, names, hashes, sizes and failures of the source that was packed, pixels from the array.

    Patches are cut from the original files, which must still be what they were. Where they are gone altogether, a
    warning says so, and patches are cut from the array.
    """

    kind = "pack"
    apart = True
    _changed = "is no longer the file that was packed"
    _again = "pack and scan again"

    def __init__(
        self,
        path: str,
        about: Mapping[str, Any],
        pixels: NDArray[np.uint8],
        tables: Arrays,
        transform: Transform,
        **options: Any,
    ) -> None:
        super().__init__(transform, len(pixels), **options)
        self.path, self._about = path, about
        self._rows = ArraySource(pixels, Transform(), path=path)
        self._names, self._seen = Names.from_arrays(tables), SeenTable.of(tables["seen"])
        self.unusable = {one["id"]: sys.intern(one["reason"]) for one in about["failures"]}  # id: why

    def name(self, id: int) -> str:
        """As the source that was packed has it."""
        return os.fsdecode(self._names[id])

    def read(self, id: int) -> Tensor:
        """uint8 [H, W, 3]."""
        return self._rows.read(self._usable(id))

    def picture(self, id: int, value_range: tuple[float, float] = (0.0, 1.0)) -> Picture:
        """The original file, upright; what the model sees where the originals are gone."""
        id = self._usable(id)
        return (self._originals or self._rows).picture(id, value_range)

    def record(self, id: int) -> dict[str, Any]:
        """id, name, width, height and hash of the original file when it was packed."""
        seen = self._seen[self._usable(id)]
        assert seen is not None  # noqa: S101  of an image that could be used
        return {"id": id, "name": self.name(id), "width": seen.width, "height": seen.height, "hash": seen.digest.hex()}

    def describe(self) -> dict[str, Any]:
        """What the source that was packed says of itself, its kind in `of`; path and shape, hash of some pixels."""
        source = self._about["source"]
        own = {"kind": self.kind, "path": self.path, "of": source["kind"]}
        return {**source, **own, "shape": self._about["shape"], "pixels": self._about["pixels"]}

    def _hash(self, id: int) -> str:
        return self.record(id)["hash"] if self._originals is None else self._originals._hash(id)

    def _usable(self, id: int) -> int:
        if reason := self.unusable.get(id := self._valid(id)):
            raise UnitvisError(f"{self.name(id)!r} could not be used when it was packed: {reason}")
        return id

    def _chunks(self, ids: Iterable[int] | None, batch_size: int, workers: int) -> Chunks:
        return self._rows._chunks(self._readable(ids), batch_size, workers)

    def _readable(self, ids: Iterable[int] | None) -> Iterator[int]:
        for id in self._ids(ids):
            if reason := self.unusable.get(id):
                self._fail(id, reason)
            else:
                yield id

    @cached_property
    def _originals(self) -> EncodedSource | None:
        """The files that were packed, each with what it must be; None, with a warning, where they are gone."""
        source = self._about["source"]
        path, tar = source["path"], source["kind"] == "tar"
        if tar:
            places = [shard for one in ([path] if isinstance(path, str) else path) for shard in expand(one)]
            missing = [place for place in places if not os.path.exists(place)]
        else:
            root = os.fsencode(path if source["kind"] == "folder" else os.path.dirname(path))
            some_files = [os.path.join(root, self._names[id]) for id in _few(len(self._names))]
            missing = [] if any(map(os.path.lexists, some_files)) else [os.fsdecode(some_files[0])]
        if missing:
            _, height, width, _ = self._about["shape"]
            instance = some([repr(place) for place in missing])
            warnings.warn(
                f"the originals of the pack {self.path!r} are gone, so patches are cut from its {width} x {height} "
                f"pixels, and nothing tells whether a file has changed; there is no {instance}"
            )
            return None
        options: dict[str, Any] = {"decoding": Decoding(**source["decoding"]), "seen": self._seen}
        if not tar:  # nothing need be listed again: a file that is not there says so
            return FileSource(source["kind"], path, root, self._names, self.transform, **options)
        found = tar_source(path, self.transform, **options)
        if found.describe()["names"] != source["names"]:
            raise UnitvisError(
                f"the archives {some(places)} are no longer those that were packed; restore them, or pack again"
            )
        return found


def pack_source(
    path: str, transform: Transform | None, *, on_error: str = "skip", decoding: Decoding | None = None
) -> PackSource | None:
    """The pack whose array is at `path`; None where the array is none.

    transform: gives mean and std; its resize, crop and interpolation are the pack's or left out. Raises UnitvisError
    where they, or the way of decoding, are others, or where the files of the pack do not belong together.
    """
    about = read_about(path)
    if about is None:
        return None
    if transform is None:
        raise UnitvisError(
            f"{path!r} is a pack and needs mean and std, which the model does not name: give "
            "transform=unitvis.Transform(mean=, std=) (--mean M M M, --std S S S); Transform() alone divides by 255"
        )
    asked = (decoding or Decoding()).to_json()
    if asked not in (Decoding().to_json(), about["source"]["decoding"]):
        raise UnitvisError(
            f"{path!r} was packed with {_told(about['source']['decoding'])} and {_told(asked)} is asked for; leave "
            "that out, or pack again"
        )
    whole = _with_baked(transform, Transform.from_json(about["transform"]), path)
    pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    try:
        with open(Path(path).with_suffix(".npz"), "rb") as file, np.load(file, allow_pickle=False) as arrays:
            tables = dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UnitvisError(f"{path!r} is not a whole pack: its .npz file: {first_line(error)}; pack again") from error
    for ending, hashed, known in (
        ("npz", tables_hash(tables), about["tables"]),
        ("npy", pixels_hash(pixels), about["pixels"]),
    ):
        if hashed != known:
            raise UnitvisError(
                f"{path!r} is not a whole pack: its .{ending} and .json files do not belong together; pack again"
            )
    return PackSource(os.path.abspath(path), about, pixels, tables, whole, on_error=on_error)


def read_about(path: str | Path) -> dict[str, Any] | None:
    """What the JSON file beside an array says of the pack that they are; None where they are none."""
    path = Path(path).with_suffix(".json")
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            if f'"{MARK}"'.encode() not in file.read(64):  # it comes first; what is none may be long
                return None
            file.seek(0)
            about = json.load(file)
    except OSError as error:
        raise UnitvisError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UnitvisError(f"{path} is damaged: {first_line(error)}; pack again") from error
    if not isinstance(about, dict) or about.get(MARK) != FORMAT:
        has = about.get(MARK) if isinstance(about, dict) else "none"
        raise UnitvisError(f"{path} has format {has}; this version of unitvis reads format {FORMAT}")
    if absent := _KEYS - set(about):
        raise UnitvisError(f"{path} is damaged: there is no {', '.join(sorted(absent))}; pack again")
    return about


def _with_baked(given: Transform, baked: Transform, path: str) -> Transform:
    """The pack's resize, crop and interpolation, mean and std as given; UnitvisError where others are asked for."""
    nothing = given.resize is given.crop is None and given.interpolation in (
        Transform.interpolation,
        baked.interpolation,
    )
    if not nothing and _geometry(given) != _geometry(baked):
        raise UnitvisError(
            f"{path!r} was packed with {_told(_geometry(baked))} and {_told(_geometry(given))} is asked for, by you or "
            "by the model's weights; leave that out, or pack again"
        )
    return replace(baked, mean=given.mean, std=given.std)


def pixels_hash(pixels: NDArray[np.uint8]) -> str:
    """Of the shape and of some rows, the first and the last among them: enough to tell one array from another."""
    digest = hashlib.blake2b(str(pixels.shape).encode(), digest_size=16)
    for row in _few(len(pixels)):
        digest.update(np.ascontiguousarray(pixels[row]).data)
    return digest.hexdigest()


def tables_hash(tables: Arrays) -> str:
    """Of all arrays, their names and types."""
    digest = hashlib.blake2b(digest_size=16)
    for name, array in sorted(tables.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def _few(images: int) -> list[int]:
    """Ids spread over so many, the first and the last among them."""
    return np.unique(np.linspace(0, images - 1, _FEW).astype(np.int64)).tolist()


def _geometry(transform: Transform) -> dict[str, Any]:
    """What a transform does to a picture, told in one way: a crop of 224 is one of 224 x 224."""
    crop = (transform.crop, transform.crop) if isinstance(transform.crop, int) else transform.crop
    return {"resize": transform.resize, "crop": crop} | (
        {} if transform.resize is None else {"interpolation": transform.interpolation}
    )


def _told(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
