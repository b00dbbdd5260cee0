"""Probing: receptive fields measured by setting rows and columns of the input to NaN, without tracing the model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from unitvis.errors import UnitvisError, error_text
from unitvis.network.receptive_fields.layer_maps import (
    checked_layers,
    inference_copy,
    input_shape,
    layer_maps,
    training_mode_hint,
)
from unitvis.network.receptive_fields.reach import collapse
from unitvis.network.receptive_fields.receptive_field import InputSize, ReceptiveField

LINES_PER_PASS = 8  # rows or columns probed in one forward pass, each in an image of its own


def probe_receptive_fields(
    model: nn.Module, layers: Iterable[str], input_size: InputSize, *, note: str = ""
) -> dict[str, ReceptiveField]:
    """Find receptive fields by setting one row or column of the input to NaN and seeing which neurons become NaN.

    Exact inside the image, at the cost of height + width forward passes in float64 on the CPU; boxes end at the
    image's border. An interpolation weight that is exactly zero counts, because zero times NaN is NaN. note: the
    reason for probing, kept in the result. Raises UnitvisError for a model that cannot run on this input, and for a
    layer whose responses depend on chance or on other images of the batch.
    """
    shape = input_shape(input_size)
    model = inference_copy(model, torch.float64)
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
    with torch.device("cpu"):
        layers = checked_layers(model, layers, image[None])
    intervals: dict[str, list[Tensor]] = {layer: [] for layer in layers}  # of rows, then of columns: [2, C, H, W]
    try:
        with torch.no_grad(), torch.device("cpu"):
            alone = layer_maps(model, layers, image[None])
            nan_before = {layer: maps.isnan() for layer, maps in alone.items()}
            for layer, maps in layer_maps(model, layers, torch.stack([image, -image])).items():
                if not torch.allclose(maps[:1], alone[layer], rtol=1e-6, atol=1e-9, equal_nan=True):
                    raise UnitvisError(
                        f"layer {layer!r} depends on chance or on other images of its batch{training_mode_hint(model)}"
                    )
            for axis in (1, 2):
                for start in range(0, shape[axis], LINES_PER_PASS):
                    lines = range(start, min(start + LINES_PER_PASS, shape[axis]))
                    images = image.repeat(len(lines), 1, 1, 1)
                    for probe, line in zip(images, lines, strict=True):
                        probe.select(axis, line).fill_(torch.nan)
                    for layer, maps in layer_maps(model, layers, images).items():
                        reached = maps.isnan() & ~nan_before[layer]
                        _extend(intervals[layer], axis - 1, lines, reached, shape[axis])
    except UnitvisError:
        raise
    except Exception as error:
        size = "x".join(map(str, shape))
        hint = "give (channels, height, width) if it takes other images"
        raise UnitvisError(f"the model cannot run on an input of {size} ({error_text(error)}); {hint}") from error
    return {layer: _probed_field(layer, intervals[layer], shape, note) for layer in layers}


def _extend(intervals: list[Tensor], axis: int, lines: range, reached: Tensor, extent: int) -> None:
    """Widen each neuron's interval along an axis by the lines that reached it: bool [lines, C, H, W].

    The first call of an axis appends its intervals, int64 [2, C, H, W]: first line and end, empty as (extent, 0).
    """
    if len(intervals) == axis:
        intervals.append(torch.stack([torch.full(reached.shape[1:], side) for side in (extent, 0)]))
    first, end = intervals[axis]
    for line, hit in zip(lines, reached, strict=True):
        first.masked_fill_(hit & (first > line), line)
        end.masked_fill_(hit, line + 1)


def _probed_field(layer: str, intervals: list[Tensor], shape: tuple[int, int, int], note: str) -> ReceptiveField:
    """The ReceptiveField of a layer from its intervals, [2, C, H, W] of rows and of columns."""
    sides, sizes, whole_image = [], [], True
    for axis, (first, end) in enumerate(intervals):
        whole_image &= bool((first == 0).all() and (end == shape[1 + axis]).all())
        n = first.shape[1 + axis]
        view = [n if dim == 1 + axis else 1 for dim in range(3)]
        # The empty box of a neuron that nothing reached lies where its position in the map points to.
        centre = ((torch.arange(n) + 0.5) * shape[1 + axis] / n).long().reshape(view).expand_as(first)
        first, end = torch.where(end == 0, centre, first), torch.where(end == 0, centre, end)
        sizes.append(int((end - first).max()))
        sides.append(collapse(torch.stack([first, end])).to(torch.int32).numpy())
    return ReceptiveField.from_sides(
        layer,
        (1, *intervals[0].shape[1:]),
        shape[1:],
        sides,
        size=(sizes[0], sizes[1]),
        stride=None,
        whole_image=whole_image,
        method="probed",
        note=note,
    )
