"""Packs: images that `unitvis.pack` decoded, resized and cropped once, read from an array.

FILE.npy holds the pixels, uint8 [images, H, W, 3], zeros for an image that could not be read. FILE.json describes the
pack: the source of the images, their transform, the failures with their reasons. FILE.npz holds the arrays `names` and
`starts` (see `Names`) and `seen` (see `ImageInfoTable`: hash of each file, original width and height, 24 bytes).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unitvis.decoding.cutting import Cutter
from unitvis.decoding.options import SCHEMA as DECODING
from unitvis.decoding.options import Decoding
from unitvis.errors import UnitvisError, abridged, first_line
from unitvis.files import array_names, open_regular, read_arrays, read_json
from unitvis.schema import COUNT, ID, OBJECT, TEXT, Is, Schema, choice, either, problem, whole
from unitvis.sources.arrays import ArraySource, mapped_array
from unitvis.sources.base import Chunks, ImageInfoTable, Picture, Source
from unitvis.sources.description import SOURCE
from unitvis.sources.encoded import EncodedSource
from unitvis.sources.files import FileSource
from unitvis.sources.names import Names
from unitvis.sources.tar import archives_of, tar_source
from unitvis.sources.transform import Transform

Arrays = Mapping[str, NDArray[Any]]

FORMAT = 1
FORMAT_KEY = "unitvis pack"  # of a pack's JSON file; its value is the number of the format
_SEARCHED = 2**28  # bytes of a JSON file in which the key is looked for; longer files are not read
BAKED_FIELDS = ("resize", "crop", "interpolation")  # fields of a transform that were applied when the pack was made
_TABLES = ("names", "starts", "seen")  # arrays of the .npz file
_SAMPLED_IMAGES = 16  # images that are checked in place of all
_ABOUT: dict[str, Schema] = {  # of the JSON file
    "source": SOURCE
    | {
        "kind": choice("folder", "list", "tar"),
        "path": either(TEXT, [TEXT]),
        "images": COUNT,
        "names": TEXT,
        "decoding": DECODING,
    },
    "transform": OBJECT,
    "shape": (whole(1, 2**40), whole(1, 10**6), whole(1, 10**6), whole(3, 3)),
    "pixels": TEXT,
    "tables": TEXT,
    "failures": [{"id": ID, "reason": Is("text that is not empty", lambda v: isinstance(v, str) and v != "")}],
}


class PackSource(Source):
    """Images of a pack: pixels from its array; ids, names, hashes, sizes and failures of the source that was packed.

    Patches are cut from the original files, which must not have changed. If the files are gone, a warning says so, and
    patches are cut from the array.
    """

    kind = "pack"
    separate_originals = True
    _changed_message = "is no longer the file that was packed"
    _remedy = "pack and scan again"

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
        self._rows = ArraySource(pixels, Transform(), path=path, name=self.name)
        self._names, self._infos = Names.from_arrays(tables), ImageInfoTable.of(tables["seen"])
        self.unusable = {one["id"]: sys.intern(one["reason"]) for one in about["failures"]}  # id -> reason

    def name(self, id: int) -> str:
        """Name of the image in the source that was packed."""
        return os.fsdecode(self._names[id])

    def read(self, id: int) -> Tensor:
        """Read one image from the array: uint8 [H, W, 3]."""
        return self._rows.read(self._usable_id(id))

    def is_readable(self, id: int) -> bool:
        """Whether the original file can be read now or, if the originals are gone, the image was when it was packed."""
        return id not in self.unusable if self._originals is None else self._originals.is_readable(id)

    def picture(self, id: int, value_range: tuple[float, float] = (0.0, 1.0)) -> Picture:
        """Decode the original file, upright; if the originals are gone, return the packed pixels."""
        id = self._usable_id(id)
        self._check_pixels(id)
        return (self._originals or self._rows).picture(id, value_range)

    def cutter(self, input_size: tuple[int, int], *, grey: bool) -> Cutter | None:
        """What cuts patches from the original files; None if they are gone."""
        return None if self._originals is None else self._originals.cutter(input_size, grey=grey)

    def files(self) -> Iterable[bytes]:
        return () if self._originals is None else self._originals.files()

    def place(self, id: int) -> Any:
        """Where the original file of an image is."""
        assert self._originals is not None  # noqa: S101  there is no cutter without
        return self._originals.place(self._usable_id(id))

    def packed(self, id: int) -> NDArray[np.uint8]:
        """The image's row of the array."""
        return self._rows.read(self._usable_id(id)).numpy()

    def check(self, record: Mapping[str, Any]) -> None:
        """Raise UnitvisError unless the original file is the one that was packed, and gives the packed pixels."""
        super().check(record)
        self._check_pixels(record["id"])

    def _check_pixels(self, id: int) -> None:
        """Raise UnitvisError where the original file gives other pixels: names and hashes may be those of others."""
        if self._originals is not None:
            self._originals.check_pixels(id, self.packed(id))

    def record(self, id: int) -> dict[str, Any]:
        """Identify the image: id, name, width, height and hash of the original file when it was packed."""
        info = self._infos[self._usable_id(id)]
        assert info is not None  # noqa: S101  a usable image has one
        return {"id": id, "name": self.name(id), "width": info.width, "height": info.height, "hash": info.digest.hex()}

    def describe(self) -> dict[str, Any]:
        """Describe the packed source (its kind in `of`), with the pack's path, shape and hash of some pixels."""
        source = self._about["source"]
        own = {"kind": self.kind, "path": self.path, "of": source["kind"]}
        return {**source, **own, "shape": self._about["shape"], "pixels": self._about["pixels"]}

    def noted(self, ids: NDArray[np.int64]) -> NDArray[np.void]:
        """Hash and size of the packed pixels of these images."""
        return self._rows.noted(ids)

    def note(self, seen: NDArray[np.void]) -> None:
        """Take over hashes of packed pixels; UnitvisError for an image that there is not."""
        self._rows.note(seen)

    def _hash(self, id: int) -> str:
        return self.record(id)["hash"] if self._originals is None else self._originals._hash(id)

    def _usable_id(self, id: int) -> int:
        """Return the id; UnitvisError if the image could not be read when it was packed."""
        if (id := self._checked_id(id)) in self.unusable:
            raise UnitvisError(f"{self.name(id)!r} could not be used when it was packed: {self.unusable[id]}")
        return id

    def _chunks(self, ids: Iterable[int] | None, batch_size: int, workers: int) -> Chunks:
        return self._rows._chunks(self._readable(ids), batch_size, workers)

    def _readable(self, ids: Iterable[int] | None) -> Iterator[int]:
        """Yield the ids of usable images, and note the others as failures."""
        for id in self._checked_ids(ids):
            if id in self.unusable:
                self._note_failure(id, self.unusable[id])
            else:
                yield id

    @cached_property
    def _originals(self) -> EncodedSource | None:
        """Open the files that were packed, with the hashes they must have; None, with a warning, if they are gone."""
        source = self._about["source"]
        path, tar = source["path"], source["kind"] == "tar"
        if tar:
            archives = archives_of(path)
            missing = [archive for archive in archives if not os.path.exists(archive)]
        else:
            root = os.fsencode(path if source["kind"] == "folder" else os.path.dirname(path))
            some_files = [os.path.join(root, self._names[id]) for id in _spread_ids(len(self._names))]
            missing = [] if any(map(os.path.lexists, some_files)) else [os.fsdecode(some_files[0])]
        if missing:
            _, height, width, _ = self._about["shape"]
            instance = abridged([repr(archive) for archive in missing])
            warnings.warn(
                f"the originals of the pack {self.path!r} are gone, so patches are cut from its {width} x {height} "
                f"pixels, and nothing tells whether a file has changed; there is no {instance}"
            )
            return None
        options: dict[str, Any] = {"decoding": Decoding.from_json(source["decoding"]), "infos": self._infos}
        if not tar:  # no new listing is needed: a missing file fails when it is read
            return FileSource(source["kind"], path, root, self._names, self.transform, **options)
        found = tar_source(path, self.transform, endings=source.get("images_ending"), **options)
        if found.describe()["names"] != source["names"]:
            raise UnitvisError(
                f"the archives {abridged(archives)} are no longer those that were packed; restore them, or pack again"
            )
        return found


def pack_source(
    path: str, transform: Transform | None, *, on_error: str = "skip", decoding: Decoding | None = None
) -> PackSource | None:
    """Open the pack whose array is at `path`; None if the array does not belong to a pack.

    transform: gives mean and std; its resize, crop and interpolation must be the pack's, or left out. Raises
    UnitvisError if they or the options of decoding differ, or if the files of the pack do not belong together.
    """
    about = read_about(path)
    if about is None:
        if array_names(beside := Path(path).with_suffix(".npz")) == set(_TABLES):
            raise UnitvisError(
                f"{path!r} is an incomplete pack: {beside.name} is that of a pack, and there is no .json file of one; "
                f"restore that, or pack again, or move {beside.name} away if the array is another one"
            )
        return None
    if transform is None:
        raise UnitvisError(
            f"{path!r} is a pack and needs mean and std, which the model does not name: give "
            "transform=unitvis.Transform(mean=, std=) (--mean M M M, --std S S S); Transform() alone divides by 255"
        )
    asked = (decoding or Decoding()).to_json()
    if asked not in (Decoding().to_json(), about["source"]["decoding"]):
        raise UnitvisError(
            f"{path!r} was packed with {_as_arguments(about['source']['decoding'])} and {_as_arguments(asked)} is "
            "asked for; leave that out, or pack again"
        )
    combined = _combined_transform(transform, Transform.from_json(about["transform"]), path)
    pixels = mapped_array(path)
    try:
        tables = read_arrays(Path(path).with_suffix(".npz"), _TABLES)
    except Exception as error:  # a damaged file makes numpy and zipfile raise nearly anything
        raise UnitvisError(f"{path!r} is an incomplete pack: its .npz file: {first_line(error)}; pack again") from error
    for ending, hashed, known in (
        ("npz", tables_hash(tables), about["tables"]),
        ("npy", pixels_hash(pixels), about["pixels"]),
    ):
        if hashed != known:
            raise UnitvisError(
                f"{path!r} is an incomplete pack: its .{ending} and .json files do not belong together; pack again"
            )
    if wrong := _contents_problem(about, pixels, tables):
        raise UnitvisError(f"{path!r} is damaged: {wrong}; pack again")
    return PackSource(os.path.abspath(path), about, pixels, tables, combined, on_error=on_error)


def read_about(path: str | Path) -> dict[str, Any] | None:
    """Read the JSON file beside an array; None if it is not that of a pack. UnitvisError if it is damaged.

    It is a pack's if the object in it has the key `FORMAT_KEY`, wherever, or if it cannot be parsed and has the text.
    """
    path = Path(path).with_suffix(".json")
    if not path.is_file():
        return None
    try:
        with open_regular(path) as file:
            if f'"{FORMAT_KEY}"'.encode() not in file.read(_SEARCHED):  # another file is not parsed
                return None
        about = read_json(path)
    except OSError as error:
        raise UnitvisError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UnitvisError(f"{path} is damaged: {first_line(error)}; pack again") from error
    if not isinstance(about, dict) or FORMAT_KEY not in about:  # another file that has the text as a value
        return None
    if about[FORMAT_KEY] != FORMAT:
        raise UnitvisError(f"{path} has format {about[FORMAT_KEY]}; this version of unitvis reads format {FORMAT}")
    if wrong := problem(about, _ABOUT):
        raise UnitvisError(f"{path} is damaged: {wrong}; pack again")
    try:
        Transform.from_json(about["transform"])
        Decoding.from_json(about["source"]["decoding"])
    except UnitvisError as error:
        raise UnitvisError(f"{path} is damaged: {error}; pack again") from error
    return about


def refuse_unreadable(about: Mapping[str, Any]) -> None:
    """Raise UnitvisError where `read_about` would refuse entries of a pack's JSON file; those that are there count."""
    try:
        held = json.loads(json.dumps(about))
        wrong = problem(held, {key: schema for key, schema in _ABOUT.items() if key in held})
    except TypeError as error:  # of a value that JSON cannot hold
        wrong = first_line(error)
    if wrong:
        raise UnitvisError(f"a pack is not written that nothing could read again: {wrong}")


def _contents_problem(about: Mapping[str, Any], pixels: NDArray[Any], tables: Arrays) -> str | None:
    """What of a pack's array, tables and JSON file does not fit together; None if all does."""
    images = len(pixels)
    if pixels.dtype != np.uint8 or list(pixels.shape) != about["shape"]:
        return f"the array is {pixels.dtype} {list(pixels.shape)}, not uint8 {about['shape']}"
    if about["source"]["images"] != images:
        return f"source.images is {about['source']['images']}, of an array of {images:,}"
    try:
        names = Names.from_arrays(tables)
    except (KeyError, ValueError) as error:
        return first_line(error)
    if len(names) != images or names.hash() != about["source"]["names"]:
        return f"its {len(names):,} names are not those of the {images:,} images that were packed"
    seen = tables.get("seen")
    if seen is None or seen.dtype != ImageInfoTable.ROW or seen.shape != (images,):
        return "it has no table of the files that were packed"
    failed = [failure["id"] for failure in about["failures"]]
    if max(failed, default=0) >= images:
        return f"image {max(failed)} is said to have failed, of {images:,}"
    if len(set(failed)) < len(failed):
        return "an image is listed twice among the failures"
    unseen = np.flatnonzero((seen["width"] == 0) | (seen["height"] == 0))
    if len(unnamed := np.setdiff1d(unseen, failed)):
        return f"nothing is noted of image {unnamed[0]}"
    if len(noted := np.setdiff1d(failed, unseen)):
        return f"image {noted[0]} is said to have failed, and its size is noted"
    if type(about["source"]["path"]) is list and about["source"]["kind"] != "tar":
        return f"source.path is a list, of a {about['source']['kind']}"
    return None


def _combined_transform(given: Transform, baked: Transform, path: str) -> Transform:
    """Combine the pack's resize, crop and interpolation with the given mean and std; UnitvisError if they conflict."""
    left_out = given.resize is given.crop is None and given.interpolation in (
        Transform.interpolation,
        baked.interpolation,
    )
    if not left_out and _geometry(given) != _geometry(baked):
        raise UnitvisError(
            f"{path!r} was packed with {_as_arguments(_geometry(baked))} and {_as_arguments(_geometry(given))} is "
            "asked for, by you or by the model's weights; leave that out, or pack again"
        )
    return replace(baked, mean=given.mean, std=given.std)


def pixels_hash(pixels: NDArray[np.uint8]) -> str:
    """Hash of the shape and of 16 rows, the first and the last among them, to tell one array from another."""
    digest = hashlib.blake2b(str(pixels.shape).encode(), digest_size=16)
    for row in _spread_ids(len(pixels)):
        digest.update(np.ascontiguousarray(pixels[row]).data)
    return digest.hexdigest()


def tables_hash(tables: Arrays) -> str:
    """Hash of all arrays, with their names, dtypes and shapes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, array in sorted(tables.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def _spread_ids(images: int) -> list[int]:
    """At most 16 ids spread evenly from 0 to images - 1, the first and the last among them."""
    return np.unique(np.linspace(0, images - 1, _SAMPLED_IMAGES).astype(np.int64)).tolist()


def _geometry(transform: Transform) -> dict[str, Any]:
    """Resize, crop and interpolation of a transform in one notation, to compare: a crop of 224 is (224, 224)."""
    crop = (transform.crop, transform.crop) if isinstance(transform.crop, int) else transform.crop
    return {"resize": transform.resize, "crop": crop} | (
        {} if transform.resize is None else {"interpolation": transform.interpolation}
    )


def _as_arguments(values: Mapping[str, Any]) -> str:
    """Write values as keyword arguments, for messages."""
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
