"""Processes that call functions for this one: for work that threads of one process would take turns at."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, Self, TypeVar

from unitvis.decoding.processes import PARENT_SECONDS, above_standard, start

Result = TypeVar("Result")


class Crew:
    """Context with processes that call functions of modules; what those take and return can be pickled.

    workers: number of processes, each driven by a thread. What a function raises is raised by its future, and OSError
    where a process cannot be started or dies.
    """

    def __init__(self, workers: int) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._own = threading.local()
        self._threads = ThreadPoolExecutor(workers, "unitvis-crew")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        for connection in self._connections:
            connection.close()  # which ends the process at its other end
        for process in self._processes:
            process.wait()

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Call a function in one of the processes."""
        return self._threads.submit(self._call, function, arguments)

    def _call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        connection = getattr(self._own, "connection", None) or self._connect()
        try:
            connection.send((function, arguments))
            returned, result = connection.recv()
        except (EOFError, ConnectionError) as error:
            raise OSError("a process that draws has died, perhaps because memory ran out") from error
        if returned:
            return result
        raise result

    def _connect(self) -> Connection:
        """Start the process of this thread, and return what speaks to it."""
        here, there = socket.socketpair()
        with here, there:
            passed = above_standard(there.fileno())
            try:
                process = start(__name__, (passed, os.getpid()), pass_fds=(passed,), stdin=subprocess.DEVNULL)
            finally:
                os.close(passed)
            self._processes.append(process)
            connection = self._own.connection = Connection(os.dup(here.fileno()))
        self._connections.append(connection)
        return connection


def main(file: int, parent: int) -> None:
    """Call functions for the process at the other end of a socket until it closes, or is no longer there."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(file)
    while True:
        while not connection.poll(PARENT_SECONDS):
            if os.getppid() != parent:  # a copy of it may hold the socket open
                return
        try:
            function, arguments = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            answer = True, function(*arguments)
        except Exception as error:
            answer = False, error
        connection.send(answer)
