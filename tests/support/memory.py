"""The peak of the anonymous memory of this process (Linux): what it allocated, not the files that it mapped."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Self


def anonymous() -> int:
    """RssAnon of this process in bytes."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, "/proc/self/status has no RssAnon"
    return 1024 * int(found[1])


class Peak:
    """Measures the peak while its block runs, by reading the memory every 10 ms in a thread."""

    def __enter__(self) -> Self:
        self.before = self.highest = anonymous()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self.highest = max(self.highest, anonymous())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.highest = max(self.highest, anonymous())

    @property
    def added(self) -> int:
        """Bytes of the peak above what there was when the block began."""
        return self.highest - self.before
