"""Choose the precision of a scan, by a short measurement or for shards by a rule, with the reason in one line."""

from __future__ import annotations

import functools
import math
import time
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unitvis.errors import UnitvisError
from unitvis.half_precision.step import HALF
from unitvis.half_precision.suitability import NAMES
from unitvis.network.canonical import canonical_settings
from unitvis.network.forward import COMPUTE_BATCH
from unitvis.network.memory import holding
from unitvis.sources import Source
from unitvis.state.sampling import SIZE, sample

MAX_SHARD_RECOMPUTED = 0.5  # of the images: where more are computed again, shards scan in float32
OBSERVING_PASSES = 10  # canonical passes of an image that `suitability` takes as long as, measured on a CPU
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

    timed = holding(f"a convolution of {images} maps, which is timed,", device)
    with timed, torch.inference_mode(), torch.autocast(device.type, enabled=False):
        with canonical_settings(device):
            full = seconds(torch.float32)
        return full / seconds(HALF[precision])


def has_fast_half(device: torch.device) -> bool:
    """True for a GPU with tensor cores (compute capability 7.0); CPUs of one name differ in what they are fast at."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)


def judged_images(source: Source, like: Tensor) -> Tensor | None:
    """The images by which a scan settles its precision: the 16 of the whole source whose ids hash to the smallest.

    So all shards settle on one. like: images of the source, of the same size; those that cannot be read are left out,
    and counted by the scan. None for a stream, and where none can be read.
    """
    if not source.rereadable or source.length is None:
        return None
    found = []
    for id in sample(np.array([[0, source.length]]), COMPUTE_BATCH).tolist():
        try:
            pixels = source.read(id)
        except UnitvisError:
            continue
        if pixels.shape == like.shape[1:]:  # the scan refuses others when it comes to them
            found.append(pixels)
    return torch.stack(found) if found else None


def plan(
    images: int | None,
    units: int,
    k: int,
    device: torch.device,
    *,
    rereadable: bool,
    channels: bool = True,
    shard: bool = False,
) -> Plan:
    """Choose float32 for streams, for few images and where half precision is not fast; otherwise float16 or bfloat16.

    images: their number in the whole source, None if unknown. float16 is preferred: its rounding errors are an eighth
    of bfloat16's. rereadable: images can be read again by id. channels: units are channels, not neurons. shard: nothing
    is measured, so that every shard on a device of the same kind gets the same answer.
    """
    if not channels:
        return Plan("fp32", "float32: a scan of neurons has too many units to keep candidates for")
    if not rereadable or images is None:
        return Plan("fp32", "float32: a stream is read once, so candidates could not be computed again")
    # expected number of different images among the candidates, if every unit draws k + 3 images at random
    recomputed = min(images, SIZE + images * -math.expm1(-units * (k + 3) / images))
    recomputed_share = recomputed / images
    if shard and not has_fast_half(device):
        return Plan("fp32", f"float32, as every shard on a device of the kind {device.type}")
    if recomputed_share > (MAX_SHARD_RECOMPUTED if shard else MAX_RELATIVE_TIME):
        return Plan(
            "fp32",
            f"float32: half precision would not pay, because deciding between its candidates would compute "
            f"{recomputed:,.0f} of {images:,} images again in float32",
        )
    again = f"about {recomputed:,.0f} of {images:,} images are computed again in float32"
    if shard:
        return Plan("fp16", f"float16, as every shard on a device of the kind {device.type}; {again}")
    speeds = {precision: speed(device, precision) for precision in HALF}
    best = "fp16" if speeds["fp16"] >= 0.7 * speeds["bf16"] else "bf16"
    observed = OBSERVING_PASSES * (SIZE + COMPUTE_BATCH)
    cost = 1 / speeds[best] + recomputed_share + observed / images  # expected time, relative to float32
    if cost > MAX_RELATIVE_TIME:
        return Plan(
            "fp32",
            f"float32: half precision would not pay, because {NAMES[best]} is only {speeds[best]:.1f} times as fast on "
            f"this device, {again}, and seeing whether it suits the network takes the time of {observed:,} images",
        )
    return Plan(
        best,
        f"{NAMES[best]}, {speeds[best]:.1f} times as fast as float32 on this device; {again} "
        f"({1 / cost:.1f} times as fast in all)",
    )
