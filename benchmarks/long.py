"""Long measurements, started by hand: `python -m benchmarks.long memory`, `... folder` and `... exact`.

memory: peak memory of scans of few and of many images. folder: AlexNet on 2,000 JPEG files, against a naive loop and
against the time that decoding and computing take alone. exact: AlexNet on 50,000 images in memory, exact by way of half
precision, against bare forward passes and the naive hook; on a device where half precision is not fast nothing is
measured, and the results say so. Results go into benchmarks/results/<device>.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks import machine, results
from benchmarks.naive import network
from benchmarks.ring import Ring
from support.memory import Peak
from unitvis.bench.baselines import Forward, HostHook
from unitvis.bench.bench import Bench, fastest_half, interleaved, synthetic_images
from unitvis.half_precision.step import HALF
from unitvis.network.network import Network
from unitvis.ranking.recorder import Recorder
from unitvis.results.arrays import UNSEPARATED
from unitvis.scanning.precision import speed
from unitvis.scanning.scan import scan
from unitvis.sources import open_source
from unitvis.sources.transform import Transform

MEMORY_COUNTS, MEMORY_SIDE = (4_000, 100_000), 32
EXACT_IMAGES, FOLDER_FILES = 50_000, 2_000
BASELINE_IMAGES = 2_000  # that the baselines of `exact` are timed on
RING_BYTES = 2**33


def small_net() -> nn.Module:
    """Network of two convolutions with 48 units."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2)).eval()


def growth(path: str, count: int, precision: str) -> dict[str, Any]:
    """Measure the peak of anonymous memory of a scan of `count` small images, above that after a scan of one batch.

    path: a .npy file of the images.
    """
    pixels = np.load(path, mmap_mode="r")[:count]
    transform, model = Transform(mean=(0.5,) * 3, std=(0.25,) * 3), small_net()

    def scanned(images: np.ndarray) -> dict[str, Any]:
        if precision == "exact":
            return scan(model, images, transform=transform, progress=False).manifest
        with Recorder(model, transform=transform, precision=precision, batch_size=64) as recorder:
            for start in range(0, len(images), 64):
                part = torch.from_numpy(np.ascontiguousarray(images[start : start + 64]))
                recorder(part, torch.arange(start, start + len(part)))
        return recorder.result(images).manifest

    scanned(pixels[:64])
    start = time.perf_counter()
    with Peak() as peak:
        manifest = scanned(pixels)
    return {
        "images": count,
        "beyond_a_batch_mib": round(peak.added / 2**20, 2),
        "rescored": manifest.get("rescored", {}).get("images", 0),
        "seconds": round(time.perf_counter() - start, 1),
    }


def memory(counts: Sequence[int]) -> list[dict[str, Any]]:
    """Measure `growth` for each count in a new process, in the precision that a scan chooses and by way of float16."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.npy"
        shape = (max(counts), MEMORY_SIDE, MEMORY_SIDE, 3)
        pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        rng = np.random.default_rng(0)
        for start in range(0, len(pixels), 4096):
            part = pixels[start : start + 4096]
            part[:] = rng.integers(0, 256, part.shape, dtype=np.uint8)
        pixels.flush()
        for precision in ("exact", "fp16"):
            for count in counts:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    found.append({"precision": precision} | pool.apply(growth, (str(path), count, precision)))
                print(found[-1], flush=True)
    return found


def jpegs(folder: Path, count: int) -> None:
    """Write JPEG files of 500 x 400 pixels, 256 different ones and copies of them."""
    drawn = synthetic_images(min(count, 256), (400, 500))
    for number in range(count):
        path = folder / f"{number:06}.jpg"
        if number < len(drawn):
            Image.fromarray(drawn[number]).save(path, quality=90)
        else:
            shutil.copy(folder / f"{number % len(drawn):06}.jpg", path)


def naive_batches(folder: Path, transform: Transform) -> Iterator[Tensor]:
    """Read files as a first version of a scan would: one after the other, to normalised float batches of 64."""
    mean, std = torch.tensor(transform.mean)[:, None, None], torch.tensor(transform.std)[:, None, None]
    waiting = []
    for path in sorted(folder.iterdir()):
        with Image.open(path) as file:
            picture = file.convert("RGB")
        scale = 256 / min(picture.size)
        size = (round(picture.width * scale), round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.BILINEAR)
        left, top = (picture.width - 224) // 2, (picture.height - 224) // 2
        pixels = torch.from_numpy(np.array(picture.crop((left, top, left + 224, top + 224))))
        waiting.append((pixels.permute(2, 0, 1).float() / 255 - mean) / std)
        if len(waiting) == 64:
            yield torch.stack(waiting)
            waiting = []
    if waiting:
        yield torch.stack(waiting)


def folder(count: int) -> dict[str, Any]:
    """Measure images a second from files, in the fastest precision: a scan, its parts alone, and the naive loop."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    model = network("alexnet").model.to(device)
    transform = Transform(resize=256, crop=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    precision = fastest_half(device) or "fp32"
    ring = Ring(count, 224, RING_BYTES, pinned=device.type == "cuda", batch=64)

    examined = Network(model, transform=transform)
    examined.examine((3, 224, 224))
    with tempfile.TemporaryDirectory() as scratch, examined.evaluating():
        jpegs(Path(scratch), count)
        layers = [layer.name for layer in examined.layers]

        def decoded() -> None:
            for _ in open_source(scratch, transform).batches(64):
                pass

        def computed() -> None:
            with Recorder(model, layers, transform=transform, precision=precision, batch_size=64) as recorder:
                for ids, pixels in ring.batches(64, count):
                    recorder(pixels, ids)

        def naive() -> None:
            done = 0
            with torch.inference_mode(), HostHook(model, layers) as hooks:
                for batch in naive_batches(Path(scratch), transform):
                    hooks(batch.to(device), torch.arange(done, done := done + len(batch), device=device))

        def scanned() -> float:
            run = scan(model, scratch, layers, transform=transform, precision=precision, device=device, progress=False)
            return float(run.manifest["seconds"]["scan"])

        turns: list[dict[str, float]] = []
        for _ in range(3):  # in turns, so that a slow moment of the machine slows all of them
            times: dict[str, float] = {}
            for name, run in (("decoding alone", decoded), ("computing alone", computed), ("naive loop", naive)):
                start = time.perf_counter()
                run()
                times[name] = time.perf_counter() - start
            turns.append(times | {"scan": scanned()})
    rates = {name: count / statistics.median(times[name] for times in turns) for name in turns[0]}
    shares = [(times["decoding alone"] + times["computing alone"]) / times["scan"] for times in turns]
    return {
        "images": count,
        "precision": precision,
        "images_s": {name: round(rate, 1) for name, rate in rates.items()},
        "x_naive_loop": round(statistics.median(times["naive loop"] / times["scan"] for times in turns), 2),
        "share_of_what_decoding_and_computing_allow": round(statistics.median(shares), 3),
    }


def exact(count: int) -> dict[str, Any]:
    """Measure seconds of scan and re-ranking of `count` images, and the images a second of the baselines."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    half = fastest_half(device)
    if half is None:
        speeds = {precision: round(speed(device, precision), 2) for precision in HALF}
        return {"not measured": "half precision is slower than float32 here", "times_as_fast_as_float32": speeds}
    loaded = network("alexnet")
    ring = Ring(count, 224, RING_BYTES, pinned=device.type == "cuda", batch=64)
    examined = Network(loaded.model.to(device), transform=loaded.transform)
    examined.examine((3, 224, 224))
    checked_bench = Bench(examined)
    model, transform, layers = checked_bench.model, checked_bench.transform, checked_bench.layers
    fast = network.__wrapped__("alexnet").model.to(device, HALF[half], memory_format=torch.channels_last)
    timed = min(count, BASELINE_IMAGES)

    def passed(kind: type[Forward], own: nn.Module, dtype: torch.dtype) -> Any:
        def run() -> None:
            with torch.inference_mode(), kind(own, layers) as hooks:
                for ids, pixels in ring.batches(64, timed):
                    hooks(transform.normalize(pixels.to(device), dtype), ids.to(device))

        return lambda: run

    def prepared(images: int) -> Recorder:
        recorder = Recorder(model, layers, transform=transform, precision=half, batch_size=64)
        recorder.prepare((3, 224, 224))
        return recorder

    def scanned(recorder: Recorder, images: int) -> None:
        with recorder:
            for ids, pixels in ring.batches(64, images):
                recorder(pixels, ids)

    def alone() -> Any:
        recorder = prepared(timed)
        return lambda: scanned(recorder, timed)

    contenders = {
        "bare half": passed(Forward, fast, HALF[half]),
        "scan alone": alone,
        "bare float32": passed(Forward, model, torch.float32),
        "naive host hook": passed(HostHook, model, torch.float32),
    }
    rates = {name: timed / seconds for name, seconds in interleaved(contenders, 3, device).items()}
    recorder = prepared(count)
    start = time.perf_counter()
    scanned(recorder, count)
    middle = time.perf_counter()
    run = recorder.result(ring)
    both = time.perf_counter() - start
    again = run.manifest["rescored"]["images"]
    units = sum(len(top) for top in run.tops.values())
    undecided = sum(int((top.status == UNSEPARATED).sum()) for top in run.tops.values())
    return {
        "images": count,
        "precision": half,
        "images_s": {name: round(rate, 1) for name, rate in rates.items()},
        "scan_seconds": round(middle - start, 1),
        "rescoring_seconds": round(start + both - middle, 1),
        "rescored": again,
        "separated_or_tied": round(1 - undecided / units, 4),
        "scan_alone_x_bare_half_time": round(rates["bare half"] / rates["scan alone"], 3),
        "total_x_expected_time": round(both / (count / rates["bare half"] + again / rates["bare float32"]), 3),
        "x_naive_hook": round(count / both / rates["naive host hook"], 2),
    }


def main() -> int:
    """Measure, print, and write into the device's results file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long", description=__doc__)
    parser.add_argument("what", choices=("memory", "folder", "exact"))
    arguments = parser.parse_args()
    runs = {
        "memory": lambda: memory(MEMORY_COUNTS),
        "folder": lambda: folder(FOLDER_FILES),
        "exact": lambda: exact(EXACT_IMAGES),
    }
    found = runs[arguments.what]()
    print(json.dumps(found, indent=1))
    target = results.RESULTS / machine.file_name(machine.device_name())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results.write(target, **{arguments.what: {"machine": machine.describe(device), "found": found}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
