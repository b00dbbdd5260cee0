"""Feature maps: what all units of a layer respond to one image, as a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import nn

import unitvis_kernels as uk
from unitvis import models
from unitvis.attribution.filters import filters_of_first
from unitvis.attribution.responses import seen_by
from unitvis.drawing.colours import signed
from unitvis.drawing.notebook import png
from unitvis.drawing.page import MAX_PAGE_PIXELS, PAPER
from unitvis.drawing.sheets import FAINT, INK, fitting_name
from unitvis.drawing.units import checked_units
from unitvis.errors import UnitvisError
from unitvis.sources.transform import Transform

MAP_SIDE, GAP, MARGIN = 112, 12, 36  # pixels of a map's longer side at least, between maps, around the page
PICTURE_SIDE = 320  # pixels of the image's longer side, above the maps
RING = (255, 120, 0)  # colour of the ring around the largest response


@dataclass(frozen=True, eq=False)
class FeatureMaps:
    """The responses of all channels of a layer to one image."""

    layer: str
    maps: NDArray[np.float32]  # [C, H, W]
    values: NDArray[np.float32]  # [C], the largest response; NaN where the map holds one
    positions: NDArray[np.int64]  # [C, 2]: row and column of the largest response; of equal ones the first
    filters: NDArray[np.float32] | None  # [C, channels, h, w] of the first convolution; None for other layers
    image: Image.Image  # the model's input, cut from the original picture

    def page(self, units: Sequence[int] | None = None) -> Image.Image:
        """Draw the image and the maps of units (None: all): black is a map's smallest response, white its largest.

        A cell is one neuron, and a ring marks the largest response; below it stand its value, row and column. In the
        first convolution the filter, in which grey is 0, stands to the left of its map.
        """
        chosen = checked_units(self.layer, len(self.maps), units)
        cell = max(1, MAP_SIDE // max(self.maps.shape[1:]))
        size = self.maps.shape[2] * cell, self.maps.shape[1] * cell
        filter_width = 0 if self.filters is None else size[1] + GAP // 2
        text, heading = ImageFont.load_default(12), ImageFont.load_default(26)
        step = filter_width + max(size[0], 84) + GAP, size[1] + GAP + 34
        columns = min(len(chosen), max(math.ceil(math.sqrt(1.6 * len(chosen))), 6))
        top = MARGIN + 76 + PICTURE_SIDE + GAP
        width = max(columns * step[0] - GAP, 720) + 2 * MARGIN
        height = top + math.ceil(len(chosen) / columns) * step[1] + MARGIN
        if width * height > MAX_PAGE_PIXELS:
            raise UnitvisError(
                f"{len(chosen):,} maps of {self.maps.shape[1]} x {self.maps.shape[2]} do not fit on one page; name "
                "fewer units (units=, --units)"
            )
        page = Image.new("RGB", (width, height), PAPER)
        draw = ImageDraw.Draw(page)
        draw.text((MARGIN, MARGIN - 8), fitting_name(self.layer, heading, width - 2 * MARGIN), INK, heading)
        draw.text((MARGIN, MARGIN + 28), self._legend(len(chosen)), FAINT, ImageFont.load_default(14))
        scale = PICTURE_SIDE / max(self.image.size)
        shown = max(1, round(self.image.width * scale)), max(1, round(self.image.height * scale))
        page.paste(self.image.resize(shown), (MARGIN, MARGIN + 64))
        for index, unit in enumerate(chosen):
            x, y = MARGIN + index % columns * step[0], top + index // columns * step[1]
            if self.filters is not None:
                page.paste(signed(self.filters[unit]).resize((size[1], size[1]), Image.Resampling.NEAREST), (x, y))
            page.paste(_grey(self.maps[unit]).resize(size, Image.Resampling.NEAREST), (x + filter_width, y))
            row, column = self.positions[unit].tolist()
            centre = x + filter_width + (column + 0.5) * cell, y + (row + 0.5) * cell
            radius = max(5.0, 0.75 * cell)
            draw.ellipse((*(place - radius for place in centre), *(place + radius for place in centre)), None, RING, 2)
            draw.text((x, y + size[1] + 2), str(unit), INK, text)
            draw.text((x, y + size[1] + 17), f"{self.values[unit]:.4g} at {row}, {column}", FAINT, text)
        return page

    def _legend(self, drawn: int) -> str:
        channels, height, width = self.maps.shape
        of = f"{channels:,} channels" if drawn == channels else f"{drawn:,} of {channels:,} channels"
        left = "" if self.filters is None else "left: the filter, grey is 0; right: "
        return (
            f"{of}, map {height} x {width}; {left}black is a map's smallest response, white its largest, which the "
            "ring marks (value at row, column)"
        )

    def _repr_png_(self) -> bytes:
        return png(self.page(range(min(len(self.maps), 64))))


def _grey(values: NDArray[np.float32]) -> Image.Image:
    """A map [H, W] from black, its smallest finite response, to white, its largest; NaN is black."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    levels = (np.clip(np.nan_to_num(values, nan=low), low, high).astype(np.float64) - low) / ((high - low) or 1.0)
    return Image.fromarray(np.rint(255 * levels).astype(np.uint8))


def feature_maps(
    model: nn.Module | str | models.Loaded,
    image: Any,
    layer: str,
    *,
    transform: Transform | None = None,
    device: torch.device | str | None = None,
) -> FeatureMaps:
    """Compute the responses of all channels of a layer to one image, bit for bit those that `scan` ranks.

    The arguments are those of `response_map`. Raises UnitvisError for a layer that does not exist.
    """
    seen = seen_by(model, image, layer, transform=transform, device=device)
    values, flat = (tensor[0].cpu().numpy() for tensor in uk.unpack(uk.spatial_argmax(seen.maps[None])))
    positions = np.stack(np.divmod(flat, seen.maps.shape[2]), axis=-1)
    channels = seen.network.input_channels(*seen.field.input_size)
    filters = filters_of_first(seen.network.model, (channels, *seen.field.input_size)).get(layer)
    return FeatureMaps(layer, seen.maps.cpu().numpy(), values, positions, filters, seen.picture)
