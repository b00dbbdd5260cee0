"""An end for what might never come to one."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

SECONDS = 60  # a hundred times as long as anything that runs inside takes


@contextmanager
def in_time() -> Iterator[None]:
    """Context that fails where its block waits, or goes round, for ever; for the main thread."""

    def stop(*_: object) -> NoReturn:
        raise AssertionError(f"it does not end within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
