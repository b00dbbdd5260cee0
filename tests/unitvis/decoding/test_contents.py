"""Reading the bytes of files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from unitvis.decoding import contents
from unitvis.decoding.contents import FileContents
from unitvis.errors import ImageError

IN_LITTLE_MEMORY = """
import os, resource, sys
from unitvis.decoding.contents import FileContents
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26,) * 2)
print(len(FileContents(b"").read(os.fsencode(sys.argv[1]))))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells how much memory a process has")
def test_a_file_takes_memory_of_its_size(tmp_path):
    (tmp_path / "image").write_bytes(bytes(100_000))
    command = [sys.executable, "-c", IN_LITTLE_MEMORY, str(tmp_path / "image")]
    root = Path(__file__).parents[3]
    found = subprocess.run(command, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(root)})
    assert found.stdout == "100000\n", found.stderr


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="no file system here has files without a size")
def test_a_file_whose_size_the_system_does_not_tell_is_read():
    assert Path("/proc/version").stat().st_size == 0
    assert FileContents(b"/").read(b"proc/version") == Path("/proc/version").read_bytes()


def test_a_file_that_would_block_is_no_image(tmp_path, monkeypatch):
    (tmp_path / "log").write_bytes(b"")
    with open(tmp_path / "log", "rb") as file:
        waiting = MagicMock(wraps=file)
        waiting.__enter__.return_value = waiting
        waiting.read = lambda size: None  # as a log of the system that has no more lines now
        monkeypatch.setattr(contents, "open_regular", lambda path: waiting)
        with pytest.raises(ImageError, match="whose bytes are not there yet"):
            FileContents(bytes(tmp_path)).read(b"log")
