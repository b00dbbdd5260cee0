"""What is usual for a unit, on its page: a histogram with the winners' values, and typical images."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import unitvis
from support import browsers
from support.galleries import data
from unitvis.pages import usual

COUNT = 40  # images, each of one colour; the last one black
COLOURS = np.random.default_rng(5).integers(40, 256, (COUNT, 3))


def network() -> nn.Module:
    """Unit 0 of two gives the mean of red, unit 1 that of red below a bias that no image exceeds."""
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU()).eval()
    model[0].weight.data = torch.tensor([[1.0, 0, 0], [1.0, 0, 0]]).reshape(2, 3, 1, 1)
    model[0].bias.data = torch.tensor([0.0, -2.0])
    return model


def scanned(folder: Path) -> unitvis.Run:
    (folder / "photos").mkdir()
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (24, 16), tuple(colour.tolist())).save(folder / "photos" / f"{number:02}.png")
    transform = unitvis.Transform(mean=(0, 0, 0), std=(1, 1, 1))
    run = unitvis.scan(network(), folder / "photos", ["0"], transform=transform, out=folder / "run", progress=False)
    unitvis.gallery(run, folder / "run")
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("usual")
    scanned(folder)
    return folder / "run"


def cell(folder: Path, place: int) -> np.ndarray:
    """The middle of an image in the picture of the sample."""
    row, column = divmod(place, 16)
    pixels = np.asarray(Image.open(folder / "gallery" / "sample.jpg")).astype(int)
    assert pixels.shape == (96 * 3, 96 * 16, 3)
    return pixels[row * 96 + 40 : row * 96 + 56, column * 96 + 40 : column * 96 + 56].mean(axis=(0, 1))


def test_the_picture_of_the_sample_has_its_images(folder: Path) -> None:
    for place in (0, 17, COUNT - 1):
        assert abs(cell(folder, place) - COLOURS[place]).max() < 6  # JPEG


def test_images_that_win_in_dead_units_alone_are_read(tmp_path: Path) -> None:
    """They are not drawn among the winners, from whose pictures the others are taken."""
    model = network()
    model[0].weight.data[1] *= -1  # wins where there is least red, and never fires
    folder = tmp_path / "run"
    scanned(tmp_path)
    transform = unitvis.Transform(mean=(0, 0, 0), std=(1, 1, 1))
    options = {"transform": transform, "overwrite": True, "progress": False}
    run = unitvis.scan(model, tmp_path / "photos", ["0"], out=folder, **options)
    unitvis.gallery(run, folder)
    alone = set(run["0"].images[1].tolist()) - set(run["0"].images[0].tolist())
    assert alone
    assert not any((folder / "gallery" / "images" / f"{id}.jpg").exists() for id in alone)
    for place in alone:
        assert abs(cell(folder, place) - COLOURS[place]).max() < 6


def test_pages_say_what_is_usual(folder: Path) -> None:
    red = COLOURS[:, 0] / 255
    order = sorted(range(COUNT), key=lambda image: (-red[image], image))
    entry = data(folder / "gallery" / "layers" / "0" / "layer.js")["usual"][0]
    assert sum(entry["counts"]) == COUNT
    assert entry["extent"] == pytest.approx([red.min(), red.max()], rel=1e-4)
    images, values = zip(*entry["images"], strict=True)
    assert values == pytest.approx(red[list(images)], rel=1e-4)
    assert images[1:10] == tuple(order[16:25])  # the median of 40 is the 20th from below
    assert [order.index(image) for image in (images[0], images[10])] == [10, 30]
    sample = data(folder / "gallery" / "index.js")["sample"]
    assert sample == {"names": [f"{number:02}.png" for number in range(COUNT)], "columns": 16, "file": "sample.jpg"}


def test_without_a_sample_the_page_shows_none(folder: Path, tmp_path: Path) -> None:
    run = unitvis.load(folder)
    run.sample = None
    unitvis.gallery(run, tmp_path / "old")
    assert not (tmp_path / "old" / "gallery" / usual.FILE).exists()
    assert data(tmp_path / "old" / "gallery" / "layers" / "0" / "layer.js")["usual"] is None


def test_an_image_that_changed_is_not_shown_beside_an_old_response(tmp_path: Path) -> None:
    run = scanned(tmp_path)
    changed = next(image for image in range(COUNT) if image not in run.winners)
    Image.new("RGB", (24, 16), (1, 2, 3)).save(tmp_path / "photos" / f"{changed:02}.png")
    with pytest.warns(UserWarning, match=rf"no typical images are drawn, because .*: '{changed:02}\.png' is no longer"):
        unitvis.gallery(unitvis.load(tmp_path / "run"), tmp_path / "run")
    assert not (tmp_path / "run" / "gallery" / usual.FILE).exists()
    assert data(tmp_path / "run" / "gallery" / "index.js")["sample"] is None


@browsers.needed[0]
@browsers.needed[1]
def test_a_browser_shows_it(folder: Path) -> None:
    entry = data(folder / "gallery" / "layers" / "0" / "layer.js")["usual"][0]
    with browsers.launched() as browser:
        with browsers.opened(browser, f"{(folder / 'index.html').as_uri()}#0/0") as (page, _):
            page.wait_for_selector(".usual .histogram")
            assert page.locator(".histogram .bar").count() == len(entry["counts"])
            heights = page.locator(".bar").evaluate_all(
                "(bars) => bars.map((bar) => Number(bar.getAttribute('height')))"
            )
            assert np.allclose(np.array(heights) * max(entry["counts"]), np.array(entry["counts"]) * 80)
            assert page.locator(".histogram .mark").count() == 9
            said = page.locator(".usual p").first.inner_text()
            assert re.search(r"Responses to 40 images of the run, .*; lines: the 9 strongest of all images", said)
            thumbs = page.locator(".thumb")
            assert thumbs.count() == 11
            page.wait_for_function("() => [...document.querySelectorAll('.thumb img')].every((one) => one.complete)")
            thumbs.nth(0).scroll_into_view_if_needed()
            for index, (image, _) in enumerate(entry["images"]):
                picture = np.asarray(Image.open(io.BytesIO(thumbs.nth(index).screenshot())).convert("RGB"))
                height, width = picture.shape[:2]
                assert abs(picture[height // 2, width // 2].astype(int) - COLOURS[image]).max() < 12
        with browsers.opened(browser, f"{(folder / 'index.html').as_uri()}#0/1") as (page, _):
            page.wait_for_selector(".usual .histogram")
            assert page.locator(".histogram .mark").count() == 0  # no winner fired
