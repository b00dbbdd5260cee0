"""How much memory this process may still take: what Linux grants beyond it, it takes back by killing a process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

_SYSTEM = Path("/")  # whose /proc and /sys tell
_NO_LIMIT = 2**60  # bytes: groups of the first version write a number above this where there is no limit


def available_memory() -> float:
    """Bytes that the machine has free and that the limits of this process's control groups leave; else infinity.

    Memory that caches of files occupy counts as free. Outside of Linux nothing tells.
    """
    return min(_free_of_machine(), *_free_of_groups(), math.inf)


def _free_of_machine() -> float:
    try:
        lines = (_SYSTEM / "proc/meminfo").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


def _free_of_groups() -> Iterator[float]:
    """What is left in each group that the process is in, of both versions of control groups, up to the root."""
    try:
        lines = (_SYSTEM / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        first = controllers == "memory"
        root = _SYSTEM / ("sys/fs/cgroup/memory" if first else "sys/fs/cgroup")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if first else ("memory.max", "memory.current")
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):  # in a container the path may be another one than outside
            if folder == root.parent:
                break
            yield _free_of_group(folder, *names, "total_inactive_file" if first else "inactive_file")


def _free_of_group(folder: Path, limit: str, usage: str, cached: str) -> float:
    try:
        most = (folder / limit).read_text().strip()
        if most == "max" or int(most) > _NO_LIMIT:
            return math.inf
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return float(max(0, int(most) - int((folder / usage).read_text()) + int(counts.get(cached, 0))))
    except (OSError, ValueError):
        return math.inf
