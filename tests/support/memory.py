"""Measure the anonymous memory of this process (Linux), or what Python allocates."""

from __future__ import annotations

import re
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Self


def anonymous() -> int:
    """Anonymous memory (RssAnon) of this process in bytes."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, "/proc/self/status has no RssAnon"
    return 1024 * int(found[1])


class Peak:
    """Context that samples anonymous memory every 10 ms: `before`, `highest` and `added`, in bytes."""

    def __enter__(self) -> Self:
        self.before = self.highest = anonymous()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.01):
            self.highest = max(self.highest, anonymous())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.highest = max(self.highest, anonymous())

    @property
    def added(self) -> int:
        """Highest memory above that at the start, in bytes."""
        return self.highest - self.before


@contextmanager
def tracing() -> Iterator[SimpleNamespace]:
    """Context that afterwards has the largest number of bytes that Python and numpy had allocated in it: `peak`."""
    found = SimpleNamespace(peak=0)
    tracemalloc.start()
    try:
        yield found
        found.peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
