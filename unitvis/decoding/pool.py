"""Worker processes that decode image files into shared memory, in the order in which they are asked for.

Threads of one process hold each other up, at the interpreter's lock and the allocator's, the more the more there are.
The workers are processes of this module's own, and not those of `torch.utils.data.DataLoader`: they import no PyTorch,
need no `if __name__ == "__main__"` in the caller's script and no large /dev/shm, may be started inside of daemonic
processes, and one that dies of a file is replaced.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from unitvis.decoding import board as b
from unitvis.decoding.board import JOB_IMAGES, Board, slot_bytes
from unitvis.decoding.contents import Contents
from unitvis.decoding.decode import pillow_globals
from unitvis.decoding.geometry import ResizeCrop
from unitvis.decoding.memory import available_memory
from unitvis.decoding.options import Decoding
from unitvis.decoding.processes import may_start, start
from unitvis.decoding.worker import Reading

MAX_SECONDS = 120.0  # of processor time for one image; one within the limit of pixels takes a few
_LOOK_SECONDS = 0.1  # between two looks whether a worker died, while its results are waited for


class Done(NamedTuple):
    """Results of a job: `RECORD` [n], and pixels, uint8 [n, H, W, 3], in memory that the next job overwrites."""

    records: NDArray[np.void]
    pixels: NDArray[np.uint8]


class PoolError(Exception):
    """Workers cannot be had here; the message says why. What was not received is not read."""


class Pool:
    """Context with worker processes; jobs of at most `JOB_IMAGES` images go in and come out in order.

    contents, decoding, geometry: how images are read. size: (height, width) that they have then. workers: number of
    processes. ahead: number of images to be read in advance, fewer where half of the free memory does not hold them.
    images: number of all, at most. Raises PoolError where there are no workers.
    """

    def __init__(
        self,
        contents: Contents,
        decoding: Decoding,
        geometry: ResizeCrop,
        size: tuple[int, int],
        *,
        workers: int,
        ahead: int,
        images: int,
    ) -> None:
        if not may_start():
            raise PoolError("this system has no memory files")
        wanted = min(max(2 * workers + 1, -(-ahead // JOB_IMAGES)), -(-images // JOB_IMAGES))
        room = available_memory() / 2  # Linux grants more than there is, and kills a process when it is used
        self.jobs = int(min(wanted, room // slot_bytes(size)))  # that can be under way at once
        if self.jobs < min(2, wanted):
            raise PoolError(
                f"{room / 2**20:,.0f} MB of shared memory cannot hold two jobs of {size[1]} x {size[0]} pixels"
            )
        workers = min(workers, self.jobs)  # each has one at a time
        self._issued = self._received = 0
        self._starts_left = 2 * workers  # that may fail before the first job is done
        self._workers: list[subprocess.Popen[bytes]] = []
        about = Reading(contents, decoding, geometry, MAX_SECONDS, pillow_globals())
        try:
            self._board = Board.create(self.jobs, size, about)
        except OSError as error:
            raise PoolError(f"shared memory cannot be had: {error.strerror}") from error
        try:
            self._ends = *os.pipe(), *os.pipe()
        except OSError as error:
            self._board.close()
            raise PoolError(f"pipes cannot be had: {error.strerror}") from error
        self._jobs_out, self._jobs_in = self._ends[:2]  # a byte for each job that is issued; its end ends the workers
        self._results_out, self._results_in = self._ends[2:]  # a byte for each job that is done
        os.set_blocking(self._results_out, False)
        try:
            for number in range(workers):
                self._workers.append(self._start(number / workers))
        except PoolError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def full(self) -> bool:
        """True while a job must be received before another one can be issued."""
        return self._issued - self._received == self.jobs

    def issue(self, places: list[Any]) -> None:
        """Hand out a job: where its images are, see `Contents.read`."""
        self._board.issue(self._issued, places)
        self._issued += 1
        os.write(self._jobs_in, b"\0")

    def receive(self) -> Done:
        """Wait for the oldest job; its memory is overwritten from the next call on."""
        number = self._received % self.jobs
        slot = self._board.slots[number]
        while slot["state"] != b.DONE:
            if not self._wait():
                self._replace_the_dead()
        slot["state"] = b.FREE
        self._received += 1
        return Done(self._board.records[number, : slot["images"]], self._board.pixels[number, : slot["images"]])

    def pause(self) -> None:
        """Start no decoding until `go_on`; files are still read."""
        self._board.pause()

    def go_on(self) -> None:
        """Decode again."""
        self._board.go_on()

    def close(self) -> None:
        """End all workers, whatever they do."""
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.wait()
        for end in self._ends:
            os.close(end)
        self._board.close()

    def _start(self, share: float) -> subprocess.Popen[bytes]:
        """Start a worker; share: see `Board.hold`."""
        arguments = (share, os.getpid(), self._board.arguments)
        files = {"stdin": self._jobs_out, "stdout": self._results_in, "pass_fds": (self._board.arguments[0],)}
        try:
            return start("unitvis.decoding.worker", arguments, **files)
        except OSError as error:
            raise PoolError(f"{sys.executable!r} cannot be started: {error.strerror}") from error

    def _wait(self) -> bool:
        """Wait until some job is done; False after a while without one."""
        if not select.select([self._results_out], [], [], _LOOK_SECONDS)[0]:
            return False
        with contextlib.suppress(BlockingIOError):
            os.read(self._results_out, 4096)
        return True

    def _replace_the_dead(self) -> None:
        """Start a worker for each that died, and issue its job again but for an image that two have died of."""
        slots = self._board.slots
        for number, worker in enumerate(self._workers):
            if worker.poll() is None:
                continue
            own_slots = np.flatnonzero((slots["process"] == worker.pid) & (slots["state"] == b.TAKEN)).tolist()
            for slot in own_slots:
                self._resume(slot, worker.returncode)
            if not own_slots and not self._received:  # it may never have come to work
                self._starts_left -= 1
                if self._starts_left < 0:
                    raise PoolError(f"they end with exit code {worker.returncode} as they start")
            self._workers[number] = self._start(number / len(self._workers))
            os.write(self._jobs_in, b"\0")  # for one that it read and took no job for

    def _resume(self, number: int, code: int) -> None:
        """Issue a job again whose worker died with an exit code."""
        slot = self._board.slots[number]
        records = self._board.records[number, : slot["images"]]
        waiting = np.flatnonzero(records["state"] == b.WAITING)
        if len(waiting):
            at_hand = records[int(waiting[0])]
            at_hand["deaths"] += 1
            if at_hand["deaths"] > 1:
                at_hand["reason"], at_hand["state"] = _cause(code).encode(), b.UNUSABLE
        slot["state"] = b.ISSUED  # also where no image is left, for the worker to say so
        os.write(self._jobs_in, b"\0")


def _cause(code: int) -> str:
    """Why a worker that ended with this code died: the reason of the image that it had at hand."""
    if code == -signal.SIGPROF:
        return f"decoding it took more than {MAX_SECONDS:g} s of processor time"
    if code == -signal.SIGKILL:
        return "the process that decoded it was killed twice, perhaps because memory ran out"
    if code < 0:
        return f"the decoder crashed ({signal.Signals(-code).name})"
    return f"the decoder ended its process with exit code {code}"
