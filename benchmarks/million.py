"""Scan a million small images in a hundred tar shards, once whole and once with three kills, and compare the bytes.

    python -m benchmarks.million [--images 1000000] [--shards 100] [--kills 3] [--folder DIR] [--seed 0]

Each `kill -9` comes at a random function call after a random number of images, not after a time, so that on any machine
it comes before the scan is over, every second time while a checkpoint is being written. Prints images/s, anonymous
memory (RssAnon) from image 10,000 to the end, the fraction of time that checkpoints took, and whether both runs are
equal; with a million images the figures go into benchmarks/results/long/million.json.
"""

from __future__ import annotations

import argparse
import io
import json
import operator
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from PIL import Image
from torch import nn

import unitvis
from benchmarks.results import record
from support.memory import anonymous
from unitvis.scanning.progress import Progress

SIDE, BATCH = 32, 256
SAMPLE_EVERY = 10_000  # images between two figures of memory
# A kill comes within so many calls and returns: about half of them write a checkpoint, the others begin a batch.
MAX_CALLS = 3_000


def network() -> nn.Sequential:
    """Network of two convolutions with 48 channels."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2)).eval()


def make_shard(path: Path, number: int, count: int) -> None:
    """Write a tar archive of `count` different JPEG files of coloured blocks and noise."""
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
    """Make the shards that do not exist yet; returns their pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        for number in range(shards):
            path = folder / f"{images}-{number:04}.tar"
            count = (number + 1) * images // shards - number * images // shards
            if not path.exists():
                pool.submit(make_shard, path, number, count)
    return str(folder / f"{images}-{{0000..{shards - 1:04}}}.tar")


def scan(pattern: str, out: Path, every: float, batch: int, until: int | None, call: int) -> None:
    """Scan, or resume a scan, in this process; prints images and memory at first and after each batch.

    until: number of images after which the process kills itself at the `call`-th call of a function; None: never.
    """
    real_unread_ids, real_after_batch = Progress.unread_ids, Progress.after_batch

    def unread_ids(self: Progress) -> Iterable[int] | None:
        print(self._recorder.images, anonymous(), flush=True)
        return real_unread_ids(self)

    def after_batch(self: Progress) -> None:
        print(self._recorder.images, anonymous(), flush=True)
        if until is not None and self._recorder.images >= until and sys.getprofile() is None:
            self.checkpoint()
            self._checkpoints._every = 1e-9  # a checkpoint after every batch, so that the kill can come during one
            sys.setprofile(killing(call))
        real_after_batch(self)

    Progress.unread_ids, Progress.after_batch = unread_ids, after_batch  # type: ignore[method-assign]
    if until is not None:
        Progress.finish = lambda self: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign, assignment]
    transform = unitvis.Transform(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    unitvis.scan(
        network(), pattern, transform=transform, out=out, resume=True, every=every, batch_size=batch, progress=False
    )


def killing(call: int) -> Callable[[FrameType, str, object], None]:
    """Make a function for `sys.setprofile` that kills the process at the `call`-th call or return."""
    left = iter(range(call, 0, -1))

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if next(left, 1) == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    return profile


@dataclass
class Outcome:
    """Result of comparing the whole run with the one that was killed."""

    images: int
    shards: int
    seconds: float  # of the whole scan
    rate: float  # its images/s
    memory: dict[int, int]  # images -> its RssAnon in bytes, at the first batch of each 10,000 images and at the end
    every: float  # seconds between its checkpoints
    checkpoint_share: float  # of its time
    kills: list[int]  # images that were done at each kill
    resumed: list[int]  # images in the checkpoint that was resumed after each kill
    equal: bool
    seconds_in_all: float

    @property
    def spread(self) -> int:
        """Difference in bytes between the smallest and the largest memory from image 10,000 to the end."""
        return max(self.memory.values()) - min(self.memory.values())

    def __str__(self) -> str:
        first, last, spread = (
            f"{value / 2**20:.1f} MB"
            for value in (self.memory[min(self.memory)], self.memory[max(self.memory)], self.spread)
        )
        killed, resumed = (", ".join(f"{images:,}" for images in counts) for counts in (self.kills, self.resumed))
        return (
            f"{self.images:,} images of {self.shards} shards in {self.seconds:.0f} s, {self.rate:.0f} images/s; "
            f"RssAnon {first} after {min(self.memory):,}, {last} at the end, within {spread}; checkpoints every "
            f"{self.every:g} s took {self.checkpoint_share:.2%} of the time; killed after {killed} images, "
            f"resumed from {resumed}: "
            f"{'the same bytes' if self.equal else 'OTHER BYTES'}; {self.seconds_in_all:.0f} s in all"
        )


def watched(
    pattern: str, out: Path, every: float, batch: int, until: int | None = None, call: int = 0
) -> dict[int, int]:
    """Scan in a new process, see `scan`; returns images -> RssAnon in bytes."""
    memory: dict[int, int] = {}
    command = [sys.executable, "-m", "benchmarks.million", "--scan", pattern, "--out", str(out), "--every", str(every)]
    command += ["--batch", str(batch)]
    if until is not None:
        command += ["--until", str(until), "--call", str(call)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            images, bytes_ = map(int, line.split())
            memory[images] = bytes_
    expected = 0 if until is None else -signal.SIGKILL
    assert process.returncode == expected, f"the scan ended with {process.returncode}, not {expected}"
    return memory


def sampled(memory: dict[int, int]) -> dict[int, int]:
    """Keep the first figure of each 10,000 images, and the last; none before the first 10,000."""
    kept: dict[int, int] = {}
    for images in memory:
        kept.setdefault(images // SAMPLE_EVERY, images)
    first = min(SAMPLE_EVERY, max(memory))
    return {images: memory[images] for images in [*kept.values(), max(memory)] if images >= first}


def compare(
    folder: Path, pattern: str, shards: int, kills: int, seed: int, every: float, batch: int = BATCH
) -> Outcome:
    """Scan without a kill, then with one kill -9 in each of `kills` equal parts; `folder` must hold no runs."""
    start, draw = time.perf_counter(), random.Random(seed)  # noqa: S311
    whole, killed = folder / "whole", folder / "killed"
    memory = watched(pattern, whole, every, batch)
    manifest = json.loads((whole / "manifest.json").read_text())
    seconds = manifest["seconds"]
    reached, planned, resumed = [], [], []
    for number in range(kills):
        until = int(manifest["images"] * (number + draw.uniform(0.1, 0.9)) / kills)
        attempt = watched(pattern, killed, every, batch, until, draw.randint(1, MAX_CALLS))
        assert not (killed / "manifest.json").exists(), "the scan was over before the kill"
        reached.append(max(attempt))
        planned.append(until)
        resumed.append(min(attempt))
    resumed.append(min(watched(pattern, killed, every, batch)))
    assert all(map(operator.ge, resumed, [0, *planned])), f"killed after {planned} images and resumed from {resumed}"
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
        kills=reached,
        resumed=resumed[1:],
        equal=equal,
        seconds_in_all=round(time.perf_counter() - start, 1),
    )


def main() -> None:
    """Make the shards, compare the scans and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--every", type=float, default=10.0, help="seconds between checkpoints")
    parser.add_argument("--folder", type=Path, help="where the shards are made, and kept")
    parser.add_argument("--seed", type=int, default=0, help="of the random places of the kills")
    parser.add_argument("--scan", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=BATCH, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--call", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.scan:
        scan(arguments.scan, arguments.out, arguments.every, arguments.batch, arguments.until, arguments.call)
        return
    with tempfile.TemporaryDirectory(prefix="unitvis-") as temporary:
        pattern = make(arguments.folder or Path(temporary), arguments.images, arguments.shards)
        outcome = compare(Path(temporary), pattern, arguments.shards, arguments.kills, arguments.seed, arguments.every)
    print(outcome)
    if outcome.images >= 1_000_000:
        print(record("million", asdict(outcome) | {"spread": outcome.spread}))


if __name__ == "__main__":
    main()
