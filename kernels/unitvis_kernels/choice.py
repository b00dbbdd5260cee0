"""The choice between `conv_argmax` and a convolution with `epilogue`, by a measurement or else by an estimate."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Literal

import torch

# Measured on an H200. Two ways for one layer on one chip are compared, so only the ratio of these two counts, which is
# much the same on other recent chips.
BYTES_PER_SECOND = 4.3e12
FLOPS_PER_SECOND = 790e12
# The share of cuDNN's speed that a convolution in Triton is assumed to reach. PyTorch's own templates are reported at
# 0.58 to 0.86 of it for spatial kernels (its pull requests 174752 and 174989), and above it for 1x1 (107004).
SPATIAL_SHARE_OF_CUDNN = 0.5
POINTWISE_SHARE_OF_CUDNN = 0.8


def layer_key(
    in_channels: int,
    out_channels: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    groups: int,
    map_size: tuple[int, int],
    dtype: torch.dtype,
) -> str:
    """The layer's name in measured.json, without the batch size: "64-256 k1x1 s1x1 g1 56x56 float16"."""
    k, s, m = (f"{rows}x{columns}" for rows, columns in (kernel, stride, map_size))
    return f"{in_channels}-{out_channels} k{k} s{s} g{groups} {m} {str(dtype).removeprefix('torch.')}"


@cache
def measured() -> dict[str, dict[str, dict[str, float]]]:
    """The table of measured.json: architecture -> `layer_key` -> {"fused_us", "separate_us"}, explained in "format"."""
    table = json.loads(files("unitvis_kernels").joinpath("measured.json").read_text())
    return table["layers"]


def prefer(
    in_channels: int,
    out_channels: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    groups: int,
    map_size: tuple[int, int],
    dtype: torch.dtype,
    architecture: str,
    *,
    pooled: bool = False,
) -> tuple[bool, Literal["measured", "estimated"]]:
    """(whether `conv_argmax` is faster than cuDNN's convolution followed by `epilogue`, how that is known).

    `map_size` is (OH, OW) of the output, `architecture` such as "sm_90". The estimate: fusing saves writing and reading
    the raw map, 4 bytes an output element, and does 2 K FLOP an element (K products) at a lower speed. It saves nothing
    where the map is `pooled` next: `epilogue` pools in the same pass, after `conv_argmax` pooling takes a pass more.
    """
    if pooled:
        return False, "estimated"
    layer = layer_key(in_channels, out_channels, kernel, stride, groups, map_size, dtype)
    if found := measured().get(architecture, {}).get(layer):
        return found["fused_us"] < found["separate_us"], "measured"
    if groups != 1 or dtype not in (torch.float16, torch.bfloat16):
        return False, "estimated"
    depth = in_channels * kernel[0] * kernel[1]
    share = POINTWISE_SHARE_OF_CUDNN if kernel == (1, 1) else SPATIAL_SHARE_OF_CUDNN
    saved = 4 / BYTES_PER_SECOND
    lost = 2 * depth / FLOPS_PER_SECOND * (1 / share - 1)
    return saved > lost, "estimated"
