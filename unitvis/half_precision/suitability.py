"""Whether half precision suits a network, judged by what its operations compute in float32 from some images.

Re-ranking bounds the errors of images that it does not compute by those of images that it does. An error that rises at
once, in few images, shows in no sample: a sum that overflows behind a division, a denominator that becomes 0, a
comparison that turns out the other way. Three properties of the float32 pass rule such errors out: numbers with room
below the largest and above the smallest of the half precision, and no operation that makes a step.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from unitvis.errors import UnitvisError
from unitvis.half_precision.step import HALF
from unitvis.network.copies import copied
from unitvis.network.forward import COMPUTE_BATCH, Hooks
from unitvis.network.network import Network

NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}  # precisions in sentences
HEADROOM = 16  # times more than in the images looked at, numbers may reach in the others; as many times less likewise
TOLERANCE = 8  # resolutions of the half precision, of a layer's largest value: what rounding does in a deep network
# Operations on floats that make a step, hide NaN, or hand a number to the model's Python code, which may compare it.
_STEPS = {
    "sign", "sgn", "floor", "ceil", "round", "trunc", "fix", "frac", "fmod", "remainder", "floor_divide", "heaviside",
    "hardshrink", "fake_quantize_per_tensor_affine_cachemask", "fake_quantize_per_channel_affine_cachemask",
    "nan_to_num", "nansum", "nanmedian", "fmax", "fmin", "_local_scalar_dense",
}  # fmt: skip


def fallbacks(precision: str) -> tuple[str, ...]:
    """The precisions in which a scan may run that was asked for one: itself, and the next wider ones."""
    wider = tuple(NAMES)
    return wider if precision == "exact" else wider[wider.index(precision) :]


def suitable_precision(network: Network, images: Tensor, precision: str) -> tuple[str, str | None]:
    """The precision, or else the next wider one, that suits a network whose layers are known, with the reason if wider.

    images: as they were read, any number from 1.
    """
    first_reason = None
    for wider in fallbacks(precision)[:-1]:
        parts = (unsuitable_layers(network, part, wider) for part in images.split(COMPUTE_BATCH))
        reasons = (reason for part in parts for reason in part.values())
        reason = _failure(network, images[:COMPUTE_BATCH], wider) or next(reasons, None)
        if reason is None:
            return wider, first_reason
        first_reason = first_reason or reason
    return "fp32", first_reason


def unsuitable_layers(network: Network, images: Tensor, precision: str) -> dict[str, str]:
    """The layers that half precision might get wrong without a trace, each with the reason, a clause for people.

    images: as they were read, at most `COMPUTE_BATCH`.
    """
    # Filled up with the same images: those of zeros that a compute batch is padded with are nobody's.
    filled = images[torch.arange(COMPUTE_BATCH, device=images.device) % len(images)]
    found: dict[str, str] = {}
    maps_of: dict[int, Tensor] = {}
    names = [layer.name for layer in network.layers]
    dtype = HALF[precision]
    pixels = network.normalise(filled)
    watch = _Watch(pixels)

    def judge(index: int, maps: Tensor) -> None:
        if reason := watch.reason(precision):
            found[names[index]] = f"before layer {names[index]!r} is read, {reason}"
        else:
            maps_of[index] = maps.clone()

    def compare(index: int, maps: Tensor) -> None:
        if index in maps_of and not _close(maps, maps_of.pop(index), TOLERANCE * torch.finfo(dtype).eps):
            found[names[index]] = (
                f"layer {names[index]!r} depends on numbers below {HEADROOM * torch.finfo(dtype).smallest_normal:.2g}, "
                f"which lose digits near the smallest of {NAMES[precision]}"
            )

    _run(network, pixels, watch, judge)
    if maps_of:
        _run(network, pixels, _Rounding(dtype), compare)
    return {name: found[name] for name in names if name in found}


def _failure(network: Network, images: Tensor, precision: str) -> str | None:
    """Why the model cannot be computed in half precision at all; None where it can."""
    dtype, finfo = HALF[precision], torch.finfo(HALF[precision])
    tensors = [*network.model.named_parameters(), *network.model.named_buffers()]
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel() and (largest := _largest(tensor)) > finfo.max:
            return f"{name!r} holds {largest:.3g}, and {NAMES[precision]} ends at {finfo.max:.3g}"
    try:
        model = copied(network.model).to(memory_format=torch.channels_last).to(dtype)  # type: ignore[call-overload]
        axes = network.channel_axes([layer.name for layer in network.layers], network.input_shape)
        with torch.inference_mode(), torch.autocast(network.device.type, enabled=False), Hooks(model, axes) as hooks:
            hooks.run(network.normalise(images).to(dtype, memory_format=torch.channels_last), lambda index, maps: None)
    except UnitvisError as error:
        return f"it does not compute in {NAMES[precision]} ({error})"
    return None


def _run(network: Network, images: Tensor, mode: TorchDispatchMode, read: Callable[[int, Tensor], None]) -> None:
    """One canonical pass, whose forward pass runs under a dispatch mode."""
    # Under a torch function mode transformer layers take no fast path, which would hide their operations.
    with network.reading() as canonical, BaseTorchFunctionMode():
        canonical.maps(images, read, mode)


class _Observer(TorchDispatchMode):
    """Calls `see` with each operation that is no composite of others, its arguments and its result."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode composite operations arrive whole
            if func is torch.ops.aten.scaled_dot_product_attention.default:  # else one fused kernel
                return torch.ops.aten._scaled_dot_product_attention_math(*args, **kwargs)[0]
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        return self.see(func, args, kwargs, func(*args, **kwargs))

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """The result to go on with."""
        raise NotImplementedError


class _Watch(_Observer):
    """Finds the largest finite magnitude of any result, and the first step that what comes from the images has to take.

    A step is an operation of `_STEPS`, or one that computes floats from whole numbers or truth values that came from
    floats, as after a comparison or an argmax.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.largest = 0.0
        self.step: str | None = None  # the name of the operation
        # Memory that depends on the images: floats, and other numbers that were computed from floats.
        self._floats, self._others = {StorageWeakRef(images.untyped_storage())}, set[StorageWeakRef]()

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """Observe a result; it stays as it is."""
        inputs = {StorageWeakRef(x.untyped_storage()) for x in _tensors((args, kwargs))}
        name = func.overloadpacket.__name__
        from_floats, from_others = not inputs.isdisjoint(self._floats), not inputs.isdisjoint(self._others)
        if self.step is None and (from_floats or from_others) and _makes_step(name, args, kwargs):
            self.step = str(func)
        for output in _tensors(result):
            if from_floats or from_others:
                memory = self._floats if output.is_floating_point() else self._others
                memory.add(StorageWeakRef(output.untyped_storage()))
            if output.is_floating_point():
                if from_others:
                    self.step = self.step or str(func)
                if output.numel() and not _is_view(func) and "empty" not in name:  # empty: not written yet
                    self.largest = max(self.largest, _largest(output))
        return result

    def reason(self, precision: str) -> str | None:
        """A clause for people: why numbers like those seen so far do not suit a half precision; None if they do."""
        largest = torch.finfo(HALF[precision]).max
        if self.largest * HEADROOM > largest:
            return (
                f"numbers reach {self.largest:.3g}; {NAMES[precision]} ends at {largest:.3g}, and a factor of "
                f"{HEADROOM} is kept free"
            )
        if self.step is not None:
            return f"{self.step} makes a step, which a rounding error can take"
        return None


class _Rounding(_Observer):
    """Rounds small results in float32 as a half precision does whose smallest number is `HEADROOM` times as large."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        finfo = torch.finfo(dtype)
        self._below = finfo.smallest_normal * HEADROOM
        self._shift = (
            1.5 * 2**23 * self._below * finfo.eps
        )  # float32 numbers near it lie one spacing of small ones apart

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """Round a result."""
        if _is_view(func):
            return result
        if func._schema.is_mutable:
            for output in _tensors(result):
                if output.dtype == torch.float32:
                    output.copy_(self._rounded(output))
            return result
        return tree_map_only(Tensor, lambda x: self._rounded(x) if x.dtype == torch.float32 else x, result)

    def _rounded(self, x: Tensor) -> Tensor:
        small = x.clamp(-self._below, self._below)
        # What rounding adds to the small ones: 0 at the bounds. NaN stays.
        return (small + self._shift).sub_(self._shift).sub_(small).add_(x)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _largest(x: Tensor) -> float:
    """The largest finite magnitude of a tensor."""
    least, greatest = float(x.detach().amin()), float(x.detach().amax())
    if math.isfinite(least) and math.isfinite(greatest):  # neither is where there is NaN
        return max(-least, greatest)
    return float(x.detach().abs().nan_to_num(0, 0, 0).amax())


def _close(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """True where no value differs by more than a share of the largest one wanted; those not finite need not agree."""
    difference = (found - wanted).abs_()
    slack = tolerance * _largest(wanted)
    if float(difference.amax()) <= slack:
        return True
    return not bool(((difference > slack) | ~found.isfinite())[wanted.isfinite()].any())


def _is_view(func: Any) -> bool:
    """True for an operation whose result is a view of an argument."""
    return any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)


def _makes_step(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True for an operation from floats to floats that is not continuous."""
    return (
        name in _STEPS
        or (name == "threshold" and args[1] != args[2])
        or kwargs.get("rounding_mode") is not None
        or (name in ("grid_sampler_2d", "grid_sampler_3d") and args[2] == 1)  # the nearest value
    )
