"""The command line, called in this process, and files with networks for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from unitvis import cli

# The network has 10 units in layers 0 and 2, for images of 31 x 31 (SIZE); the other functions cannot be scanned.
MODEL = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    head = nn.Linear(4 * 12 * 12, 5)
    return nn.Sequential(nn.Conv2d(3, 6, 5, stride=2), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), head)

def raising():
    raise KeyError("no such file")

def leaving():
    raise SystemExit(0)

def broken():
    class Broken(nn.Sequential):
        def forward(self, x):
            raise RuntimeError("bad shapes")
    return Broken(nn.Conv2d(3, 3, 3))

def noisy():
    return nn.Sequential(nn.Dropout(0.5).train(), nn.Conv2d(3, 3, 3))

number = 3
"""


TWO_CONVOLUTIONS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3))
"""
SIZE = ["--resize", "31x31", "--mean", ".5", ".5", ".5", "--std", ".25", ".25", ".25"]


def model_file(folder: Path, source: str = MODEL, function: str = "net") -> str:
    """Write a file with a network into a folder; how the command line names the network."""
    (folder / "nets.py").write_text(source)
    return f"{folder / 'nets.py'}:{function}"


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """The exit code, what was printed, and the last line of the errors; fails on a traceback."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return code, printed.out, printed.err.split("\r")[-1].strip()
