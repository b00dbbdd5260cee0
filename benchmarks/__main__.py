"""python -m benchmarks: run the suite that suits the device, write results/<device>.json and the tables in docs/."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from benchmarks import machine, results, sizes

MODULES = ("bench_operators.py", "bench_step.py", "bench_scan.py")


def main() -> int:
    """Run the suite; returns 0, or pytest's exit code if a benchmark failed, and then nothing is written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--render", action="store_true", help="only write the tables in docs/ again")
    if not parser.parse_args().render:
        torch.manual_seed(0)
        form = sizes.here()
        described = machine.describe(
            torch.device("cuda", torch.cuda.current_device()) if form == "gpu" else torch.device("cpu")
        )
        folder = Path(__file__).parent
        with tempfile.TemporaryDirectory() as scratch:
            raw = Path(scratch) / "raw.json"
            options = ["--sizes", form, "--benchmark-enable", f"--benchmark-json={raw}", "-W", "default"]
            code = pytest.main(
                [*(str(folder / name) for name in MODULES), "-p", "no:cacheprovider", "--benchmark-quiet", *options]
            )
            if code:
                return int(code)
            timed = json.loads(raw.read_text())["benchmarks"]
        target = results.RESULTS / machine.file_name(described["name"])
        results.write(target, machine=described, rows=results.rows(timed))
        print(target)
    results.update_documents()
    return 0


if __name__ == "__main__":
    sys.exit(main())
