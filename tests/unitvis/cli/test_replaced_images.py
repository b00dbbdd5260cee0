"""A command that writes one picture refuses to replace an image that it reads, and replaces any other picture."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.commands import MODEL, SIZE, call
from unitvis import cli


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs, some under a second name, a pack of them, and runs of both."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "set").mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (31, 31, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "set" / f"{number:02}.png")
    (folder / "original.png").write_bytes((folder / "set" / "03.png").read_bytes())
    (folder / "set" / "03.png").unlink()
    (folder / "set" / "03.png").symlink_to(folder / "original.png")
    os.link(folder / "set" / "04.png", folder / "hard.png")
    (folder / "nets.py").write_text(MODEL)
    return folder


@pytest.fixture
def runs(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    monkeypatch.chdir(work)
    if not (work / "packed").exists():
        assert call(capsys, "scan", "nets.py:net", "set", "-o", "run", *SIZE)[0] == cli.DONE
        assert call(capsys, "pack", "set", "-o", "x.npy", "--resize", "31x31")[0] == cli.DONE
        assert call(capsys, "scan", "nets.py:net", "x.npy", "-o", "packed", "--mean", 0, 0, 0)[0] == cli.DONE
    return work


COMMANDS = [
    ["sheet", "run", "0"],
    ["sheet", "packed", "0"],
    ["sheet", "run", "0", "--figure", "lecture"],
    ["overview", "run"],
    ["maps", "nets.py:net", "set/05.png", "0", *SIZE],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(map(str, command[:5])))
def test_an_image_is_not_replaced_and_another_picture_is(
    command: list[object], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = ["set/05.png"] if command[0] == "maps" else ["set/05.png", "set/../set/00.png", "original.png", "hard.png"]
    before = {path: path.read_bytes() for path in [*runs.glob("set/*"), *runs.glob("*.png")]}
    for image in images:
        code, _, error = call(capsys, *command, "-o", image)
        assert code == cli.USAGE
        assert error.startswith(f"unitvis: {image} is ")
        assert error.endswith("and would be replaced; give another path")
    assert {path: path.read_bytes() for path in before} == before
    (runs / "mine.png").write_text("an older picture")
    assert call(capsys, *command, "-o", "mine.png")[0] == cli.DONE
    assert (runs / "mine.png").read_bytes()[:4] == b"\x89PNG"
    (runs / "mine.png").unlink()
