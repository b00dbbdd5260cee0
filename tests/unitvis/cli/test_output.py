"""Commands whose output cannot be written, and names that are hard to write."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import unitvis
from support.commands import TWO_CONVOLUTIONS, call, model_file
from unitvis import UnitvisError, cli
from unitvis.cli.output import unfailing_output
from unitvis.errors import ImageError
from unitvis.files import file_name

SIZE = ["--resize", "16"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (16, 16), (90 * number, 40, 10)).save(folder / f"bild-\u00fc{number}.png")
    return folder


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("redirect", ["> /dev/full", ">&- 2>&-", "PYTHONIOENCODING=ascii"])
def test_a_run_is_drawn_whatever_becomes_of_the_output(tmp_path: Path, photos: Path, redirect: str) -> None:
    command = [sys.executable, "-m", "unitvis", "scan", model_file(tmp_path, TWO_CONVOLUTIONS), photos, *SIZE]
    words = " ".join(f"'{word}'" for word in [*command, "-o", tmp_path / "r\u00fcn"])
    line = f"set -o pipefail; {redirect} {words}" if "=" in redirect else f"set -o pipefail; {words} {redirect}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, env=dict(os.environ))
    assert "Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r\u00fcn" / "index.html").exists()
    if redirect == "> /dev/full":
        assert "unitvis: standard output could not be written: No space left on device" in done.stderr
    if redirect == "PYTHONIOENCODING=ascii":
        assert "r\\xfcn" in done.stdout


def test_a_reader_that_left_ends_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe, unfailing_output_to(pipe, monkeypatch):
        print("x" * 100_000)
        print("more")
    assert capsys.readouterr().err == ""


@contextmanager
def unfailing_output_to(stream: TextIO, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "stdout", stream)
    with unfailing_output():
        yield


def test_what_does_not_fit_into_memory_is_refused_in_a_line(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_file(tmp_path, TWO_CONVOLUTIONS)
    code, _, error = call(capsys, "scan", model, photos, *SIZE, "-o", tmp_path / "run", "--batch-size", 10**15)
    assert (code, error.count("\n")) == (2, 0)
    assert "batch_size must be a whole number of at most 1,099,511,627,776, not 1000000000000000" in error
    code, _, error = call(capsys, "layers", model, "--crop", 10**6)
    assert code == 2
    assert "an input of 1000000 x 1000000 pixels takes 11,176 GiB" in error


def test_names_too_long_for_a_file(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = TWO_CONVOLUTIONS.replace("return nn.Sequential(", "return Long(") + (
        "\nclass Long(nn.Sequential):\n    def __init__(self, *layers):\n        super().__init__()\n"
        "        for number, layer in enumerate(layers):\n"
        "            self.add_module('\u00e9' * (100 + number), layer)\n"
    )
    code, _, error = call(capsys, "scan", model_file(tmp_path, source), photos, *SIZE, "-o", tmp_path / "run")
    assert code == 0, error
    layers = unitvis.load(tmp_path / "run").layers
    assert layers == ["\u00e9" * 100, "\u00e9" * 102]
    names = {file_name(layer) for layer in layers}
    assert len(names) == 2
    assert {path.stem for path in (tmp_path / "run" / "sheets").iterdir()} == names
    code, _, error = call(capsys, "scan", model_file(tmp_path, source), photos, *SIZE, "-o", tmp_path / ("c" * 256))
    assert code == 2
    assert "File name too long" in error


def test_paths_that_are_no_utf8(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = tmp_path / os.fsdecode(b"net\xff")
    try:
        odd.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    (photos / "bild-\u00fc0.png").rename(photos / os.fsdecode(b"n\xff.png"))
    model = model_file(odd, TWO_CONVOLUTIONS)
    assert call(capsys, "scan", model, photos, *SIZE, "-o", odd / "run")[0] == 0
    assert call(capsys, "verify", odd / "run", model)[0] == 0
    assert (odd / "run" / "index.html").exists()


EVIL = "a\x1b[2J\r\n\u202eb\x9b31m\u2028"  # clears the screen, returns to the line's start, turns the direction
SHOWN = r"a\x1b[2J\r\n\u202eb\x9b31m\u2028"


def evil_run(folder: Path, change: str) -> Path:
    """A run in whose files one name steers a terminal."""
    torch.manual_seed(0)
    names = OrderedDict({EVIL if change == "layer" else "conv": nn.Conv2d(3, 2, 3)})
    pixels = np.random.default_rng(0).integers(0, 256, (5, 9, 9, 3), np.uint8)
    np.save(folder / "images.npy", pixels)
    options = {"transform": unitvis.Transform(), "out": folder / "run", "progress": False}
    unitvis.scan(nn.Sequential(names).eval(), folder / "images.npy", **options)
    manifest = json.loads((folder / "run" / "manifest.json").read_text())
    if change == "format":
        manifest["format"] = EVIL
    elif change == "kind":
        manifest["source"] = {"kind": EVIL}
    elif change == "class":
        manifest["model"]["class"] = EVIL
    (folder / "run" / "manifest.json").write_text(json.dumps(manifest))
    return folder / "run"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", ["format", "kind", "class", "layer"])
def test_names_from_files_steer_no_terminal(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, model = str(evil_run(tmp_path, change)), model_file(tmp_path, TWO_CONVOLUTIONS)
    said = ""
    for command in (["render", run], ["render", run, "--model", model], ["verify", run, model], ["sheet", run, "x"]):
        cli.main([*command, *(["-o", str(tmp_path / "x.png")] if command[0] == "sheet" else [])])
        out, err = capsys.readouterr()
        assert len(err.splitlines()) <= 1
        assert not set(out + err) & (set(EVIL) - set("a[2Jb31m\n"))
        said += out + err
    assert SHOWN in said


def test_errors_are_one_line_of_printable_characters() -> None:
    assert str(UnitvisError(f"layer {EVIL}, é 語\u3000👩")) == f"layer {SHOWN}, é 語\u3000👩"
    error = pickle.loads(pickle.dumps(ImageError(EVIL)))  # noqa: S301
    assert (type(error), str(error)) == (ImageError, SHOWN)
