"""Receptive fields in closed form: the smallest box that holds all input pixels that can change a neuron.

The model is traced once and intervals of pixels are carried through its graph (`trace`, `rules`, `reach`). The boxes of
layers that come after an operator without a rule, or after a line of code that no tracer can follow, are unknown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from unitvis import models
from unitvis.errors import UnitvisError, error_text
from unitvis.network.borrowing import Tensors
from unitvis.network.receptive_fields.layer_maps import (
    Ran,
    acts_as_in_training,
    checked_layers,
    inference_copy,
    input_shape,
    layer_maps,
    training_mode_hint,
)
from unitvis.network.receptive_fields.reach import EMPTY, PADDED, Reach, collapse
from unitvis.network.receptive_fields.receptive_field import InputSize, ReceptiveField
from unitvis.network.receptive_fields.rules import Unsupported
from unitvis.network.receptive_fields.trace import (
    ASKS_FOR_VALUES,
    MixedError,
    Traced,
    forward_of_autograd_functions,
    reaches,
    trace,
)

OTHERWISE = "the model's code does something else when it is traced"


def receptive_field(model: nn.Module | str | models.Loaded, layer: str, input_size: InputSize) -> ReceptiveField:
    """Find the receptive fields of one layer; see `receptive_fields`. model: may be a spec, as for `scan`."""
    module = models.resolved(model)[0]
    with Tensors(module).kept():  # the copy that is traced shares the parameters
        return receptive_fields(module, [layer], input_size)[layer]


def receptive_fields(model: nn.Module, layers: Iterable[str], input_size: InputSize) -> dict[str, ReceptiveField]:
    """Find the receptive fields of these layers from one trace of the model in eval mode, which is left as it was.

    layers: names, or a mapping from names to the axis that holds each one's channels, where that is known already.
    input_size: a side, (height, width) or (channels, height, width); without channels it is 3. Where the boxes of a
    layer cannot be found, they are the whole image, and `method` and `note` say so. Raises UnitvisError for an unknown
    layer, a model that cannot run on this input, and responses that depend on chance or on their batch (active dropout,
    batch normalisation in training mode).
    """
    return followed_fields(model, layers, input_size)[0]


def followed_fields(
    model: nn.Module, layers: Iterable[str], input_size: InputSize
) -> tuple[dict[str, ReceptiveField], bool]:
    """Find receptive fields as `receptive_fields` does, and whether the whole forward pass could be followed.

    It could not if the trace called other torch functions than a run of the model, before or after the last layer:
    what the model does may then depend on the images' values, whatever it does with the exceptions of the tracer.
    """
    shape = input_shape(input_size)
    own = _traceable(model)
    floating = [tensor for tensor in (*own.parameters(), *own.buffers()) if tensor.is_floating_point()]
    like = floating[0] if floating else torch.empty(())
    # A batch of two shows operators that mix images.
    images = torch.zeros((2, *shape), dtype=like.dtype, device=like.device)
    layers = checked_layers(own, layers, images[:1])
    ran = _run(model, layers, images)
    traced: list[Ran] = []

    def run(x: Tensor) -> dict[str, Tensor]:
        traced.append(layer_maps(own, layers, x))
        return traced[0].maps

    found: dict[str, Traced] = {}
    followed = False
    try:
        graph = trace(run, images)
        differs = traced[0].calls.first_difference(ran.calls)
        if differs is not None:  # perhaps only in what functions keep after their first call
            differs = traced[0].calls.first_difference(_run(model, layers, images).calls)
        followed = differs is None and traced[0].error is None
        note = "" if followed else _reason_of(traced[0], differs)
        alike = {name for name, calls in traced[0].after.items() if differs is None or calls <= differs}
        found = reaches(graph, alike)
    except MixedError as error:
        raise UnitvisError(f"{error}{training_mode_hint(own)}") from None
    except Unsupported as error:
        note = str(error)
    except Exception as error:  # the tracer may fail at any line of the model
        note = _reason(error)
    found = {layer: Traced(tuple(maps.shape), note) for layer, maps in ran.maps.items()} | found
    return {layer: _field(layer, found[layer], shape[1:]) for layer in layers}, followed


def _traceable(model: nn.Module) -> nn.Module:
    """Copy a model for a trace, see `inference_copy`."""
    own = inference_copy(model)
    for module in own.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) and not acts_as_in_training(module):
            module.forward = torch.clone  # also elementwise; tracing BatchNorm's own code takes most of the time
    return own


def _run(model: nn.Module, layers: Mapping[str, int | None], images: Tensor) -> Ran:
    """Run a copy of the model; its maps have no values. Raises UnitvisError where it does not run."""

    def shape_of(maps: Tensor) -> Tensor:
        return torch.empty(maps.shape, device="meta")

    with torch.no_grad(), forward_of_autograd_functions():
        ran = layer_maps(_traceable(model), layers, images, shape_of)
    if ran.error is not None:
        size = "x".join(map(str, images.shape[1:]))
        hint = "give (channels, height, width) if it takes other images"
        raise UnitvisError(f"the model cannot run on an input of {size} ({error_text(ran.error)}); {hint}")
    return ran


def _reason_of(traced: Ran, number: int | None) -> str:
    """Why the boxes of layers are unknown: number: of the first call that a run of the model does not make, if any."""
    error = (None if number is None else traced.calls.errors.get(number)) or traced.error
    return OTHERWISE if error is None else _reason(error)


def _reason(error: Exception) -> str:
    """Why the boxes of layers are unknown, after an exception while the model was traced."""
    if "data-dependent" in str(error) or isinstance(error, DataDependentOutputException):
        return ASKS_FOR_VALUES
    return f"cannot be traced: {error_text(error)}"


def _field(layer: str, traced: Traced, input_size: tuple[int, int]) -> ReceptiveField:
    if traced.note:
        return ReceptiveField.unknown(layer, traced.shape, input_size, traced.note)
    if traced.axes is None:
        raise UnitvisError(f"layer {layer!r} does not depend on the image")
    return _traced_field(layer, traced.shape, *traced.axes[1:])


def _traced_field(layer: str, map_shape: tuple[int, ...], rows: Reach, columns: Reach) -> ReceptiveField:
    """The ReceptiveField of a layer with maps of shape [N, C, H, W], which input rows and columns reach as given."""
    sides, sizes, strides, whole_image, image_alone = [], [], [], True, np.ones((1, 1), bool)
    for reach, n in ((rows, map_shape[2]), (columns, map_shape[3])):
        bounds = collapse(reach.bounds[:, 0])  # [5, C, H, W] of the first image; all images have the same
        first, end = _box_sides(bounds, reach.extent)
        sides.append(np.stack([first, end]))
        sizes.append(int((end - first).max()))
        strides.append(_stride(bounds, reach, n))
        image_alone = image_alone & _read_image_alone(bounds, reach.extent)
        whole_image &= bool((bounds[0] == 0).all() and (bounds[1] == reach.extent - 1).all())
    has_stride = max(map_shape[2:]) > 1 and None not in strides
    return ReceptiveField.from_sides(
        layer,
        map_shape,
        (rows.extent, columns.extent),
        sides,
        size=(sizes[0], sizes[1]),
        stride=(float(strides[0] or 0), float(strides[1] or 0)) if has_stride else None,
        whole_image=whole_image,
        image_alone=image_alone,
    )


def _box_sides(bounds: Tensor, extent: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """First pixel and end (exclusive) of boxes along one axis, int32 [C, H, W], from bounds [5, C, H, W] of a `Reach`.

    A side at the image's border is moved outwards to the virtual bound, so that the box may leave the image.
    """
    first, end, virtual_first, virtual_end = -bounds[0], bounds[1] + 1, -bounds[2], bounds[3] + 1
    # Virtual sides are fractions after up-sampling: rounded outwards, 1e-3 of a pixel being rounding error.
    first = torch.where((first == 0) & virtual_first.isfinite(), (virtual_first + 1e-3).floor().clamp(max=0), first)
    end = torch.where((end == extent) & virtual_end.isfinite(), (virtual_end - 1e-3).ceil().clamp(min=extent), end)
    centre = ((virtual_first + virtual_end) / 2).nan_to_num(nan=extent / 2).clamp(0, extent).floor()
    is_empty = bounds[0] == EMPTY
    first, end = torch.where(is_empty, centre, first), torch.where(is_empty, centre, end)
    return first.to(torch.int32).numpy(), end.to(torch.int32).numpy()


def _read_image_alone(bounds: Tensor, extent: int) -> NDArray[np.bool_]:
    """Where the neurons of all channels read pixels and, along one axis, no padding: bool [H, W].

    bounds: [5, C, H, W] of a `Reach`. Virtual bounds tell of padding that was not noted: along an axis that was moved
    when the padding came, or of bounds that are infinite.
    """
    virtual_first, virtual_end = -bounds[2], bounds[3] + 1
    within = (virtual_first > -1e-3) & (virtual_end < extent + 1e-3)  # rounding error of fractions after up-sampling
    return (within & (bounds[4] != PADDED) & (bounds[0] != EMPTY)).all(dim=0).numpy()


def _stride(bounds: Tensor, reach: Reach, n: int) -> float | None:
    """Input pixels from one neuron to the next along the reach's axis, on a map with n positions; None: not constant.

    bounds: [5, C, H, W] of the reach.
    """
    virtual = bounds[2:4]
    if n == 1 or bool(virtual.isinf().any()):
        return reach.step
    first, last = virtual.diff(dim=reach.axis)  # of size 0 along the axis where the bounds do not change
    slopes = torch.cat([-first.flatten(), last.flatten()])
    constant = len(slopes) > 0 and bool((slopes - slopes[0]).abs().max() < 1e-3) and float(slopes[0]) > 0
    return round(float(slopes[0]), 6) if constant else None
