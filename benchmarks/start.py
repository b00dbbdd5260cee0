"""Measure the time and memory that a scan of a very large source needs until it reads its first image.

    python -m benchmarks.start [--images 1000000] [--folder DIR]

Makes folders of empty files and the same number of members in tar shards. For each a scan is started twice, the second
time with the saved listing, and stopped when it asks for the first image. Prints the seconds of `unitvis.scan` until
then, its CPU seconds (which other processes do not lengthen), the seconds of the whole process with its imports, and
the peak of anonymous memory (RssAnon) above that after the imports. With a million images the figures go into
benchmarks/results/long/start.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.results import record


class FirstRequestError(Exception):
    """Raised when the scan asks for its first image."""


def start(images: str, out: str) -> None:
    """Scan in this process until the first image is asked for; prints seconds and memory as JSON."""
    import unitvis
    from benchmarks.million import network
    from support.memory import Peak
    from unitvis.sources.encoded import EncodedSource

    asked: list[float] = []

    def stop(self: EncodedSource, id: int) -> bytes:
        asked.extend([time.perf_counter(), time.process_time()])
        raise FirstRequestError

    EncodedSource._load = stop  # type: ignore[method-assign, assignment]
    with Peak() as peak:
        begin = time.perf_counter(), time.process_time()
        with contextlib.suppress(FirstRequestError):
            unitvis.scan(network(), images, transform=unitvis.Transform(crop=32), out=out, overwrite=True, workers=0)
    seconds, cpu = (round(then - before, 2) for then, before in zip(asked, begin, strict=True))
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "megabytes": round(peak.added / 2**20)}))


def make(folder: Path, count: int) -> dict[str, str]:
    """Make the sources: a flat folder, a thousand folders and a hundred shards; returns name -> path."""
    flat, deep, shards = folder / "flat", folder / "deep", folder / "shards"
    if not shards.exists():
        for directory in (flat, deep, shards):
            directory.mkdir()
        for number in range(count):
            (flat / f"n{number:08}.jpg").touch()
        for number in range(count):
            directory = deep / f"class{number % 1000:04}"
            directory.mkdir(exist_ok=True)
            (directory / f"n{number:08}.jpg").touch()
        for shard in range(100):
            with tarfile.open(shards / f"s-{shard:03}.tar", "w") as archive:
                for number in range(shard * count // 100, (shard + 1) * count // 100):
                    archive.addfile(tarfile.TarInfo(f"n{number:08}.jpg"))
                    archive.members.clear()  # type: ignore[attr-defined]
        time.sleep(3)  # a listing is saved only if nothing has changed for two seconds
    return {"flat folder": str(flat), "1000 folders": str(deep), "100 shards": str(shards / "s-{000..099}.tar")}


def main() -> None:
    """Make the sources, measure them and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where to make them, and keep them")
    parser.add_argument("--start", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        start(*arguments.start)
        return
    with tempfile.TemporaryDirectory(prefix="unitvis-") as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = measured(make(folder, arguments.images), Path(temporary))
    if arguments.images >= 1_000_000:
        print(record("start", {"images": arguments.images, "rows": rows}))


def measured(sources: dict[str, str], temporary: Path) -> list[dict[str, Any]]:
    """Start each source twice in new processes, without and with its saved listing; returns a row for each."""
    rows = []
    environment = os.environ | {"XDG_CACHE_HOME": str(temporary / "cache")}
    print(f"{'source':<16} {'listing':<8} {'seconds':>10} {'of a core':>10} {'of process':>10} {'MB':>10}")
    for name, images in sources.items():
        for listing in ("new", "kept"):
            command = [sys.executable, "-m", "benchmarks.start", "--start", images, str(temporary / "run")]
            begin = time.perf_counter()
            output = subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout
            process = round(time.perf_counter() - begin, 2)
            rows.append({"source": name, "listing": listing, **json.loads(output), "process_seconds": process})
            row = rows[-1]
            print(f"{name:<16} {listing:<8} {row['seconds']:>10} {row['cpu_seconds']:>10}", end="")
            print(f" {process:>10} {row['megabytes']:>10}", flush=True)
    return rows


if __name__ == "__main__":
    main()
