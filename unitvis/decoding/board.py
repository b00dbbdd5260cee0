"""Memory that a process shares with its workers: what they are to read, and what they have read.

A job is a few images. Each has a slot: the places of its images, a record of each, and their pixels. The slots are a
ring, so that job j is in slot j modulo their number. Locks are those of `fcntl`, which the system gives back when a
process dies, whatever it died of.
"""

from __future__ import annotations

import math
import mmap
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from unitvis.decoding.decode import BUDGET
from unitvis.decoding.processes import above_standard

try:
    import fcntl
except ImportError:  # Windows, which has no memfd_create either
    fcntl = None  # type: ignore[assignment]

JOB_IMAGES = 8  # few enough that workers end together, so many that handing out jobs takes no time
FREE, ISSUED, TAKEN, DONE = range(4)  # states of a slot
WAITING, READ, OTHER_SIZE, UNUSABLE, ERROR, BROKEN = range(6)  # states of an image; see `worker.Worker`
MAX_REASON = 2048  # bytes of UTF-8 that are kept of why an image cannot be used
MAX_PATH = 4400  # bytes that are kept of a path; the system refuses more than 4,096
_REQUEST = JOB_IMAGES * (MAX_PATH + 16) + 64  # bytes for the pickled places of a job
SLOT = np.dtype(
    [
        ("state", "u1"),
        ("images", "u1"),
        ("job", "<i8"),
        ("process", "<i8"),  # that has taken the job
        ("length", "<i4"),  # of the request
        ("request", "u1", (_REQUEST,)),
    ]
)
RECORD = np.dtype(
    [
        ("state", "u1"),
        ("deaths", "u1"),  # of workers that were reading the image
        ("digest", "V16"),
        ("width", "<u4"),  # of the upright original; of the resized image if it is of another size than the others
        ("height", "<u4"),
        ("reason", f"S{MAX_REASON}"),
    ]
)
_TAKING, _DECODING, _BUDGET = 0, 1, 16  # bytes of the file that stand for locks, the last one the first of many
_PAGE = 4096
_UNIT = 1_000_000  # bytes of memory that each of the locks for the budget stands for


def slot_bytes(size: tuple[int, int]) -> int:
    """Bytes of memory that one slot takes, for images of this (height, width)."""
    return SLOT.itemsize + JOB_IMAGES * (RECORD.itemsize + math.prod(size) * 3)


class Board:
    """Slots, records and pixels in a memory file; a worker makes its own from the arguments of the first.

    slots: `SLOT` [slots]. records: `RECORD` [slots, JOB_IMAGES]. pixels: uint8 [slots, JOB_IMAGES, H, W, 3].
    """

    def __init__(self, file: int, slots: int, size: tuple[int, int], about: int) -> None:
        """Map a file; size: (height, width) of all images; about: length of the bytes that workers are started with."""
        self.arguments = (file, slots, size, about)
        self._file = file
        arrays: list[tuple[np.dtype[Any], tuple[int, ...]]] = [
            (SLOT, (slots,)),
            (RECORD, (slots, JOB_IMAGES)),
            (np.dtype("u1"), (about,)),
            (np.dtype("u1"), (slots, JOB_IMAGES, *size, 3)),
        ]
        ends = np.cumsum([-(-dtype.itemsize * math.prod(shape) // _PAGE) * _PAGE for dtype, shape in arrays]).tolist()
        if os.fstat(file).st_size == 0:  # at once, so that a limit which the system tells of is an error here
            os.posix_fallocate(file, 0, ends[-1])
        memory = mmap.mmap(file, ends[-1])
        self.slots, self.records, self._about, self.pixels = (
            np.ndarray(shape, dtype, memory, start)
            for (dtype, shape), start in zip(arrays, [0, *ends[:-1]], strict=True)
        )

    @classmethod
    def create(cls, slots: int, size: tuple[int, int], about: object) -> Board:
        """Make a board in new memory, OSError where there is not enough; about: what `about` gives to the workers."""
        pickled = pickle.dumps(about)
        low = os.memfd_create("unitvis")
        file = above_standard(low)
        os.close(low)
        try:
            board = cls(file, slots, size, len(pickled))
        except BaseException:
            os.close(file)
            raise
        board._about[:] = np.frombuffer(pickled, np.uint8)
        return board

    def about(self) -> Any:
        """What workers are started with."""
        return pickle.loads(self._about.tobytes())  # noqa: S301  of the process that started the worker

    def close(self) -> None:
        """Close the file; arrays that are still used keep their memory."""
        os.close(self._file)

    def issue(self, job: int, places: Sequence[Any]) -> None:
        """Write a job into its slot, which is free; places: what `Contents.read` takes, for each image."""
        number = job % len(self.slots)
        slot = self.slots[number]
        cut = [place[:MAX_PATH] if isinstance(place, bytes) else place for place in places]
        request = np.frombuffer(pickle.dumps(cut), np.uint8)
        slot["request"][: len(request)] = request
        slot["length"], slot["images"], slot["job"] = len(request), len(places), job
        self.records["state"][number] = WAITING
        self.records["deaths"][number] = 0
        slot["state"] = ISSUED

    def take(self, process: int) -> int | None:
        """Take the first job that nobody has taken: its slot, or None if there is none."""
        with self._locked(_TAKING, 1):
            issued = np.flatnonzero(self.slots["state"] == ISSUED)
            if not len(issued):
                return None
            number = int(issued[self.slots["job"][issued].argmin()])
            self.slots["process"][number] = process
            self.slots["state"][number] = TAKEN
            return number

    def places(self, number: int) -> list[Any]:
        """Places of the images of the job in a slot."""
        slot = self.slots[number]
        return pickle.loads(slot["request"][: slot["length"]].tobytes())  # noqa: S301  written by `issue`

    def pause(self) -> None:
        """Let no worker begin to decode, until `go_on` or the end of this process."""
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, _DECODING)

    def go_on(self) -> None:
        """Let workers decode again."""
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _DECODING)

    def wait_while_paused(self) -> None:
        """Return when decoding may begin."""
        with self._locked(_DECODING, 1, shared=True):
            pass

    @contextmanager
    def hold(self, share: float, need: int) -> Iterator[None]:
        """Hold `need` bytes of the budget while the block runs; all of it if need is larger.

        share: where in the budget to begin, from 0 to 1, another one for each worker, so that few wait for others.
        """
        units = BUDGET // _UNIT
        wanted = min(units, -(-need // _UNIT))
        with self._locked(_BUDGET + min(int(share * units), units - wanted), wanted):
            yield

    @contextmanager
    def _locked(self, start: int, length: int, *, shared: bool = False) -> Iterator[None]:
        fcntl.lockf(self._file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, length, start)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, length, start)
