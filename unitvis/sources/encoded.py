"""Base class of sources of encoded image files: their bytes are hashed, then decoded from memory."""

from __future__ import annotations

import hashlib
import os
import threading
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unitvis.sources.base import ImageInfo, ImageInfoTable, ItemSource, Picture, require_transform
from unitvis.sources.decoding import Decoding
from unitvis.sources.names import Names
from unitvis.sources.transform import Transform

MAX_BYTES = 1 << 29  # of one file, which is read whole; no image within the limit of pixels needs more


class EncodedSource(ItemSource):
    """Named image files; a pass over them reads each file once, hashes its bytes and decodes them from memory.

    others: number of files beside them that are not read, by the ending of their names. endings: those that the user
    chose for images. infos: hashes and sizes that the files must have; None: they are noted as the files are read.
    """

    has_files = True
    _changed_message = "is no longer the file that was scanned"

    def __init__(
        self,
        kind: str,
        names: Names,
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
        self._names = names
        self._may_decode = threading.Event()
        self._may_decode.set()

    @property
    def other_files(self) -> int:
        """Number of files beside the images that are not read."""
        return sum(self.others.values())

    @contextmanager
    def pause_decoding(self) -> Iterator[None]:
        """Start no decoding while the block runs, so that the cores are free to compute; files are still read."""
        self._may_decode.clear()
        try:
            yield
        finally:
            self._may_decode.set()

    def name(self, id: int) -> str:
        """Path of the file, relative to the source."""
        return os.fsdecode(self._names[id])

    def picture(self, id: int, value_range: tuple[float, float] = (0.0, 1.0)) -> Picture:
        """Decode the original image, upright; see `Source.picture`."""
        with self._failure_as_error(id):
            image = self._decoding.picture(self._checked_contents(self._checked_id(id))[0])
        return image, partial(self._transform.to_source, width=image.width, height=image.height)

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
        if self._endings is not None:
            described["images_ending"] = list(self._endings)
        return described

    @abstractmethod
    def _origin(self) -> str | list[str] | None:
        """Path or paths that open the source again; None if there is none."""

    @abstractmethod
    def _contents(self, id: int) -> bytes:
        """Read the file's bytes; ImageError if they cannot be read."""

    def _hash(self, id: int) -> str:
        return _digest(self._contents(id)).hex()

    def _read_noted(self, id: int) -> object:
        return self._checked_contents(id)

    def _load(self, id: int) -> tuple[Tensor, ImageInfo]:
        data, digest = self._checked_contents(id)
        self._may_decode.wait()
        pixels, size = self._decoding.pixels(data, self._transform)
        return torch.from_numpy(pixels), ImageInfo(digest, *size)

    def _checked_contents(self, id: int) -> tuple[bytes, bytes]:
        """Read the file's bytes and their hash; UnitvisError if the file changed since it was read before."""
        data = self._contents(id)
        return data, self._check_unchanged(id, _digest(data))


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
