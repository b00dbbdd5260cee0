"""Response maps: the responses of a unit at every position of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

import unitvis_kernels as uk
from unitvis import models
from unitvis.decoding.cutting import Box, as_seen, whole_input
from unitvis.drawing.colours import heat, heat_levels
from unitvis.drawing.notebook import png
from unitvis.errors import check_unit
from unitvis.network.network import Network
from unitvis.network.receptive_fields.fields import receptive_field
from unitvis.network.receptive_fields.receptive_field import ReceptiveField
from unitvis.sources import open_source
from unitvis.sources.transform import Transform

Area = tuple[float, float, float, float]  # left, top, right, bottom in model-input pixels


@dataclass(frozen=True, eq=False)
class ResponseMap:
    """One unit's responses to one image, at every position."""

    layer: str
    unit: int
    map: NDArray[np.float32]  # [H, W]
    value: float  # the largest response
    position: tuple[int, int]  # row and column of the largest response; of equal ones the first
    box: Box  # the receptive field of the neuron there, in model-input pixels
    area: Area  # the part of the input that the map lies over when it is drawn, see `map_area`
    image: Image.Image  # the model's input, cut from the original picture

    def overlay(self, size: int = 448) -> Image.Image:
        """Draw the map over the image, `size` pixels on its longer side; each cell is one neuron.

        Clear where the response is at most 0 or at most the map's median, yellow where it is largest.
        """
        scale = size / max(self.image.size)
        page = self.image.resize((round(self.image.width * scale), round(self.image.height * scale)))
        height, width = self.map.shape
        left, upper, right, lower = (side * page.width / self.image.width for side in self.area)
        x = np.clip(np.floor((np.arange(page.width) + 0.5 - left) / (right - left) * width), -1, width).astype(int)
        y = np.clip(np.floor((np.arange(page.height) + 0.5 - upper) / (lower - upper) * height), -1, height).astype(int)
        levels = np.pad(heat_levels(self.map), 1)[np.ix_(y + 1, x + 1)]  # a border of 0 for pixels outside the map
        return Image.alpha_composite(page.convert("RGBA"), heat(levels).convert("RGBA")).convert("RGB")

    def _repr_png_(self) -> bytes:
        return png(self.overlay())


def response_map(
    model: nn.Module | str | models.Loaded,
    image: Any,
    layer: str,
    unit: int,
    *,
    transform: Transform | None = None,
    device: torch.device | str | None = None,
) -> ResponseMap:
    """Compute the responses of one channel of a layer to one image, bit for bit those that `scan` ranks.

    image: the path of a file, a PIL image, uint8 [H, W, 3] or a normalised float tensor [C, H, W]. transform: turns a
    picture into the model's input; None: that of a model given by name. Raises UnitvisError for a layer or unit that
    does not exist.
    """
    seen = seen_by(model, image, layer, transform=transform, device=device)
    check_unit(layer, unit, seen.maps.shape[0])
    value, flat = (tensor[0, unit].item() for tensor in uk.unpack(uk.spatial_argmax(seen.maps[None])))
    row, column = divmod(int(flat), seen.maps.shape[2])
    field = seen.field
    left, upper, right, lower = field.boxes(unit, row, column)[0].tolist()
    first = field.boxes(unit, 0, 0)[0].tolist()
    area = map_area(field.stride, field.whole_image, first, (0, 0), field.map_size, field.input_size)
    box = left, upper, right, lower
    return ResponseMap(layer, unit, seen.maps[unit].cpu().numpy(), value, (row, column), box, area, seen.picture)


class Seen(NamedTuple):
    """A layer's responses to one image."""

    maps: Tensor  # float32 [C, H, W]
    field: ReceptiveField
    picture: Image.Image  # the model's input, cut from the original picture
    network: Network


def seen_by(
    model: nn.Module | str | models.Loaded,
    image: Any,
    layer: str,
    *,
    transform: Transform | None = None,
    device: torch.device | str | None = None,
) -> Seen:
    """Compute all responses of a layer to one image, by the canonical pass; see `response_map`."""
    model, own_transform, _ = models.resolved(model)
    transform = transform or own_transform
    images = image[None] if isinstance(image, np.ndarray | Tensor) else [image]
    source = open_source(images, transform)
    maps: list[Tensor] = []
    network = Network(model, device=device, transform=source.transform)
    pixels = source.read(0)[None]
    shape = network.input_shape_of(pixels)
    field = receptive_field(network.model, layer, shape)
    with network.evaluating(), network.reading_maps([layer], shape) as canonical:
        canonical.maps(pixels, lambda _, found: maps.append(found.clone()))
    size = field.input_size
    picture, to_picture = source.picture(0, source.value_range([0]))
    shown = whole_input(as_seen(picture, grey=shape[0] == 1), to_picture, size, max(size))
    return Seen(maps[0][0], field, shown, network)


def map_area(
    stride: Sequence[float] | None,
    whole_image: bool,
    box: Sequence[int],
    position: tuple[float, float],
    map_size: tuple[int, int],
    input_size: tuple[int, int],
) -> Area:
    """The part of the input that a map lies over, with cells as large as the stride, centred on their neurons' boxes.

    The whole image where there is no stride, or every neuron depends on all of it. box: that of the neuron at
    `position`. Pairs are (height, width) or (row, column).
    """
    if stride is None or whole_image:
        return 0.0, 0.0, float(input_size[1]), float(input_size[0])
    left = (box[0] + box[2]) / 2 - (position[1] + 0.5) * stride[1]
    upper = (box[1] + box[3]) / 2 - (position[0] + 0.5) * stride[0]
    return left, upper, left + map_size[1] * stride[1], upper + map_size[0] * stride[0]
