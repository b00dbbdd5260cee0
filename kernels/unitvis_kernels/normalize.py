"""normalize: a batch of uint8 pixels to a network's normalised input, on the device that computes."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unitvis_kernels import cpu
from unitvis_kernels._triton import HAS_TRITON, Launch, jit, tl
from unitvis_kernels.arguments import require_tensors

BLOCKS_PER_PROGRAM = 4


@jit
def _normalize_kernel(
    x,  # [E] uint8: [N, H, W, 3] flattened, or [N, H, W, 1], of whose channel there are three means and stds
    y,  # [E] float32 | float16 | bfloat16, in the same order
    E,
    mean0,
    mean1,
    mean2,
    std0,
    std1,
    std2,
    BLOCKS: tl.constexpr,
    BE: tl.constexpr,
):
    # A program takes every third block, so that a lane has the same channel in each.
    i_phase, i_block = tl.program_id(0) % 3, tl.program_id(0) // 3
    lane = tl.arange(0, BE)  # [BE]
    channel = (i_phase * BE + lane) % 3
    mean = tl.where(channel == 0, mean0, tl.where(channel == 1, mean1, mean2))
    std = tl.where(channel == 0, std0, tl.where(channel == 1, std1, std2))
    for i in range(BLOCKS):
        o = (i_block.to(tl.int64) * BLOCKS + i) * (3 * BE) + i_phase * BE + lane
        v = tl.load(x + o, mask=o < E, other=0).to(tl.float32)
        v = tl.div_rn(tl.div_rn(v, tl.full([BE], 255.0, tl.float32)) - mean, std)  # IEEE; `/` approximates
        tl.store(y + o, v.to(y.dtype.element_ty), mask=o < E)


def plan(x: Tensor, mean: Sequence[float], std: Sequence[float], y: Tensor) -> Launch | None:
    """The launch that fills `y`; None where there is no kernel for x."""
    if not x.is_contiguous() or not x.numel():
        return None
    options: dict[str, Any] = {"BLOCKS": BLOCKS_PER_PROGRAM, "BE": 2048, "num_warps": 4, "num_stages": 1}
    programs = 3 * -(-x.numel() // (3 * BLOCKS_PER_PROGRAM * options["BE"]))
    return Launch(_normalize_kernel, (programs,), (x, y, x.numel(), *_three(mean), *_three(std)), options)


def _three(values: Sequence[float]) -> Sequence[float]:
    return values if len(values) == 3 else [*values] * 3


@torch.library.custom_op("unitvis::normalize", mutates_args=())
def _normalize(x: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    return cpu.normalize(x, mean, std, dtype)


@_normalize.register_fake
def _(x: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype).permute(0, 3, 1, 2)


def launch(
    x: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, y: Tensor | None = None
) -> Tensor:
    """[N, C, H, W] by the kernel, into y [N, H, W, C] if given; by `cpu.normalize` where there is no kernel."""
    y = x.new_empty(x.shape, dtype=dtype) if y is None else y
    planned = plan(x, mean, std, y)
    if planned is None:
        return cpu.normalize(x, mean, std, dtype)
    planned.run()
    return y.permute(0, 3, 1, 2)


if HAS_TRITON:
    _normalize.register_kernel("cuda")(launch)


def normalize(x: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
    """(x / 255 - mean) / std of uint8 [N, H, W, C] as channels_last [N, C, H, W] in float32, float16 or bfloat16.

    C is 3, or 1 for grey images; there is one mean and one std a channel.

    The arithmetic is IEEE float32 in that order on every device, rounded once to `dtype`: the same bits everywhere. On
    a GPU contiguous batches take one pass; other strides run in PyTorch. Raises ValueError for anything else.
    """
    require_tensors("normalize", x=x)
    if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[3] not in (1, 3):
        raise ValueError(f"normalize takes uint8 [N, H, W, 3] or [N, H, W, 1], not {x.dtype} {tuple(x.shape)}")
    if not len(mean) == len(std) == x.shape[3] or not all(std):
        needed = f"{x.shape[3]} means and {x.shape[3]} stds other than 0"
        raise ValueError(f"normalize needs {needed}, not {list(mean)} and {list(std)}")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"normalize gives float32, float16 or bfloat16, not {dtype}")
    return _normalize(x, mean, std, dtype)
