"""Measure reading from image files against a plain loop of one process: `python -m benchmarks.reading [FOLDER]`.

FOLDER: photographs; without it 1,000 JPEG files of 500 x 400 pixels are drawn. Measured in turns, three times:

- the plain loop of `benchmarks.plain`, in a process of its own, before and after each scan;
- scans of a folder and of a tar archive of 3,000 files, in which the photographs are repeated, by a network of one
  1 x 1 convolution with stride 32, whose time for computing alone is subtracted; one process a core, and 0;
- scans of 8,000 JPEG files of 32 x 32 pixels.

Then what a worker does for an image, stage by stage, with Pillow, and with simplejpeg where it is installed; the
processor time that the scanning process itself needs for an image, with 16 workers that wait for 2 ms in place of
decoding; and, with --memory, how much the memory of all processes together (PSS) grows from image 10,000 to 100,000.
Images/s of several processes are compared with cores times the plain loop. All pixels are first checked to be those of
the plain loop. Writes benchmarks/results/long/reading.json.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks.long import jpegs
from benchmarks.machine import ROOT
from benchmarks.results import record
from unitvis.choices import DECODERS
from unitvis.decoding.contents import FileContents, digest
from unitvis.decoding.options import Decoding
from unitvis.ranking.recorder import Recorder
from unitvis.scanning.scan import scan
from unitvis.sources import open_source
from unitvis.sources.base import usable_cores
from unitvis.sources.transform import Transform

TURNS = 3
PHOTOGRAPHS, SMALL = 1_000, 8_000  # files
LONG = 3_000  # files of the scans of photographs, which are repeated under other names: starting takes some 0.3 s
WAITING_WORKERS, WAITING_IMAGES = 16, 8_000
MEMORY_FROM, MEMORY_TO = 10_000, 100_000  # images
TRANSFORM = Transform(resize=256, crop=224)
# In place of decoding, for a worker process: 150 KB of pixels after 2 ms.
WAITING = """
import time
import numpy as np
from unitvis.decoding.options import Decoding
def waited(self, data, geometry):
    time.sleep(0.002)
    return np.zeros((224, 224, 3), np.uint8), (500, 400)
Decoding.pixels = waited
"""


def plain(paths: list[Path], scratch: Path) -> dict[str, Any]:
    """Run the plain loop over files in a process of its own."""
    (scratch / "list").write_text("\n".join(map(str, paths)))
    command = [sys.executable, "-m", "benchmarks.plain", str(scratch / "list")]
    return dict(json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout))


def network() -> nn.Module:
    """One 1 x 1 convolution with stride 32."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 1, 32)).eval()


def scanned(images: Path, workers: int | None) -> float:
    """Seconds of a scan, from its first batch to its last."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of images that are repeated, which is meant here
        run = scan(network(), str(images), transform=TRANSFORM, precision="fp32", workers=workers, progress=False)
    return float(run.manifest["seconds"]["scan"])


def computed(count: int) -> float:
    """Seconds that the network takes for so many images that are in memory."""
    pixels = torch.zeros(64, 224, 224, 3, dtype=torch.uint8)
    with Recorder(network(), transform=TRANSFORM, precision="fp32") as recorder:
        begin = time.perf_counter()
        for start in range(0, count, 64):
            recorder(pixels[: count - start])
        return time.perf_counter() - begin


def check(paths: list[Path], wanted: str) -> None:
    """Compare pixels with those of the plain loop; exits if they differ."""
    found = hashlib.blake2b()
    for batch in open_source(paths[:100], TRANSFORM).batches(64):
        found.update(batch.pixels.numpy().tobytes())
    if found.hexdigest() != wanted:
        sys.exit("the pixels are not those of the plain loop")


def rates(photographs: Path, scratch: Path) -> dict[str, Any]:
    """Images a second of scans of photographs and of the plain loop, in turns."""
    paths = sorted(photographs.iterdir())
    folder, archive = links(photographs, scratch / "photographs", LONG), scratch / "photographs.tar"
    with tarfile.open(archive, "w", dereference=True) as tar:
        tar.add(folder, "")
    check(paths, plain(paths, scratch)["pixels"])
    turns, loops = [], []
    for _ in range(TURNS):
        computing, turn = computed(LONG), {}
        for name, images, workers in (("folder", folder, None), ("tar", archive, None), ("one", folder, 0)):
            loops += [before := plain(paths, scratch)]
            turn[name] = LONG / (scanned(images, workers) - computing)
            loops += [after := plain(paths, scratch)]
            turn[f"{name}_x_plain"] = turn[name] / statistics.mean(loop["images_s"] for loop in (before, after))
        turns.append(turn)
    median = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    cores = usable_cores()
    return {
        "photographs": len(paths),
        "files_of_a_scan": LONG,
        "images_s": {
            "plain loop": round(statistics.median(loop["images_s"] for loop in loops), 1),
            "folder": round(median["folder"], 1),
            "tar": round(median["tar"], 1),
            "folder, workers=0": round(median["one"], 1),
        },
        "folder_x_cores_x_plain": round(median["folder_x_plain"] / cores, 3),
        "tar_x_cores_x_plain": round(median["tar_x_plain"] / cores, 3),
        **decoders(paths),
        "microseconds_of_the_plain_loop": {
            stage: round(statistics.median(loop["microseconds"][stage] for loop in loops), 1)
            for stage in loops[0]["microseconds"]
        },
    }


def decoders(paths: list[Path]) -> dict[str, Any]:
    """Microseconds an image of what a worker does, stage by stage, in this process, by each decoder in turns."""
    contents, geometry = FileContents(b"/"), TRANSFORM.geometry
    pixels = np.empty((224, 224, 3), np.uint8)
    stages = "read", "hash", "decode", "resize and crop"
    names = [name for name in DECODERS if name == "pillow" or importlib.util.find_spec(name)]
    seconds = {name: dict.fromkeys(stages, 0.0) for name in names}
    equal = dict.fromkeys(names, 0)
    for path in paths:
        pictures = {}
        for name in names:
            decoding = Decoding(name)
            times = [time.process_time()]
            data = contents.read(os.fsencode(path))
            times.append(time.process_time())
            digest(data)
            times.append(time.process_time())
            pictures[name] = picture = decoding.picture(data)
            times.append(time.process_time())
            pixels[:] = geometry(picture)
            times.append(time.process_time())
            for stage, start, stop in zip(stages, times, times[1:], strict=False):
                seconds[name][stage] += stop - start
            equal[name] += pictures["pillow"].tobytes() == picture.tobytes()
    micros = {
        name: {stage: round(value / len(paths) * 1e6, 1) for stage, value in found.items()}
        for name, found in seconds.items()
    }
    return {"microseconds_of_a_worker": micros, "images_decoded_as_by_pillow": equal}


def small_files(scratch: Path) -> dict[str, Any]:
    """Images a second of small JPEG files."""
    folder = scratch / "small"
    folder.mkdir()
    tile = next(iter(sorted((scratch / "drawn").iterdir())))
    with Image.open(tile) as picture:
        for number in range(SMALL):
            left, top = number % 400, number // 400 % 300
            picture.crop((left, top, left + 32, top + 32)).save(folder / f"{number:05}.jpg", quality=90)
    found = []
    for _ in range(TURNS):
        begin = time.perf_counter()
        count = sum(len(batch.ids) for batch in open_source(folder, Transform()).batches(64))
        found.append(count / (time.perf_counter() - begin))
    return {"small_images_s": round(statistics.median(found), 1)}


def own_time(photographs: Path, scratch: Path) -> dict[str, Any]:
    """Processor time of the reading process itself, with workers that wait in place of decoding."""
    (scratch / "waiting").mkdir()
    (scratch / "waiting" / "sitecustomize.py").write_text(WAITING)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(scratch / "waiting"), str(ROOT), str(ROOT / "kernels")])
    try:
        return {"own_microseconds": round(reading_alone(photographs, WAITING_IMAGES, WAITING_WORKERS), 1)}
    finally:
        del os.environ["PYTHONPATH"]


def links(photographs: Path, folder: Path, count: int) -> Path:
    """Make a folder of so many names for the photographs."""
    folder.mkdir()
    for number, path in enumerate(islice(cycle(sorted(photographs.iterdir())), count)):
        (folder / f"{number:06}.jpg").symlink_to(path)
    return folder


def reading_alone(photographs: Path, count: int, workers: int) -> float:
    """Microseconds of this process's own processor time an image, of reading `count` images."""
    with tempfile.TemporaryDirectory() as temporary:
        source = open_source(links(photographs, Path(temporary, "images"), count), TRANSFORM)
        begin = time.process_time()
        read = sum(len(batch.ids) for batch in source.batches(64, workers=workers))
        return (time.process_time() - begin) / read * 1e6


def memory(photographs: Path) -> dict[str, Any]:
    """Growth of the memory of this process and its workers while they read small images."""
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        source = open_source(links(photographs, Path(temporary, "images"), MEMORY_TO), Transform(resize=32, crop=32))
        read = 0
        for batch in source.batches(64):
            read += len(batch.ids)
            if read - len(batch.ids) < MEMORY_FROM <= read or read == MEMORY_TO:
                found[read] = proportional_bytes()
    first, last = found.values()
    return {"memory_growth_megabytes": round((last - first) / 2**20, 1)}


def proportional_bytes() -> int:
    """PSS of this process and its children: shared pages are divided among those that share them."""
    total = 0
    own = os.getpid()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (int(entry.name) == own or f"PPid:\t{own}\n" in (entry / "status").read_text()):
            lines = (entry / "smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return total


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reading", description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", type=Path, nargs="?")
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="unitvis-") as temporary:
        scratch = Path(temporary)
        (scratch / "drawn").mkdir()
        jpegs(scratch / "drawn", PHOTOGRAPHS if arguments.folder is None else 1)
        photographs = (arguments.folder or scratch / "drawn").absolute()
        figures = rates(photographs, scratch) | small_files(scratch) | own_time(photographs, scratch)
        if arguments.memory:
            figures |= memory(scratch / "small")
    print(json.dumps(figures, indent=1))
    print(record("reading", figures))


if __name__ == "__main__":
    main()
