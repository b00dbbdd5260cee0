"""For every operator with a rule in the receptive fields, a function of images that uses it.

Each takes images [N, 4, 6, W] in float64, W even, and returns maps whose first axis is the images.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten


def fixed(*shape: int) -> Tensor:
    """Weights that are the same whenever they are asked for."""
    return (torch.arange(math.prod(shape), dtype=torch.float64) * 1.7 + 1).sin().reshape(shape)


def map_of(x: Tensor) -> Tensor:
    """Whatever follows the images, as a map."""
    return x.reshape(len(x), -1, 1, 1) if x.ndim < 3 else x.reshape(len(x), -1, *x.shape[-2:])


def of_matrices(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """For operators of matrices: applied to the first channel [6, W] of each image."""
    return lambda x: torch.stack([function(image[0]) for image in x])[:, None]


def batch_norm(name: str, *extra: object) -> Callable[[Tensor], Tensor]:
    statistics = fixed(4).abs() + 1
    return lambda x: getattr(aten, name)(x, statistics, statistics, statistics, statistics, *extra)[0]


def attention(name: str, **options: object) -> Callable[[Tensor], Tensor]:
    def attend(x: Tensor) -> Tensor:
        rows = x.transpose(1, 2)  # heads: rows of the image; tokens: channels
        return getattr(aten, name)(rows, rows.flip(2), rows.flip(3), **options)[0]

    return attend


def affine(x: Tensor) -> Tensor:
    """A grid [N, 6, W, 2] that each pixel predicts for itself."""
    return torch.stack([x[:, 0].tanh(), x[:, 1].tanh()], -1)


def affine3(x: Tensor) -> Tensor:
    return torch.stack([x.tanh(), x.flip(1).tanh(), x.sigmoid()], -1)


def volume(x: Tensor) -> Tensor:
    """Images as volumes [N, 2, 2, 6, W]."""
    return x.reshape(len(x), 2, 2, *x.shape[2:])


def row(x: Tensor) -> Tensor:
    """Images as sequences [N, 24, W]."""
    return x.flatten(1, 2)


def resized(name: str, scales: int = 2, **options: object) -> Callable[[Tensor], Tensor]:
    def resize(x: Tensor) -> Tensor:
        width = x.shape[3] // 2 + 1
        given, size = {1: (row(x), [width]), 2: (x, [4, width]), 3: (volume(x), [3, 4, width])}[scales]
        return map_of(getattr(aten, name)(given, size, **options))

    return resize


def pooled_and_back(x: Tensor) -> Tensor:
    values, indices = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(values * 2, indices, 2, output_size=x.shape[2:])


def pooled_and_back_3d(x: Tensor) -> Tensor:
    values, indices = F.max_pool3d(volume(x), (1, 2, 2), return_indices=True)
    return map_of(F.max_unpool3d(values, indices, (1, 2, 2), output_size=(2, *x.shape[2:])))


def written(x: Tensor) -> Tensor:
    out = x * 2
    out[:, :, 1:4, ::2] = x[:, :, 2:5, 1::2]
    return out


def choice(x: Tensor, dim: int) -> Tensor:
    """Indices along a dimension that the image itself chooses."""
    return x.argsort(dim)


def batched_rows(x: Tensor) -> Tensor:
    """[N * 4, 6, W]"""
    return x.flatten(0, 1)


def with_batch(y: Tensor, x: Tensor) -> Tensor:
    return y.reshape(len(x), 4, *y.shape[1:])


CASES: dict[str, Callable[[Tensor], Tensor]] = {
    # elementwise, and what only moves
    "_to_copy": lambda x: x.float(),
    "detach": lambda x: aten.detach(x) + 1,
    "alias": lambda x: aten.alias(x) + 1,
    "_prelu_kernel": lambda x: F.prelu(x, fixed(4)),
    "hardswish": F.hardswish,
    "log_sigmoid_forward": F.logsigmoid,
    "fill": lambda x: aten.fill(x, 0.5) + x,
    "native_dropout": lambda x: aten.native_dropout(x, 0.5, False)[0],
    "rrelu_with_noise_functional": lambda x: aten.rrelu_with_noise_functional(x, torch.zeros_like(x))[0],
    "complex": lambda x: torch.complex(x, x.flip(3)).abs(),
    "floor_divide": lambda x: x // 0.1,
    "expand": lambda x: x[:, :1].expand(-1, 3, -1, -1) * 1,
    "expand_copy": lambda x: aten.expand_copy(x[:, :1], [len(x), 3, *x.shape[2:]]),
    "copy": lambda x: x * 1 + aten.copy(x, x.flip(3)),
    "zeros_like": lambda x: x + torch.zeros_like(x.flip(3)),
    "ones_like": lambda x: x + torch.ones_like(x.flip(3)),
    "full_like": lambda x: x + torch.full_like(x.flip(3), 2),
    "empty_like": lambda x: torch.where(x > 0, x, torch.empty_like(x.flip(3)).fill_(2)),
    "new_zeros": lambda x: x + x.flip(3).new_zeros(x.shape),
    "new_ones": lambda x: x + x.flip(3).new_ones(x.shape),
    "new_full": lambda x: x + x.flip(3).new_full(x.shape, 2),
    "new_empty": lambda x: torch.where(x > 0, x, x.flip(3).new_empty(x.shape).fill_(2)),
    "view": lambda x: x.view(len(x), 2, 2, 6, -1).sum(2),
    "_unsafe_view": lambda x: aten._unsafe_view(x, [len(x), 8, 3, -1]),
    "view_copy": lambda x: aten.view_copy(x, [len(x), 8, 3, -1]),
    "_reshape_alias": lambda x: aten._reshape_alias(x, x.shape, x.stride()) + 1,
    "squeeze": lambda x: x[:, :, :1].squeeze(2)[:, :, None] * 1,
    "unsqueeze": lambda x: x.unsqueeze(2).sum(2),
    "as_strided": lambda x: aten.as_strided(x.contiguous(), x.shape, x.contiguous().stride()) + 1,
    "as_strided_": lambda x: F.adaptive_avg_pool2d(x.contiguous(memory_format=torch.channels_last), 1),
    "permute": lambda x: x.permute(0, 2, 1, 3) * 1,
    "permute_copy": lambda x: aten.permute_copy(x, [0, 2, 1, 3]),
    "transpose": lambda x: x.transpose(1, 3) * 1,
    "transpose_copy": lambda x: aten.transpose_copy(x, 1, 3),
    "t": of_matrices(lambda m: m.t() * 1),
    "t_copy": of_matrices(aten.t_copy),
    "slice": lambda x: x[:, :, 1:5:2] * 1,
    "select": lambda x: x.select(2, 3)[:, :, None] * 1,
    "split": lambda x: x.split(4, 3)[0] * 1,
    "split_with_sizes": lambda x: x.split([1, 5], 2)[1] * 1,
    "split_copy": lambda x: aten.split_copy(x, 4, 3)[1],
    "unbind": lambda x: x.unbind(2)[2][:, :, None] * 1,
    "unfold": lambda x: x.unfold(dimension=3, size=3, step=2).prod(-1),
    "index_select": lambda x: x.index_select(3, torch.tensor([4, 0, 3])),
    "flip": lambda x: x.flip(2),
    "roll": lambda x: x.roll((1, 2), (2, 3)),
    "gather": lambda x: x.gather(3, torch.tensor([2, 5]).expand(len(x), 3, 4, 2)),
    "gather by choice": lambda x: x.gather(3, choice(x[:, :3], 3)),
    "index_put": lambda x: aten.index_put(x, [None, None, torch.tensor([1, 3])], x[:, :, 4:]),
    "index_put by mask": lambda x: aten.index_put(x, [x.flip(3) < 0], torch.tensor(0.5, dtype=x.dtype)),
    "scatter": lambda x: x.scatter(3, torch.tensor([1, 0]).expand(*x.shape[:3], 2), x[..., 3:5]),
    "scatter by choice": lambda x: x.scatter(3, choice(x, 3), x.flip(2)),
    "scatter_add": lambda x: x.scatter_add(3, choice(x, 3), x.flip(2)),
    "scatter_reduce": lambda x: x.scatter_reduce(3, choice(x, 3), x.flip(2), "amax"),
    "embedding": lambda x: F.embedding((x.sigmoid() * 7).long(), fixed(8, 3)).sum(-1),
    "view_as_real": lambda x: torch.view_as_real(torch.complex(x, x.flip(3))).prod(-1),
    "view_as_complex": lambda x: torch.view_as_complex(x.view(*x.shape[:3], -1, 2)).abs(),
    "index": lambda x: x[:, :, [3, 1], :][..., [2, 0, 5]],
    "repeat": lambda x: x.repeat(1, 1, 2, 1),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
    "im2col": lambda x: F.unfold(x, (2, 3))[:, :, None],
    "diagonal": lambda x: x.diagonal(0, 2, 3)[:, :, None] * 1,
    "tril": lambda x: x.tril(1),
    "triu": lambda x: x.triu(1),
    "slice_scatter": written,
    "select_scatter": lambda x: x.select_scatter(x[:, :, 1], 2, 3),
    "rot90": lambda x: x.rot90(1, (2, 3)),
    "cat": lambda x: torch.cat([x, x.flip(3)[..., :2]], 3),
    "stack": lambda x: torch.stack([x, x.flip(3)], 2).flatten(1, 2),
    "glu": lambda x: F.glu(x, 1),
    # reductions
    **{
        name: lambda x, name=name: getattr(x, name)(3, keepdim=True) for name in ("sum", "mean", "amax", "amin", "prod")
    },
    **{
        name: lambda x, name=name: getattr(x, name)(2, keepdim=True)[0]
        for name in ("max", "min", "median", "nanmedian", "mode")
    },
    "any": lambda x: (x > 2).any(3, keepdim=True).double(),
    "all": lambda x: (x > -2).all(3, keepdim=True).double(),
    "argmax": lambda x: x.argmax(3, keepdim=True).double(),
    "argmin": lambda x: x.argmin(3, keepdim=True).double(),
    "logsumexp": lambda x: x.logsumexp((2,), keepdim=True),
    "var": lambda x: x.var(3, keepdim=True),
    "std": lambda x: x.std(3, keepdim=True),
    "var_mean": lambda x: torch.var_mean(x, 1, keepdim=True)[1],
    "std_mean": lambda x: torch.std_mean(x, 2, keepdim=True)[0],
    "linalg_vector_norm": lambda x: torch.linalg.vector_norm(x, dim=1, keepdim=True),
    "norm": lambda x: aten.norm(x, 2.0, [2], True),
    "count_nonzero": lambda x: aten.count_nonzero(x.relu(), [3])[..., None].double(),
    "nansum": lambda x: x.nansum(2, keepdim=True),
    "aminmax": lambda x: torch.aminmax(x, dim=2, keepdim=True)[1],
    "kthvalue": lambda x: x.kthvalue(2, 3, keepdim=True)[0],
    "median of everything": of_matrices(lambda m: m - m.median()),
    "cumsum": lambda x: x.cumsum(3),
    "cumprod": lambda x: x.cumprod(2),
    "logcumsumexp": lambda x: x.logcumsumexp(3),
    "cummax": lambda x: x.cummax(3)[0],
    "cummin": lambda x: x.cummin(2)[0],
    "_softmax": lambda x: x.softmax(3),
    "_log_softmax": lambda x: x.log_softmax(2),
    "_safe_softmax": lambda x: aten._safe_softmax(x, 2),
    "sort": lambda x: x.sort(3)[0],
    "topk": lambda x: x.topk(2, 3)[0],
    "_fft_r2c": lambda x: torch.fft.rfft(x, dim=3).abs(),
    "_fft_c2c": lambda x: torch.fft.fft(torch.complex(x, x), dim=2).abs(),
    "_fft_c2r": lambda x: torch.fft.irfft(torch.complex(x, x.flip(3)), dim=3),
    "native_layer_norm": lambda x: F.layer_norm(x, x.shape[3:]),
    "native_group_norm": lambda x: F.group_norm(x, 2),
    "native_batch_norm": batch_norm("native_batch_norm", False, 0.1, 1e-5),
    "native_batch_norm of each image": F.instance_norm,
    "_native_batch_norm_legit": lambda x: aten._native_batch_norm_legit.no_stats(
        x.reshape(1, -1, *x.shape[2:]), None, None, True, 0.1, 1e-5
    )[0].reshape(x.shape),
    "_native_batch_norm_legit_functional": batch_norm("_native_batch_norm_legit_functional", False, 0.1, 1e-5),
    "_native_batch_norm_legit_no_training": batch_norm("_native_batch_norm_legit_no_training", 0.1, 1e-5),
    "_batch_norm_no_update": batch_norm("_batch_norm_no_update", 0.1, 1e-5),
    "mm": of_matrices(lambda m: m @ fixed(m.shape[1], 3)),
    "addmm": of_matrices(lambda m: torch.addmm(m[:, :3], m, fixed(m.shape[1], 3))),
    "bmm": lambda x: with_batch(torch.bmm(batched_rows(x), batched_rows(x).transpose(1, 2)), x),
    "baddbmm": lambda x: with_batch(
        torch.baddbmm(batched_rows(x)[..., :3], batched_rows(x), fixed(4 * len(x), x.shape[3], 3)), x
    ),
    "mv": of_matrices(lambda m: (m @ fixed(m.shape[1]))[:, None]),
    "addmv": of_matrices(lambda m: torch.addmv(m[:, 0], m, fixed(m.shape[1]))[:, None]),
    "dot": of_matrices(lambda m: m[1].dot(m[2])[None, None]),
    "_scaled_dot_product_flash_attention_for_cpu": attention("_scaled_dot_product_flash_attention_for_cpu"),
    # windows
    "convolution": lambda x: F.conv2d(x, fixed(4, 2, 3, 2), fixed(4), (2, 1), (1, 0), (1, 2), 2),
    "convolution transposed": lambda x: F.conv_transpose2d(x, fixed(4, 2, 3, 2), None, (2, 1), (1, 0), (1, 0), 2),
    "max_pool2d_with_indices": lambda x: F.max_pool2d(x, (3, 2), (2, 1), (1, 0), (1, 2)),
    "max_pool3d_with_indices": lambda x: map_of(F.max_pool3d(volume(x), (1, 2, 3), 2, (0, 1, 1))),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "avg_pool3d": lambda x: map_of(F.avg_pool3d(volume(x), (2, 3, 2))),
    "_adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, (4, 3)),
    "_adaptive_avg_pool3d": lambda x: map_of(F.adaptive_avg_pool3d(volume(x), (1, 4, 3))),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, (4, 3)),
    "adaptive_max_pool3d": lambda x: map_of(F.adaptive_max_pool3d(volume(x), (1, 4, 3))),
    "upsample_nearest1d": resized("upsample_nearest1d", 1),
    "upsample_nearest2d": resized("upsample_nearest2d"),
    "upsample_nearest3d": resized("upsample_nearest3d", 3),
    "_upsample_nearest_exact1d": resized("_upsample_nearest_exact1d", 1),
    "_upsample_nearest_exact2d": resized("_upsample_nearest_exact2d"),
    "_upsample_nearest_exact3d": resized("_upsample_nearest_exact3d", 3),
    "upsample_linear1d": resized("upsample_linear1d", 1, align_corners=False),
    "upsample_bilinear2d": resized("upsample_bilinear2d", align_corners=False),
    "upsample_trilinear3d": resized("upsample_trilinear3d", 3, align_corners=True),
    "upsample_bicubic2d": resized("upsample_bicubic2d", align_corners=False),
    "_upsample_bilinear2d_aa": resized("_upsample_bilinear2d_aa", align_corners=False),
    "_upsample_bicubic2d_aa": resized("_upsample_bicubic2d_aa", align_corners=False),
    "_upsample_lanczos2d_aa": resized("_upsample_lanczos2d_aa", align_corners=False),
    "grid_sampler_2d": lambda x: F.grid_sample(x, affine(x), align_corners=False),
    "grid_sampler_3d": lambda x: map_of(F.grid_sample(volume(x), affine3(x)[:, :2], align_corners=False)),
    "max_unpool2d": pooled_and_back,
    "max_unpool2d by choice": lambda x: F.max_unpool2d(x, choice(x.flatten(2), 2).view(x.shape), 1),
    "max_unpool3d": pooled_and_back_3d,
    "col2im": lambda x: F.fold(x.flatten(2), (10, x.shape[3] + 2), 2, (1, 2), (1, 0), (2, 1)),
    "constant_pad_nd": lambda x: F.pad(x, (1, -2, 0, 3)),
    "reflection_pad1d": lambda x: F.pad(row(x), (2, 1), "reflect")[:, :, None],
    "reflection_pad2d": lambda x: F.pad(x, (2, 1, 0, 3), "reflect"),
    "reflection_pad3d": lambda x: map_of(F.pad(volume(x), (2, 1, 0, 3, 1, 0), "reflect")),
    "replication_pad1d": lambda x: F.pad(row(x), (2, 1), "replicate")[:, :, None],
    "replication_pad2d": lambda x: F.pad(x, (2, 1, 0, 3), "replicate"),
    "replication_pad3d": lambda x: map_of(F.pad(volume(x), (2, 1, 0, 3, 1, 0), "replicate")),
}

# Operators that a CPU does not run; each has the rule of another that it does run.
OF_GPUS = {
    "_batch_norm_with_update": "native_batch_norm",
    "_batch_norm_with_update_functional": "native_batch_norm",
    "_fused_rms_norm": "native_layer_norm",
    "_scaled_dot_product_cudnn_attention": "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention": "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention": "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable": "_scaled_dot_product_flash_attention_for_cpu",
    "cudnn_batch_norm": "native_batch_norm",
    "miopen_batch_norm": "native_batch_norm",
}
