"""Running a copy of a model and reading its layers' maps, as tracing and probing both do; checks of their arguments."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from unitvis.errors import UnitvisError, error_text
from unitvis.network.channels import channel_axes
from unitvis.network.forward import as_map
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
def inference_copy(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Copy a model into eval mode, sharing its parameters; with a dtype: on the CPU, its floating-point tensors cast.

    Buffers and attributes are always copied, because a forward pass may count in them and a tracer may leave fake
    tensors there. Raises UnitvisError for a model that cannot be copied.
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


def layer_maps(model: nn.Module, layers: Mapping[str, int | None], images: Tensor) -> dict[str, Tensor]:
    """Run the model on images [N, C, H, W] and return the layers' outputs as maps [N, C', H', W'].

    layers: names with the axis of their channels.

    Raises UnitvisError for a layer that does not run exactly once or does not return one map for each image.
    """
    maps: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, output: object) -> None:
        if name in maps:
            raise UnitvisError(f"layer {name!r} runs more than once in a forward pass; its response is ambiguous")
        found = as_map(name, layers[name], output)
        if len(found) != len(images):
            raise UnitvisError(f"layer {name!r} gives {len(found)} maps for {len(images)} images; name a layer outside")
        maps[name] = found.clone()  # an in-place activation may overwrite the layer's own output next

    modules = dict(model.named_modules())
    hooks = [
        modules[name].register_forward_hook(lambda module, _, output, name=name: keep(name, module, output))
        for name in layers
    ]
    try:
        model(images.clone())  # a copy, because the model may overwrite its input
    except UnitvisError:
        raise
    except Exception:
        # A failure after the last of the layers does not matter, such as a classifier made for another input size.
        if len(maps) < len(layers):
            raise
    finally:
        for hook in hooks:
            hook.remove()
    if missing := [name for name in layers if name not in maps]:
        raise UnitvisError(f"layer {missing[0]!r} does not run in a forward pass")
    return maps


def acts_as_in_training(module: nn.Module) -> bool:
    """True for a module that `eval()` leaves in training mode, and for a BatchNorm without running statistics."""
    return module.training or (isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None)


def training_mode_hint(model: nn.Module) -> str:
    """Name, for an error message, up to five modules for which `acts_as_in_training` holds; empty without any."""
    names = [name for name, module in model.named_modules() if acts_as_in_training(module)]
    return f" (in training mode or without running statistics: {', '.join(names[:5])})" if names else ""
