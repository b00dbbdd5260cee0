"""The command `unitvis pack`, and scans of what it wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import unitvis
from support.commands import model_file
from support.packs import NET, TRANSFORM, net, originals
from unitvis import cli, models


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return originals(tmp_path / "images")


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = model_file(tmp_path, NET), tmp_path / "x.npy"
    size = ["--resize", "20", "--crop", "16", "--interpolation", "bicubic"]

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    code, printed, _ = call("pack", folder, "-o", out, *size, "--workers", 1)
    assert (code, printed.splitlines()[0]) == (cli.SKIPPED, f"{out}: 70 images, 16 x 16 pixels")
    assert "4 images could not be read and were skipped (all are listed in x.json):" in printed
    code, _, err = call("pack", folder, "-o", out, *size)
    assert (code, err.strip()[-31:]) == (cli.USAGE, "or overwrite it (--overwrite)") or code == cli.USAGE
    assert call("pack", folder, "-o", out, *size, "--resume")[0] == cli.SKIPPED
    assert call("pack", folder, "-o", out, *size, "--overwrite", "--max-failures", "3")[0] == cli.USAGE
    assert call("pack", folder, "-o", out, "--like", model)[2].endswith(
        "names no transform; give --resize and --crop\n"
    )

    normal = ["--mean", ".5", ".4", ".3", "--std", ".2", ".2", ".3"]
    code, printed, _ = call("scan", model, out, "-o", tmp_path / "run", *normal)
    assert code == cli.SKIPPED
    assert "66 images, 11 units of 2 layers" in printed
    assert call("scan", model, folder, "-o", tmp_path / "want", *normal, *size)[0] == cli.SKIPPED
    for name in ("top.npz", "sample.npz", "images.jsonl", "sheets/2.png"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "want" / name).read_bytes()
    assert call("verify", tmp_path / "run", model)[0] == cli.DONE
    assert call("verify", tmp_path / "run", model, "--images", folder)[0] == cli.DONE
    assert call("verify", tmp_path / "want", model, "--images", out)[0] == cli.DONE
    shutil.move(folder, tmp_path / "moved")
    code, _, err = call("render", tmp_path / "run")
    assert code == cli.DONE
    assert "unitvis: warning: the originals of the pack" in err
    code, _, err = call("render", tmp_path / "run", "--images", tmp_path / "moved")
    assert (code, err) == (cli.DONE, "")


def test_like_a_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the weights want is done as far as a pack does it, and what is said beside it goes first."""
    loaded = unitvis.models.Loaded("some:model", net(), TRANSFORM)
    asked = []
    monkeypatch.setattr(models, "load", lambda *a, **b: asked.append((a, b)) or loaded)
    command = ["pack", str(folder), "-o", str(tmp_path / "x.npy"), "--like", "some:model"]
    for more, crop in (([], 16), (["--crop", "12", "--overwrite"], [12, 12])):
        assert cli.main(command + more) == cli.SKIPPED
        about = json.loads((tmp_path / "x.json").read_text())
        assert about["transform"] == {"resize": 20, "crop": crop, "interpolation": "bicubic"}
    assert asked == [(("some:model",), {"pretrained": False})] * 2  # its weights are not needed
