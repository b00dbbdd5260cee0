"""Transform: resize, central crop and normalisation of images, and the way back to original pixels."""

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
from torch import Tensor

import unitvis_kernels as uk
from unitvis.decoding.geometry import FILTERS, Geometry, ResizeCrop
from unitvis.errors import UnitvisError

_MAX_SIDE = 10**6  # pixels of a resize or a crop


@dataclass(frozen=True)
class Transform(Geometry):
    """Resize, crop the centre, divide by 255, subtract `mean`, divide by `std`, as torchvision does, rounding included.

    Args:
        resize: an int is the length of the shorter side, a pair is (height, width); None: no resize.
        crop: an int is the side of a square, a pair is (height, width), cut from the centre; None: no crop.
        mean, std: three numbers, for red, green and blue in 0..1, or one for all channels, as of a network for grey
            images; None: 0 and 1.
        interpolation: one of Pillow's antialiased filters: nearest, bilinear, bicubic, lanczos, box or hamming.
    """

    resize: int | tuple[int, int] | None = None
    crop: int | tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if not isinstance(self.interpolation, str) or self.interpolation not in FILTERS:
            raise UnitvisError(f"interpolation={self.interpolation!r}; it must be one of {', '.join(FILTERS)}")
        for name in ("resize", "crop"):
            object.__setattr__(self, name, _checked_size(name, getattr(self, name)))
        for name in ("mean", "std"):
            object.__setattr__(self, name, _checked_colour(name, getattr(self, name)))

    @property
    def geometry(self) -> ResizeCrop:
        """Resize, crop and interpolation without the rest."""
        return ResizeCrop(self.resize, self.crop, self.interpolation)

    def normalize(
        self,
        batch: Tensor,
        dtype: torch.dtype = torch.float32,
        *,
        channels: int = 3,
        blocks: uk.Blocks | None = None,
    ) -> Tensor:
        """Normalise uint8 [N, H, W, 3 or 1] to the model's input: [N, channels, H, W] of `dtype`, channels_last memory.

        channels: see `in_channels`. blocks: another layout of the input.
        """
        return uk.normalize(self.in_channels(batch, channels), *self.mean_and_std(channels), dtype, blocks)

    def magnitudes(self, batch: Tensor, *, channels: int = 3) -> Tensor:
        """How large the numbers of the model's input are, float32 [N, scales], of the pixels that `normalize` takes."""
        return uk.magnitudes(self.in_channels(batch, channels), *self.mean_and_std(channels))

    def in_channels(self, batch: Tensor, channels: int = 3) -> Tensor:
        """Pixels, uint8 [N, H, W, channels], of uint8 [N, H, W, 3 or 1]; UnitvisError for anything else.

        channels: 3, or 1 for a model of grey images, whose colours become grey as Pillow's convert("L") makes them.
        """
        if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[3] not in (1, 3):
            raise UnitvisError(f"pixels are uint8 [N, H, W, 3], not {batch.dtype} {list(batch.shape)}")
        if channels not in (1, 3):
            raise UnitvisError(
                f"the model takes images of {channels} channels, and pictures have 3, or 1 where they are grey; give "
                "normalised float [N, C, H, W]"
            )
        if batch.shape[3] != channels:
            batch = grey(batch) if channels == 1 else batch.repeat_interleave(3, 3)
        return batch

    def mean_and_std(self, channels: int = 3) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std, one number a channel; 0 and 1 if they were left out. UnitvisError if three stand for one."""
        for name, value in (("mean", self.mean), ("std", self.std)):
            if value is not None and len(value) not in (1, channels):
                raise UnitvisError(
                    f"the model takes images of one channel (grey), and {name} has three numbers; give one: {name}=0.5 "
                    f"(--{name} 0.5)"
                )
        mean, std = self.mean or (0.0,), self.std or (1.0,)
        return mean * (channels // len(mean)), std * (channels // len(std))

    def denormalize(self, image: Tensor) -> np.ndarray:
        """Convert a model input [3, H, W] back to uint8 [H, W, 3]: rounded, clipped to 0..255; NaN becomes black."""
        pixels = image.detach().to("cpu", torch.float64)
        if self.std is not None:
            pixels = pixels * _per_channel(self.std, pixels.device).double()
        if self.mean is not None:
            pixels = pixels + _per_channel(self.mean, pixels.device).double()
        return pixels.mul(255).nan_to_num(0).clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()

    def to_json(self) -> dict[str, Any]:
        """Arguments of the transform as numbers, strings and lists, for a manifest."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Transform:
        """Make the transform that `to_json` wrote; UnitvisError for an unknown key."""
        if unknown := set(values) - {field.name for field in dataclasses.fields(cls)}:
            raise UnitvisError(f"a transform has no {', '.join(sorted(map(repr, unknown)))}; a newer unitvis wrote it")
        return cls(**values)


def grey(batch: Tensor) -> Tensor:
    """Grey, uint8 [..., 1], of colours, uint8 [..., 3]: the luma of ITU-R BT.601 in the integers of Pillow's "L"."""
    red, green, blue = batch.int().unbind(-1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(torch.uint8)[..., None]


@functools.lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Constants as float32 [3 or 1, 1, 1] on the device, cached so that no batch needs a copy or synchronisation."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def _checked_size(name: str, value: Any) -> int | tuple[int, int] | None:
    """Check resize or crop: None, a positive int or a pair of them."""
    sides = value if isinstance(value, tuple | list) else [value]
    if value is None:
        return None
    if not all(
        isinstance(side, Integral) and not isinstance(side, bool) and 0 < int(side) <= _MAX_SIDE for side in sides
    ):
        raise UnitvisError(
            f"{name}={value!r}; it must be a positive number of pixels (to {_MAX_SIDE:,}) or a pair (height, width)"
        )
    if isinstance(value, tuple | list):
        if len(value) != 2:
            raise UnitvisError(f"{name}={value!r}; a pair (height, width) is needed")
        return int(value[0]), int(value[1])
    return int(value)


def _checked_colour(name: str, value: Any) -> tuple[float, ...] | None:
    """Check mean or std: None, a finite number, or one or three of them; std above 0."""
    if value is None:
        return None
    numbers = value.tolist() if isinstance(value, Tensor | np.ndarray) else value
    numbers = [numbers] if isinstance(numbers, Real) else numbers
    wanted = isinstance(numbers, tuple | list) and len(numbers) in (1, 3)
    if not wanted or not all(isinstance(number, Real) for number in numbers):
        raise UnitvisError(
            f"{name}={value!r}; three numbers are needed, for red, green and blue, or one for all channels"
        )
    if not all(_is_finite(number) for number in numbers):
        raise UnitvisError(f"{name}={value!r}; every value must be a finite number")
    if name == "std" and min(numbers) <= 0:
        raise UnitvisError(f"std={value!r}; every value must be above 0")
    return tuple(float(number) for number in numbers)


def _is_finite(number: Any) -> bool:
    """True for a number that a float can hold."""
    try:
        return math.isfinite(number)
    except OverflowError:  # of a larger integer
        return False
