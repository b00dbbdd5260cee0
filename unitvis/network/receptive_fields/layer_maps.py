"""Running a copy of a model and reading its layers' maps; checks of the arguments of `receptive_fields`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unitvis.errors import UnitvisError
from unitvis.network.channels import channel_axes
from unitvis.network.copies import copied
from unitvis.network.forward import as_map
from unitvis.network.receptive_fields.calls import Calls
from unitvis.network.receptive_fields.receptive_field import InputSize


def input_shape(input_size: InputSize) -> tuple[int, int, int]:
    """Convert an input size to (channels, height, width), 3 channels if none are given; UnitvisError for any other."""
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    channels, height, width = size if len(size) == 3 else (3, *size[:1], *size[-1:])
    if len(size) not in (2, 3) or min(channels, height, width) < 1:
        raise UnitvisError(f"input size {input_size!r} is not a side, (height, width) or (channels, height, width)")
    return channels, height, width


def checked_layers(model: nn.Module, layers: Iterable[str], image: Tensor) -> dict[str, int | None]:
    """Layer names with the axis of their channels, found by a pass of an image [1, C, H, W] unless `layers` has them.

    Names become plain strings: NumPy's do not survive the code that a trace generates. Raises UnitvisError for a name
    that is not in `named_modules()`.
    """
    names = dict(model.named_modules())
    for layer in layers:
        if layer not in names:
            raise UnitvisError(f"the model has no layer {layer!r}; its layers are the names of named_modules()")
    if isinstance(layers, Mapping):
        return {str(layer): axis for layer, axis in layers.items()}
    return channel_axes(model, map(str, layers), image)


@torch.inference_mode(False)  # whose tensors could not be written to outside it
def inference_copy(model: nn.Module) -> nn.Module:
    """Copy a model into eval mode, sharing its parameters and what cannot be copied.

    Buffers and attributes are copied, because a forward pass may count in them and a tracer may leave fake tensors
    there.
    """
    tensors: dict[int, Tensor] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, Tensor):
                data = tensor.detach()
                tensors[id(tensor)] = nn.Parameter(data, False) if isinstance(tensor, nn.Parameter) else data.clone()
    own = copied(model, tensors).eval()
    for module in own.modules():  # compiled modules refuse to be traced: the code that they were made from runs instead
        module._compiled_call_impl = None
        if isinstance(eager := getattr(module, "_orig_mod", None), nn.Module):
            vars(module)["forward"] = eager.__call__
    return own


class Ran(NamedTuple):
    """What a forward pass showed.

    maps: of the layers, [N, C', H', W']. error: what the model raised before the last of the layers had run; the maps
    are those until then. calls: the torch functions that it called. after: for each layer, how many of them before it
    returned.
    """

    maps: dict[str, Tensor]
    error: Exception | None
    calls: Calls
    after: dict[str, int]


def layer_maps(
    model: nn.Module,
    layers: Mapping[str, int | None],
    images: Tensor,
    copy: Callable[[Tensor], Tensor] = torch.clone,
) -> Ran:
    """Run the model on images [N, C, H, W] and read the layers' outputs as maps.

    layers: names with the axis of their channels. copy: of a map, for an in-place activation may overwrite the layer's
    own output next. Raises UnitvisError for a layer that does not run exactly once or does not return one map for each
    image, also where the model's own code catches it.
    """
    maps: dict[str, Tensor] = {}
    after: dict[str, int] = {}
    refusals: list[UnitvisError] = []
    calls = Calls()

    def keep(name: str, output: object) -> None:
        if name in maps:
            raise UnitvisError(f"layer {name!r} runs more than once in a forward pass; its response is ambiguous")
        found = as_map(name, layers[name], output)
        if len(found) != len(images):
            raise UnitvisError(f"layer {name!r} gives {len(found)} maps for {len(images)} images; name a layer outside")
        maps[name], after[name] = copy(found), len(calls.names)

    def hook(name: str, output: object) -> None:
        try:
            with calls.paused():
                keep(name, output)
        except UnitvisError as refusal:
            refusals.append(refusal)
            raise

    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_hook(lambda module, _, output, name=name: hook(name, output)) for name in layers
    ]
    error: Exception | None = None
    try:
        with calls.recording():
            model(images.clone())  # a copy, because the model may overwrite its input
    except Exception as raised:
        error = raised
    finally:
        for handle in handles:
            handle.remove()
    if refusals:
        raise refusals[0]
    missing = [name for name in layers if name not in maps]
    if missing and error is None:
        raise UnitvisError(f"layer {missing[0]!r} does not run in a forward pass")
    # A failure after the last of the layers does not matter, such as a classifier made for another input size.
    return Ran(maps, error if missing else None, calls, after)


def acts_as_in_training(module: nn.Module) -> bool:
    """True for a module that `eval()` leaves in training mode, and for a BatchNorm without running statistics."""
    return module.training or (isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None)


def training_mode_hint(model: nn.Module) -> str:
    """Name, for an error message, up to five modules for which `acts_as_in_training` holds; empty without any."""
    names = [name for name, module in model.named_modules() if acts_as_in_training(module)]
    return f" (in training mode or without running statistics: {', '.join(names[:5])})" if names else ""
