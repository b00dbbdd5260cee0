"""Patches are the right pixels, and blanks, dead units and what did not fire are drawn as such."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import unitvis
from unitvis import UnitvisError
from unitvis.decoding import cutting
from unitvis.drawing import patches, sheets

FILL = np.array(cutting.FILL)


def spot_finder() -> nn.Module:
    """Unit 0 likes red, unit 1 likes blue, unit 2 never fires: 3x3 boxes, stride 2, padding 1."""
    model = nn.Sequential(nn.Conv2d(3, 3, 3, stride=2, padding=1), nn.ReLU()).eval()
    weight = torch.zeros(3, 3, 3, 3)
    weight[0, 0], weight[0, 1:] = 1.0, -1.0
    weight[1, 2], weight[1, :2] = 1.0, -1.0
    model[0].weight.data[:] = weight
    model[0].bias.data[:] = torch.tensor([0.0, 0.0, -1.0])
    return model


def photograph(folder: Path, number: int, spots: dict[tuple[int, int], tuple[int, int, int]]) -> None:
    """120 x 96 pixels of grey noise with 12 x 12 spots whose upper left corners are given as (x, y)."""
    noise = np.random.default_rng(number).integers(90, 120, (96, 120, 1)).repeat(3, axis=2).astype(np.uint8)
    for (x, y), colour in spots.items():
        noise[y : y + 12, x : x + 12] = colour
    Image.fromarray(noise).save(folder / f"{number}.png")


@pytest.fixture
def spots(tmp_path: Path) -> unitvis.Run:
    """Resized to 40 x 32, a third, and cropped to 30 x 30: a model pixel is 3 x 3 original ones, offset by (5, 1)."""
    photograph(tmp_path, 0, {(45, 27): (255, 0, 0)})
    photograph(tmp_path, 1, {(9, 0): (0, 0, 255), (60, 60): (200, 0, 0)})
    transform = unitvis.Transform(resize=(32, 40), crop=30, interpolation="box")
    return unitvis.scan(spot_finder(), tmp_path, k=4, transform=transform, progress=False)


def test_patches_come_from_the_right_place_of_the_original(spots: unitvis.Run) -> None:
    top = spots["0"]
    assert top.images[0].tolist() == [0, 1, -1, -1]
    left, upper = top.boxes[0, 0, :2].tolist()
    x, y = (left + 5) * 3, (upper + 1) * 3  # worked out by hand: crop first, then resize, undone
    original = np.asarray(Image.open(Path(spots.manifest["source"]["path"]) / "0.png"))
    want = original[y : y + 9, x : x + 9]
    got = np.asarray(spots.patch("0", 0, 0, crop="rf", size=9))
    np.testing.assert_array_equal(got, want)
    assert (want == [255, 0, 0]).all()
    assert (np.asarray(spots.patch("0", 0, 1, crop="rf", size=9)) == [200, 0, 0]).all()


def test_what_lies_outside_the_input_is_filled_though_the_photograph_goes_on(spots: unitvis.Run) -> None:
    assert spots["0"].boxes[1, 0].tolist() == [-1, -1, 2, 2]  # the blue spot is in the corner of the crop
    got = np.asarray(spots.patch("0", 1, 0, crop="rf", size=9))
    assert (got[:3] == FILL).all()
    assert (got[:, :3] == FILL).all()
    assert (got[3:, 3:] == [0, 0, 255]).all()


def test_crops(spots: unitvis.Run) -> None:
    whole = np.asarray(spots.patch("0", 0, 0, crop="image", size=90))
    original = np.asarray(Image.open(Path(spots.manifest["source"]["path"]) / "0.png"))
    np.testing.assert_array_equal(whole, original[3:93, 15:105])
    side = spots["0"].info["effective_box"]
    assert side == 3
    assert patches.crop_of(spots, "0", None) == "rf"
    info = dict(spots["0"].info)
    info["receptive_field"] = info["receptive_field"] | {"size": [22, 22]}
    assert patches.default_crop(info, (30, 30)) == "effective"
    assert patches.default_crop(info | {"effective_box": None}, (30, 30)) == "image"
    with pytest.raises(UnitvisError, match="one of rf, effective, image, not 'box'"):
        spots.patch("0", 0, 0, crop="box")


def test_effective_boxes_are_centred_on_the_neuron(spots: unitvis.Run) -> None:
    top = spots["0"]
    spots.set_effective_box("0", 5)
    left, upper, right, lower = top.boxes[0, 0].tolist()
    assert patches.drawn_box(top, 0, 0, "effective", (30, 30)) == (left - 1, upper - 1, right + 1, lower + 1)


def test_blanks_and_what_did_not_fire_are_drawn_as_such(spots: unitvis.Run) -> None:
    blank = np.asarray(spots.patch("0", 0, 3, size=48))
    assert (blank == sheets.EMPTY).all()
    struck = np.asarray(spots.patch("0", 2, 0, size=48))
    assert spots["0"].dead.tolist() == [False, False, True]
    assert {tuple(colour) for colour in struck.reshape(-1, 3)} == {sheets.EMPTY, sheets.EMPTY_MARK}
    assert (struck[40, 7] == sheets.EMPTY_MARK).all()
    tile = spots.tile("0", 0, size=20)
    assert tile.size == (41, 41)


def test_a_sheet_has_every_unit_at_one_size(spots: unitvis.Run, tmp_path: Path) -> None:
    page = np.asarray(spots.sheet("0", size=30))
    for unit, colour in ((0, (255, 0, 0)), (1, (0, 0, 255))):
        assert (page == colour).all(axis=2).sum() >= 300, unit
    assert (page == sheets.EMPTY_MARK).all(axis=2).any()
    assert spots.sheet("0", [1], size=30).width < 2000
    written = sheets.render(spots, tmp_path)
    assert [path.name for path in written] == ["0.png"]
    assert np.array_equal(np.asarray(Image.open(written[0])), np.asarray(spots.sheet("0")))
    for units, message in (([7], "no unit 7; it has 3"), ([], "no unit was named")):
        with pytest.raises(UnitvisError, match=message):
            spots.sheet("0", units)
    with pytest.raises(UnitvisError, match="no layer 'conv'; it has 0"):
        spots.sheet("conv")
    with pytest.raises(UnitvisError, match="no rank 4: the run keeps 4"):
        spots.patch("0", 0, 4)


def test_a_changed_image_is_refused(spots: unitvis.Run) -> None:
    folder = Path(spots.manifest["source"]["path"])
    photograph(folder, 0, {(45, 27): (254, 0, 0)})
    with pytest.raises(UnitvisError, match=r"'0.png' is no longer the file that was scanned"):
        spots.tile("0", 0)


def test_normalised_tensors_are_drawn_with_one_range_for_the_whole_run() -> None:
    pixels = torch.zeros(3, 3, 8, 8)
    pixels[0] = 2.0
    pixels[1] = -2.0
    model = nn.Sequential(nn.Conv2d(3, 1, 1)).eval()
    model[0].weight.data.fill_(1)
    model[0].bias.data.fill_(0)
    run = unitvis.scan(model, pixels, k=3, progress=False)
    assert run["0"].images.tolist() == [[0, 2, 1]]
    greys = [int(np.asarray(run.patch("0", 0, rank, crop="image", size=8)).mean()) for rank in range(3)]
    assert greys in ([255, 127, 0], [255, 128, 0])


def test_a_stream_needs_its_images_again_to_cut_patches() -> None:
    model, pixels = nn.Sequential(nn.Conv2d(3, 2, 3)).eval(), torch.rand(6, 3, 12, 12)
    run = unitvis.scan(model, iter([pixels]), progress=False)
    with pytest.raises(UnitvisError, match="cannot be read again to cut patches"):
        run.tile("0", 0)
    with unitvis.Recorder(model) as recorder:
        recorder(pixels)
    with pytest.raises(UnitvisError, match=r"came from a recorder.*give them as images="):
        recorder.result().tile("0", 0)
    assert recorder.result(images=pixels).patch("0", 0, 0).size == (96, 96)


def test_neuron_names() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3)).eval()
    run = unitvis.scan(model, torch.rand(4, 3, 5, 7), unit="neuron", progress=False)
    assert len(run["0"]) == 2 * 3 * 5
    assert [sheets.unit_name(run["0"], unit) for unit in (0, 4, 5, 15, 29)] == [
        "0/0/0",
        "0/0/4",
        "0/1/0",
        "1/0/0",
        "1/2/4",
    ]


def test_a_winner_that_sees_only_padding_is_drawn_as_padding() -> None:
    model = nn.Sequential(nn.Conv2d(3, 1, 1, padding=2)).eval()
    nn.init.constant_(model[0].weight, -1.0)  # the padding, 0, beats every pixel
    run = unitvis.scan(model, torch.rand(3, 3, 8, 8) + 1, k=2, progress=False)
    left, upper, right, lower = run["0"].boxes[0, 0].tolist()
    assert (left, upper) == (right, lower)
    assert (np.asarray(run.patch("0", 0, 0, crop="rf", size=16)) == FILL).all()


def test_a_tile_of_white_patches_is_no_gap_on_the_page() -> None:
    pixels = np.full((10, 8, 8, 3), 255, np.uint8)
    model = nn.Sequential(nn.Conv2d(3, 2, 1)).eval()
    nn.init.zeros_(model[0].weight)
    run = unitvis.scan(model, pixels, transform=unitvis.Transform(), progress=False)
    assert run["0"].status.tolist() == ["tied", "tied"]
    tile = np.asarray(run.tile("0", 0, size=20))
    assert (tile[[0, -1]] == sheets.EMPTY_MARK).all(axis=2).mean() > 0.9  # its outline, but for the gaps
    assert (tile[:, [0, -1]] == sheets.EMPTY_MARK).all(axis=2).mean() > 0.9
    assert (tile[1:19, 1:19] == 255).all()
    assert (np.asarray(run.patch("0", 0, 0, size=20)) == 255).all()  # the picture itself is left as it is
    red = unitvis.scan(
        model, pixels * np.array([1, 0, 0], np.uint8), transform=unitvis.Transform(), progress=False
    ).tile("0", 0, size=20)
    assert (np.asarray(red)[:20, :20] == (255, 0, 0)).all()
