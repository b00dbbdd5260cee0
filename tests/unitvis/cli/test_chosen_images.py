"""The files that a command reads, and those that it says it left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import unitvis
from support.commands import MODEL, SIZE, call
from unitvis import cli


@pytest.fixture
def samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve photographs with their segmentations, and files of other kinds; the working directory."""
    (tmp_path / "set").mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (31, 31, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "set" / f"{number:02}.jpg")
        Image.fromarray(255 - pixels).save(tmp_path / "set" / f"{number:02}.seg.png")
    for name in ("a.heic", "b.heic", "c.heic", "d.heic", "e", "f"):
        (tmp_path / "set" / name).write_bytes(b"x")
    (tmp_path / "nets.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_other_files_and_samples_of_several_images_are_told(samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, error = call(capsys, "scan", "nets.py:net", "set", "-o", "run", *SIZE)
    assert code == cli.DONE
    assert "6 other files (.heic 4, none 2) left alone; --images-ending reads others\n" in printed
    assert "of 12 samples several files are images ('00.jpg', '00.seg.png'), and all of them are ranked" in error
    _, printed, _ = call(capsys, "pack", "set", "-o", "x.npy", "--resize", "31x31")
    assert "6 other files (.heic 4, none 2) left alone" in printed


@pytest.mark.parametrize("packed", [False, True], ids=["files", "pack"])
def test_an_ending_chooses_and_every_later_command_keeps_it(
    samples: Path, packed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    images, size = "set", SIZE
    if packed:
        ending = ["--images-ending", ".jpg"]
        assert call(capsys, "pack", "set", "-o", "x.npy", "--resize", "31x31", *ending)[0] == cli.DONE
        images, size, ending = "x.npy", SIZE[2:], []
    else:
        ending = ["--images-ending", ".jpg"]
    code, printed, error = call(capsys, "scan", "nets.py:net", images, "-o", "run", *size, *ending)
    assert (code, error) == (cli.DONE, "")
    assert packed or "18 other files (.png 12, .heic 4, none 2) left alone" in printed
    run = unitvis.load("run")
    assert {record["name"][2:] for record in run.records.values()} == {".jpg"}
    assert call(capsys, "verify", "run", "nets.py:net")[0] == cli.DONE
    assert call(capsys, "verify", "run", "nets.py:net", "--images", images)[0] == cli.DONE
    assert call(capsys, "render", "run")[0] == cli.DONE
    assert call(capsys, "scan", "nets.py:net", images, "-o", "run", *size, *ending, "--resume")[0] == cli.DONE
    if not packed:
        code, _, error = call(capsys, "scan", "nets.py:net", images, "-o", "run", *size, "--resume")
        assert code == cli.USAGE
        assert "source.images_ending is" in error
        assert (
            call(capsys, "scan", "nets.py:net", images, "-o", "part", *size, *ending, "--shard", "1/1")[0] == cli.DONE
        )
        merge = ["merge", "part", "-o", "whole", "--model", "nets.py:net"]
        (samples / "set" / "notes.txt").write_text("a file that appeared")
        assert call(capsys, *merge, "--images", "set")[0] == cli.DONE
        assert (samples / "whole" / "top.npz").read_bytes() == (samples / "run" / "top.npz").read_bytes()


def test_the_options_of_a_scan_hold_for_images_that_moved(samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (samples / "set").glob("*.jpg"):
        Image.open(path).resize((310, 310)).save(path)
    scan = ["scan", "nets.py:net", "set", "-o", "run", *SIZE, "--images-ending", ".jpg", "--scaled"]
    assert call(capsys, *scan)[0] == cli.DONE
    (samples / "set").rename("elsewhere")
    assert call(capsys, "verify", "run", "nets.py:net", "--images", "elsewhere")[0] == cli.DONE
