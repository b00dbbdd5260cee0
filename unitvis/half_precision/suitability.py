"""Whether half precision suits a network, judged by what its operations compute in float32 from some images.

Re-ranking bounds the errors of images that it does not compute by those of images that it does. An error that rises at
once, in few images, shows in no sample: a sum that overflows behind a division, a denominator that becomes 0, a
comparison that turns out the other way. Three properties of the float32 pass rule such errors out: numbers with room
below the largest and above the smallest of the half precision, and no operation that makes a step.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import unitvis_kernels as uk
from unitvis.errors import UnitvisError
from unitvis.half_precision.step import HALF
from unitvis.network.borrowing import Tensors
from unitvis.network.copies import copied
from unitvis.network.forward import COMPUTE_BATCH, Hooks
from unitvis.network.memory import place, shortage
from unitvis.network.network import Network
from unitvis.network.operators import CONVOLUTIONS_AND_NORMS, names
from unitvis.network.receptive_fields.calls import READ_OUTSIDE

NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}  # precisions in sentences
HEADROOM = 16  # times more than in the images looked at, numbers may reach in the others; as many times less likewise
TOLERANCE = 8  # resolutions of the half precision, of a layer's largest value: what rounding does in a deep network
# Times the error of the median image that half precision may make of an image that is nearly of one colour: trained
# networks with batch normalisation make ten, normalisations of such an image make hundreds.
FLAT_TOLERANCE = 32
LEAST_EXPONENT = 0.2  # of a power: smaller ones raise the smallest numbers of half precision to more than a thirtieth
# ATen operations, without the underscore of in-place ones, from floats to floats that are continuous where their
# results are finite. Any other makes a step, hides NaN, hands numbers to the model's Python code, or may do so.
_CONTINUOUS = CONVOLUTIONS_AND_NORMS | names(
    """_slow_conv2d_forward mm addmm bmm baddbmm addbmm mv addmv dot vdot linear mkldnn_linear _trilinear
    _cdist_forward mkldnn_rnn_layer _thnn_fused_lstm_cell _thnn_fused_gru_cell add sub rsub mul div true_divide
    neg abs sqrt rsqrt exp exp2 expm1 log log1p log2 log10 sin cos tan tanh sinh cosh asin acos atan atanh asinh
    acosh sinc logit xlogy entr erf erfc erfinv reciprocal square pow lerp addcmul addcdiv hypot logaddexp
    logaddexp2 special_entr special_xlog1py special_i0 special_i1 lgamma digamma sigmoid relu relu6 leaky_relu
    elu selu celu gelu silu mish softplus softshrink hardtanh hardsigmoid hardswish clamp clamp_min clamp_max
    maximum minimum prelu _prelu_kernel log_sigmoid log_sigmoid_forward threshold rrelu_with_noise glu _softmax
    _safe_softmax _log_softmax softmax log_softmax logsumexp cumsum cumprod logcumsumexp cummax cummin
    _cummax_helper _cummin_helper sum mean prod std var var_mean std_mean norm linalg_vector_norm amax amin max
    min aminmax median kthvalue sort topk trace renorm max_pool2d_with_indices max_pool3d_with_indices
    adaptive_max_pool2d adaptive_max_pool3d mkldnn_max_pool2d avg_pool2d avg_pool3d _adaptive_avg_pool2d
    _adaptive_avg_pool3d adaptive_avg_pool2d mkldnn_adaptive_avg_pool2d max_unpool2d max_unpool3d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sampler_2d grid_sampler_3d affine_grid_generator
    pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle im2col col2im index index_select gather
    scatter scatter_add scatter_reduce index_add index_copy index_put _index_put_impl masked_fill masked_select
    masked_scatter where take take_along_dim embedding cat stack constant_pad_nd reflection_pad1d
    reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d roll flip repeat
    repeat_interleave tile diag diag_embed tril triu rot90 unfold_copy view_copy as_strided transpose squeeze
    unsqueeze t detach clone copy _to_copy contiguous fill zero lift_fresh lift alias _reshape_alias_copy
    _reshape_copy resize resize_as empty_like zeros_like ones_like full_like new_empty new_zeros new_ones
    new_full new_empty_strided complex polar view_as_real_copy view_as_complex_copy _conj_physical conj_physical
    real_copy imag_copy _fft_r2c _fft_c2r _fft_c2c native_dropout _unsafe_view _unsafe_index slice_scatter
    select_scatter diagonal_scatter as_strided_scatter split_copy unbind_copy"""
)
# Functions between two bounds, with how far apart inputs near the one and near the other lie.
_WIDTHS = {
    "tanh": 2.0,
    "erf": 2.0,
    "erfc": 2.0,
    "sin": 2.0,
    "cos": 2.0,
    "atan": 4.0,
    "relu6": 6.0,
    "hardsigmoid": 6.0,
    **dict.fromkeys(("sigmoid", "softmax", "_softmax", "_safe_softmax"), 4.0),
}
_LIMITING = names("hardtanh clamp clip clamp_min clamp_max maximum minimum")  # between bounds that are arguments
STEEPEST = 1 / 8  # widths of a function between two bounds that two neighbouring half precision inputs may lie apart


def fallbacks(precision: str) -> tuple[str, ...]:
    """The precisions in which a scan may run that was asked for one: itself, and the next wider ones."""
    wider = tuple(NAMES)
    return wider if precision == "exact" else wider[wider.index(precision) :]


def suitable_precision(network: Network, images: Tensor, precision: str) -> tuple[str, str | None]:
    """The precision, or else the next wider one, that suits a network whose layers are known, with the reason if wider.

    images: as they were read, any number from 1.
    """
    if not network.followed and (layer := network.unfollowed) is not None:
        return "fp32", (
            f"the model's code could not be followed as far as layer {layer!r} and may mix the images of some batches, "
            f"which is looked for in float32 alone"
        )
    with network.reading() as canonical:  # functions that keep tensors make them here, not in inference mode
        canonical.maps(images[:COMPUTE_BATCH], lambda index, maps: None)
    first, first_reason = images[:COMPUTE_BATCH], None
    batches = first, nearly_flat(first)
    for wider in fallbacks(precision)[:-1]:
        parts = (unsuitable_layers(network, part, wider) for part in images.split(COMPUTE_BATCH))
        reasons = (reason for part in parts for reason in part.values())
        half, reason = _in_half(network, batches, wider)
        reason = reason or next(reasons, None) or _flat_images(network, batches, half, wider)
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


def _in_half(network: Network, batches: Sequence[Tensor], precision: str) -> tuple[list[Tensor], str | None]:
    """Responses of batches in half precision, see `_half_values`, or why the model cannot be computed in it at all."""
    dtype, finfo = HALF[precision], torch.finfo(HALF[precision])
    tensors = [*network.model.named_parameters(), *network.model.named_buffers()]
    for name, tensor in tensors:
        if tensor.is_complex():
            return [], f"{name!r} holds complex numbers, and {NAMES[precision]} has only real ones"
        if tensor.is_floating_point() and tensor.numel() and (largest := _largest(tensor)) > finfo.max:
            return [], f"{name!r} holds {largest:.3g}, and {NAMES[precision]} ends at {finfo.max:.3g}"
    try:
        return _half_values(network, batches, dtype), None
    except Exception as error:
        if shortage(error) is not None:
            return [], f"a copy of the model in {NAMES[precision]} does not fit into {place(network.device)} beside it"
        if not isinstance(error, UnitvisError):
            raise
        return [], f"it does not compute in {NAMES[precision]} ({error})"


def _half_values(network: Network, batches: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Responses of batches in half precision, float32 [N, units] each, by a copy of the model."""
    model = copied(network.model).to(memory_format=torch.channels_last).to(dtype)  # type: ignore[call-overload]
    hooks = Hooks(model, network.channel_axes(network.layer_names, network.input_shape), inside=network.inside)
    with torch.no_grad(), torch.autocast(network.device.type, enabled=False), hooks:
        pixels = (network.normalise(batch).to(dtype, memory_format=torch.channels_last) for batch in batches)
        found = []
        for one in pixels:
            with Tensors(model).kept():  # a pass that ends with the last layer may leave the model changed
                found.append(hooks.keys(one, network.columns, None, neurons=network.unit == "neuron"))
    return [uk.unpack(keys)[0].float() for keys in found]


def _flat_images(network: Network, batches: Sequence[Tensor], half: list[Tensor], precision: str) -> str | None:
    """Why half precision gets images wrong that are nearly of one colour; None where it errs as in others.

    batches: images of the data set, and flat ones; half: their responses in half precision.

    Data sets hold such images, if few: blank pages, skies, masks. A normalisation of the image gives them the contrast
    of any other, and with it what rounding did to them.
    """
    dtype = HALF[precision]
    with network.reading() as canonical:
        wanted = [uk.unpack(canonical.keys(batch))[0].float() for batch in batches]
    usual, unusual = ((found - right).abs().nan_to_num(0, 0, 0) for found, right in zip(half, wanted, strict=True))
    for layer, own in zip(network.layers, network.columns, strict=True):
        # The median image: some of these may be flat themselves.
        expected = float(usual[:, own].amax(dim=1).median())
        expected = max(expected, torch.finfo(dtype).eps * max(_largest(right[:, own]) for right in wanted))
        if (error := float(unusual[:, own].amax())) > FLAT_TOLERANCE * expected:
            return (
                f"layer {layer.name!r} errs by {error:.2g} in {NAMES[precision]} where an image is nearly of one "
                f"colour, and by {expected:.2g} in others"
            )
    return None


def nearly_flat(images: Tensor) -> Tensor:
    """`COMPUTE_BATCH` images of almost one grey each: four greys with a spot, two, noise or a half that hardly differ.

    images: those of the data set, as they were read, whose shape, type and range of values they have.
    """
    pixels = images.dtype == torch.uint8
    height, width = images.shape[1:3] if pixels else images.shape[2:]
    finite = images[images.isfinite()].float()
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    changes = torch.zeros(4, height, width)
    changes[:2, height // 2, width // 2] = 1
    changes[1, height // 4, width // 3] = -1
    changes[2] = torch.rand(height, width, generator=torch.Generator().manual_seed(0)) < 0.02
    changes[2, 0, 0] = 1  # where the images are small, by chance nothing else is
    changes[3, height // 2 :] = 1
    levels = low + (high - low) * torch.tensor([0.02, 0.35, 0.65, 0.98])
    finest = (high - low) / torch.tensor([255.0, 4096.0, 16384.0, 65536.0])
    steps = torch.ones(4) if pixels else finest
    flat = levels[:, None, None, None] + steps[:, None, None, None] * changes
    flat = flat.reshape(COMPUTE_BATCH, height, width).to(images.device)
    whole = flat.round()[..., None] if pixels else flat[:, None]
    return whole.expand(-1, *images.shape[1:]).to(images.dtype).contiguous()


def _run(network: Network, images: Tensor, mode: TorchDispatchMode, read: Callable[[int, Tensor], None]) -> None:
    """One canonical pass, whose forward pass runs under a dispatch mode."""

    @contextmanager
    def observed() -> Iterator[None]:
        with torch.inference_mode(), mode:  # under which operators come whole that are made of others
            yield

    with network.reading() as canonical, _ReadsOutside(mode):
        canonical.maps(images, read, observed())


class _ReadsOutside(TorchFunctionMode):
    """Tells a `_Watch` of numbers that the model reads outside of PyTorch, as through NumPy.

    Under a torch function mode transformer layers take no fast path, which would hide their operations.
    """

    def __init__(self, mode: TorchDispatchMode) -> None:
        super().__init__()
        self._watch = mode if isinstance(mode, _Watch) else None

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if self._watch is not None and name in READ_OUTSIDE and args:
            self._watch.read_outside(args[0], name)
        return func(*args, **(kwargs or {}))


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
        self.look(func, args, kwargs)
        return self.see(func, args, kwargs, func(*args, **kwargs))

    def look(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Observe the arguments, which the operation may overwrite."""

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """The result to go on with."""
        raise NotImplementedError


class _Watch(_Observer):
    """Finds the largest finite magnitude of any result, and the first step that what comes from the images has to take.

    A step is an operation that is not `_CONTINUOUS`, one that computes floats from whole numbers or truth values that
    came from floats, as after a comparison or an argmax, or numbers that the model reads outside of PyTorch. Of the
    functions between two bounds, the steepest for its inputs is kept.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.largest = 0.0
        self.step: str | None = None  # the name of the operation
        self.steepest, self.widths = "", 0.0  # a function between two bounds, and how many widths its inputs reach
        self._input = 0.0  # the largest magnitude that the operation at hand reads and that comes from the images
        # Memory that depends on the images: floats, and other numbers that were computed from floats.
        self._floats, self._others = {StorageWeakRef(images.untyped_storage())}, set[StorageWeakRef]()

    def look(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the largest input of a function between two bounds."""
        self._input = 0.0
        if _name(func) in _WIDTHS or _name(func) in _LIMITING:
            inputs = (x for x in _tensors((args, kwargs)) if StorageWeakRef(x.untyped_storage()) in self._floats)
            if "softmax" in _name(func):  # those far below the largest, as behind a mask, have no part in it
                inputs = (x.amax(args[1]) for x in inputs if x.numel())
            self._input = max((_largest(x) for x in inputs if x.numel() and x.is_floating_point()), default=0.0)

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """Observe a result; it stays as it is."""
        if self._input and (widths := self._input / max(_width(func, args, result), 1e-30)) > self.widths:
            self.steepest, self.widths = str(func), widths
        inputs = {StorageWeakRef(x.untyped_storage()) for x in _tensors((args, kwargs))}
        name = func.overloadpacket.__name__
        from_floats, from_others = not inputs.isdisjoint(self._floats), not inputs.isdisjoint(self._others)
        if self.step is None and (from_floats or from_others) and _makes_step(func, args, kwargs, result):
            self.step = str(func)
        for output in _tensors(result):
            if from_floats or from_others:
                memory = self._floats if output.is_floating_point() else self._others
                memory.add(StorageWeakRef(output.untyped_storage()))
            if output.is_floating_point():
                if from_others:
                    self.step = self.step or str(func)
                # Those of empty are not written yet; of 8 bits can nothing be computed.
                if output.numel() and not _is_view(func) and "empty" not in name and output.element_size() > 1:
                    self.largest = max(self.largest, _largest(output))
        return result

    def read_outside(self, tensor: Tensor, method: str) -> None:
        """Note that the model reads a tensor by a method that hands its numbers to other code."""
        memory = StorageWeakRef(tensor.untyped_storage())
        if self.step is None and (memory in self._floats or memory in self._others):
            self.step = f"{method}()"

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
        if self.widths * torch.finfo(HALF[precision]).eps > STEEPEST:
            return (
                f"{self.steepest} goes from one bound to the other within 1/{self.widths:.0f} of the largest number "
                f"that it reads, of which {NAMES[precision]} tells 1/{1 / torch.finfo(HALF[precision]).eps:.0f}"
            )
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


def _name(func: Any) -> str:
    """The name of an operation, the same for its form in place."""
    name = str(func.overloadpacket.__name__)
    return name.rstrip("_") or name


def _width(func: Any, args: tuple[Any, ...], result: Tensor) -> float:
    """How far apart inputs at the two bounds of a function of `_WIDTHS` or `_LIMITING` lie."""
    if (width := _WIDTHS.get(_name(func))) is not None:
        return width
    low, high = (*args, *((-1.0, 1.0) if _name(func) == "hardtanh" else (None, None))[len(args) - 1 :])[1:3]
    if isinstance(low, int | float) and isinstance(high, int | float):
        return float(high - low)
    finite = result[result.isfinite()]
    extent = float(finite.amax() - finite.amin()) if len(finite) else 0.0
    if not extent and (_name(func) in ("clamp_min", "maximum") or (_name(func) == "clamp" and high is None)):
        return math.inf  # closed, as a ReLU is, which has no second bound
    return extent or _largest(result)  # one number, or a bound that all have reached


def _is_view(func: Any) -> bool:
    """True for an operation whose result is a view of an argument."""
    return any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)


def _makes_step(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
    """Whether an operation whose operands come from the images is not known to be continuous.

    Whole numbers and truth values are no step themselves; what is computed from them is.
    """
    name = _name(func)
    if _is_view(func) or not any(
        leaf.is_floating_point() or leaf.is_complex() if isinstance(leaf, Tensor) else isinstance(leaf, int | float)
        for leaf in tree_leaves(result)
    ):
        return False
    if func.namespace != "aten" or name not in _CONTINUOUS:
        return True
    narrowed = any(one.is_floating_point() and one.element_size() == 1 for one in _tensors(result))
    return (
        narrowed
        or _counts(name, args)
        or (name.startswith("threshold") and args[1] != args[2])
        or kwargs.get("rounding_mode") is not None
        or (name in ("grid_sampler_2d", "grid_sampler_3d") and args[2] == 1)  # the nearest value
    )


def _counts(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a power or a norm tells zeros from what is not, or nearly so: its order or exponent is near 0."""
    if name == "pow":
        base, exponent = args[:2]
        if not isinstance(base, Tensor):
            return bool(base == 0)
        least = float(exponent.detach().abs().amin()) if isinstance(exponent, Tensor) and exponent.numel() else exponent
        return isinstance(least, int | float) and 0 < abs(least) < LEAST_EXPONENT
    if name in ("norm", "linalg_vector_norm", "_cdist_forward"):
        order = args[2 if name == "_cdist_forward" else 1] if len(args) > 1 else 2
        return isinstance(order, int | float) and -math.inf < order < 1
    return False
