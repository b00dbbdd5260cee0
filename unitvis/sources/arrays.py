"""Images in arrays and tensors: the shapes that are accepted, and a source over one array."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from unitvis.decoding.geometry import Box
from unitvis.errors import UnitvisError
from unitvis.sources.base import Chunks, Picture, Source, id_groups, map_in_order, require_transform, usable_cores
from unitvis.sources.transform import Transform
from unitvis.state.partial import SEEN


class ArraySource(Source):
    """Images of one array: uint8 [N, H, W, 3 or 1], to be transformed, or float [N, C, H, W], already normalised.

    A memory-mapped array is read row by row; a tensor stays on its device. Do not change the array while it is in use.
    Rows are hashed only where `noted` asks for them; a row of another hash raises UnitvisError when it is read again.
    name: names an image in messages, in place of `Source.name`.
    """

    kind = "array"

    def __init__(
        self,
        array: np.ndarray | Tensor,
        transform: Transform | None,
        *,
        on_error: str = "skip",
        path: str | None = None,
        name: Callable[[int], str] | None = None,
    ) -> None:
        check_pixels(array, 4, repr(path) if path else "the array")
        super().__init__(transform, len(array), on_error)
        if array.dtype in (np.uint8, torch.uint8):
            require_transform(transform)
        self._array, self._path, self._own_name = array, path, name
        self._digests: dict[int, bytes] = {}  # of the rows that were noted, by id

    def name(self, id: int) -> str:
        """Name of the image in messages and the manifest."""
        return super().name(id) if self._own_name is None else self._own_name(id)

    def read(self, id: int) -> Tensor:
        """Read one image: uint8 [H, W, 3] or float32 [C, H, W], on the array's device."""
        return resize_and_crop(self._rows([id]), self.transform)[0]

    def picture(self, id: int, value_range: tuple[float, float] = (0.0, 1.0)) -> Picture:
        """uint8: the image before resize and crop; float: the model's input, see `Source.picture`."""
        return picture_from_pixels(self._rows([id])[0], self.transform, value_range)

    def record(self, id: int) -> dict[str, Any]:
        """Identify the image: id, name, width, height, hash of its values."""
        width, height = size_of(self._rows([id])[0])
        return {"id": id, "name": self.name(id), "width": width, "height": height, "hash": self._hash(id)}

    def describe(self) -> dict[str, Any]:
        """Describe the array: kind, path (None for an array in memory), number of images, shape and dtype."""
        shape, dtype = list(self._array.shape), str(self._array.dtype).removeprefix("torch.")
        return {"kind": self.kind, "path": self._path, "images": self.length, "shape": shape, "dtype": dtype}

    def noted(self, ids: NDArray[np.int64]) -> NDArray[np.void]:
        """Hash and size of these images: rows that were not noted before are read and hashed in threads."""
        new = [id for id in ids.tolist() if id not in self._digests]
        hashed = map_in_order(self._hash, new, usable_cores(), ahead=2 * usable_cores())
        self._digests |= {id: bytes.fromhex(result()) for id, result in hashed}
        self._digests = {id: self._digests[id] for id in ids.tolist()}
        found = np.zeros(len(ids), SEEN)
        found["id"], found["digest"] = ids, [np.void(digest) for digest in self._digests.values()]
        if len(ids):
            found["width"], found["height"] = size_of(self._rows(ids[:1].tolist())[0])
        return found

    def note(self, seen: NDArray[np.void]) -> None:
        """Take over hashes; UnitvisError for an image that there is not."""
        ids = [self._checked_id(id) for id in seen["id"].tolist()]
        self._digests |= dict(zip(ids, (digest.tobytes() for digest in seen["digest"]), strict=True))

    def _hash(self, id: int) -> str:
        return pixel_hash(self._rows([id])[0])

    def _chunks(self, ids: Iterable[int] | None, batch_size: int, workers: int) -> Chunks:
        def load(group: list[int]) -> Tensor:
            return resize_and_crop(self._rows(group), self.transform)

        for group, result in map_in_order(load, id_groups(self._checked_ids(ids), batch_size), workers, ahead=2):
            yield group, result()

    def _rows(self, ids: list[int]) -> Tensor:
        ids = [self._checked_id(id) for id in ids]
        consecutive = ids == list(range(ids[0], ids[0] + len(ids)))  # a slice of a tensor is a view, not a copy
        rows = as_pixels(self._array[ids[0] : ids[-1] + 1] if consecutive else self._array[ids], 4, "the array")
        for row, id in enumerate(ids):
            if (digest := self._digests.get(id)) is not None and pixel_hash(rows[row]) != digest.hex():
                raise UnitvisError(
                    f"{self.name(id)!r} {self._changed_message}: its pixels differ; restore them, or {self._remedy}"
                )
        return rows


def mapped_array(path: str) -> NDArray[Any]:
    """The array of a .npy file, mapped into memory; UnitvisError if it cannot be read."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, OverflowError, TypeError) as error:
        raise UnitvisError(f"cannot read {path!r}: {' '.join(str(error).split())}") from error


def check_pixels(value: object, ndim: int, what: str) -> None:
    """Raise UnitvisError unless `value` has `ndim` dimensions and is uint8 [..., H, W, 3 or 1] or float [..., C, H, W].

    what: names the value in the message. Whether floats have their channels first can be told with the model alone, see
    `input_channels`.
    """
    n = "N, " if ndim == 4 else ""
    wanted = f"uint8 [{n}H, W, 3] or normalised float [{n}C, H, W]"
    if not isinstance(value, Tensor | np.ndarray):
        raise UnitvisError(f"{what} is {type(value).__name__}, not a tensor or array; {wanted} is needed")
    if is_pixels(value, ndim):
        return
    shape, hint = list(value.shape), ""
    if value.ndim == ndim and min(shape[-3:]) > 0 and value.dtype in (np.uint8, torch.uint8):
        hint = ", channels last" if shape[-3] in (1, 3) else ", three channels"
    raise UnitvisError(f"{what} is {value.dtype} {shape}, not an image; {wanted} is needed{hint}")


def is_pixels(value: Tensor | np.ndarray, ndim: int) -> bool:
    """True for uint8 [..., H, W, 3 or 1] and float [..., C, H, W] with `ndim` dimensions."""
    if value.ndim != ndim or min(value.shape[-3:]) < 1:
        return False
    if value.dtype in (np.uint8, torch.uint8):
        return value.shape[-1] in (1, 3)
    return value.is_floating_point() if isinstance(value, Tensor) else value.dtype.kind == "f"


def as_pixels(value: object, ndim: int, what: str) -> Tensor:
    """Convert to a tensor, uint8 or float32, after `check_pixels`.

    A tensor keeps its device; a numpy array is copied, to native byte order and writable memory. Grey uint8
    [..., H, W, 1] becomes [..., H, W, 3].
    """
    check_pixels(value, ndim, what)
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.array(value, np.uint8 if value.dtype == np.uint8 else np.float32, order="C"))
    pixels: Tensor = value.detach()  # type: ignore[attr-defined]
    if pixels.dtype != torch.uint8:
        return pixels.float()
    return pixels if pixels.shape[-1] == 3 else pixels.repeat_interleave(3, -1)


def resize_and_crop(pixels: Tensor, transform: Transform | None) -> Tensor:
    """Resize and crop uint8 [N, H, W, 3] as the transform says; floats are returned unchanged."""
    if pixels.dtype != torch.uint8:
        return pixels
    transform = require_transform(transform)
    if transform.resize is None and transform.crop is None:
        return pixels
    images = [torch.from_numpy(transform(Image.fromarray(row))) for row in pixels.cpu().numpy()]
    return torch.stack(images).to(pixels.device)


def picture_from_pixels(pixels: Tensor, transform: Transform | None, value_range: tuple[float, float]) -> Picture:
    """Make the `Picture` of one image, uint8 [H, W, 3] or float [C, H, W], as `Source.picture` describes.

    Of more than three float channels the first three are drawn, of one or two the first, in grey.
    """
    if pixels.dtype == torch.uint8:
        picture = Image.fromarray(pixels.cpu().numpy())
        return picture, partial(require_transform(transform).to_source, width=picture.width, height=picture.height)
    if len(pixels) != 3 or transform is None or (transform.mean is None and transform.std is None):
        low, high = value_range
        pixels = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)
        pixels, transform = (pixels.double() - low) / (high - low), Transform()
    return Image.fromarray(transform.denormalize(pixels)), _unmoved


def size_of(pixels: Tensor) -> tuple[int, int]:
    """(width, height) of one image, uint8 [H, W, 3] or float [C, H, W]."""
    height, width = pixels.shape[:2] if pixels.dtype == torch.uint8 else pixels.shape[1:]
    return width, height


def pixel_hash(pixels: Tensor) -> str:
    """BLAKE2b hash of one image's values, 32 hexadecimal digits."""
    return hashlib.blake2b(pixels.contiguous().cpu().numpy().tobytes(), digest_size=16).hexdigest()


def _unmoved(box: Box) -> Box:
    """Return the box: the picture is the model's input itself."""
    return box
