"""What a long benchmark found, as a file of its own: benchmarks/results/large/NAME.json."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
LARGE = ROOT / "benchmarks" / "results" / "large"


def record(name: str, figures: dict[str, Any], folder: Path = LARGE) -> Path:
    """Write the figures and what they were measured on; a file of that name is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": machine()} | figures, indent=1) + "\n")
    return path


def machine() -> dict[str, Any]:
    """The processor, its cores, how busy they are now, the versions, the commit (+: changed since) and the date."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    said = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "name": said[0] if said else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "versions": {"python": platform.python_version()} | {one: version(one) for one in ("torch", "numpy", "pillow")},
        "commit": _git("rev-parse", "--short=12", "HEAD") + ("+" if _git("status", "--porcelain", "*.py") else ""),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _git(*command: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *command], check=True, capture_output=True, text=True).stdout.strip()
