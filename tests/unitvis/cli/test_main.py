"""The commands as a user calls them: what they print, what they write, and how they end."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import unitvis
from support.commands import SIZE, call, model_file
from support.encoded import header
from unitvis import cli, models


@pytest.fixture
def model(tmp_path: Path) -> str:
    return model_file(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve photographs in two folders."""
    for number in range(12):
        path = tmp_path / "photos" / ("a", "b")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return tmp_path / "photos"


def test_scan_render_sheet_and_verify(
    model: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    code, printed, _ = call(capsys, "scan", model, folder, "-o", out, "-k", 5, *SIZE)
    assert code == cli.DONE
    assert "12 images, 10 units of 2 layers" in printed
    assert "input: 31 x 31 pixels, pixels / 255, mean 0.5 0.5 0.5, std 0.25 0.25 0.25\n" in printed
    assert f"2 sheets in {out / 'sheets'}" in printed
    files = ["gallery", "images.jsonl", "index.html", "manifest.json", "sample.npz", "sheets", "top.npz"]
    assert sorted(p.name for p in out.iterdir()) == files
    run = unitvis.load(out)
    assert run.layers == ["0", "2"]
    assert run["0"].values.shape == (6, 5)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["images"] == 12
    assert manifest["model"]["spec"] == model
    records = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    assert {record["id"] for record in records} == set(run.winners.tolist())
    assert {"id", "name", "width", "height", "hash"} == set(records[0])

    sheet = (out / "sheets" / "0.png").read_bytes()
    (out / "sheets" / "0.png").unlink()
    assert call(capsys, "render", out)[0] == cli.DONE
    assert (out / "sheets" / "0.png").read_bytes() == sheet

    target = tmp_path / "page.png"
    code, printed, _ = call(capsys, "sheet", out, "2", "--units", "0-2", "--crop", "image", "-o", target)
    assert code == cli.DONE
    with Image.open(target) as page:
        assert f"{target}: {page.width} x {page.height} pixels" in printed

    code, printed, _ = call(capsys, "verify", out, model)
    assert code == cli.DONE
    assert printed.startswith("50 of 50 winners were reproduced bit for bit\ncompared: values, positions, boxes, what")


@pytest.mark.parametrize("reason", ["No space left on device", "Read-only file system"])
def test_a_sheet_that_cannot_be_written_names_its_file_and_the_way_out(
    reason: str,
    model: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call(capsys, "scan", model, folder, "-o", tmp_path / "run", "-k", 2, *SIZE)
    real, target = os.open, tmp_path / "page.png"

    def refusing(path: object, *options: int, **named: object) -> int:
        if str(path).endswith("page.png.part"):
            raise OSError(errno.EROFS, reason, path)
        return real(path, *options, **named)  # type: ignore[arg-type]

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, reason)

    if reason.startswith("No"):
        monkeypatch.setattr(Image.Image, "save", full)
    else:
        monkeypatch.setattr("os.open", refusing)
    code, _, said = call(capsys, "sheet", tmp_path / "run", "2", "-o", target)
    told = f"unitvis: {target} could not be written: {reason}; make room there, or give another path"
    assert (code, said) == (cli.USAGE, told)
    assert not list(tmp_path.glob("page*"))


def test_verify_finds_a_forged_value_and_another_model(
    model: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    call(capsys, "scan", model, folder, "-o", out, *SIZE)
    run = unitvis.load(out)
    run["2"].values[1, 3] = np.nextafter(run["2"].values[1, 3], np.float32(9))
    run.save(out, overwrite=True)
    code, printed, _ = call(capsys, "verify", out, model)
    assert code == cli.WRONG
    assert "89 of 90 winners" in printed
    assert f"the first that was not: image {run['2'].images[1, 3]} in layer '2'" in printed

    weights = {name: tensor + 1 for name, tensor in models.load(model).model.state_dict().items()}
    save_file(weights, tmp_path / "other.safetensors")
    assert call(capsys, "verify", out, model, "--weights", tmp_path / "other.safetensors")[0] == cli.WRONG


def test_verify_allows_rounding_on_another_machine(
    model: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    call(capsys, "scan", model, folder, "-o", out, *SIZE)
    run = unitvis.load(out)
    run.manifest["fingerprint"]["hardware"] = "an abacus"
    run["2"].values[1, 3] *= np.float32(1 + 2e-7)
    run.save(out, overwrite=True)
    code, printed, _ = call(capsys, "verify", out, model)
    assert code == cli.DONE
    assert "90 of 90 winners were reproduced within 1e-5" in printed
    run["2"].values[1, 3] *= np.float32(1.001)
    run.save(out, overwrite=True)
    assert call(capsys, "verify", out, model)[0] == cli.WRONG


def test_images_that_moved_are_given_by_hand(
    model: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, moved = tmp_path / "run", tmp_path / "moved"
    call(capsys, "scan", model, folder, "-o", out, *SIZE)
    folder.rename(moved)
    code, _, error = call(capsys, "render", out)
    assert code == cli.USAGE
    assert "are not where they were" in error
    assert call(capsys, "render", out, "--images", moved)[0] == cli.DONE
    Image.new("RGB", (50, 40)).save(moved / "a" / "0.png")
    code, _, error = call(capsys, "render", out, "--images", moved)
    assert code == cli.USAGE
    assert "'a/0.png' is no longer the file that was scanned" in error


def test_layers_lists_what_can_be_scanned(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = call(capsys, "layers", model, "--crop", 31)
    assert code == cli.DONE
    rows = [line.split() for line in printed.splitlines()]
    assert rows[1] == ["0", "Conv2d", "6", "14", "x", "14", "5", "x", "5", "2", "x", "2"]
    assert rows[2] == ["2", "Conv2d", "4", "12", "x", "12", "9", "x", "9", "2", "x", "2"]
    assert printed.splitlines()[3:] == ["not among them: 4 (Linear), whose units are the network's outputs"]
    code, printed, _ = call(capsys, "layers", model, "--crop", 31, "--layer", "4")
    assert "whole image" in printed
    assert "not among them" not in printed


@pytest.mark.parametrize(
    ("words", "layers"),
    [
        ("layers M --layer 2 0 --crop 31", "0 2"),
        ("layers M --crop 31 --layer 2 0 --exclude 2 4", "0"),
        ("layers M --layer 2 --layer 0 4 --crop 31", "0 2 4"),
        ("layers --layer 2 M --crop 31", "2"),  # as it always was: the word behind an option's only one is MODEL
    ],
)
def test_several_layers_after_one_option(
    words: str, layers: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed, error = call(capsys, *(model if word == "M" else word for word in words.split()))
    assert (code, error) == (cli.DONE, "")
    assert [line.split()[0] for line in printed.splitlines()[1:] if line[0].isdigit()] == layers.split()


def test_a_word_that_belongs_to_no_option_is_refused(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = call(capsys, "layers", model, "--layer", "0", "2", "--crop", 31, "stray")
    assert code == cli.USAGE
    assert error.endswith("unrecognized arguments: stray")


def test_unreadable_images_are_skipped_listed_and_counted(
    model: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = tmp_path / "clean"
    call(capsys, "scan", model, folder, "-o", clean, *SIZE)
    (folder / "text.jpg").write_text("I am a text")
    (folder / "empty.jpg").touch()
    (folder / "huge.png").write_bytes(header("PNG", 20_000, 20_000))
    Image.new("RGB", (300, 300), "red").save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:700])
    (folder / "whole.jpg").unlink()
    (folder / "notes.txt").write_text("no image, and not taken for one")
    out = tmp_path / "run"
    code, printed, _ = call(capsys, "scan", model, folder, "-o", out, *SIZE)
    assert code == cli.SKIPPED
    assert "4 images could not be read and were skipped" in printed
    failures = {f["name"]: f["reason"] for f in json.loads((out / "manifest.json").read_text())["failures"]}
    assert set(failures) == {"cut.jpg", "empty.jpg", "huge.png", "text.jpg"}
    assert "20000" in failures["huge.png"].replace(",", "").replace(" ", "")
    assert all(reason in printed for reason in failures.values())
    ours, theirs = unitvis.load(out), unitvis.load(clean)
    assert ours.manifest["images"] == 12
    for name in ours:
        assert ours[name].values.tobytes() == theirs[name].values.tobytes()
    code, _, error = call(capsys, "scan", model, folder, "-o", tmp_path / "other", "--on-error", "raise", *SIZE)
    assert code == cli.USAGE
    assert "'cut.jpg'" in error


def test_failures_may_be_limited_and_truncated_files_allowed(
    model: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (300, 300), "red").save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:700])
    (folder / "text.jpg").write_text("I am a text")
    scan = ["scan", model, folder, *SIZE]
    code, _, error = call(capsys, *scan, "-o", tmp_path / "a", "--max-failures", 1)
    assert code == cli.USAGE
    assert "2 images could not be used, more than max_failures=1; the last is 'text.jpg' (not an image" in error
    assert call(capsys, *scan, "-o", tmp_path / "b", "--max-failures", 2)[0] == cli.SKIPPED
    assert call(capsys, *scan, "-o", tmp_path / "c", "--max-failures", 1, "--allow-truncated")[0] == cli.SKIPPED
    run = unitvis.load(tmp_path / "c")
    assert run.manifest["images"] == 13
    assert run.manifest["source"]["decoding"]["allow_truncated"]
    assert call(capsys, "verify", tmp_path / "c", model)[0] == cli.DONE
    assert call(capsys, *scan, "-o", tmp_path / "d", "--max-failures", -1)[0] == cli.USAGE


def test_tar_archives_are_scanned_as_the_folder_was(
    model: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted(folder.rglob("*.png"))
    for number, part in enumerate((files[:7], files[7:])):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            for path in part:
                archive.add(path, path.name)
    runs = []
    for images in ([folder], [tmp_path / "0.tar", tmp_path / "1.tar"], [f"{tmp_path}/{{0..1}}.tar"]):
        out = tmp_path / f"run{len(runs)}"
        assert call(capsys, "scan", model, *images, "-o", out, *SIZE)[0] == cli.DONE
        assert call(capsys, "verify", out, model)[0] == cli.DONE
        runs.append((out / "top.npz").read_bytes())
    assert runs[0] == runs[1] == runs[2]


def refused(case: str, model: str, folder: Path, tmp: Path) -> tuple[list[object], str]:
    """The arguments of a call that cannot start, and what it must say."""
    scan = ["scan", model, folder, "-o", tmp / "run", *SIZE]
    other = model.removesuffix("net")
    (tmp / "empty").mkdir()
    (tmp / "folder.png").mkdir()
    (tmp / "texts").mkdir()
    (tmp / "texts" / "a.jpg").write_text("text")
    (tmp / "file").write_text("")
    (tmp / "full").mkdir()
    (tmp / "full" / "thesis.tex").touch()
    np.save(tmp / "wrong.npy", np.zeros((2, 3, 8, 8), np.int32))
    np.save(tmp / "flat.npy", np.zeros((2, 8, 8), np.uint8))
    torch.save({"0.weight": torch.zeros(6, 3, 5, 5), "2.bias": torch.zeros(7), "x": torch.zeros(1)}, tmp / "w.pt")
    torch.save(models.load(model).model, tmp / "pickle.pt")
    return {
        "no transform": ([*scan[:5]], "need a transform"),
        "empty folder": (["scan", model, tmp / "empty", *scan[3:]], "no image"),
        "no readable image": (["scan", model, tmp / "texts", *scan[3:]], "'a.jpg'"),
        "missing folder": (["scan", model, tmp / "nowhere", *scan[3:]], "there is no file or folder"),
        "one image": (["scan", model, folder / "a" / "0.png", *scan[3:]], "is one image"),
        "wrong array": (["scan", model, tmp / "wrong.npy", *scan[3:]], "int32 [2, 3, 8, 8]"),
        "flat array": (["scan", model, tmp / "flat.npy", *scan[3:]], "uint8 [2, 8, 8]"),
        "different sizes": ([*scan[:5], "--resize", 31, "--mean", 0, 0, 0], "raised RuntimeError"),
        "crop too large": ([*scan[:5], "--crop", 64], "larger than the image"),
        "negative std": ([*scan[:5], "--std", 1, 0, 1], "above 0"),
        "interpolation": ([*scan, "--interpolation", "cubic"], "'cubic'; it must be one of"),
        "layer": ([*scan, "--layer", "conv1"], "no layer is named 'conv1'"),
        "device": ([*scan, "--device", "cuda:7"], "cuda:7"),
        "device without a way": ([*scan, "--device", "mps"], "a model on device 'mps' cannot be scanned"),
        "no such device": ([*scan, "--device", "gpu"], "'gpu'"),
        "no device": ([*scan, "--device", ""], "device '' is unknown; give cpu"),
        "mean": ([*scan, "--mean", "nan"], "mean=(nan,); every value must be a finite number"),
        "large mean": ([*scan, "--mean", "1e400"], "mean=(inf,); every value must be a finite number"),
        "infinite std": ([*scan, "--std", 1, 1, "inf"], "std=(1.0, 1.0, inf); every value must be a finite number"),
        "large batch size": ([*scan, "--batch-size", 10**20], "batch_size must be a whole number of at most"),
        "many workers": ([*scan, "--workers", 10**20], "workers must be a whole number of at most"),
        "large count": (["bench", model, "--count", 10**20], "the number of images must be a whole number of at most"),
        "many images": (["bench", model, "--count", 10**15], "more than half of the"),
        "k": ([*scan, "-k", 0], "k must be a whole number of at least 1, not 0"),
        "output is a file": ([*scan[:4], tmp / "file", *SIZE], "is a file; a run is a folder"),
        "output is no run": ([*scan[:4], tmp / "full", *SIZE, "--overwrite"], "holds no run"),
        "model form": (["scan", "net", *scan[2:]], "is not of the form torchvision:NAME, timm:NAME, file.py:function"),
        "model file": (["scan", "nowhere.py:net", *scan[2:]], "there is no file nowhere.py"),
        "model module": (["scan", "no_such_package.x:net", *scan[2:]], "no module 'no_such_package'"),
        "model function": (["scan", other + "nets", *scan[2:]], "has no 'nets'; it has net, raising"),
        "model number": (["scan", other + "number", *scan[2:]], "is a int"),
        "model raises": (["scan", other + "raising", *scan[2:]], "raised KeyError"),
        "forward raises": (["scan", other + "broken", *scan[2:]], "the model raised RuntimeError on a batch of shape"),
        "model exits": (["scan", other + "leaving", *scan[2:]], "raised SystemExit"),
        "weights": ([*scan, "--weights", tmp / "none.pt"], "there is no file"),
        "weights that do not fit": ([*scan, "--weights", tmp / "w.pt"], "missing: 0.bias, 2.weight, 4.weight, 4.bias"),
        "weights of a whole model": ([*scan, "--weights", tmp / "pickle.pt"], "cannot be read"),
        "not a run": (["render", tmp / "empty"], "there is no manifest.json"),
        "sheet of nothing": (["sheet", tmp / "empty", "0", "-o", tmp / "x.png"], "there is no manifest.json"),
        "sheet ending": (["sheet", tmp / "empty", "0", "-o", tmp / "x.doc"], "must end in .png"),
        "sheet is a folder": (["sheet", tmp / "empty", "0", "-o", tmp / "folder.png"], "is a folder; name a file"),
        "sheet size": (["sheet", tmp / "empty", "0", "-o", tmp / "y.png", "--size", -5], "1 to 2048 pixels a patch"),
        "sheet folder": (["sheet", tmp / "empty", "0", "-o", tmp / "no" / "x.png"], "there is no folder"),
    }[case]


@pytest.mark.parametrize(
    "case",
    """no transform|empty folder|no readable image|missing folder|one image|wrong array|flat array|different sizes|
    crop too large|negative std|mean|large mean|infinite std|large batch size|many workers|large count|many images|
    no device|interpolation|layer|device|device without a way|no such device|k|
    output is a file|output is no run|model form|model file|model module|model function|model number|model raises|
    forward raises|model exits|weights|weights that do not fit|weights of a whole model|not a run|sheet of nothing|
    sheet ending|sheet is a folder|sheet size|sheet folder""".replace("\n    ", "").split("|"),
)
def test_a_call_that_cannot_start_says_why_in_one_line(
    case: str, model: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = refused(case, model, folder, tmp_path)
    code, _, error = call(capsys, *arguments)
    assert code == cli.USAGE
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_an_existing_run_is_kept_until_the_new_one_is_there(
    model: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    scan = ["scan", model, folder, "-o", out, *SIZE]
    call(capsys, *scan)
    code, _, error = call(capsys, *scan)
    assert code == cli.USAGE
    assert "holds a run already; give another path, or overwrite it (--overwrite)" in error
    before = (out / "top.npz").read_bytes()
    assert call(capsys, *scan, "--overwrite", "--layer", "nothing")[0] == cli.USAGE
    assert (out / "top.npz").read_bytes() == before
    assert call(capsys, *scan, "--overwrite", "-k", 2)[0] == cli.DONE
    assert unitvis.load(out).manifest["k"] == 2


def test_a_folder_that_cannot_be_written_is_refused_before_the_scan(
    model: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def deny(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", deny)  # a superuser may write into read-only folders
    code, _, error = call(capsys, "scan", model, folder, "-o", tmp_path / "run", *SIZE)
    assert code == cli.USAGE
    assert "cannot write into" in error
    assert "Permission denied" in error


@pytest.mark.parametrize("arguments", [["scan"], ["fly"], ["scan", "m", "i", "-o", "r", "--resize", "0"], []], ids=str)
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, *arguments)[0] == cli.USAGE


@pytest.mark.parametrize("damage", ["no arrays", "cut arrays", "newer format", "no json"])
def test_a_damaged_run_is_refused(
    damage: str, model: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    call(capsys, "scan", model, folder, "-o", out, *SIZE)
    manifest = out / "manifest.json"
    if damage == "no arrays":
        (out / "top.npz").unlink()
    elif damage == "cut arrays":
        (out / "top.npz").write_bytes((out / "top.npz").read_bytes()[:100])
    elif damage == "newer format":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    else:
        manifest.write_text("{")
    code, _, error = call(capsys, "render", out)
    assert code == cli.USAGE
    assert any(word in error for word in ("not a whole run", "format 99", "damaged"))


def test_the_program_runs_as_a_process(model: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "unitvis", "layers", model, "--crop", "31"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout.startswith("layer")
    done = subprocess.run(
        [sys.executable, "-m", "unitvis", "render", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1


def test_forgotten_mean_and_std_are_told(
    model: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, printed, _ = call(capsys, "scan", model, folder, "-o", tmp_path / "run", "--resize", "31x31")
    assert "input: 31 x 31 pixels, pixels / 255, no mean or std\n" in printed


def test_a_command_says_where_its_time_went_and_what_ctrl_c_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (40, 40), (200, 40, 10)).save(folder / "a.png")
    scan = ["scan", model_file(tmp_path), folder, *SIZE]
    code, out, _ = call(capsys, *scan, "-o", tmp_path / "run")
    assert code == cli.DONE
    assert re.fullmatch(r"time: (\w+( pass)? \d+\.\d s, )*drawing \d+\.\d s", out.splitlines()[-1])

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("unitvis.pages.pictures.draw_run", interrupted)
    code, _, error = call(capsys, *scan, "-o", tmp_path / "other")
    assert code == 130
    assert f"the run in {tmp_path / 'other'} is complete, but not all of its pictures are drawn" in error
    assert unitvis.load(tmp_path / "other").layers
