"""From a picture to what the model sees, and back: resize, crop the centre, normalise."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import unitvis_kernels as uk
from unitvis.errors import ImageError, UnitvisError
from unitvis.sources.decode import MAX_PIXELS, to_rgb

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels, half-open

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


@dataclass(frozen=True)
class Transform:
    """Resize, crop the centre, divide by 255, subtract `mean`, divide by `std`: torchvision's way, rounding included.

    resize: an int is the length of the shorter side, a pair is (height, width); None keeps the size.
    crop: an int is a square, a pair is (height, width), cut from the centre; None keeps everything.
    mean, std: three numbers, for red, green and blue of 0..1; None is 0 and 1.
    interpolation: nearest, bilinear, bicubic, lanczos, box or hamming, Pillow's filters (antialiased).
    """

    resize: int | tuple[int, int] | None = None
    crop: int | tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.interpolation not in _FILTERS:
            raise UnitvisError(f"interpolation={self.interpolation!r}; it must be one of {', '.join(_FILTERS)}")
        for name in ("resize", "crop"):
            object.__setattr__(self, name, _size(name, getattr(self, name)))
        for name in ("mean", "std"):
            object.__setattr__(self, name, _colour(name, getattr(self, name)))

    def __call__(self, image: Image.Image, size: tuple[int, int] | None = None) -> np.ndarray:
        """The model's pixels, uint8 [H, W, 3]; ImageError where the crop is larger than the (resized) image.

        size: (width, height) of the whole picture, where `image` is a smaller copy of it.
        """
        height, width = self.resized(*(size or image.size))
        left, top, right, bottom = self._window(height, width)
        image = to_rgb(image)
        if (width, height) != image.size:
            image = image.resize((width, height), _FILTERS[self.interpolation])
        return np.array(image)[top:bottom, left:right]

    def input_size(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) of what the model sees of an image of this width and height."""
        left, top, right, bottom = self._window(*self.resized(width, height))
        return bottom - top, right - left

    def to_source(self, box: Box, width: int, height: int) -> Box:
        """A box of the model's pixels in pixels of the original of this size: crop and resize undone, not clipped."""
        tall, wide = self.resized(width, height)
        left, top, _, _ = self._window(tall, wide)
        x, y = width / wide, height / tall
        return (box[0] + left) * x, (box[1] + top) * y, (box[2] + left) * x, (box[3] + top) * y

    def normalize(self, batch: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The model's input, float [N, 3, H, W] in channels_last memory, from uint8 [N, H, W, 3] on any device."""
        if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[3] != 3:
            raise UnitvisError(f"pixels are uint8 [N, H, W, 3], not {batch.dtype} {list(batch.shape)}")
        return uk.normalize(batch, *self.mean_and_std, dtype)

    @property
    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Three numbers each, also where they were left out."""
        return self.mean or (0.0, 0.0, 0.0), self.std or (1.0, 1.0, 1.0)

    def denormalize(self, image: Tensor) -> np.ndarray:
        """A picture, uint8 [H, W, 3], of the model's input [3, H, W]: clipped to 0..255 and rounded; NaN is black."""
        pixels = image.detach().to("cpu", torch.float64)
        if self.std is not None:
            pixels = pixels * _per_channel(self.std, pixels.device).double()
        if self.mean is not None:
            pixels = pixels + _per_channel(self.mean, pixels.device).double()
        return pixels.mul(255).nan_to_num(0).clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, for a manifest."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Transform:
        """The transform that `to_json` wrote."""
        if unknown := set(values) - {field.name for field in dataclasses.fields(cls)}:
            raise UnitvisError(f"a transform has no {', '.join(sorted(map(repr, unknown)))}; a newer unitvis wrote it")
        return cls(**values)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) after the resize, of an image of this width and height."""
        if self.resize is None:
            return height, width
        if isinstance(self.resize, tuple):
            tall, wide = self.resize
        elif width <= height:
            tall, wide = int(self.resize * height / width), self.resize
        else:
            tall, wide = self.resize, int(self.resize * width / height)
        if tall * wide > MAX_PIXELS:
            raise ImageError(
                f"{width} x {height} would be resized to {wide} x {tall} pixels; no more than {MAX_PIXELS:,}"
            )
        return tall, wide

    def _window(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of the crop in the resized image."""
        if self.crop is None:
            return 0, 0, width, height
        tall, wide = self.crop if isinstance(self.crop, tuple) else (self.crop, self.crop)
        if tall > height or wide > width:
            raise ImageError(f"the crop of {wide} x {tall} is larger than the image, {width} x {height} when resized")
        top, left = round((height - tall) / 2), round((width - wide) / 2)
        return left, top, left + wide, top + tall


@functools.lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[3, 1, 1] on the device; made once, so that a batch costs no copy to it and no synchronisation."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def _size(name: str, value: Any) -> int | tuple[int, int] | None:
    sides = value if isinstance(value, tuple | list) else [value]
    if value is None:
        return None
    if not all(isinstance(side, Integral) and not isinstance(side, bool) and int(side) > 0 for side in sides):
        raise UnitvisError(f"{name}={value!r}; it must be a positive number of pixels or a pair (height, width)")
    if isinstance(value, tuple | list):
        if len(value) != 2:
            raise UnitvisError(f"{name}={value!r}; a pair (height, width) is needed")
        return int(value[0]), int(value[1])
    return int(value)


def _colour(name: str, value: Any) -> tuple[float, ...] | None:
    if value is None:
        return None
    numbers = value.tolist() if isinstance(value, Tensor | np.ndarray) else value
    wanted = isinstance(numbers, tuple | list) and len(numbers) == 3
    if not wanted or not all(isinstance(number, Real) and math.isfinite(number) for number in numbers):
        raise UnitvisError(f"{name}={value!r}; three numbers are needed, for red, green and blue")
    if name == "std" and min(numbers) <= 0:
        raise UnitvisError(f"std={value!r}; every value must be above 0")
    return tuple(float(number) for number in numbers)
