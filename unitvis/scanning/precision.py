"""Choose the precision of a scan by a short measurement, with the reason in one line."""

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

MAX_RELATIVE_TIME = 0.9  # of float32's time: half precision is used only if the scan is expected to take less


class Plan(NamedTuple):
    """Precision of a scan ("fp32", "fp16" or "bf16"), and the reason in one line for people."""

    precision: str
    line: str


@functools.cache
def speed(device: torch.device, precision: str) -> float:
    """Measure how many times as fast as canonical float32 a convolution is: 3x3, 64 to 64 channels, maps of 28x28."""
    images, calls = (16, 1) if device.type == "cpu" else (256, 20)  # enough work that launching it does not count

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
    """Choose float32 for streams, for few images and where half precision is not fast; otherwise float16 or bfloat16.

    images: their number, None if unknown. float16 is preferred: its rounding errors are an eighth of bfloat16's.
    rereadable: images can be read again by id. channels: units are channels, not neurons.
    """
    if not channels:
        return Plan("fp32", "float32: a scan of neurons has too many units to keep candidates for")
    if not rereadable or images is None:
        return Plan("fp32", "float32: a stream is read once, so candidates could not be computed again")
    # expected number of different images among the candidates, if every unit draws k + 3 images at random
    recomputed = min(images, SIZE + images * -math.expm1(-units * (k + 3) / images))
    recomputed_share = recomputed / images
    if recomputed_share > MAX_RELATIVE_TIME:
        return Plan(
            "fp32",
            f"float32: half precision would not pay, because deciding between its candidates would compute "
            f"{recomputed:,.0f} of {images:,} images again in float32",
        )
    speeds = {precision: speed(device, precision) for precision in HALF}
    best = "fp16" if speeds["fp16"] >= 0.7 * speeds["bf16"] else "bf16"
    cost = 1 / speeds[best] + recomputed_share  # expected time, relative to float32
    names = {"fp16": "float16", "bf16": "bfloat16"}
    if cost > MAX_RELATIVE_TIME:
        return Plan(
            "fp32",
            f"float32: half precision would not pay, because {names[best]} is only {speeds[best]:.1f} times as fast on "
            "this device",
        )
    return Plan(
        best,
        f"{names[best]}, {speeds[best]:.1f} times as fast as float32 on this device; about {recomputed:,.0f} of "
        f"{images:,} images are computed again in float32 ({1 / cost:.1f} times as fast in all)",
    )
