"""Images that are already numbers: which shapes count as images, and the source over an array of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unitvis.errors import UnitvisError
from unitvis.sources.base import Chunks, Picture, Source, grouped, in_order, needed
from unitvis.sources.transform import Box, Transform


class ArraySource(Source):
    """uint8 [N, H, W, 3], which goes through the transform, or float [N, C, H, W], taken as already normalised.

    A memory-mapped array is read row by row; a tensor stays on its device. It must not change while it is in use.
    """

    kind = "array"

    def __init__(
        self,
        array: np.ndarray | Tensor,
        transform: Transform | None,
        *,
        on_error: str = "skip",
        path: str | None = None,
    ) -> None:
        check_pixels(array, 4, repr(path) if path else "the array")
        super().__init__(transform, len(array), on_error)
        if array.dtype in (np.uint8, torch.uint8):
            needed(transform)
        self._array, self._path = array, path

    def read(self, id: int) -> Tensor:
        """uint8 [H, W, 3] or float32 [C, H, W], on the array's device."""
        return fitted(self._rows([id]), self.transform)[0]

    def picture(self, id: int, value_range: tuple[float, float] = (0.0, 1.0)) -> Picture:
        """The row before resize and crop; of floats the model's input."""
        return shown(self._rows([id])[0], self.transform, value_range)

    def record(self, id: int) -> dict[str, Any]:
        """id, name, width, height, hash of the row."""
        width, height = size_of(self._rows([id])[0])
        return {"id": id, "name": self.name(id), "width": width, "height": height, "hash": self._hash(id)}

    def describe(self) -> dict[str, Any]:
        """Kind, path (None for an array in memory), shape and type."""
        shape, dtype = list(self._array.shape), str(self._array.dtype).removeprefix("torch.")
        return {"kind": self.kind, "path": self._path, "images": self.length, "shape": shape, "dtype": dtype}

    def _hash(self, id: int) -> str:
        return pixel_hash(self._rows([id])[0])

    def _chunks(self, ids: Iterable[int] | None, batch_size: int, workers: int) -> Chunks:
        def load(group: list[int]) -> Tensor:
            return fitted(self._rows(group), self.transform)

        for group, result in in_order(load, grouped(self._ids(ids), batch_size), workers, ahead=2):
            yield group, result()

    def _rows(self, ids: list[int]) -> Tensor:
        ids = [self._valid(id) for id in ids]
        consecutive = ids == list(range(ids[0], ids[0] + len(ids)))  # then a tensor gives a view
        return as_pixels(self._array[ids[0] : ids[-1] + 1] if consecutive else self._array[ids], 4, "the array")


def check_pixels(value: object, ndim: int, what: str) -> None:
    """UnitvisError unless `value` is uint8 [..., H, W, 3] or floating point [..., C, H, W] of so many dimensions."""
    n = "N, " if ndim == 4 else ""
    wanted = f"uint8 [{n}H, W, 3] or normalised float [{n}C, H, W]"
    if not isinstance(value, Tensor | np.ndarray):
        raise UnitvisError(f"{what} is {type(value).__name__}, not a tensor or array; {wanted} is needed")
    shape = list(value.shape)
    real = value.is_floating_point() if isinstance(value, Tensor) else value.dtype.kind == "f"
    hint = ""
    if value.ndim == ndim and min(shape[-3:]) > 0:
        channels_last = shape[-1] in (1, 3, 4) and min(shape[-3:-1]) > 4
        if real and not channels_last:
            return
        if value.dtype in (np.uint8, torch.uint8):
            if shape[-1] == 3:
                return
            hint = ", channels last" if shape[-3] == 3 else ", three channels"
        elif real:
            hint = ", channels first"
    raise UnitvisError(f"{what} is {value.dtype} {shape}, not an image; {wanted} is needed{hint}")


def as_pixels(value: object, ndim: int, what: str) -> Tensor:
    """A checked tensor, uint8 or float32, on its device; a numpy array is copied, in native order, writable."""
    check_pixels(value, ndim, what)
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.array(value, np.uint8 if value.dtype == np.uint8 else np.float32, order="C"))
    pixels: Tensor = value.detach()  # type: ignore[attr-defined]
    return pixels if pixels.dtype == torch.uint8 else pixels.float()


def fitted(pixels: Tensor, transform: Transform | None) -> Tensor:
    """uint8 [N, H, W, 3] resized and cropped; floats as they are."""
    if pixels.dtype != torch.uint8:
        return pixels
    transform = needed(transform)
    if transform.resize is None and transform.crop is None:
        return pixels
    images = [torch.from_numpy(transform(Image.fromarray(row))) for row in pixels.cpu().numpy()]
    return torch.stack(images).to(pixels.device)


def shown(pixels: Tensor, transform: Transform | None, value_range: tuple[float, float]) -> Picture:
    """One image as `Source.picture` says; of more than three channels the first three are drawn, of fewer the first."""
    if pixels.dtype == torch.uint8:
        picture = Image.fromarray(pixels.cpu().numpy())
        return picture, partial(needed(transform).to_source, width=picture.width, height=picture.height)
    if len(pixels) != 3 or transform is None or (transform.mean is None and transform.std is None):
        low, high = value_range
        pixels = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)
        pixels, transform = (pixels.double() - low) / (high - low), Transform()
    return Image.fromarray(transform.denormalize(pixels)), _unmoved


def size_of(pixels: Tensor) -> tuple[int, int]:
    """(width, height) of one image."""
    height, width = pixels.shape[:2] if pixels.dtype == torch.uint8 else pixels.shape[1:]
    return width, height


def pixel_hash(pixels: Tensor) -> str:
    """Of one image's values."""
    return hashlib.blake2b(pixels.contiguous().cpu().numpy().tobytes(), digest_size=16).hexdigest()


def _unmoved(box: Box) -> Box:
    return box
