"""Starting processes that run a function of this package, whatever the caller's script looks like."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows, which has no memfd_create either
    fcntl = None  # type: ignore[assignment]

PARENT_SECONDS = 2.0  # between two looks of a process that waits for work whether its parent lives
_COMMAND = """import importlib, json, sys
path, module, arguments = json.loads(sys.argv[1])
sys.path[:] = path
importlib.import_module(module).main(*arguments)"""


def may_start() -> bool:
    """Whether this system has what the processes need, and whether `sys.executable` is a Python that can be one."""
    return hasattr(os, "memfd_create") and bool(sys.executable) and not hasattr(sys, "frozen")


def above_standard(file: int) -> int:
    """A copy of a file's number that is none of standard input, output and error, which a process gets anew.

    A process whose own are closed gives their numbers to the next files that it opens.
    """
    assert fcntl is not None  # noqa: S101  see `may_start`
    return fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 3)


def start(module: str, arguments: tuple[Any, ...], **options: Any) -> subprocess.Popen[bytes]:
    """Start a process that calls a module's `main`; arguments: JSON. options: see `subprocess.Popen`.

    It finds the packages that this one finds, is not sent the terminal's Ctrl-C, and what its libraries print on
    standard error is dropped: what they mean comes as exceptions. OSError where it cannot be started.
    """
    root = str(Path(__file__).parents[2])
    path = [root, *(os.path.abspath(one) for one in sys.path if isinstance(one, str))]
    # -P: no module of the working directory, which may be a foreign run's, takes the place of Python's own.
    command = [sys.executable, "-P", "-c", _COMMAND, json.dumps((path, module, arguments))]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, process_group=0, **options)  # noqa: S603  this Python
