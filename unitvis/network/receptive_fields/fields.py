"""Receptive fields: for each neuron of a layer, the smallest box that holds all input pixels that can change it.

The closed form traces the model once and carries intervals of pixels through the graph (`geometry`). Where an operator
has no rule, and as the judge of the tests, an oracle needs no tracing: set rows and columns to NaN, see what follows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from unitvis.errors import UnitvisError, error_text
from unitvis.network.forward import as_map
from unitvis.network.receptive_fields.reach import NOTHING, Reach, collapse
from unitvis.network.receptive_fields.rules import Unsupported
from unitvis.network.receptive_fields.trace import MixedError, reaches, trace

InputSize = int | tuple[int, int] | tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class ReceptiveField:
    """The receptive fields of one layer's neurons, in model-input pixels.

    A weight that happens to be zero counts as a connection, and so does what a mask hides.
    """

    layer: str
    input_size: tuple[int, int]  # height, width
    map_size: tuple[int, int]  # H, W
    channels: int
    size: tuple[int, int]  # height, width of the layer's largest box, as far as it may leave the image
    stride: tuple[float, float] | None  # pixels from one neuron to the next; None: a 1x1 map, or not regular
    whole_image: bool  # every neuron sees all of the image, and every box is the image
    method: str  # "traced" (closed form) | "probed" (by NaN; boxes then end at the image's border)
    note: str  # why it was probed, else empty
    _rows: NDArray[np.int32] = field(repr=False)  # [2, 1|C, 1|H, 1|W] top and bottom
    _columns: NDArray[np.int32] = field(repr=False)  # [2, 1|C, 1|H, 1|W] left and right

    @property
    def channels_last(self) -> bool:
        """Whether what counts as channels and rows here are really the image's rows and columns: a map [N, H, W, C]."""
        (_, c, h, _), (_, c2, h2, w2) = self._rows.shape, self._columns.shape
        return c > 1 and h == 1 and c2 == 1 and h2 > 1 and w2 == 1

    def boxes(self, channels: ArrayLike, rows: ArrayLike, columns: ArrayLike) -> NDArray[np.int32]:
        """The boxes of these neurons: int32 [n, 4] left, top, right, bottom (half-open); they may leave the image.

        The arguments are integers or arrays of them, broadcast against each other. The box of a neuron that no pixel
        can change (it sees only padding) has width and height 0. Raises UnitvisError for a neuron outside the map.
        """
        neurons = np.broadcast_arrays(
            *(np.atleast_1d(np.asarray(index, np.intp)) for index in (channels, rows, columns))
        )
        for name, index, n in zip(("channel", "row", "column"), neurons, (self.channels, *self.map_size), strict=True):
            if bool(((index < 0) | (index >= n)).any()):
                raise UnitvisError(f"layer {self.layer!r} has {name}s 0 to {n - 1}, not {index.min()} to {index.max()}")
        sides = []
        for bounds in (self._columns, self._rows):
            where = [
                index if n > 1 else np.zeros_like(index) for index, n in zip(neurons, bounds.shape[1:], strict=True)
            ]
            sides.append(bounds[:, where[0], where[1], where[2]])
        (left, right), (top, bottom) = sides
        return np.stack([left, top, right, bottom], axis=-1).astype(np.int32, copy=False).reshape(-1, 4)


def receptive_field(model: nn.Module, layer: str, input_size: InputSize) -> ReceptiveField:
    """The receptive fields of one layer; see `receptive_fields`."""
    return receptive_fields(model, [layer], input_size)[layer]


def receptive_fields(model: nn.Module, layers: Sequence[str], input_size: InputSize) -> dict[str, ReceptiveField]:
    """The receptive fields of these layers, from one trace of the model in eval mode, which is left as it was.

    `input_size` is a side, (height, width) or (channels, height, width); without channels it is 3. A model with an
    operator that has no closed form is probed instead, and `method` and `note` say so. Raises UnitvisError for an
    unknown layer, a model that cannot run on this input, and responses that depend on chance or on their batch (active
    dropout, batch normalisation in training mode).
    """
    shape = _input_shape(input_size)
    layers = _checked(model, layers)
    twin = _twin(model, None)
    weights = [tensor for tensor in (*twin.parameters(), *twin.buffers()) if tensor.is_floating_point()]
    like = weights[0] if weights else torch.empty(())
    # A batch of two shows what mixes images.
    images = torch.zeros((2, *shape), dtype=like.dtype, device=like.device)
    for module in twin.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) and not _culprit(module):
            module.forward = torch.clone  # element by element, too; torch's own takes most of the tracer's time
    try:
        graph = trace(lambda x: _maps(twin, layers, x), images)
        outputs = reaches(graph)
    except MixedError as error:
        raise UnitvisError(f"{error}{_culprits(twin)}") from None
    except UnitvisError:
        raise
    except Unsupported as error:
        return _probe(model, layers, shape, str(error))
    except Exception as error:  # whatever stops the tracer; what stops the model itself stops the probe as well
        return _probe(model, layers, shape, f"cannot be traced: {error_text(error)}")
    fields = {}
    for layer in layers:
        map_shape, axes = outputs[layer]
        if axes is None:
            raise UnitvisError(f"layer {layer!r} does not depend on the image")
        fields[layer] = _closed_form(layer, map_shape, axes[1], axes[2])
    return fields


def probe_receptive_fields(model: nn.Module, layers: Sequence[str], input_size: InputSize) -> dict[str, ReceptiveField]:
    """The same by a method that needs no tracing: set one row or column of the input to NaN and see what becomes NaN.

    Exact inside the image, at the cost of height + width forward passes in float64 on the CPU; boxes end at the border.
    An interpolation weight that is exactly zero counts here, because zero times NaN is NaN.
    """
    return _probe(model, _checked(model, layers), _input_shape(input_size), "")


# --- running the model -----------------------------------------------------------------------------------------------


def _input_shape(input_size: InputSize) -> tuple[int, int, int]:
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    channels, height, width = size if len(size) == 3 else (3, *size[:1], *size[-1:])
    if len(size) not in (2, 3) or min(channels, height, width) < 1:
        raise UnitvisError(f"input size {input_size!r} is not a side, (height, width) or (channels, height, width)")
    return channels, height, width


def _checked(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """The layers, each once, as plain strings: numpy's do not survive the code that a trace generates."""
    names = dict(model.named_modules())
    for layer in layers:
        if layer not in names:
            raise UnitvisError(f"the model has no layer {layer!r}; its layers are the names of named_modules()")
    return list(dict.fromkeys(map(str, layers)))


def _twin(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy in eval mode: on the same parameters, or (dtype given) on the CPU with floating-point ones of that type.

    A copy, because a forward pass may count in buffers and, under a tracer, leave fake tensors in attributes.
    """
    memo: dict[int, object] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if not isinstance(tensor, Tensor):
                continue
            data = tensor.detach()
            if dtype is not None:
                data = data.to("cpu", dtype if data.is_floating_point() else data.dtype, copy=True)
            memo[id(tensor)] = nn.Parameter(data, False) if isinstance(tensor, nn.Parameter) else data.clone()
    try:
        return copy.deepcopy(model, memo).eval()
    except Exception as error:
        raise UnitvisError(f"the model cannot be copied to be traced ({error_text(error)})") from error


def _maps(model: nn.Module, layers: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    """The layers' outputs as maps [N, C, H, W]."""
    maps: dict[str, Tensor] = {}

    def tap(name: str, module: nn.Module, output: object) -> None:
        if name in maps:
            raise UnitvisError(f"layer {name!r} runs more than once in a forward pass; its response is ambiguous")
        found = as_map(name, type(module), output)
        if len(found) != len(images):
            raise UnitvisError(f"layer {name!r} gives {len(found)} maps for {len(images)} images; name a layer outside")
        maps[name] = found.clone()  # what an in-place activation does next is not the layer's

    modules = dict(model.named_modules())
    hooks = [
        modules[name].register_forward_hook(lambda module, _, output, name=name: tap(name, module, output))
        for name in layers
    ]
    try:
        model(images.clone())  # which it may overwrite
    except UnitvisError:
        raise
    except Exception:
        if len(maps) < len(layers):  # else it came after all that was asked for, like a classifier of another size
            raise
    finally:
        for hook in hooks:
            hook.remove()
    if missing := [name for name in layers if name not in maps]:
        raise UnitvisError(f"layer {missing[0]!r} does not run in a forward pass")
    return maps


def _culprit(module: nn.Module) -> bool:
    """Whether eval mode leaves the module in training mode, or without statistics of its own."""
    return module.training or (isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None)


def _culprits(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if _culprit(module)]
    return f" (in training mode or without running statistics: {', '.join(names[:5])})" if names else ""


# --- the closed form -------------------------------------------------------------------------------------------------


def _closed_form(layer: str, map_shape: tuple[int, ...], rows: Reach, columns: Reach) -> ReceptiveField:
    sides, sizes, strides, whole = [], [], [], True
    for reach, n in ((rows, map_shape[2]), (columns, map_shape[3])):
        bounds = collapse(reach.bounds[:, 0])  # [4, C, H, W], the first image's: all are alike
        low, high = _sides(bounds, reach.extent)
        sides.append(np.stack([low, high]))
        sizes.append(int((high - low).max()))
        strides.append(_stride(bounds, reach, n))
        whole &= bool((bounds[0] == 0).all() and (bounds[1] == reach.extent - 1).all())
    known = max(map_shape[2:]) > 1 and None not in strides
    return _result(
        layer,
        map_shape,
        (rows.extent, columns.extent),
        sides,
        size=(sizes[0], sizes[1]),
        stride=(float(strides[0] or 0), float(strides[1] or 0)) if known else None,
        whole=whole,
    )


def _result(
    layer: str,
    map_shape: tuple[int, ...],
    input_size: tuple[int, int],
    sides: Sequence[NDArray[np.int32]],
    *,
    size: tuple[int, int],
    stride: tuple[float, float] | None,
    whole: bool,
    method: str = "traced",
    note: str = "",
) -> ReceptiveField:
    if whole:
        sides = [np.array([0, extent], np.int32).reshape(2, 1, 1, 1) for extent in input_size]
    _, channels, height, width = map_shape
    return ReceptiveField(
        layer, input_size, (height, width), channels, size, stride, whole, method, note, sides[0], sides[1]
    )


def _sides(bounds: Tensor, extent: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """First pixel and end of each box: exact, but where that is the image's border, as far beyond it as virtually."""
    low, high, virtual_low, virtual_high = -bounds[0], bounds[1] + 1, -bounds[2], bounds[3] + 1
    # Virtual sides are fractions where a map was up-sampled: rounded outwards, rounding errors aside.
    low = torch.where((low == 0) & virtual_low.isfinite(), (virtual_low + 1e-3).floor().clamp(max=0), low)
    high = torch.where((high == extent) & virtual_high.isfinite(), (virtual_high - 1e-3).ceil().clamp(min=extent), high)
    centre = ((virtual_low + virtual_high) / 2).nan_to_num(nan=extent / 2).clamp(0, extent).floor()
    nothing = bounds[0] == NOTHING
    low, high = torch.where(nothing, centre, low), torch.where(nothing, centre, high)
    return low.to(torch.int32).numpy(), high.to(torch.int32).numpy()


def _stride(bounds: Tensor, reach: Reach, n: int) -> float | None:
    """Pixels from one neuron to the next along the reach's own axis of a map with n positions, if always the same."""
    virtual = bounds[2:]
    if n == 1 or bool(virtual.isinf().any()):
        return reach.step
    low, high = virtual.diff(dim=reach.axis)  # size 0 if it is the same all along
    slopes = torch.cat([-low.flatten(), high.flatten()])
    regular = len(slopes) > 0 and bool((slopes - slopes[0]).abs().max() < 1e-3) and float(slopes[0]) > 0
    return round(float(slopes[0]), 6) if regular else None


# --- the oracle ------------------------------------------------------------------------------------------------------

PROBES = 8  # rows or columns tried in one forward pass


def _probe(
    model: nn.Module, layers: Sequence[str], shape: tuple[int, int, int], note: str
) -> dict[str, ReceptiveField]:
    twin = _twin(model, torch.float64)
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
    hulls: dict[str, list[Tensor]] = {layer: [] for layer in layers}  # [2, C, H, W] of the rows, then of the columns
    try:
        with torch.no_grad(), torch.device("cpu"):
            alone = _maps(twin, layers, image[None])
            before = {layer: found.isnan() for layer, found in alone.items()}
            for layer, found in _maps(twin, layers, torch.stack([image, -image])).items():
                if not torch.allclose(found[:1], alone[layer], rtol=1e-6, atol=1e-9, equal_nan=True):
                    raise UnitvisError(
                        f"layer {layer!r} depends on chance or on other images of its batch{_culprits(twin)}"
                    )
            for axis in (1, 2):
                for start in range(0, shape[axis], PROBES):
                    positions = range(start, min(start + PROBES, shape[axis]))
                    images = image.repeat(len(positions), 1, 1, 1)
                    for probe, position in zip(images, positions, strict=True):
                        probe.select(axis, position).fill_(torch.nan)
                    for layer, found in _maps(twin, layers, images).items():
                        reached = found.isnan() & ~before[layer]
                        _extend(hulls[layer], axis - 1, positions, reached, shape[axis])
    except UnitvisError:
        raise
    except Exception as error:
        size = "x".join(map(str, shape))
        hint = "give (channels, height, width) if it takes other images"
        raise UnitvisError(f"the model cannot run on an input of {size} ({error_text(error)}); {hint}") from error
    return {layer: _probed(layer, hulls[layer], shape, note) for layer in layers}


def _extend(hulls: list[Tensor], axis: int, positions: range, reached: Tensor, extent: int) -> None:
    """Widen the interval of each neuron that one of the positions reached: bool [positions, C, H, W]."""
    if len(hulls) == axis:
        hulls.append(torch.stack([torch.full(reached.shape[1:], side) for side in (extent, 0)]))
    low, high = hulls[axis]
    for position, hit in zip(positions, reached, strict=True):
        low.masked_fill_(hit & (low > position), position)
        high.masked_fill_(hit, position + 1)


def _probed(layer: str, hulls: list[Tensor], shape: tuple[int, int, int], note: str) -> ReceptiveField:
    sides, sizes, whole = [], [], True
    for axis, (low, high) in enumerate(hulls):
        whole &= bool((low == 0).all() and (high == shape[1 + axis]).all())
        n = low.shape[1 + axis]
        view = [n if dim == 1 + axis else 1 for dim in range(3)]
        centre = ((torch.arange(n) + 0.5) * shape[1 + axis] / n).long().reshape(view).expand_as(low)
        low, high = torch.where(high == 0, centre, low), torch.where(high == 0, centre, high)
        sizes.append(int((high - low).max()))
        sides.append(collapse(torch.stack([low, high])).to(torch.int32).numpy())
    map_shape = (1, *hulls[0].shape[1:])
    size = (sizes[0], sizes[1])
    return _result(layer, map_shape, shape[1:], sides, size=size, stride=None, whole=whole, method="probed", note=note)
