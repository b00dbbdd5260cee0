"""ReceptiveField: the boxes of one layer's neurons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unitvis.errors import UnitvisError

InputSize = int | tuple[int, int] | tuple[int, int, int]  # a side, (height, width) or (channels, height, width)


@dataclass(frozen=True, eq=False)
class ReceptiveField:
    """The receptive fields of one layer's neurons, in model-input pixels.

    A connection counts even where its weight happens to be zero or an attention mask hides it. Where values decide what
    is read (predicted sampling positions, a sort), every element that can be read counts. Where `method` is "unknown",
    the boxes are the whole image for want of better ones: `note` tells why, and neurons may well see less.
    """

    layer: str
    input_size: tuple[int, int]  # height, width
    map_size: tuple[int, int]  # H, W
    channels: int
    size: tuple[int, int]  # height, width of the layer's largest box, including what lies outside the image
    stride: tuple[float, float] | None  # pixels from one neuron to the next; None: a 1x1 map, or not constant
    whole_image: bool  # every neuron is connected to the whole image; False where that is unknown
    method: str  # "traced" | "unknown"
    note: str  # why the boxes are unknown, else empty
    _rows: NDArray[np.int32] = field(repr=False)  # [2, 1|C, 1|H, 1|W] top and bottom
    _columns: NDArray[np.int32] = field(repr=False)  # [2, 1|C, 1|H, 1|W] left and right
    _image_alone: NDArray[np.bool_] = field(repr=False)  # [1|H, 1|W] no channel's neuron reads padding

    @classmethod
    def from_sides(
        cls,
        layer: str,
        map_shape: Sequence[int],
        input_size: tuple[int, int],
        sides: Sequence[NDArray[np.int32]],
        *,
        size: tuple[int, int],
        stride: tuple[float, float] | None,
        whole_image: bool,
        image_alone: NDArray[np.bool_],
    ) -> Self:
        """Build the traced field of a layer with maps of shape [N, C, H, W].

        sides: (top, bottom) and (left, right) of every neuron's box, each int32 [2, 1|C, 1|H, 1|W]; ignored where every
        box is the whole image. image_alone: bool [1|H, 1|W], the positions where no channel's neuron reads padding.
        """
        if whole_image:
            sides = _whole(input_size)
        _, channels, height, width = map_shape
        rows, columns = sides
        about = (height, width), channels, size, stride, whole_image, "traced", ""
        return cls(layer, input_size, *about, rows, columns, image_alone)

    @classmethod
    def unknown(cls, layer: str, map_shape: Sequence[int], input_size: tuple[int, int], note: str) -> Self:
        """Build the field of a layer with maps of shape [N, C, H, W] whose boxes are unknown; note: the reason."""
        _, channels, height, width = map_shape
        rows, columns = _whole(input_size)
        about = (height, width), channels, input_size, None, False, "unknown", note
        return cls(layer, input_size, *about, rows, columns, np.zeros((1, 1), bool))

    def boxes(self, channels: ArrayLike, rows: ArrayLike, columns: ArrayLike) -> NDArray[np.int32]:
        """Return the neurons' boxes: int32 [n, 4] left, top, right, bottom (half-open); they may leave the image.

        The arguments are integers or arrays of them, broadcast against each other. The box of a neuron that no pixel
        can change (all its inputs are padding) has width and height 0. Raises UnitvisError for a neuron outside the
        map.
        """
        neurons = np.broadcast_arrays(
            *(np.atleast_1d(np.asarray(index, np.intp)) for index in (channels, rows, columns))
        )
        for name, index, n in zip(("channel", "row", "column"), neurons, (self.channels, *self.map_size), strict=True):
            if bool(((index < 0) | (index >= n)).any()):
                raise UnitvisError(f"layer {self.layer!r} has {name}s 0 to {n - 1}, not {index.min()} to {index.max()}")
        sides = []
        for bounds in (self._columns, self._rows):
            # A dimension of size 1 holds one value for all its positions.
            indices = [
                index if n > 1 else np.zeros_like(index) for index, n in zip(neurons, bounds.shape[1:], strict=True)
            ]
            sides.append(bounds[:, indices[0], indices[1], indices[2]])
        (left, right), (top, bottom) = sides
        return np.stack([left, top, right, bottom], axis=-1).astype(np.int32, copy=False).reshape(-1, 4)

    def positions_inside(self, side: int | None = None) -> NDArray[np.bool_]:
        """Bool [H, W]: no channel's neuron reads padding. With side: squares of that side, with the centres of the
        neurons' boxes, lie in the image, whatever the neurons read.
        """
        if side is None:
            return np.broadcast_to(self._image_alone, self.map_size)
        inside = np.ones((1, 1, 1), bool)
        for (first, last), extent in zip((self._rows, self._columns), self.input_size, strict=True):
            start = (first + last - side) // 2
            inside = inside & (start >= 0) & (start + side <= extent) & (first < last)
        return np.broadcast_to(inside.all(axis=0), self.map_size)


def seen_in_part(size: Sequence[int], input_size: Sequence[int]) -> bool:
    """Whether a receptive field of this size is at most half as wide and high as the image; (height, width) each."""
    return 2 * size[0] <= input_size[0] and 2 * size[1] <= input_size[1]


def _whole(input_size: tuple[int, int]) -> list[NDArray[np.int32]]:
    """The sides of boxes that are the whole image: (top, bottom) and (left, right), each int32 [2, 1, 1, 1]."""
    return [np.array([0, extent], np.int32).reshape(2, 1, 1, 1) for extent in input_size]
