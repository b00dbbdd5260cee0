"""Which precision scans, decided by a short measurement and told in one line."""

from __future__ import annotations

import functools
import math
import time
from typing import NamedTuple

import torch
from torch.nn import functional as F

from unitvis.half_precision.step import HALF
from unitvis.network.canonical import canonical_settings
from unitvis.state.sampling import SIZE

WORTH = 0.9  # of float32's time: half precision has to save more than the rest


class Plan(NamedTuple):
    """A scan's precision, and why."""

    precision: str
    line: str


@functools.cache
def speed(device: torch.device, precision: str) -> float:
    """How many times as fast as canonical float32 a convolution is: 64 to 64 channels, 3x3, on maps of 28x28."""
    images, calls = (16, 1) if device.type == "cpu" else (256, 20)  # so that launching them is not what takes the time

    def seconds(dtype: torch.dtype) -> float:
        x = torch.zeros(images, 64, 28, 28, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
        weight = torch.zeros(64, 64, 3, 3, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
        best = math.inf
        for _ in range(4):  # the first one compiles
            start = time.perf_counter()
            for _ in range(calls):
                y = F.conv2d(x, weight, padding=1)
            y.sum().item()
            best = min(best, time.perf_counter() - start)
        return best

    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        with canonical_settings(device):
            full = seconds(torch.float32)
        return full / seconds(HALF[precision])


def plan(
    images: int | None, units: int, k: int, device: torch.device, *, rereadable: bool, channels: bool = True
) -> Plan:
    """float32 for what is read once, for few images and where half precision is not fast; else the faster half.

    images: how many there are, None if only the end will tell. float16 first: its errors are an eighth of bfloat16's.
    """
    if not channels:
        return Plan("fp32", "float32: neurons are too many to keep candidates of")
    if not rereadable or images is None:
        return Plan("fp32", "float32: a stream is read once, so no candidate could be computed again")
    again = min(images, SIZE + images * -math.expm1(-units * (k + 3) / images))  # each unit's, drawn independently
    share = again / images
    if share > WORTH:
        return Plan("fp32", f"float32: {units:,} units would have nearly all of {images:,} images computed again")
    speeds = {precision: speed(device, precision) for precision in HALF}
    best = "fp16" if speeds["fp16"] >= 0.7 * speeds["bf16"] else "bf16"
    cost = 1 / speeds[best] + share
    names = {"fp16": "float16", "bf16": "bfloat16"}
    if cost > WORTH:
        return Plan("fp32", f"float32: {names[best]} is {speeds[best]:.1f} times as fast here, too little to pay")
    return Plan(
        best,
        f"{names[best]}, {speeds[best]:.1f} times as fast here, then float32 for about {again:,.0f} of {images:,} "
        f"images ({1 / cost:.1f} times as fast in all)",
    )
