"""Resize and crop of images, as torchvision does them, and the way back to original pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from unitvis.decoding.decode import MAX_PIXELS, to_rgb
from unitvis.errors import ImageError

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels, half-open

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


class Geometry:
    """Resize, then crop the centre; a base class, whose subclasses have these three fields.

    resize: an int is the length of the shorter side, a pair is (height, width); None: no resize. crop: an int is the
    side of a square, a pair is (height, width); None: no crop. interpolation: a name of `FILTERS`.
    """

    resize: int | tuple[int, int] | None
    crop: int | tuple[int, int] | None
    interpolation: str

    def __call__(self, image: Image.Image, size: tuple[int, int] | None = None) -> np.ndarray:
        """Resize and crop an image: uint8 [H, W, 3]; ImageError if the crop is larger than the resized image.

        size: (width, height) of the original if `image` is a smaller copy of it.
        """
        height, width = self.resized(*(size or image.size))
        left, top, right, bottom = self._crop_window(height, width)
        image = to_rgb(image)
        if (width, height) != image.size:
            image = image.resize((width, height), FILTERS[self.interpolation])
        return np.array(image)[top:bottom, left:right]

    def input_size(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) of the model's input from an image of this width and height."""
        left, top, right, bottom = self._crop_window(*self.resized(width, height))
        return bottom - top, right - left

    def to_source(self, box: Box, width: int, height: int) -> Box:
        """Convert a box in model-input pixels to pixels of an original of this size; it is not clipped to the image."""
        tall, wide = self.resized(width, height)
        left, top, _, _ = self._crop_window(tall, wide)
        x, y = width / wide, height / tall
        return (box[0] + left) * x, (box[1] + top) * y, (box[2] + left) * x, (box[3] + top) * y

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) after the resize of an image of this size; ImageError above MAX_PIXELS."""
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

    def _crop_window(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of the crop in the resized image."""
        if self.crop is None:
            return 0, 0, width, height
        tall, wide = self.crop if isinstance(self.crop, tuple) else (self.crop, self.crop)
        if tall > height or wide > width:
            raise ImageError(f"the crop of {wide} x {tall} is larger than the image, {width} x {height} when resized")
        top, left = round((height - tall) / 2), round((width - wide) / 2)
        return left, top, left + wide, top + tall


@dataclass(frozen=True)
class ResizeCrop(Geometry):
    """The geometry of a transform alone, as worker processes get it."""

    resize: int | tuple[int, int] | None = None
    crop: int | tuple[int, int] | None = None
    interpolation: str = "bilinear"
