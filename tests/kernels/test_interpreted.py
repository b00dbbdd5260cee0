"""Runs `interpreted*.py`, one process a group: Triton's interpreter must be chosen before the kernels are imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("group", ["argmax", "topk", "epilogue", "normalize", "magnitudes", "conv", "addresses"])
def test_interpreted_kernels_equal_naive(group: str) -> None:
    file = Path(__file__).with_name(
        {"conv": "interpreted_conv.py", "addresses": "interpreted_addresses.py"}.get(group, "interpreted.py")
    )
    command = [sys.executable, "-m", "pytest", str(file), "-k", f"test_{group}", "-p", "no:cacheprovider", "--tb=short"]
    done = subprocess.run(
        command, cwd=file.parents[2], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
