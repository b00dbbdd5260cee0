"""A run written into the folder of its images does not become part of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.commands import MODEL, call
from unitvis import cli
from unitvis.sources import open_source
from unitvis.sources.transform import Transform


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twenty pictures and a network beside them; the working directory."""
    for number in range(20):
        pixels = np.random.default_rng(number).integers(0, 256, (31, 31, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02}.png")
    (tmp_path / "nets.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_in_the_folder_of_its_images(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scan = ["scan", "nets.py:net", ".", "--mean", 0, 0, 0, "-o", "run"]
    assert call(capsys, *scan)[0] == cli.DONE
    first = (photos / "run" / "top.npz").read_bytes()
    assert list((photos / "run").rglob("*.png"))  # pictures that a listing would find
    code, printed, _ = call(capsys, "verify", "run", "nets.py:net")
    assert code == cli.DONE
    assert "90 of 90 winners" in printed
    assert call(capsys, *scan, "--overwrite")[0] == cli.DONE
    assert (photos / "run" / "top.npz").read_bytes() == first
    assert json.loads((photos / "run" / "manifest.json").read_text())["images"] == 20
    assert open_source(".", Transform()).length == 20


def test_a_text_file_that_appears_does_not_block_resuming(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scan = ["scan", "nets.py:net", ".", "--mean", 0, 0, 0, "-o", "run"]
    assert call(capsys, *scan)[0] == cli.DONE
    (photos / "notes.txt").write_text("seen on a Tuesday")
    code, _, error = call(capsys, *scan, "--resume")
    assert (code, error) == (cli.DONE, "")


def test_the_images_of_a_folder_that_only_looks_like_a_run_are_kept(photos: Path) -> None:
    (photos / "more").mkdir()
    (photos / "00.png").rename(photos / "more" / "00.png")
    (photos / "more" / "manifest.json").write_text("{}")  # one file does not make a run
    assert open_source(".", Transform()).length == 20
