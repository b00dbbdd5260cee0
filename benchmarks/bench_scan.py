"""Benchmark a whole scan of images in host memory, transfer to the device included: AlexNet's five convolutions.

On a GPU a ring of images in pinned memory is read again and again, so that a million images need little memory. Images
that can win are read from the same ring when they are computed again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from benchmarks.naive import network
from benchmarks.ring import Ring
from benchmarks.sizes import Sizes
from benchmarks.timing import Timer
from unitvis.bench.bench import BARE_FORWARD, BASELINES, DEVICE_HOOK, NAIVE_HOOK, Bench, synthetic_images
from unitvis.network.network import Network
from unitvis.ranking.recorder import Recorder
from unitvis.results.arrays import UNSEPARATED
from unitvis.sources.transform import Transform

SCAN, EXACT = "unitvis, the scan alone", "unitvis, exact"
CASES: dict[str, Callable[[Sizes, str], list[tuple[Any, ...]]]] = {
    "test_scan": lambda form, kind: [
        ("alexnet", contender, turn)
        for turn in range(form.turns)
        for contender in (BARE_FORWARD, SCAN, *([EXACT] if kind == "cuda" else []), DEVICE_HOOK, NAIVE_HOOK)
    ]
}


@cache
def checked(name: str, side: int, device: torch.device) -> tuple[nn.Module, Transform, list[str]]:
    """Load a network, check that all contenders agree on 64 images; returns the model, its transform and layers."""
    loaded = network(name)
    examined = Network(loaded.model.to(device), transform=loaded.transform)
    examined.examine((3, side, side))
    with examined.evaluating():
        checked_bench = Bench(examined)
        checked_bench.check(synthetic_images(64, (side, side)))
    return checked_bench.model, checked_bench.transform, checked_bench.layers


def test_scan(case: tuple[str, str, int], timer: Timer, form: Sizes, device: torch.device) -> None:
    name, contender, turn = case
    on_gpu = device.type == "cuda"
    model, transform, layers = checked(name, form.side, device)
    precision, dtype, size = ("fp16", torch.float16, form.batches[-1]) if on_gpu else ("fp32", torch.float32, 64)
    ring = Ring(form.host_images, form.side, form.ring, pinned=on_gpu, batch=size)
    count = min(form.host_images, 20_000) if contender in BASELINES else form.host_images
    timer.rounds = 1
    row: dict[str, Any] = {"kind": "scan", "network": name, "precision": precision, "images": count}
    row |= {"contender": contender, "ring": len(ring.images), "batch": size}
    recorder: Recorder
    own = model  # what a baseline runs, in the precision of the scan
    if on_gpu and contender in BASELINES:
        own = copy.deepcopy(model).to(dtype, memory_format=torch.channels_last)

    def prepare() -> None:  # untimed: layers and receptive fields are found once a model
        nonlocal recorder
        recorder = Recorder(model, layers, transform=transform, precision=precision, batch_size=size)
        recorder.prepare((3, form.side, form.side))

    def scan() -> None:
        with recorder:
            for ids, pixels in ring.batches(size, count):
                recorder(pixels, ids)
        if contender == EXACT:
            run = recorder.result(ring)
            row["rescored"] = run.manifest["rescored"]["images"]
            row["undecided"] = sum(int((top.status == UNSEPARATED).sum()) for top in run.tops.values())

    def baseline() -> None:
        with torch.inference_mode(), BASELINES[contender](own, layers) as hooks:
            for ids, pixels in ring.batches(size, count):
                batch = transform.normalize(pixels.to(device, non_blocking=True), dtype)
                hooks(batch, ids.to(device))

    run, setup = (baseline, None) if contender in BASELINES else (scan, prepare)
    timer(run, setup=setup, warm=turn > 0, **row)
    timer.benchmark.extra_info.update(row)
