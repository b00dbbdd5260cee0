"""Describe the machine and the versions that figures were measured with."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from unitvis.half_precision.step import HALF
from unitvis.scanning.precision import speed

ROOT = Path(__file__).parents[1]


def describe(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit, date, and the load of the machine before the measurement."""
    own = _gpu(device) if device.type == "cuda" else {"name": _processor(), "driver": None}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        **own,
        "kind": device.type,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load": round(os.getloadavg()[0], 1),
        "half_precision": {one: round(speed(device, one), 2) for one in HALF},  # times float32's speed
        "versions": {name: _version(name) for name in ("torch", "triton", "torchvision", "numpy", "pytest-benchmark")}
        | {"python": platform.python_version(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()},
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def device_name() -> str:
    """Name of the GPU, or of the processor if there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()


def file_name(name: str) -> str:
    """File name of a device's results: its name in lower-case letters, digits, dots and dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-.") + ".json"


def commit() -> str | None:
    """Commit of the checkout, followed by + if tracked Python files differ from it; None outside of a checkout."""
    try:
        own = _output_of("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
        changed = _output_of("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", "--", "*.py")
    except (OSError, subprocess.CalledProcessError):
        return None
    return own + ("+" if changed else "")


def _output_of(*command: str) -> str:
    """Run a command and return its output."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _gpu(device: torch.device) -> dict[str, Any]:
    """Name, driver, architecture and size of the L2 cache of a GPU."""
    found = torch.cuda.get_device_properties(device)
    try:
        driver = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        driver = None
    capability = f"sm_{found.major}{found.minor}"
    return {"name": found.name, "driver": driver, "architecture": capability, "l2_bytes": found.L2_cache_size}


def _processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    """Version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
