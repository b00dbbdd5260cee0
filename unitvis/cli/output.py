"""Standard output and standard error that cannot stop a command: it goes on, and draws its run, without them."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TextIO


class _Stream:
    """A text stream whose write errors are kept instead of raised; what follows the first one is dropped.

    error: the first one. Characters that the stream's encoding does not have are written as escapes.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        if self.error is None:
            try:
                self._stream.write(text)
            except OSError as error:
                self._stop(error)
        return len(text)

    def flush(self) -> None:
        if self.error is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._stop(error)

    def _stop(self, error: OSError) -> None:
        self.error = error
        with suppress(OSError, ValueError):  # or the interpreter fails on what is left in the buffer when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def unfailing_output() -> Iterator[None]:
    """Keep write errors of standard output and standard error from ending the commands of a `with` block.

    At its end one line on standard error names what could not be written, unless the reader had closed a pipe.
    """
    before = sys.stdout, sys.stderr
    with ExitStack() as stack:
        # Python has None for a closed one; the null device also keeps its number from the next file that is opened.
        out, errors = (_Stream(one or stack.enter_context(open(os.devnull, "w"))) for one in before)
        sys.stdout, sys.stderr = out, errors
        try:
            yield
        finally:
            out.flush()
            if out.error is not None and out.error.errno != errno.EPIPE:
                print(f"unitvis: standard output could not be written: {out.error.strerror}", file=errors)
            errors.flush()
            sys.stdout, sys.stderr = before
