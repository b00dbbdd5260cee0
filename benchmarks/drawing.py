"""Measure how long the pictures of a run take: `python -m benchmarks.drawing FOLDER [MODEL ...]`.

FOLDER: photographs. MODEL: specs of networks; AlexNet with random weights is measured anyway. Each network scans the
photographs once in float32; then everything is drawn into a new folder, three times: sheets, gallery, response maps and
filters. Prints the seconds of each turn, by the clock and of all processes together, with the files and megabytes that
were written, and how often as long it took as the plain loop of `benchmarks.plain` in one process takes to decode the
photographs, before and after. Writes benchmarks/results/long/drawing.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.reading import plain
from benchmarks.results import record
from support import zoos
from unitvis import models
from unitvis.pages import draw
from unitvis.results.folder import check_output
from unitvis.run import Run
from unitvis.scanning.scan import scan
from unitvis.sources.transform import Transform

TURNS = 3


def alexnet() -> models.Loaded:
    """AlexNet with random weights, and the size of input that it was made for."""
    zoos.importable()
    return models.Loaded("AlexNet, random weights", models.load("torchvision:alexnet", pretrained=False).model, None)


def processor_seconds() -> float:
    """Seconds of processor time of this process and of the children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def drawn(run: Run, model: nn.Module, folder: Path) -> dict[str, float]:
    """Draw everything of a run into a new folder; returns seconds, processor seconds, files and megabytes."""
    run.write(check_output(folder))
    written = set(folder.rglob("*"))
    start = time.perf_counter(), processor_seconds()
    draw(run, folder, model, with_sheets=True)
    seconds, used = time.perf_counter() - start[0], processor_seconds() - start[1]
    files = [path for path in set(folder.rglob("*")) - written if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 1e6
    found = {"seconds": round(seconds, 2), "processor_seconds": round(used, 2)}
    return {**found, "files": len(files), "megabytes": round(size)}


def measure(loaded: models.Loaded, photographs: Path, scratch: Path) -> dict[str, Any]:
    """Scan with a network and draw the run `TURNS` times."""
    transform = loaded.transform or Transform(resize=(224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    run = scan(loaded.model, photographs, transform=transform, precision="fp32", progress=False)
    paths, turns = sorted(photographs.iterdir()), []
    for number in range(TURNS):
        before = plain(paths, scratch)["images_s"]
        turn = drawn(run, loaded.model, scratch / str(number))
        seconds = len(paths) / statistics.mean([before, plain(paths, scratch)["images_s"]])
        turns.append(turn | {"x_plain_loop": round(turn["seconds"] / seconds, 2)})
    units = sum(len(top) for top in run.tops.values())
    return {"network": Path(loaded.spec).name, "units": units, "images": run.manifest["images"], "turns": turns}


def main() -> None:
    """Measure each network, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("models", metavar="MODEL", nargs="*")
    arguments = parser.parse_args()
    rows = []
    for loaded in (alexnet(), *map(models.load, arguments.models)):
        with tempfile.TemporaryDirectory(prefix="unitvis-") as scratch:
            rows.append(measure(loaded, arguments.folder, Path(scratch)))
        print(json.dumps(rows[-1]), flush=True)
    print(record("drawing", {"rows": rows}))


if __name__ == "__main__":
    main()
