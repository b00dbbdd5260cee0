"""A million small images in a hundred tar shards, scanned in one go and again with three kills, compared byte by byte.

    python -m benchmarks.million [--images 1000000] [--shards 100] [--kills 3] [--folder DIR] [--seed 0]

Tells images/s, anonymous memory (RssAnon) from image 10,000 to the end, the share of time that checkpoints took, and
whether the run that was killed equals the other one; with a million images in benchmarks/results/long/million.json.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import unitvis
from benchmarks.memory import anonymous
from benchmarks.results import record
from unitvis.scanning.progress import Progress

SIDE, SAMPLE = 32, 10_000


def network() -> nn.Sequential:
    """48 channels in two layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2)).eval()


def make_shard(path: Path, number: int, count: int) -> None:
    """`count` JPEG files of coloured blocks and noise, each another."""
    draw = np.random.default_rng(number)
    with tarfile.open(path.with_suffix(".part"), "w", format=tarfile.USTAR_FORMAT) as archive:
        for image in range(count):
            blocks = draw.integers(0, 256, (4, 4, 3), np.uint8).repeat(SIDE // 4, 0).repeat(SIDE // 4, 1)
            file = io.BytesIO()
            Image.fromarray(blocks ^ draw.integers(0, 32, blocks.shape, np.uint8)).save(file, "JPEG", quality=90)
            info = tarfile.TarInfo(f"{number:04}{image:06}.jpg")
            info.size = file.tell()
            file.seek(0)
            archive.addfile(info, file)
            archive.members.clear()  # type: ignore[attr-defined]
    path.with_suffix(".part").rename(path)


def make(folder: Path, images: int, shards: int) -> str:
    """The shards, made where they are not there yet; returns their pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        for number in range(shards):
            path = folder / f"{images}-{number:04}.tar"
            count = (number + 1) * images // shards - number * images // shards
            if not path.exists():
                pool.submit(make_shard, path, number, count)
    return str(folder / f"{images}-{{0000..{shards - 1:04}}}.tar")


def scan(pattern: str, out: Path, every: float) -> None:
    """In a process of its own: scan, or go on; prints the number of images and the memory after every batch."""
    real = Progress.after_batch

    def after_batch(self: Progress) -> None:
        print(self._recorder.images, anonymous(), flush=True)
        real(self)

    Progress.after_batch = after_batch  # type: ignore[method-assign]
    transform = unitvis.Transform(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    unitvis.scan(
        network(), pattern, transform=transform, out=out, resume=True, every=every, batch_size=256, progress=False
    )


@dataclass
class Outcome:
    """What a comparison of the run in one go with the one that was killed came to."""

    images: int
    shards: int
    seconds: float  # of the scan in one go
    rate: float  # its images/s
    memory: dict[int, int]  # its RssAnon in bytes, by images: at the first batch from each 10,000 on, and at the end
    every: float  # seconds between its checkpoints
    checkpoint_share: float  # of its time
    kills: list[int]  # images that were done when each came
    equal: bool
    seconds_in_all: float

    @property
    def spread(self) -> int:
        """Bytes between the smallest and the largest memory from image 10,000 to the end."""
        return max(self.memory.values()) - min(self.memory.values())

    def __str__(self) -> str:
        first, last, spread = (
            f"{value / 2**20:.1f} MB"
            for value in (self.memory[min(self.memory)], self.memory[max(self.memory)], self.spread)
        )
        killed = ", ".join(f"{images:,}" for images in self.kills)
        return (
            f"{self.images:,} images of {self.shards} shards in {self.seconds:.0f} s, {self.rate:.0f} images/s; "
            f"RssAnon {first} after {min(self.memory):,}, {last} at the end, within {spread}; checkpoints every "
            f"{self.every:g} s took {self.checkpoint_share:.2%} of the time; killed after {killed} images: "
            f"{'the same bytes' if self.equal else 'OTHER BYTES'}; {self.seconds_in_all:.0f} s in all"
        )


def watched(pattern: str, out: Path, every: float, until: int | None = None, delay: float = 0.0) -> dict[int, int]:
    """Memory by images of a scan in a process; `kill -9` comes `delay` seconds after so many images (None: never)."""
    memory: dict[int, int] = {}
    command = [sys.executable, "-m", "benchmarks.million", "--scan", pattern, "--out", str(out), "--every", str(every)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            images, bytes_ = map(int, line.split())
            memory[images] = bytes_
            if until is not None and images >= until:
                time.sleep(delay)
                process.kill()
                break
    assert process.returncode == (0 if until is None else -9), f"the scan ended with {process.returncode}"
    return memory


def sampled(memory: dict[int, int]) -> dict[int, int]:
    """Of each 10,000 images the first that is known, and the last of all; nothing before the first 10,000."""
    kept: dict[int, int] = {}
    for images in memory:
        kept.setdefault(images // SAMPLE, images)
    return {images: memory[images] for images in [*kept.values(), max(memory)] if images >= min(SAMPLE, max(memory))}


def compare(folder: Path, pattern: str, shards: int, kills: int, seed: int, every: float) -> Outcome:
    """Scan in one go, then with kill -9 at random moments; `folder` must be empty of runs."""
    start, draw = time.perf_counter(), random.Random(seed)  # noqa: S311
    whole, killed = folder / "whole", folder / "killed"
    memory = watched(pattern, whole, every)
    manifest = json.loads((whole / "manifest.json").read_text())
    seconds = manifest["seconds"]
    moments = sorted(int(manifest["images"] * draw.uniform(0.05, 0.95)) for _ in range(kills))
    met = []
    for images in moments:
        met.append(max(watched(pattern, killed, every, images, delay=draw.uniform(0, 0.3))))
        assert not (killed / "manifest.json").exists(), "the kill came too late"
    watched(pattern, killed, every)
    again = json.loads((killed / "manifest.json").read_text())
    equal = all((whole / name).read_bytes() == (killed / name).read_bytes() for name in ("top.npz", "images.jsonl"))
    equal &= all(manifest[key] == again[key] for key in ("images", "coverage", "failures", "layers", "source"))
    return Outcome(
        images=manifest["images"],
        shards=shards,
        seconds=round(seconds["scan"], 1),
        rate=round(manifest["images"] / seconds["scan"], 1),
        memory=sampled(memory),
        every=every,
        checkpoint_share=seconds["checkpoints"] / seconds["scan"],
        kills=met,
        equal=equal,
        seconds_in_all=round(time.perf_counter() - start, 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--every", type=float, default=10.0, help="seconds between checkpoints")
    parser.add_argument("--folder", type=Path, help="where the shards are made, and kept")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--scan", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.scan:
        scan(arguments.scan, arguments.out, arguments.every)
        return
    with tempfile.TemporaryDirectory(prefix="unitvis-") as temporary:
        pattern = make(arguments.folder or Path(temporary), arguments.images, arguments.shards)
        outcome = compare(Path(temporary), pattern, arguments.shards, arguments.kills, arguments.seed, arguments.every)
    print(outcome)
    if outcome.images >= 1_000_000:
        print(record("million", asdict(outcome) | {"spread": outcome.spread}))


if __name__ == "__main__":
    main()
