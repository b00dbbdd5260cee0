"""Which layers `conv_argmax` is the faster way for: measured where someone has measured, estimated elsewhere."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Literal

import torch

# Measured on an H200. What is compared is one layer on one chip, so only their ratio counts; it is much the same on
# other chips of the time.
BYTES_PER_SECOND = 4.3e12
FLOPS_PER_SECOND = 790e12
# Of cuDNN's speed, what a convolution in Triton is assumed to reach: PyTorch's own templates are reported at 0.58 to
# 0.86 of it where the kernel is spatial (its pull requests 174752 and 174989), ahead where it is 1x1 (107004).
SPATIAL, POINTWISE = 0.5, 0.8


def layer_key(
    in_channels: int,
    out_channels: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    groups: int,
    map_size: tuple[int, int],
    dtype: torch.dtype,
) -> str:
    """The layer's name in measured.json: "64-256 k1x1 s1x1 g1 56x56 float16"; never with a batch size."""
    k, s, m = (f"{rows}x{columns}" for rows, columns in (kernel, stride, map_size))
    return f"{in_channels}-{out_channels} k{k} s{s} g{groups} {m} {str(dtype).removeprefix('torch.')}"


@cache
def measured() -> dict[str, dict[str, dict[str, float]]]:
    """measured.json: architecture -> `layer_key` -> {"fused_us", "separate_us"}; its "format" says what these are."""
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
    """Whether `conv_argmax` beats cuDNN's convolution followed by `epilogue`, and how that is known.

    `map_size` is (OH, OW) of the output, `architecture` such as "sm_90". The estimate: fusing saves writing and reading
    the raw map, 4 bytes an output element, at the cost of 2 K FLOP (K products an element) at a lower speed. Of a map
    that is `pooled` at once nothing is saved: `epilogue` pools in its own pass, after `conv_argmax` it takes another.
    """
    if pooled:
        return False, "estimated"
    layer = layer_key(in_channels, out_channels, kernel, stride, groups, map_size, dtype)
    if found := measured().get(architecture, {}).get(layer):
        return found["fused_us"] < found["separate_us"], "measured"
    if groups != 1 or dtype not in (torch.float16, torch.bfloat16):
        return False, "estimated"
    depth = in_channels * kernel[0] * kernel[1]
    speed = POINTWISE if kernel == (1, 1) else SPATIAL
    saved = 4 / BYTES_PER_SECOND
    lost = 2 * depth / FLOPS_PER_SECOND * (1 / speed - 1)
    return saved > lost, "estimated"
