"""Colour scales: signed values around grey, and responses as a transparent heat map over a picture."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

GREY = (128, 128, 128)  # colour of 0 on the signed scale
LEVELS = 16  # of the heat map, as many as a palette of 4 bits holds
# [LEVELS, 4] red, green, blue, alpha: from transparent over orange to yellow
HEAT = np.rint(
    np.array([[255, 70 + 180 * x, 70 * x, 215 * x**0.7] for x in np.linspace(0, 1, LEVELS)]),
).astype(np.uint8)


def signed(signal: NDArray[np.float32], scale: float | None = None) -> Image.Image:
    """Draw a signal [C, H, W] in colour: 0 is grey, `scale` white and -`scale` black, the same for all channels.

    scale: None: the largest magnitude. Of more than three channels the first three are drawn, of fewer the first.
    """
    shown = signal[:3] if len(signal) >= 3 else signal[:1].repeat(3, axis=0)
    scale = (float(np.abs(signal).max(initial=0)) if scale is None else scale) or 1.0
    levels = np.clip(np.rint(127.5 + 127.5 * (shown / scale)), 0, 255).astype(np.uint8)
    levels[:, (shown == 0).all(axis=0)] = GREY[0]
    return Image.fromarray(levels.transpose(1, 2, 0))


def heat_levels(maps: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Quantise maps [..., H, W] into `LEVELS` levels: 0 up to the map's median, the last at its maximum.

    Responses of at most 0, and NaN, count as 0, and what is 0 has level 0.
    """
    positive = np.clip(np.where(np.isnan(maps), 0, maps), 0, np.finfo(np.float32).max)
    largest = positive.max(axis=(-2, -1), keepdims=True)
    flat = positive.reshape(*positive.shape[:-2], -1)
    middle = (flat.shape[-1] - 1) // 2
    median = np.partition(flat, middle, axis=-1)[..., middle, None, None]  # of an even number, the lower one
    most = np.where(largest > median, largest - median, 1)
    levels = np.ceil(np.clip(positive - median, 0, None) / most * (LEVELS - 1)).astype(np.uint8)
    levels[(positive == largest) & (largest > 0)] = LEVELS - 1  # also where half of the map or more is as large
    return levels


def heat(levels: NDArray[np.uint8]) -> Image.Image:
    """Make a palette image with transparency of levels [H, W]."""
    image = Image.fromarray(levels, "P")
    image.putpalette(HEAT[:, :3].tobytes(), "RGB")
    image.info["transparency"] = HEAT[:, 3].tobytes()
    return image
