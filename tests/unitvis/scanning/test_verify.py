"""What `verify` says of a winner that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import unitvis
from support.commands import call
from support.scans import images, scan, two_convolutions
from unitvis import cli
from unitvis.cli.report import print_verified
from unitvis.scanning.verify import verify


def test_positions_are_told_where_they_differ() -> None:
    model = two_convolutions()
    run = scan(model, images(5, 12), ["2"], 2)
    image, (row, column) = run["2"].images[3, 1], run["2"].positions[3, 1].tolist()
    value = f"{run['2'].values[3, 1]:.9g}"
    other = (row + 1) % 8
    run["2"].positions[3, 1, 0] = other
    found = verify(run, model)
    assert found["wrong"] == 1
    said = f"{value} at row {other}, column {column} in the run, {value} at row {row}, column {column} now"
    assert found["first_wrong"] == f"image {image} in layer '2': {said}"
    run["2"].positions[3, 1, 0] = row
    run["2"].values[3, 1] += 1
    assert verify(run, model)["first_wrong"].endswith(f" in the run, {value} now")


@pytest.mark.parametrize("unit", ["channel", "neuron"])
def test_another_box_is_told(unit: str) -> None:
    model = two_convolutions()
    run = scan(model, images(5, 12), ["0", "2"], 2, unit=unit)
    found = verify(run, model)
    assert (found["wrong"], found["equal"]) == (0, found["winners"])
    image, box = run["2"].images[3, 1], run["2"].boxes[3, 1].tolist()
    row, column = run["2"].positions[3, 1].tolist()
    assert box == [column, row, column + 5, row + 5]  # two convolutions of 3 x 3
    for top in run.tops.values():
        top.boxes[...] += [1, 0, 1, 0]
    found = verify(run, model)
    assert found["wrong"] == found["winners"] == found["equal"]
    run = scan(model, images(5, 12), ["0", "2"], 2, unit=unit)
    run["2"].boxes[3, 1, 3] += 1
    found, value = verify(run, model), f"{run['2'].values[3, 1]:.9g}"
    assert found["wrong"] == 1
    said = f"{value} in box {[*box[:3], box[3] + 1]} in the run, {value} in box {box} now"
    assert found["first_wrong"] == f"image {image} in layer '2': {said}"


class Torn(nn.Module):
    """A convolution whose receptive field is unknown, since values choose what is computed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if x.abs().max() < 1e9 else -x)


@pytest.mark.filterwarnings("ignore:the receptive fields", "ignore:the model's code could not be followed")
def test_boxes_that_are_unknown_are_those_of_the_image() -> None:
    run = scan(Torn(), images(5, 12), ["conv"], 2)
    assert run["conv"].info["receptive_field"]["method"] == "unknown"
    assert verify(run, Torn())["wrong"] == 0
    run["conv"].boxes[0, 0, 0] = 1
    assert verify(run, Torn())["first_wrong"].endswith(
        f"in box [1, 0, 12, 12] in the run, {run['conv'].values[0, 0]:.9g} in box [0, 0, 12, 12] now"
    )


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "net.py").write_text("from support.scans import two_convolutions as net\n")
    options = {"transform": unitvis.Transform(crop=12), "out": tmp_path / "run"}
    scan(two_convolutions(), tmp_path / "photos", ["0"], 3, **options)
    code, out, _ = call(capsys, "verify", tmp_path / "run", f"{tmp_path / 'net.py'}:net")
    assert code == cli.DONE
    assert "compared: values, positions, boxes, what the run says of model, layers and images, and samples of f" in out
    (tmp_path / "photos" / "1.png").write_bytes(b"")
    code, out, _ = call(capsys, "verify", tmp_path / "run", f"{tmp_path / 'net.py'}:net")
    assert "first that was not: image 1 in layer '0': '1.png' cannot be read now: empty file" in out
    assert code == cli.WRONG


def nan_run(model: nn.Module) -> unitvis.Run:
    """A run of five images, of which image 2 gives NaN in all units of both layers."""
    pixels = images(5, 12)
    pixels[2] = torch.nan
    return scan(model, pixels, ["0", "2"], 5)


def without_winner(run: unitvis.Run, layer: str, unit: int) -> int:
    """Take a unit's last winner away and count one more NaN response; returns the image."""
    top, last = run[layer], int((run[layer].images[unit] >= 0).sum()) - 1
    image = int(top.images[unit, last])
    for array, blank in ((top.images, -1), (top.values, np.nan), (top.positions, -1), (top.boxes, 0)):
        array[unit, last] = blank
    nan = run.manifest["layers"][layer]["nan"]
    nan["responses"] += 1
    return image


def test_nan_responses_that_hide_a_winner_are_told() -> None:
    model = two_convolutions()
    run = nan_run(model)
    assert run["2"].info["nan"]["first_image"] == 2
    found = verify(run, model)
    assert (found["wrong"], found["differing"]) == (0, [])
    image = without_winner(run, "2", 3)
    found = verify(
        unitvis.Run(run.tops, run.manifest, run.records, run.source), model
    )  # which looks at what fired anew
    assert found["wrong"] == 0
    said = f"unit 3 of layer '2' has fewer than 5 winners, and image {image}, none of them, gives it a response"
    assert found["differing"] == [said]


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (4, "image 2 gives NaN in layer '2', and the run says image 4 as the first"),
        (1, "layer '2' gives no NaN for image 1, which the run says is the first with one"),
    ],
)
def test_another_first_image_with_nan_is_told(first: int, said: str) -> None:
    model = two_convolutions()
    run = nan_run(model)
    run["2"].info["nan"]["first_image"] = first
    assert verify(run, model)["differing"] == [said]


@pytest.mark.parametrize("packed", [False, True])
def test_an_image_that_is_falsely_listed_as_failed_is_told(packed: bool, tmp_path: Path) -> None:
    photos, model = tmp_path / "photos", two_convolutions()
    photos.mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.png")
    whole = (photos / "1.png").read_bytes()
    for broken in (1, 3):
        (photos / f"{broken}.png").write_bytes(whole[:60])
    transform, source = unitvis.Transform(crop=12), photos
    if packed:
        source = tmp_path / "photos.npy"
        unitvis.pack(photos, source, transform=transform, progress=False)
        transform = unitvis.Transform()
    options = {"transform": transform, "out": tmp_path / "run"}
    run = scan(model, source, ["0"], 2, **options)
    assert verify(run, model)["differing"] == []
    assert scan(model, source, ["0"], 2, resume=True, **options).manifest["failures"] == run.manifest["failures"]
    (photos / "1.png").write_bytes(whole)  # as if the run had listed it falsely
    said = "image 1, '1.png', is listed as failed and can be read now"
    assert [sentence.partition(" (")[0] for sentence in verify(run, model)["differing"]] == [said]
    with pytest.raises(unitvis.UnitvisError, match=rf"the finished run in .* is not believed: {said}"):
        scan(model, source, ["0"], 2, resume=True, **options)


@pytest.mark.parametrize("other", ["folder", "array"])
def test_images_of_another_kind_of_source_are_compared_as_far_as_they_can(
    other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, model = tmp_path / "photos", two_convolutions()
    photos.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 12, 12, 3), np.uint8)
    for number, own in enumerate(pixels):
        Image.fromarray(own).save(photos / f"{number}.png")
    whole = (photos / "1.png").read_bytes()
    (photos / "1.png").write_bytes(whole[:60])
    (tmp_path / "list.txt").write_text("".join(f"photos/{number}.png\n" for number in range(4)))
    scan(model, tmp_path / "list.txt", ["0"], 2, transform=unitvis.Transform(crop=12), out=tmp_path / "run")
    (photos / "1.png").write_bytes(whole)
    lines = (tmp_path / "run" / "images.jsonl").read_text().splitlines()
    forged = json.loads(lines[0]) | {"width": 99}
    (tmp_path / "run" / "images.jsonl").write_text("\n".join([json.dumps(forged), *lines[1:]]) + "\n")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    del manifest["files"]
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    np.save(tmp_path / "array.npy", pixels)
    run = unitvis.load(tmp_path / "run", photos if other == "folder" else tmp_path / "array.npy")
    found = verify(run, model)
    assert found["wrong"] == 0
    names = "their names were" if other == "folder" else "names, sizes and hashes of images and failed images were"
    said = f"the run says that its images came from a list, and they are read from a {run.source.kind}: {names} not"
    assert found["uncompared"] == f"{said} compared"
    print_verified(found)
    assert found["uncompared"] in capsys.readouterr().out
    if other == "folder":
        assert found["differing"][0].startswith("the width of '0.png' is 99 and 12")
        assert found["differing"][1].startswith("image 1, '1.png', is listed as failed and can be read now")
    else:
        assert found["differing"] == []


def test_layers_are_compared_by_bits_whatever_the_run_says_of_their_batches() -> None:
    model = two_convolutions()
    run = scan(model, images(5, 12), ["2"], 2)
    run.manifest["scan"]["by_slot"] = ["2"]
    run["2"].values[3, 1] = np.nextafter(run["2"].values[3, 1], np.float32(-np.inf))
    found = verify(run, model)
    assert (found["wrong"], found["by_slot"]) == (1, [])


def test_a_run_without_seconds_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (5, 12, 12, 3), np.uint8))
    (tmp_path / "net.py").write_text("from support.scans import two_convolutions as net\n")
    words = ["scan", f"{tmp_path / 'net.py'}:net", tmp_path / "x.npy", "-o", tmp_path / "run", "--layer", "0"]
    words += ["--mean", "0", "0", "0", "--std", "1", "1", "1"]
    assert call(capsys, *words)[0] == cli.DONE
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest | {"seconds": {}}))
    code, out, _ = call(capsys, *words, "--resume")
    assert code == cli.DONE
    assert "5 images, 6 units of 1 layers in 0.0 s after 0.0 s of preparation" in out
