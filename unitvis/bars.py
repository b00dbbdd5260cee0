"""Progress bars on standard error: on a terminal only, and only of what takes more than a moment."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

_SECONDS = 2.0  # that must pass before a bar appears
_shown = ContextVar("shown", default=True)


def bar(total: int | None, what: str, *, unit: str = " images", initial: int = 0, delay: float = _SECONDS) -> tqdm[Any]:
    """A bar to count by, with `update`; a context. what: a word before it. delay: seconds until it appears."""
    hidden = not _shown.get() or sys.stderr is None
    return tqdm(
        total=total,
        initial=initial,
        desc=what,
        unit=unit,
        delay=delay,
        disable=True if hidden else None,  # None: shown on a terminal
        leave=False,
    )


@contextmanager
def no_bars() -> Iterator[None]:
    """Show no bar while the block runs."""
    before = _shown.set(False)
    try:
        yield
    finally:
        _shown.reset(before)
