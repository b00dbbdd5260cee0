"""A worker process: takes jobs from a `Board`, reads, hashes, decodes and crops their images, until its parent is gone.

It is started with the arguments of `main`, by `pool.Pool`. A decoder that crashes or never ends takes this process with
it and nothing else: the pool sees which image was at hand.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from unitvis.decoding import board as b
from unitvis.decoding import decode
from unitvis.decoding.board import Board
from unitvis.decoding.contents import Contents, digest
from unitvis.decoding.geometry import ResizeCrop
from unitvis.decoding.options import Decoding
from unitvis.decoding.processes import PARENT_SECONDS
from unitvis.errors import ImageError, UnitvisError, error_text

JOBS, RESULTS = 0, 1  # file descriptors: a byte is read for each job that is issued, and written for each one done


@dataclass(frozen=True)
class Reading:
    """How workers read images: the same for all of a pool."""

    contents: Contents
    decoding: Decoding
    geometry: ResizeCrop
    seconds: float  # of processor time that one image may take
    pillow: dict[str, Any]  # values of Pillow's global settings, by names of `GLOBALS`


def main(share: float, parent: int, arguments: tuple[Any, ...]) -> None:
    """Work until the parent closes the pipe of jobs; share: see `Board.hold`; arguments: those of the board."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which closes the pipe
    board = Board(*arguments)
    reading: Reading = board.about()
    decode.restore_globals(reading.pillow)
    decode.memory_budget = budget = _SharedBudget(board, share)
    os.set_blocking(JOBS, False)
    while True:
        if not select.select([JOBS], [], [], PARENT_SECONDS)[0]:
            if os.getppid() != parent:  # a copy of it may hold the pipe open
                return
            continue
        try:
            if not os.read(JOBS, 1):
                return
        except BlockingIOError:  # another worker was faster
            continue
        number = board.take(os.getpid())
        if number is None:
            continue
        for record, pixels, place in zip(
            board.records[number], board.pixels[number], board.places(number), strict=False
        ):
            if record["state"] == b.WAITING:  # not done by a worker that died
                budget.whole = bool(record["deaths"])
                signal.setitimer(signal.ITIMER_PROF, reading.seconds)  # ends the process, inside of any decoder
                _fill(board, reading, record, pixels, place)
        signal.setitimer(signal.ITIMER_PROF, 0)
        board.slots["state"][number] = b.DONE
        try:
            os.write(RESULTS, b"\0")
        except BrokenPipeError:
            return


def _fill(board: Board, reading: Reading, record: np.void, pixels: np.ndarray, place: Any) -> None:
    """Read one image into its pixels and its record, whose state is written last."""
    try:
        data = reading.contents.read(place)
        record["digest"] = np.void(digest(data))
        board.wait_while_paused()
        found, (width, height) = reading.decoding.pixels(data, reading.geometry)
        if found.shape == pixels.shape:
            pixels[:] = found
            record["width"], record["height"], record["state"] = width, height, b.READ
        else:
            record["width"], record["height"], record["state"] = found.shape[1], found.shape[0], b.OTHER_SIZE
    except ImageError as error:
        _explain(record, str(error), b.UNUSABLE)
    except UnitvisError as error:
        _explain(record, str(error), b.ERROR)
    except Exception as error:  # a defect, which the parent raises
        _explain(record, error_text(error), b.BROKEN)


def _explain(record: np.void, reason: str, state: int) -> None:
    """Write why an image has no pixels."""
    record["reason"] = reason.encode("utf-8", "backslashreplace")[: b.MAX_REASON]
    record["state"] = state


class _SharedBudget:
    """The budget of all workers together, in place of the one of a process."""

    whole = False  # True: take all of it, so that nothing else is decoded beside an image that a worker died of

    def __init__(self, board: Board, share: float) -> None:
        self._board, self._share = board, share

    @contextmanager
    def take(self, need: int) -> Iterator[None]:
        """Hold `need` bytes while the block runs; a need above the whole limit takes all of it."""
        with self._board.hold(self._share, decode.BUDGET if self.whole else need):
            yield
