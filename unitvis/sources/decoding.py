"""How image files become pixels: one way for a whole run, written into its manifest, because it changes pixels."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from unitvis.errors import UnitvisError
from unitvis.sources.decode import Size, decode_sized
from unitvis.sources.transform import Transform

_Used = TypeVar("_Used")

DECODERS = ("pillow", "simplejpeg")


@dataclass(frozen=True)
class Decoding:
    """decoder: "pillow", or "simplejpeg" for JPEG files (which must be installed; other formats stay Pillow's).

    scaled: decode a JPEG at 1/2, 1/4 or 1/8 of its size where the transform's resize asks for no more than that.
    allow_truncated: take what is there of files that end early.
    """

    decoder: str = "pillow"
    scaled: bool = False
    allow_truncated: bool = False

    def __post_init__(self) -> None:
        if self.decoder not in DECODERS:
            raise UnitvisError(f"decoder={self.decoder!r}; it must be one of {', '.join(DECODERS)}")
        if self.decoder != "pillow" and importlib.util.find_spec(self.decoder) is None:
            raise UnitvisError(f"{self.decoder} is not installed; pip install 'unitvis[{self.decoder}]'")

    def pixels(self, data: bytes, transform: Transform) -> tuple[np.ndarray, Size]:
        """The model's pixels, uint8 [H, W, 3], and (width, height) of the whole picture, upright."""
        smallest = transform.resized if self.scaled else None
        return self._decoded(data, lambda image, size: (transform(image, size), size), smallest)

    def picture(self, data: bytes) -> Image.Image:
        """The whole picture, upright, never scaled: what patches are cut from."""
        return self._decoded(data, lambda image, _: image, None)

    def to_json(self) -> dict[str, Any]:
        """For the manifest; the keys are what `open_source` takes."""
        return asdict(self)

    def _decoded(
        self, data: bytes, use: Callable[[Image.Image, Size], _Used], smallest: Callable[[int, int], Size] | None
    ) -> _Used:
        fast = self.decoder == "simplejpeg"
        return decode_sized(data, use, allow_truncated=self.allow_truncated, simplejpeg=fast, smallest=smallest)
