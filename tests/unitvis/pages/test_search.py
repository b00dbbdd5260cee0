"""Searching the gallery, and the views of images: in Chromium, from a disk."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import unitvis
from support import browsers
from support.galleries import HOSTILE

pytestmark = browsers.needed
NAMES = ("sheepdog.png", "hotdog.png", "stingray.png", "cat.png", "owl.png", HOSTILE)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> unitvis.Run:
    """Layers pw7.1 and pw70.1 of 3 and 5 units over six images, with five winners a unit; a unit of pw7.1 is dead."""
    folder = tmp_path_factory.mktemp("search")
    (folder / "photos").mkdir()
    for number, name in enumerate(NAMES):
        pixels = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((24, 24), Image.Resampling.BICUBIC).save(folder / "photos" / name)
    torch.manual_seed(0)
    model = nn.Sequential(
        OrderedDict(
            pw7=nn.Sequential(nn.Conv2d(3, 3, 5), nn.BatchNorm2d(3), nn.ReLU()),
            pw70=nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)),
        )
    ).eval()
    model.pw7[1].bias.data[1] = -100.0
    run = unitvis.scan(model, folder / "photos", k=5, transform=unitvis.Transform(), progress=False)
    assert run.layers == ["pw7.1", "pw70.1"]
    unitvis.gallery(run, folder / "g")
    run.folder = folder / "g"
    return run


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsers.launched() as browser:
        yield browser


@pytest.fixture
def page(browser: Any, run: unitvis.Run) -> Iterator[Any]:
    with browsers.opened(browser, (run.folder / "index.html").as_uri()) as (page, asked):
        yield page
        assert all(url.startswith(((run.folder.as_uri()), "data:")) for url in asked)


def image_of(run: unitvis.Run, name: str) -> int:
    return next(image for image, record in run.records.items() if record["name"] == name)


def search(page: Any, text: str) -> None:
    page.fill("#goto", text)
    page.press("#goto", "Enter")


def heading(page: Any, text: str) -> None:
    page.wait_for_function("(text) => document.querySelector('h1')?.innerText === text", arg=text)


def test_layers_units_and_images_are_found_by_what_people_type(page: Any) -> None:
    for text, found in (
        ("pw7", "pw7.1"),  # not pw70.1
        ("PW70.1/3", "pw70.1 unit 3"),
        ("pW7/2", "pw7.1 unit 2"),
        ("1", "pw7.1 unit 1"),  # of the layer on view
        ("w70", "pw70.1"),
        ("STINGray", "stingray.png"),
        ("dog", "dog"),  # two: a list
    ):
        search(page, text)
        heading(page, found)
    assert page.locator(".grid a").all_inner_texts() == ["hotdog.png", "sheepdog.png"]
    page.locator(".grid a").first.click()
    heading(page, "hotdog.png")
    search(page, "pw")
    heading(page, "pw")
    assert page.locator("ul a").all_inner_texts() == ["pw7.1", "pw70.1"]
    for text, said in (
        ("zebra", "No layer is called zebra, and no image that wins"),
        ("pw7/3", "units 0 to 2, and no 3"),
    ):
        search(page, text)
        page.wait_for_function("(said) => document.querySelector('#said').innerText.includes(said)", arg=said)
    heading(page, "pw")  # where one was


def test_an_images_view_names_every_unit_that_it_wins(page: Any, run: unitvis.Run) -> None:
    for name in NAMES:
        image, want = image_of(run, name), []
        for layer in run.layers:
            for unit in range(len(run[layer])):
                for rank in range(5):
                    value = float(run[layer].values[unit, rank])
                    if run[layer].images[unit, rank] == image and (layer != "pw7.1" or value > 0):
                        want.append((f"#{layer}/{unit}", "the strongest" if rank == 0 else f"number {rank + 1} of 5"))
        assert want
        page.goto(f"{(run.folder / 'index.html').as_uri()}#image={image}")
        heading(page, name)  # a hostile one, as text
        tiles = page.locator(".tile")
        found = [(one.get_attribute("href"), one.locator(".value").inner_text()) for one in tiles.all()]
        assert found == want
        tiles.first.click()
        page.wait_for_selector(".winners")
        page.locator(".winners a.name", has_text=name).first.click()
        heading(page, name)
    page.set_viewport_size({"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for image in ("99", "constructor", "%"):
        page.goto(f"{(run.folder / 'index.html').as_uri()}#image={image}")
        page.wait_for_function(
            "(image) => (document.querySelector('[role=alert]') || {}).innerText?.includes(`number ${image}.`)",
            arg=image,
        )


def test_a_tile_of_white_patches_is_no_gap_in_the_grid(browser: Any, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1)).eval()
    pixels = np.full((10, 8, 8, 3), 255, np.uint8)
    white = unitvis.scan(model, pixels, transform=unitvis.Transform(), progress=False)
    address = unitvis.gallery(white, tmp_path / "g").as_uri() + "#0"
    with browsers.opened(browser, address, color_scheme="light") as (page, _):
        page.wait_for_function("[...document.images].every((image) => image.naturalWidth)")
        shown = Image.open(io.BytesIO(page.locator("#unit-1 .patches").screenshot())).convert("L")
        seen = np.asarray(shown)
        assert (seen[1:-1, 1:-1] > 250).mean() > 0.9
        for side in (seen[:2].min(axis=0), seen[-2:].min(axis=0), seen[:, :2].min(axis=1), seen[:, -2:].min(axis=1)):
            assert (side < 240).mean() > 0.9
