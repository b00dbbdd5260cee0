"""How long a scan takes to start over a very large source, and what memory that needs.

    python -m benchmarks.start [--images 1000000] [--folder DIR]

Makes a folder of empty files and the same number of members in tar shards, and for each opens the source twice (the
second time from the kept listing) up to the moment when the first image is asked for. Memory is what is added to the
process after its imports: anonymous (RssAnon) at its highest.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path


class FirstRequestError(Exception):
    """The scan has asked for its first image."""


def start(images: str) -> None:
    """Open the source and ask for a batch, in this process; prints seconds and MB."""
    from benchmarks.memory import Peak
    from unitvis.sources import open_source
    from unitvis.sources.encoded import EncodedSource
    from unitvis.transform import Transform

    def stop(self: EncodedSource, id: int) -> bytes:
        raise FirstRequestError

    EncodedSource._load = stop  # type: ignore[method-assign, assignment]
    with Peak() as peak:
        begin = time.perf_counter()
        source = open_source(images, Transform(crop=32))
        try:
            next(source.batches(64, workers=0))
        except FirstRequestError:
            seconds = time.perf_counter() - begin
    print(f"{source.length:>12,} {seconds:>10.2f} {peak.added / 2**20:>10.0f}")


def make(folder: Path, count: int) -> dict[str, str]:
    """The sources: a flat folder, a thousand folders, and a hundred shards."""
    flat, deep, shards = folder / "flat", folder / "deep", folder / "shards"
    if not shards.exists():
        for place in (flat, deep, shards):
            place.mkdir()
        for number in range(count):
            (flat / f"n{number:08}.jpg").touch()
        for number in range(count):
            place = deep / f"class{number % 1000:04}"
            place.mkdir(exist_ok=True)
            (place / f"n{number:08}.jpg").touch()
        for shard in range(100):
            with tarfile.open(shards / f"s-{shard:03}.tar", "w") as archive:
                for number in range(shard * count // 100, (shard + 1) * count // 100):
                    archive.addfile(tarfile.TarInfo(f"n{number:08}.jpg"))
                    archive.members.clear()  # type: ignore[attr-defined]
        time.sleep(3)  # a listing is kept once nothing has changed for two seconds
    return {"flat folder": str(flat), "1000 folders": str(deep), "100 shards": str(shards / "s-{000..099}.tar")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where to make them, and keep them")
    parser.add_argument("--start", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        start(arguments.start)
        return
    with tempfile.TemporaryDirectory(prefix="unitvis-") as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"XDG_CACHE_HOME": temporary}
        print(f"{'source':<16} {'listing':<8} {'images':>12} {'seconds':>10} {'MB':>10}")
        for name, images in make(folder, arguments.images).items():
            for listing in ("new", "kept"):
                print(f"{name:<16} {listing:<8} ", end="", flush=True)
                command = [sys.executable, "-m", "benchmarks.start", "--start", images]
                subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    main()
