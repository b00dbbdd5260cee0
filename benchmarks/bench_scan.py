"""A whole scan from images in host memory: AlexNet's five convolutions, the transfer to the device included.

On a GPU the images are replayed from a ring of pinned memory, so that a million of them need no terabyte. What can win
is computed again from the same ring.
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
from unitvis.bench.bench import BARE, BASELINES, DEVICE, HOST, Bench, pictures
from unitvis.network.network import Network
from unitvis.ranking.recorder import Recorder
from unitvis.results.arrays import UNSEPARATED
from unitvis.sources.transform import Transform

SCAN, EXACT = "unitvis, the scan alone", "unitvis, exact"
CASES: dict[str, Callable[[Sizes, str], list[tuple[Any, ...]]]] = {
    "test_scan": lambda form, kind: [
        ("alexnet", who, turn)
        for turn in range(form.turns)
        for who in (BARE, SCAN, *([EXACT] if kind == "cuda" else []), DEVICE, HOST)
    ]
}


@cache
def checked(name: str, side: int, device: torch.device) -> tuple[nn.Module, Transform, list[str]]:
    """A network on the device, its preprocessing and layers, once all contenders agree on some images."""
    loaded = network(name)
    examined = Network(loaded.model.to(device), transform=loaded.transform)
    examined.examine((3, side, side))
    with examined.evaluating():
        one = Bench(examined)
        one.check(pictures(64, (side, side)))
    return one.model, one.transform, one.layers


def test_scan(case: tuple[str, str, int], timer: Timer, form: Sizes, device: torch.device) -> None:
    name, who, turn = case
    on_gpu = device.type == "cuda"
    model, transform, layers = checked(name, form.side, device)
    precision, dtype, size = ("fp16", torch.float16, form.batches[-1]) if on_gpu else ("fp32", torch.float32, 64)
    ring = Ring(form.host_images, form.side, form.ring, pinned=on_gpu, batch=size)
    count = min(form.host_images, 20_000) if who in BASELINES else form.host_images
    timer.rounds = 1
    row: dict[str, Any] = {"kind": "scan", "network": name, "precision": precision, "images": count, "contender": who}
    row |= {"ring": len(ring.images), "batch": size}
    recorder: Recorder
    own = copy.deepcopy(model).to(dtype, memory_format=torch.channels_last) if on_gpu and who in BASELINES else model

    def prepare() -> None:  # layers and receptive fields are found once a model
        nonlocal recorder
        recorder = Recorder(model, layers, transform=transform, precision=precision, batch_size=size)
        recorder.prepare((3, form.side, form.side))

    def scan() -> None:
        with recorder:
            for ids, pixels in ring.batches(size, count):
                recorder(pixels, ids)
        if who == EXACT:
            run = recorder.result(ring)
            row["rescored"] = run.manifest["rescored"]["images"]
            row["undecided"] = sum(int((top.status == UNSEPARATED).sum()) for top in run.tops.values())

    def baseline() -> None:
        with torch.inference_mode(), BASELINES[who](own, layers) as hooks:
            for ids, pixels in ring.batches(size, count):
                batch = transform.normalize(pixels.to(device, non_blocking=True), dtype)
                hooks(batch, ids.to(device))

    run, setup = (baseline, None) if who in BASELINES else (scan, prepare)
    timer(run, setup=setup, warm=turn > 0, **row)
    timer.benchmark.extra_info.update(row)
