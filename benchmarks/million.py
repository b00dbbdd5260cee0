"""A million small images in a hundred tar shards, scanned in one go and again with three kills, compared byte by byte.

    python -m benchmarks.million [--images 1000000] [--shards 100] [--kills 3] [--folder DIR] [--seed 0]

Tells images/s, anonymous memory (RssAnon) from image 10,000 to the end, the share of time that checkpoints took, and
whether the run that was killed equals the other one.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import unitvis
from benchmarks.memory import anonymous
from unitvis.progress import Progress

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
    """In a process of its own: scan, or go on; memory by number of images is written beside the run."""
    memory: dict[int, int] = {}
    real = Progress.after_batch

    def after_batch(self: Progress) -> None:
        real(self)
        memory.setdefault(self._recorder.images // SAMPLE * SAMPLE, anonymous())

    Progress.after_batch = after_batch  # type: ignore[method-assign]
    transform = unitvis.Transform(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    unitvis.scan(
        network(), pattern, transform=transform, out=out, resume=True, every=every, batch_size=256, progress=False
    )
    out.with_suffix(".memory.json").write_text(json.dumps(memory))


@dataclass
class Outcome:
    """What a comparison of the run in one go with the one that was killed came to."""

    images: int
    rate: float  # images/s in one go
    memory: list[int]  # RssAnon in bytes, at each 10,000 images from the first 10,000
    checkpoints: float  # share of the time
    kills: int  # that met a scan at work
    equal: bool
    seconds: float  # of all

    def __str__(self) -> str:
        spread = (max(self.memory) - min(self.memory)) / 2**20
        return (
            f"{self.images:,} images, {self.rate:.0f} images/s; RssAnon {min(self.memory) / 2**20:.0f} to "
            f"{max(self.memory) / 2**20:.0f} MB (within {spread:.1f}); checkpoints {self.checkpoints:.2%} of the time; "
            f"after {self.kills} kills {'the same bytes' if self.equal else 'OTHER BYTES'}; {self.seconds:.0f} s in all"
        )


def compare(folder: Path, pattern: str, kills: int, seed: int, every: float) -> Outcome:
    """Scan in one go, then with kill -9 at random moments; `folder` must be empty of runs."""
    start, draw = time.perf_counter(), random.Random(seed)  # noqa: S311
    whole, killed = folder / "whole", folder / "killed"

    def command(out: Path) -> list[str]:
        return [sys.executable, "-m", "benchmarks.million", "--scan", pattern, "--out", str(out), "--every", str(every)]

    subprocess.run(command(whole), check=True)
    took = time.perf_counter() - start
    met = 0
    for _ in range(kills):
        with subprocess.Popen(command(killed)) as process:
            try:
                process.wait(took * draw.uniform(0.1, 0.9) / kills + 5)  # the first seconds are imports
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                met += 1
    subprocess.run(command(killed), check=True)
    manifest = json.loads((whole / "manifest.json").read_text())
    again = json.loads((killed / "manifest.json").read_text())
    equal = all((whole / name).read_bytes() == (killed / name).read_bytes() for name in ("top.npz", "images.jsonl"))
    equal &= all(manifest[key] == again[key] for key in ("images", "coverage", "failures", "layers", "source"))
    seconds, memory = manifest["seconds"], json.loads(whole.with_suffix(".memory.json").read_text())
    return Outcome(
        manifest["images"],
        manifest["images"] / seconds["scan"],
        [value for images, value in memory.items() if int(images) >= SAMPLE],
        seconds["checkpoints"] / seconds["scan"],
        met,
        equal,
        time.perf_counter() - start,
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
        print(compare(Path(temporary), pattern, arguments.kills, arguments.seed, arguments.every))


if __name__ == "__main__":
    main()
