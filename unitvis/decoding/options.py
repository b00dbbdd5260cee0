"""Options of decoding image files: fixed for a run and written into its manifest, because they change pixels."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unitvis.choices import DECODERS
from unitvis.decoding.decode import Size, decode_sized
from unitvis.decoding.geometry import Geometry
from unitvis.errors import ImageError, UnitvisError
from unitvis.schema import FLAG, TEXT, Schema, problem

SCHEMA: Schema = {"decoder?": TEXT, "scaled?": FLAG, "allow_truncated?": FLAG}  # of `Decoding.to_json`
_ROUNDING = 4.0  # of 255: decoders of other versions give pixels that differ by less, on average
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Decoding:
    """Options of decoding image files.

    decoder: "pillow", or "simplejpeg" for JPEG files (must be installed; Pillow decodes the other formats).
    scaled: decode a JPEG at 1/2, 1/4 or 1/8 of its size if the transform resizes it to no more than that.
    allow_truncated: decode files that end early; the missing part is grey or black.
    """

    decoder: str = "pillow"
    scaled: bool = False
    allow_truncated: bool = False

    def __post_init__(self) -> None:
        for name in ("scaled", "allow_truncated"):
            value = getattr(self, name)
            if not isinstance(value, int | np.bool_) or value not in (0, 1):
                raise UnitvisError(f"{name}={value!r}; it must be True or False")
            object.__setattr__(self, name, bool(value))  # as JSON has it
        if self.decoder not in DECODERS:
            raise UnitvisError(f"decoder={self.decoder!r}; it must be one of {', '.join(DECODERS)}")
        if self.decoder != "pillow" and importlib.util.find_spec(self.decoder) is None:
            raise UnitvisError(f"{self.decoder} is not installed; pip install 'unitvis[{self.decoder}]'")

    def pixels(self, data: bytes, geometry: Geometry) -> tuple[np.ndarray, Size]:
        """Decode, resize and crop: uint8 [H, W, 3], and (width, height) of the whole image, upright."""
        wanted_size = geometry.resized if self.scaled else None
        return self._decoded(data, lambda image, size: (geometry(image, size), size), wanted_size)

    def picture(self, data: bytes) -> Image.Image:
        """Decode the whole image, upright and never scaled, to cut patches from."""
        return self._decoded(data, lambda image, _: image, None)

    def picture_and_pixels(self, data: bytes, geometry: Geometry) -> tuple[Image.Image, NDArray[np.uint8]]:
        """What `picture` and `pixels` give, decoded once, unless the pixels are decoded at another scale."""
        picture = self.picture(data)
        return picture, self.pixels(data, geometry)[0] if self.scaled else geometry(picture)

    def check(self, data: bytes, geometry: Geometry, pixels: NDArray[np.uint8]) -> None:
        """Raise ImageError unless a file gives these pixels; see `check_packed`."""
        check_packed(self.pixels(data, geometry)[0], pixels)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Decoding:
        """Make the options that `to_json` wrote; UnitvisError for others."""
        if wrong := problem(values, SCHEMA, "decoding"):
            raise UnitvisError(wrong)
        if unknown := values.keys() - asdict(cls()).keys():
            raise UnitvisError(f"decoding has no {', '.join(sorted(map(repr, unknown)))}; a newer unitvis wrote it")
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Options for the manifest, as keyword arguments of `open_source`."""
        return asdict(self)

    def _decoded(
        self, data: bytes, use: Callable[[Image.Image, Size], _Result], wanted_size: Callable[[int, int], Size] | None
    ) -> _Result:
        fast = self.decoder == "simplejpeg"
        return decode_sized(data, use, allow_truncated=self.allow_truncated, simplejpeg=fast, wanted_size=wanted_size)


def check_packed(found: NDArray[np.uint8], packed: NDArray[np.uint8]) -> None:
    """Raise ImageError unless a file gave the pixels [H, W, 3] that were packed, up to the rounding of decoders."""
    if found.shape != packed.shape or np.abs(found.astype(np.int16) - packed).mean() > _ROUNDING:
        raise ImageError("it does not give the pixels that were packed; pack again")
