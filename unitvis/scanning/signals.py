"""SIGINT and SIGTERM as a request to end at the next place from where work can be gone on with."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

from unitvis.errors import Interrupted


class Signals:
    """While the block runs, a first signal is only noted, in `came`; a second one raises `Interrupted` at once, as does
    the first one after `raise_at_once`.

    Outside of the main thread, which alone may do so, signals are left alone.
    """

    def __init__(self) -> None:
        self.came: int | None = None
        self._at_once: str | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def raise_at_once(self, message: str) -> None:
        """From here on nothing is lost by ending anywhere: `Interrupted`, now if a signal came, else when one does."""
        self._at_once = message
        if self.came is not None:
            raise Interrupted(message, self.came)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._at_once is not None:
            raise Interrupted(self._at_once, number)
        if self.came is not None:
            raise Interrupted("interrupted twice; what was done since the last checkpoint is lost", number)
        self.came = number
