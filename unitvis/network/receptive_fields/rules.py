"""One rule for each ATen operator: the reaches of its outputs from those of its operands.

A rule is right for any values of its operands. Raises `Unsupported` for an operator without a rule.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unitvis.errors import error_text
from unitvis.network.receptive_fields.reach import (
    ROWS,
    UNREAD,
    Reach,
    aligned,
    collapse,
    concatenated,
    moved,
    reduced,
    regrouped,
    reshaped,
    union,
    unreached,
    windowed,
)


class Unsupported(Exception):  # noqa: N818 - no failure for the user: boxes are unknown
    """An operator without a closed form; the message names it."""


@dataclass(frozen=True)
class Pooling:
    """A max-pooling: its arguments by name, and the shape of its input."""

    args: dict[str, Any]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Operand:
    """A tensor argument: full shape, strides, reach (None for a constant), and how to get a constant's value.

    pooling: where it holds the positions of maxima, the pooling that found them.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    reach: Reach | None
    value: Callable[[], Tensor]
    pooling: Pooling | None
    dtype: torch.dtype


@dataclass(frozen=True)
class Call:
    """One operator call of the graph: arguments by their names in the schema, shape and dtype of the first output."""

    func: torch._ops.OpOverload
    args: dict[str, Any]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The operator's name without its namespace and overload, such as "convolution"."""
        return self.func._schema.name.removeprefix("aten::")

    @property
    def operands(self) -> list[Operand]:
        """Every tensor argument, those in lists included."""
        values = [v for value in self.args.values() for v in (value if isinstance(value, list | tuple) else [value])]
        return [value for value in values if isinstance(value, Operand)]

    @property
    def main(self) -> Operand:
        """The first argument; raises Unsupported where it is a constant."""
        operand = next(iter(self.args.values()))
        if not isinstance(operand, Operand) or operand.reach is None:
            raise Unsupported(f"{self.func} of a constant")
        return operand

    @property
    def reach(self) -> Reach:
        """The reach of the first argument."""
        reach = self.main.reach
        assert reach is not None  # noqa: S101 - for mypy; `main` refuses constants
        return reach

    def positive(self, dims: int | Sequence[int] | None) -> list[int]:
        """Convert dimensions of the first argument to non-negative numbers; None or [] means all."""
        ndim = len(self.main.shape)
        if dims is None or dims == []:
            return list(range(ndim))
        return [dim % ndim for dim in ([dims] if isinstance(dims, int) else dims)]


Rule = Callable[[Call], Reach | Sequence[Reach]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the decorated function as the rule of these operators."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def carry(call: Call) -> Reach | Sequence[Reach]:
    """Apply the operator's rule: one reach for all outputs of the first one's shape, or a reach for each output."""
    if torch.Tag.pointwise in call.func.tags:
        return _pointwise(call)
    if call.name not in RULES:
        raise Unsupported(f"no closed form for {call.func}")
    try:
        return RULES[call.name](call)
    except Unsupported:
        raise
    except Exception as error:  # arguments that the rule does not know
        raise Unsupported(f"no closed form for {call.func} ({error_text(error)})") from error


# --- elementwise operators and operators that move elements ----------------------------------------------------------


# Elementwise operators that torch does not tag as pointwise.
@rule("_to_copy", "detach", "alias", "_prelu_kernel", "hardswish", "log_sigmoid_forward")
@rule("fill", "native_dropout", "rrelu_with_noise_functional", "complex", "floor_divide")
@rule("expand", "expand_copy")
def _pointwise(call: Call) -> Reach:
    return union([operand.reach for operand in call.operands if operand.reach is not None], len(call.shape))


@rule("copy")
def _copy(call: Call) -> Reach:
    written = call.args["src"].reach
    return unreached(call.reach, len(call.shape)) if written is None else aligned(written, len(call.shape))


# Only the shape of the argument is used.
@rule("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty")
def _constant(call: Call) -> Reach:
    return unreached(call.reach, len(call.shape))


@rule("view", "_unsafe_view", "view_copy", "_reshape_alias", "squeeze", "unsqueeze")
def _reshape(call: Call) -> Reach:
    return reshaped(call.reach, call.main.shape, call.shape)


@rule("as_strided", "as_strided_")
def _restride(call: Call) -> Reach:
    """Pooling a channels-last map to 1x1 sets the strides of dimensions of size 1: no element moves."""
    old, new = call.main.stride, call.args["stride"]
    if call.shape != call.main.shape or call.args["storage_offset"]:
        raise Unsupported(f"no closed form for {call.func}")
    if any(a != b for a, b, n in zip(old, new, call.shape, strict=True) if n > 1):
        raise Unsupported(f"no closed form for {call.func}")
    return call.reach


def _move(call: Call, dims: Sequence[int] | None) -> list[Reach]:
    """Apply the operator itself to the bounds of its operands, each at full size along `dims` (None: all)."""
    tensors = [name for name, value in call.args.items() if isinstance(value, Operand) and name != "index"]
    if call.args[tensors[0]].reach is None and len(tensors) == 1:
        raise Unsupported(f"{call.func} with indices that depend on the image")
    known = next(operand.reach for operand in call.operands if operand.reach is not None)
    operands = [call.args[name] for name in tensors]
    rest = {name: value for name, value in call.args.items() if name not in tensors}
    for name in ("index", "indices"):
        if name in rest:
            rest[name] = _indices(call, rest[name])

    def move(bounds: Sequence[Tensor]) -> Sequence[Tensor]:
        result = call.func(**dict(zip(tensors, bounds, strict=True)), **rest)
        return [result] if isinstance(result, Tensor) else result

    reaches = [unreached(known, len(operand.shape)) if operand.reach is None else operand.reach for operand in operands]
    return moved(reaches, [operand.shape for operand in operands], move, dims)


def _indices(call: Call, indices: Any) -> Any:
    """Replace index operands by their constant values; raises Unsupported where they depend on the image."""
    if isinstance(indices, Operand):
        if indices.reach is not None:
            raise Unsupported(f"{call.func} with indices that depend on the image")
        return indices.value().cpu()
    return [_indices(call, index) for index in indices] if isinstance(indices, list | tuple) else indices


@rule("permute", "permute_copy", "transpose", "transpose_copy", "t", "t_copy")
def _permute(call: Call) -> list[Reach]:
    return _move(call, [])


@rule("slice", "select", "split", "split_with_sizes", "split_copy", "unbind", "unfold", "index_select")
def _move_along(call: Call) -> list[Reach]:
    return _move(call, call.positive(call.args["dimension" if call.name == "unfold" else "dim"]))


@rule("flip", "roll")
def _move_along_dims(call: Call) -> list[Reach]:
    return _move(call, call.positive(list(call.args["dims"])))


@rule("gather")
def _gather(call: Call) -> Reach | list[Reach]:
    index, (dim,) = call.args["index"], call.positive(call.args["dim"])
    if index.reach is None:
        return _move(call, None)
    picked = reduced(call.reach, [dim])  # values choose along `dim`; elsewhere the first elements stay in their places
    for other, size in enumerate(call.shape):
        if picked.bounds.shape[other + 1] > size:
            picked = replace(picked, bounds=picked.bounds.narrow(other + 1, 0, size))
    return union([picked, index.reach], len(call.shape))


@rule("index_put")
def _index_put(call: Call) -> Reach | Sequence[Reach]:
    indices, values = call.args["indices"], call.args["values"]
    if len(indices) == 1 and indices[0].dtype == torch.bool and indices[0].shape == call.shape and not values.shape:
        return _pointwise(call)
    if call.args["accumulate"]:
        raise Unsupported(f"no closed form for {call.func} that adds")
    return _move(call, None)


@rule("scatter", "scatter_add", "scatter_reduce")
def _scatter(call: Call) -> Reach | list[Reach]:
    index, src = call.args["index"], call.args.get("src")
    if call.name == "scatter" and index.reach is None and src is not None:
        return _move(call, None)
    (dim,) = call.positive(call.args["dim"])
    reaches = [call.args["self"].reach]
    for operand in (index, src):  # values choose where along `dim` each element goes
        if operand is not None and operand.reach is not None:
            if any(n != m for d, (n, m) in enumerate(zip(operand.shape, call.shape, strict=True)) if d != dim):
                raise Unsupported(f"no closed form for {call.func} of a part")
            reaches.append(reduced(operand.reach, [dim]))
    return union([reach for reach in reaches if reach is not None], len(call.shape))


@rule("embedding")
def _embedding(call: Call) -> Reach:
    if call.args["weight"].reach is not None:
        raise Unsupported(f"{call.func} with weights that depend on the image")
    reach = call.args["indices"].reach
    return replace(reach, bounds=reach.bounds.unsqueeze(-1))


@rule("view_as_real")
def _as_real(call: Call) -> Reach:
    return replace(call.reach, bounds=call.reach.bounds.unsqueeze(-1))


@rule("view_as_complex")
def _as_complex(call: Call) -> Reach:
    return reduced(call.reach, [len(call.shape)], keepdim=False)


@rule("index", "repeat", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
@rule("im2col", "diagonal", "tril", "triu", "slice_scatter", "select_scatter", "rot90")
def _move_all(call: Call) -> list[Reach]:
    return _move(call, None)


@rule("cat", "stack")
def _concatenation(call: Call) -> Reach:
    operands = [operand for operand in call.args["tensors"] if operand.shape != (0,)]
    known = next(operand.reach for operand in operands if operand.reach is not None)
    reaches = [unreached(known, len(operand.shape)) if operand.reach is None else operand.reach for operand in operands]
    dim = call.args["dim"] % len(call.shape)
    if call.name == "cat":
        return concatenated(reaches, [operand.shape[dim] for operand in operands], dim)
    shape = operands[0].shape
    reaches = [reshaped(reach, shape, [*shape[:dim], 1, *shape[dim:]]) for reach in reaches]
    return concatenated(reaches, [1] * len(operands), dim)


@rule("glu")
def _glu(call: Call) -> Reach:
    (dim,) = call.positive(call.args["dim"])
    halves = moved([call.reach], [call.main.shape], lambda bounds: bounds[0].chunk(2, dim), [dim])
    return union(halves, len(call.shape))


# --- reductions ------------------------------------------------------------------------------------------------------


@rule("sum", "mean", "amax", "amin", "max", "min", "prod", "any", "all", "argmax", "argmin", "logsumexp", "median")
@rule("var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm", "count_nonzero", "nansum", "aminmax")
@rule("kthvalue", "mode", "nanmedian")
def _reduction(call: Call) -> Reach:
    return reduced(call.reach, call.positive(call.args.get("dim")), call.args.get("keepdim", False))


# Each output depends on the inputs up to its own.
@rule("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin")
def _cumulative(call: Call) -> Reach:
    (dim,) = call.positive(call.args["dim"])
    bounds = call.reach.widened(dim, call.shape[dim]).cummax(dim + 1).values
    return replace(call.reach, bounds=collapse(bounds, [dim]))


# Every output along `dim` depends on every input along it.
@rule("_softmax", "_log_softmax", "_safe_softmax", "sort", "topk", "_fft_r2c", "_fft_c2c", "_fft_c2r")
def _reduction_along(call: Call) -> Reach:
    return reduced(call.reach, call.positive(call.args["dim"]))


@rule("native_layer_norm", "_fused_rms_norm")
def _layer_norm(call: Call) -> Reach:
    ndim = len(call.main.shape)
    return reduced(call.reach, range(ndim - len(call.args["normalized_shape"]), ndim))


@rule("native_group_norm")
def _group_norm(call: Call) -> Reach:
    channels, groups = call.args["C"], call.args["group"]
    per_channel = reduced(call.reach, range(2, len(call.shape)))
    return regrouped(per_channel, channels, groups, channels)


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional", "cudnn_batch_norm")
@rule("_native_batch_norm_legit_no_training", "_batch_norm_no_update", "_batch_norm_with_update")
@rule("_batch_norm_with_update_functional", "miopen_batch_norm")
def _batch_norm(call: Call) -> Reach:
    if call.args.get("training", "with_update" in call.name):  # torch computes instance normalisation this way, too
        return reduced(call.reach, [dim for dim in range(len(call.shape)) if dim != 1])
    return call.reach


@rule("mm", "addmm", "bmm", "baddbmm", "mv", "dot", "addmv")
def _contraction(call: Call) -> Reach:
    *added, left, right = call.operands
    reaches = [operand.reach for operand in added if operand.reach is not None]
    for operand, dim in ((left, len(left.shape) - 1), (right, max(0, len(right.shape) - 2))):
        if operand.reach is not None:
            reaches.append(reduced(operand.reach, [dim], keepdim=len(operand.shape) <= len(call.shape)))
    return union(reaches, len(call.shape))


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention")
@rule("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")
@rule("_scaled_dot_product_fused_attention_overrideable")
def _attention(call: Call) -> Reach:
    reaches = []  # positions that a mask hides count as connected
    for name in ("query", "key", "value", "attn_mask", "attn_bias"):
        operand = call.args.get(name)
        if operand is None or operand.reach is None:
            continue
        # A query [.., L, E] reaches its own row of the output, keys and values [.., S, E] every row.
        reaches.append(reduced(operand.reach, [len(operand.shape) - 1] + [len(operand.shape) - 2] * (name != "query")))
    return union(reaches, len(call.shape))


# --- windows ---------------------------------------------------------------------------------------------------------


def _per_dim(value: int | Sequence[int], ndim: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * ndim if len(values) == 1 else values


def _window(outputs: int, kernel: int, stride: int, padding: int, dilation: int) -> Tensor:
    """The input positions that each output of a convolution or pooling reads, int64 [outputs, kernel]."""
    return torch.arange(outputs)[:, None] * stride - padding + torch.arange(kernel) * dilation


def _transposed_window(outputs: int, kernel: int, stride: int, padding: int, dilation: int) -> Tensor:
    """The input positions that each output of a transposed convolution reads, int64 [outputs, kernel]."""
    shifted = torch.arange(outputs)[:, None] + padding - torch.arange(kernel) * dilation
    return torch.where(shifted % stride == 0, shifted.div(stride, rounding_mode="floor"), UNREAD)


def _positions(reads: Tensor) -> Tensor:
    """The input positions that each output reads, int64 [outputs, window], from a matrix bool [outputs, inputs]."""
    positions = torch.where(reads, torch.arange(reads.shape[1]), UNREAD).sort(1).values
    return positions[:, : max(1, int(reads.sum(1).max()))]


@rule("convolution")
def _convolution(call: Call) -> Reach:
    image, weight, bias = (call.args[name] for name in ("input", "weight", "bias"))
    if image.reach is None or (call.args["transposed"] and weight.reach is not None):
        raise Unsupported(f"{call.func} with weights that depend on the image")
    ndim = len(image.shape) - 2
    reach = regrouped(image.reach, image.shape[1], call.args["groups"], call.shape[1])
    windows = (_per_dim(call.args[name], ndim) for name in ("stride", "padding", "dilation"))
    for dim, (stride, padding, dilation) in enumerate(zip(*windows, strict=True), 2):
        window = _transposed_window if call.args["transposed"] else _window
        positions = window(call.shape[dim], weight.shape[dim], stride, padding, dilation)
        reach = windowed(reach, dim, image.shape[dim], positions, 1 / stride if call.args["transposed"] else stride)
    reaches = [reach]
    for operand in (weight, bias):  # filters computed from the image: each output channel depends on all its weights
        if operand is not None and operand.reach is not None:
            per_channel = reduced(operand.reach, range(1, len(operand.shape)), keepdim=False)
            reaches.append(replace(per_channel, bounds=per_channel.bounds.reshape(ROWS, 1, -1, *[1] * ndim)))
    return union(reaches, len(call.shape))


@rule("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d")
def _pool(call: Call) -> Reach:
    shape = call.main.shape
    ndim = int(call.name.split("pool")[1][0])
    kernel = _per_dim(call.args["kernel_size"], ndim)
    strides = _per_dim(call.args["stride"] or kernel, ndim)
    padding = _per_dim(call.args["padding"], ndim)
    dilation = _per_dim(call.args.get("dilation", 1), ndim)
    reach = call.reach
    for i in range(ndim):
        dim = len(shape) - ndim + i
        positions = _window(call.shape[dim], kernel[i], strides[i], padding[i], dilation[i])
        reach = windowed(reach, dim, shape[dim], positions, strides[i])
    return reach


@rule("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d")
def _adaptive_pool(call: Call) -> Reach:
    reach = call.reach
    for dim in range(len(call.shape) - len(call.args["output_size"]), len(call.shape)):
        n, outputs = call.main.shape[dim], call.shape[dim]
        if outputs == 1:
            reach = reduced(reach, [dim])
            continue
        output = torch.arange(outputs)[:, None]
        first = (output * n).div(outputs, rounding_mode="floor")
        last = ((output + 1) * n - 1).div(outputs, rounding_mode="floor")
        position = torch.arange(n)
        reach = windowed(reach, dim, n, _positions((position >= first) & (position <= last)), n / outputs)
    return reach


@rule("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d")
@rule("upsample_trilinear3d", "upsample_bicubic2d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d")
@rule("_upsample_nearest_exact3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_lanczos2d_aa")
def _interpolation(call: Call) -> Reach:
    shape = call.main.shape
    ndim = len(shape) - 2
    if "output_size" not in call.args or "scale_factors" in call.args:
        raise Unsupported(f"no closed form for {call.func}")
    reach = call.reach
    scales = {1: ["scales"], 2: ["scales_h", "scales_w"], 3: ["scales_d", "scales_h", "scales_w"]}[ndim]
    for i in range(ndim):
        n, outputs = shape[2 + i], call.shape[2 + i]
        # Unit impulses, an image each, give the operator's weights; positions with a weight of exactly zero are not
        # read. Along the other dimensions the image has 2 pixels and keeps them: with 1, antialiasing goes wrong.
        along = [j == i for j in range(ndim)]
        dtype = call.dtype if call.dtype in (torch.float32, torch.float64) else torch.float32
        impulses = torch.eye(n, dtype=dtype).reshape(n, 1, *[n if a else 1 for a in along])
        rest = dict(list(call.args.items())[1:])
        rest["output_size"] = [outputs if a else 2 for a in along]
        rest |= {scale: None for scale, a in zip(scales, along, strict=True) if not a}
        weights = call.func(impulses.expand(n, 1, *[n if a else 2 for a in along]).contiguous(), **rest)
        for dim in [2 + j for j in range(ndim) if j != i]:
            weights = weights.narrow(dim, 0, 1)
        weights = weights.reshape(n, outputs)
        reach = windowed(reach, 2 + i, n, _positions((weights != 0).T), n / outputs)
    return reach


# Predicted positions: values choose what is read, which may lie anywhere in the map.
@rule("grid_sampler_2d", "grid_sampler_3d")
def _grid_sample(call: Call) -> Reach:
    image, grid = call.args["input"], call.args["grid"]
    if grid.reach is None:
        raise Unsupported(f"no closed form for {call.func} with a constant grid")
    positions = reduced(grid.reach, [len(grid.shape) - 1], keepdim=False)  # [N, H, W]
    reaches = [replace(positions, bounds=positions.bounds.unsqueeze(2))]
    if image.reach is not None:
        reaches.append(reduced(image.reach, range(2, len(image.shape))))
    return union(reaches, len(call.shape))


@rule("max_unpool2d", "max_unpool3d")
def _unpool(call: Call) -> Reach:
    indices = call.args["indices"]
    ndim, first = int(call.name[-2]), len(call.shape) - int(call.name[-2])
    reach = union([operand.reach for operand in call.operands if operand.reach is not None], len(call.shape))
    pooling = indices.pooling
    if pooling is None or pooling.shape[first:] != call.shape[first:]:
        return reduced(reach, range(first, len(call.shape)))  # values choose where in the map each element goes
    kernel = _per_dim(pooling.args["kernel_size"], ndim)
    windows = (_per_dim(pooling.args[name] or kernel, ndim) for name in ("stride", "padding", "dilation"))
    for dim, size, stride, padding, dilation in zip(range(first, len(call.shape)), kernel, *windows, strict=True):
        # An element goes to a position in the window that its maximum comes from.
        positions = _transposed_window(call.shape[dim], size, stride, padding, dilation)
        reach = windowed(reach, dim, indices.shape[dim], positions, 1 / stride)
    return reach


@rule("col2im")
def _fold(call: Call) -> Reach:
    """Sums of overlapping blocks, [N, C x kernel, blocks] to [N, C, H, W], the inverse of `im2col`."""
    size = [call.args[name] for name in ("kernel_size", "stride", "padding", "dilation")]
    blocks = [
        (n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for n, kernel, stride, padding, dilation in zip(call.shape[-2:], *size, strict=True)
    ]
    dims = range(len(call.shape) - 2, len(call.shape))
    reach = reshaped(call.reach, call.main.shape, (*call.shape[:-2], *size[0], *blocks))
    found = []
    for offsets in itertools.product(*map(range, size[0])):  # of a pixel in its block: the one at (0, 0), ...
        part = reach
        for dim, offset in zip(dims, offsets, strict=True):
            bounds = part.bounds.narrow(dim + 1, offset if part.bounds.shape[dim + 1] > 1 else 0, 1)
            part = replace(part, bounds=bounds)
        part = replace(part, bounds=part.bounds.squeeze((dims[0] + 1, dims[1] + 1)))
        for dim, offset, n, stride, padding, dilation in zip(dims, offsets, blocks, *size[1:], strict=True):
            positions = _transposed_window(call.shape[dim], 1, stride, padding - offset * dilation, dilation)
            part = windowed(part, dim, n, positions, 1 / stride)
        found.append(part)
    return union(found, len(call.shape))


@rule("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d")
@rule("replication_pad1d", "replication_pad2d", "replication_pad3d")
def _pad(call: Call) -> Reach:
    shape, reach = call.main.shape, call.reach
    pads = call.args["pad"] if "pad" in call.args else call.args["padding"]
    for i, (before, after) in enumerate(zip(pads[::2], pads[1::2], strict=True)):
        n = shape[-1 - i]
        positions = torch.arange(-before, n + after)  # those outside [0, n) are padding
        if call.name != "constant_pad_nd":
            mode = "reflect" if call.name.startswith("reflection") else "replicate"
            inside = torch.arange(n, dtype=torch.float64)[None, None]
            positions = F.pad(inside, (before, after), mode).long().flatten()
        reach = windowed(reach, len(shape) - 1 - i, n, positions[:, None])
    return reach
