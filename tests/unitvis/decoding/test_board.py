"""What worker processes share: jobs in order, and a budget of memory that the dead give back."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest

from unitvis.decoding import board as b
from unitvis.decoding.board import JOB_IMAGES, Board
from unitvis.decoding.decode import BUDGET
from unitvis.decoding.processes import may_start

pytestmark = pytest.mark.skipif(not may_start(), reason="there are no worker processes on this system")

DEADLINE = 300  # seconds after which what a test waits for is taken to never happen


@pytest.fixture
def board():
    made = Board.create(4, (5, 7), {"any": "object"})
    yield made
    made.close()


def test_jobs_are_taken_once_and_in_order(board):
    assert board.about() == {"any": "object"}
    assert board.pixels.shape == (4, JOB_IMAGES, 5, 7, 3)
    for job in (5, 4):  # in slots 1 and 0
        board.issue(job, [b"a%d" % job, (1, 2, 3)])
    twin = Board(*board.arguments)
    assert [board.take(1), twin.take(2), board.take(1)] == [0, 1, None]
    assert twin.places(1) == [b"a5", (1, 2, 3)]
    assert board.slots["process"][:2].tolist() == [1, 2]
    twin.pixels[1, 0] = 9
    assert (board.pixels[1, 0] == 9).all()
    board.issue(6, [b"x" * 9000] * JOB_IMAGES)  # cut to what no system opens
    assert board.take(1) == 2
    assert [len(place) for place in board.places(2)] == [b.MAX_PATH] * JOB_IMAGES


def forked(work):
    """Run a function in a copy of this process, whose number is returned."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    finally:
        os._exit(0)


@pytest.mark.parametrize(("need", "waits"), [(BUDGET, True), (10 * BUDGET, True), (BUDGET // 4, False)])
def test_pixels_that_are_held_at_once_are_limited_and_those_of_the_dead_are_free(board, need, waits):
    seen = np.ndarray(2, np.uint8, board.pixels)
    seen[:] = 0

    def hold_for_ever():
        with board.hold(0.0, need):
            seen[0] = 1
            time.sleep(DEADLINE)

    def hold():
        with board.hold(0.5, need):
            seen[1] = 1

    first = forked(hold_for_ever)
    wait_for(lambda: seen[0])
    second = forked(hold)
    try:
        if waits:
            time.sleep(0.3)
            assert not seen[1]
            os.kill(first, signal.SIGKILL)
        wait_for(lambda: seen[1])
    finally:
        os.kill(first, signal.SIGKILL)
        for child in (first, second):
            os.waitpid(child, 0)


def test_a_pause_ends_with_the_process_that_asked_for_it(board):
    seen = np.ndarray(2, np.uint8, board.pixels)
    seen[:] = 0

    def pause():
        board.pause()
        seen[0] = 1
        time.sleep(DEADLINE)

    def wait():
        board.wait_while_paused()
        seen[1] = 1

    first = forked(pause)
    wait_for(lambda: seen[0])
    second = forked(wait)
    time.sleep(0.3)
    assert not seen[1]
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: seen[1])
    for child in (first, second):
        os.waitpid(child, 0)


def wait_for(happens):
    """Wait until a function returns what is true."""
    deadline = time.monotonic() + DEADLINE
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.01)
