"""Images that are encoded files, wherever their bytes lie: hashed, then decoded from memory."""

from __future__ import annotations

import hashlib
import os
import threading
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unitvis.sources.base import ItemSource, Picture, Seen, SeenTable, needed
from unitvis.sources.decoding import Decoding
from unitvis.sources.names import Names
from unitvis.sources.transform import Transform

MAX_BYTES = 1 << 29  # a file is read whole; below the limit of pixels no sensible image needs more


class EncodedSource(ItemSource):
    """Named image files. A pass reads each once: its bytes are hashed, then decoded from memory.

    `others` counts what lies beside them and is no image by its name; it is not read. seen: what the files must be.
    """

    _changed = "is no longer the file that was scanned"

    def __init__(
        self,
        kind: str,
        names: Names,
        transform: Transform | None,
        *,
        on_error: str = "skip",
        decoding: Decoding | None = None,
        others: int = 0,
        seen: SeenTable | None = None,
    ) -> None:
        self.kind, self.others = kind, others
        super().__init__(transform, len(names), on_error, seen)
        self._transform, self._decoding = needed(transform), decoding or Decoding()
        self._names = names
        self._may_decode = threading.Event()
        self._may_decode.set()

    @contextmanager
    def undecoded(self) -> Iterator[None]:
        """While the block runs files are read, but none begins to be decoded: the cores are somebody else's."""
        self._may_decode.clear()
        try:
            yield
        finally:
            self._may_decode.set()

    def name(self, id: int) -> str:
        """The path as the source has it."""
        return os.fsdecode(self._names[id])

    def picture(self, id: int, value_range: tuple[float, float] = (0.0, 1.0)) -> Picture:
        """The file as it is, upright, and where a box of the model's pixels lies in it."""
        with self._named(id):
            image = self._decoding.picture(self._bytes(self._valid(id))[0])
        return image, partial(self._transform.to_source, width=image.width, height=image.height)

    def record(self, id: int) -> dict[str, Any]:
        """id, name, width and height (upright), hash of the bytes that were ranked."""
        seen = self._seen[self._valid(id)]
        if seen is None:
            with self._named(id):
                seen = self._load(id)[1]
        size = {"width": seen.width, "height": seen.height}
        return {"id": id, "name": self.name(id), **size, "hash": seen.digest.hex()}

    def describe(self) -> dict[str, Any]:
        """Kind, where it lies, what was found, hash of the names in order, how files are decoded."""
        names = {"images": self.length, "names": self._names.hash(), "others": self.others}
        return {"kind": self.kind, "path": self._place(), **names, "decoding": self._decoding.to_json()}

    @abstractmethod
    def _place(self) -> str | list[str] | None:
        """What opens the source again; None where nothing does."""

    @abstractmethod
    def _contents(self, id: int) -> bytes:
        """The file's bytes; ImageError if they cannot be had."""

    def _hash(self, id: int) -> str:
        return _digest(self._contents(id)).hex()

    def _load(self, id: int) -> tuple[Tensor, Seen]:
        data, digest = self._bytes(id)
        self._may_decode.wait()
        pixels, size = self._decoding.pixels(data, self._transform)
        return torch.from_numpy(pixels), Seen(digest, *size)

    def _bytes(self, id: int) -> tuple[bytes, bytes]:
        data = self._contents(id)
        return data, self._unchanged(id, _digest(data))


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
