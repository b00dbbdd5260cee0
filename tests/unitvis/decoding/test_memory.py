"""Free memory as Linux tells it, of the machine and of control groups of both versions."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from unitvis.decoding import memory

MACHINE = {"proc/meminfo": "MemTotal: 99 kB\nMemAvailable:    4000 kB\n"}
SECOND = {
    "proc/self/cgroup": "0::/a/b\n",
    "sys/fs/cgroup/a/b/memory.max": "max\n",
    "sys/fs/cgroup/a/memory.max": "2000000\n",
    "sys/fs/cgroup/a/memory.current": "1500000\n",
    "sys/fs/cgroup/a/memory.stat": "anon 5\ninactive_file 300000\n",
}
FIRST = {
    "proc/self/cgroup": "5:cpu:/x\n4:memory:/elsewhere\n0::/\n",  # another path than the container sees
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000000",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "900000",
    "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 50000\n",
}


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (MACHINE, 4_096_000),
        (MACHINE | SECOND, 800_000),
        (MACHINE | FIRST, 150_000),
        (FIRST | {"sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096)}, math.inf),
        (SECOND | {"sys/fs/cgroup/a/memory.current": "2500000"}, 0),
        (MACHINE | {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "words"}, 4_096_000),
        ({}, math.inf),
    ],
    ids=["machine", "second", "first", "no limit", "beyond", "unreadable", "no Linux"],
)
def test_available_memory(
    files: dict[str, str], wanted: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_SYSTEM", tmp_path)
    assert memory.available_memory() == wanted
