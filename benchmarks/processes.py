"""Compare a scan by several processes under torchrun with one process: equal bytes, and the time to merge.

    python -m benchmarks.processes MODEL IMAGES [--processes 4] [options of `unitvis scan`]

The time to merge runs from the moment at which the last process has computed its last image until the merged run is
written; the second pass, which a single process has too, is counted on its own. Writes
benchmarks/results/long/processes.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.results import record


def worker(notes: Path, arguments: list[str]) -> int:
    """Run `unitvis scan` in this process; the file notes/PID is touched after every batch."""
    from unitvis import cli
    from unitvis.scanning.progress import Progress

    real, note = Progress.after_batch, notes / str(os.getpid())

    def after_batch(self: Progress) -> None:
        note.touch()
        real(self)

    Progress.after_batch = after_batch  # type: ignore[method-assign]
    return cli.main(arguments)


def measured(scan: list[str], out: Path, processes: int) -> dict[str, Any]:
    """Scan into `out`; measures seconds in all, of the second pass, and from the last image to the run without it."""
    notes = out.with_name(f"{out.name}.notes")
    notes.mkdir()
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command += ["benchmarks.processes", "--worker", str(notes), "scan", *scan, "-o", str(out)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    begin = time.perf_counter()
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begin
    if not (out / "manifest.json").exists():
        sys.exit(done.stderr)
    last = max(note.stat().st_mtime for note in notes.iterdir())
    second_pass = json.loads((out / "manifest.json").read_text())["seconds"]["second_pass"]
    beyond = (out / "manifest.json").stat().st_mtime - last - second_pass
    parts = {"seconds": seconds, "second_pass": second_pass, "last_image_to_run_beyond_second_pass": beyond}
    return {"processes": processes} | {name: round(value, 2) for name, value in parts.items()}


def main() -> None:
    """Scan with one process and with several, compare the bytes and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("images", metavar="IMAGES")
    parser.add_argument("--processes", type=int, default=4)
    arguments, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="unitvis-") as temporary:
        one, several = Path(temporary, "one"), Path(temporary, "several")
        scan = [arguments.model, arguments.images, *options]
        rows = [measured(scan, one, 1), measured(scan, several, arguments.processes)]
        manifest = json.loads((several / "manifest.json").read_text())
        equal = all((one / name).read_bytes() == (several / name).read_bytes() for name in ("top.npz", "images.jsonl"))
    units = sum(layer["units"] for layer in manifest["layers"].values())
    figures = {"images": manifest["images"], "units": units, "parameters": manifest["model"]["parameters"]}
    print(json.dumps(figures | {"equal": equal, "rows": rows}, indent=1))
    print(record("processes", figures | {"equal": equal, "rows": rows}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(worker(Path(sys.argv[2]), sys.argv[3:]))
    main()
