"""Count how often the bound of half-precision scans is wrong, against float32, on trained and random networks.

    UNITVIS_SHARED=FOLDER python -m benchmarks.exactness --images 10000 small large
    python -m benchmarks.exactness --images 2000 alexnet vgg16 resnet18

The MobileNets on photographs and augmented copies of them, the others with random weights on made-up pictures. A line
each, kept in results/long/exactness.json: units `decided` by the bound alone, whatever was computed besides, and
`wrong`, those of them with a winner that is no candidate, which the bound said cannot be. Half precision is emulated
in float32 (tests/support/half.py).
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import unitvis
from benchmarks import machine, naive, results
from support import half, photos
from unitvis.ranking.recorder import Recorder
from unitvis.reranking.rerank import Reranking
from unitvis.sources import open_source


class Augmented(torch.utils.data.Dataset[Tensor]):
    """Dataset of images, float [3, H, W], then copies of them with random crops, flips and brightness, by number."""

    def __init__(self, pictures: Tensor, count: int) -> None:
        self._pictures, self._count = pictures, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Tensor:
        picture = self._pictures[number % len(self._pictures)]
        if number < len(self._pictures):
            return picture
        rng = np.random.default_rng(number)
        height, width = picture.shape[1:]
        side = int(rng.integers(height // 2, height + 1))
        top, left = (int(rng.integers(0, size - side + 1)) for size in (height, width))
        part = picture[:, top : top + side, left : left + side]
        part = torch.nn.functional.interpolate(part[None], size=(height, width), mode="bilinear")[0]
        part = part.flip(2) if rng.random() < 0.5 else part
        return (part * float(rng.uniform(0.6, 1.2)) + float(rng.uniform(-0.2, 0.2))).clamp(-1, 1)


class SmoothRandom(torch.utils.data.Dataset[Tensor]):
    """Dataset of smooth random images, float [3, side, side], of different contrast."""

    def __init__(self, count: int, side: int) -> None:
        self._count, self._side = count, side

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Tensor:
        g = torch.Generator().manual_seed(number)
        coarse = torch.randn(1, 3, 7, 7, generator=g) + 0.3 * torch.randn(1, 3, 1, 1, generator=g)
        fine = torch.randn(1, 3, self._side, self._side, generator=g)
        smooth = torch.nn.functional.interpolate(coarse, size=(self._side, self._side), mode="bicubic")
        return (smooth + 0.3 * fine)[0] * float(0.3 + torch.rand(1, generator=g))


def network(name: str) -> nn.Module:
    """Load a trained MobileNet (small, large) or a torchvision network with random weights."""
    return photos.model(name) if name in photos.NETWORKS else naive.network(name).model


def measure(name: str, count: int, precision: str) -> dict[str, Any]:
    """Count the units that the bound decides once all candidates are computed, and how many of those are wrong."""
    model = network(name)
    images = Augmented(photos.images(), count) if name in photos.NETWORKS else SmoothRandom(count, 64)
    source = open_source(images, None)
    with Recorder(model, precision=precision) as recorder:
        for batch in source.batches(64):
            recorder(batch.pixels, batch.ids)
    with recorder.network.evaluating():
        reranking = Reranking(recorder.network, recorder.scanned, source)
        reranking.compute_sample()
        reranking.compute_candidates(np.ones(len(reranking.rows), bool))
        computed = len(reranking.computed)
        decided = reranking.kth > reranking.outsiders() + reranking.margins()
    truth = unitvis.scan(model, images, precision="fp32", progress=False)
    winners = np.concatenate([top.images for top in truth.tops.values()])
    inside = (winners[:, :, None] == reranking.images[:, None, :]).any(axis=2).all(axis=1)
    return {
        "network": name,
        "images": count,
        "precision": recorder.precision,
        "computed again": computed,
        "units": len(winners),
        "decided": int(decided.sum()),
        "wrong": int((decided & ~inside).sum()),
        "undecided but right": int((~decided & inside).sum()),
    }


def save_line(line: dict[str, Any]) -> None:
    """Write a line into the results, in place of an earlier one of the same network, images and precision."""
    path = results.LONG / "exactness.json"
    same = ("network", "images", "precision")
    others = [one for one in results.read(path).get("lines", []) if any(one[key] != line[key] for key in same)]
    results.write(path, lines=[*others, line])


def main() -> None:
    """Measure each network in each precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", help="small, large, or a name of torchvision's")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--precision", nargs="+", default=["fp16", "bf16"], choices=("fp16", "bf16"))
    arguments = parser.parse_args()
    Recorder.make_step = half.Rounded.of  # type: ignore[method-assign, assignment]
    device = machine.describe(torch.device("cpu"))
    measured_on = {"commit": device["commit"], "date": device["date"], "torch": device["versions"]["torch"]}
    for name in arguments.networks:
        for precision in arguments.precision:
            start = time.perf_counter()
            line = measure(name, arguments.images, precision)
            line |= {"seconds": round(time.perf_counter() - start)} | measured_on
            print(json.dumps(line), flush=True)
            save_line(line)
    results.update_documents()


if __name__ == "__main__":
    main()
