"""Processes that torchrun starts, on the CPU: the run of one process, byte for byte."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import unitvis
from support import photos
from support.commands import TWO_CONVOLUTIONS, model_file
from support.scans import two_convolutions
from unitvis import UnitvisError, cli

ROOT = Path(__file__).parents[3]


def torchrun(processes: int, *arguments: object, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["--max-restarts", str(restarts)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [*command, "-m", "unitvis", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": paths},
    )


def check_equal(one: Path, other: Path) -> None:
    """Byte for byte."""
    for name in ("top.npz", "sample.npz", "images.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (one, other)]
    for key in ("images", "coverage", "failures", "layers", "source", "model", "transform"):
        assert manifests[0][key] == manifests[1][key], key


def test_two_processes_are_one_scan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    for number in range(37):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number:03}.png")
    (tmp_path / "images" / "030.png").write_bytes(b"broken")
    scan = ["scan", model_file(tmp_path, TWO_CONVOLUTIONS), tmp_path / "images", "--mean", 0, 0, 0, "-o"]
    assert cli.main([str(argument) for argument in [*scan, tmp_path / "one"]]) == cli.SKIPPED
    done = torchrun(2, *scan, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("36 images, 11 units of 2 layers") == 1
    assert "'030.png': not an image" in done.stdout
    check_equal(tmp_path / "one", tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "nets.py", "one", "two"]
    refused = torchrun(2, *scan, tmp_path / "two")
    assert refused.returncode != 0
    # torchrun may end the other process before it prints its line.
    assert re.search("two holds a run already|another process failed and says why", refused.stderr)
    assert "unitvis/cli.py" not in refused.stderr  # no traceback of ours


DYING = """
import os
import torch
from torch import nn

class Dying(nn.Conv2d):
    passes = 0

    def forward(self, x):
        Dying.passes += 1
        if os.environ.get("RANK") == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and Dying.passes == 40:
            os.kill(os.getpid(), 9)
        return super().forward(x)

def dying():
    torch.manual_seed(0)
    return nn.Sequential(Dying(3, 6, 3))
"""


@pytest.mark.slow
def test_a_process_that_is_killed_is_started_again_and_goes_on(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2000, 12, 12, 3), np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    model = model_file(tmp_path, DYING, "dying")
    scan = ["scan", model, tmp_path / "x.npy", "--mean", 0, 0, 0, "--batch-size", 16]
    scan += ["--checkpoint-every", 1e-6, "-o"]
    assert cli.main([str(argument) for argument in [*scan, tmp_path / "one"]]) == cli.DONE
    done = torchrun(2, *scan, tmp_path / "two", restarts=1)
    assert done.returncode == 0, done.stderr
    assert "2,000 images, 6 units of 1 layers" in done.stdout
    check_equal(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.photos
@pytest.mark.skipif(not photos.PHOTOS.is_dir(), reason="UNITVIS_SHARED names no folder with data/photos")
def test_four_processes_on_photographs_are_one_scan(tmp_path: Path) -> None:
    model = photos.spec("small")
    numbers = ["--resize", "224x224", "--mean", *[0.5] * 3, "--std", *[0.5] * 3]
    scan = ["scan", model, photos.PHOTOS, *numbers, "--device", "cpu", "-o"]
    assert cli.main([str(argument) for argument in [*scan, tmp_path / "one"]]) == cli.DONE
    done = torchrun(4, *scan, tmp_path / "four")
    assert done.returncode == 0, done.stderr
    check_equal(tmp_path / "one", tmp_path / "four")


def test_outside_of_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from unitvis.scanning.torchrun import processes

    monkeypatch.setenv("WORLD_SIZE", "8")  # a batch system may set it
    assert processes() == 1
    assert torch.distributed.is_available()


@pytest.mark.parametrize("failures", [0, 1])
def test_what_fails_elsewhere_fails_here(failures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from unitvis.scanning import torchrun

    def refuse() -> None:
        raise UnitvisError("two holds a run already")

    monkeypatch.setattr(torch.distributed, "all_reduce", lambda failed: failed.add_(failures))
    if failures:
        with pytest.raises(UnitvisError, match="another process failed and says why"):
            torchrun._in_every_process(lambda: 3)
    else:
        assert torchrun._in_every_process(lambda: 3) == 3
    with pytest.raises(UnitvisError, match="two holds a run already"):
        torchrun._in_every_process(refuse)


def test_shards_of_an_earlier_scan_stay_until_theirs_are_there_and_other_files_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unitvis.scanning import torchrun

    monkeypatch.setattr(torchrun, "_process_group", lambda: nullcontext((0, 1)))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda _: None)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 12, 12, 3), np.uint8)
    given: dict[str, Any] = {"transform": unitvis.Transform(), "progress": False, "device": "cpu"}
    shards = tmp_path / "run.shards"
    for number, of in ((1, 1), (2, 4)):
        unitvis.scan(two_convolutions(), pixels, out=shards / f"{number}-of-{of}", shard=(number, of), **given)
    (shards / "1-of-1" / "notes.txt").write_text("mine")
    (shards / "4-of-hearts").mkdir()
    before = {path: path.read_bytes() for path in shards.rglob("*") if path.is_file()}
    with pytest.raises(UnitvisError, match=r"run.shards holds a scan that is not finished; resume it"):
        torchrun.scan_together(two_convolutions(), pixels, out=tmp_path / "run", **given)
    with pytest.raises(UnitvisError, match="no layer is named 'nope'"):
        torchrun.scan_together(two_convolutions(), pixels, "nope", out=tmp_path / "run", overwrite=True, **given)
    assert {path: path.read_bytes() for path in shards.rglob("*") if path.is_file()} == before
    run = torchrun.scan_together(two_convolutions(), pixels, out=tmp_path / "run", overwrite=True, **given)
    assert run is not None
    assert {path.relative_to(shards).as_posix() for path in shards.rglob("*")} == {
        "1-of-1",
        "1-of-1/notes.txt",
        "4-of-hearts",
    }
