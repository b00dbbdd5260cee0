"""SIGINT and SIGTERM as a request to stop at the next point from which the work can be resumed."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

from unitvis.errors import Interrupted


class Signals:
    """Context that handles SIGINT and SIGTERM: the first signal is noted in `received`, the second one raises.

    After `raise_at_once` the first one raises `Interrupted`, too. Only the main thread may handle signals; in another
    thread nothing is changed.
    """

    def __init__(self) -> None:
        self.received: int | None = None  # number of the first signal
        self._message: str | None = None  # given: the next signal raises Interrupted with it
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
        """Raise `Interrupted` for a signal that was received, or as soon as one is: nothing can be lost any more."""
        self._message = message
        if self.received is not None:
            raise Interrupted(message, self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._message is not None:
            raise Interrupted(self._message, number)
        if self.received is not None:
            raise Interrupted("interrupted twice; what was done since the last checkpoint is lost", number)
        self.received = number
