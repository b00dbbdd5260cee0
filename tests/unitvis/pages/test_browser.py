"""The gallery as a person uses it: in Chromium, from a disk, by mouse and by keyboard."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote, urlparse

import numpy as np
import pytest
import torch
from torch import nn

import unitvis
from support.galleries import HOSTILE, ODD, data, network, scanned
from unitvis.pages import sprites

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium"),
]
ODD_LINK = quote(ODD, safe="")
DEADLINE = 300_000  # milliseconds after which what a test waits for is taken to never happen
sync_api.expect.set_options(timeout=DEADLINE)


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.getuid() == 0 else []  # Chromium refuses to run as root otherwise
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery with everything in it, in a folder whose name needs escaping."""
    folder = tmp_path_factory.mktemp("site")
    run = scanned(folder)
    return unitvis.gallery(run, folder / "a run #1?", network(), project=True).parent


class Visit:
    """A page, and all that it asked for or complained about."""

    def __init__(self, browser: sync_api.Browser, folder: Path, width: int = 1280, scheme: str = "light") -> None:
        self.folder = folder
        self.context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.page.set_default_timeout(DEADLINE)
        self.problems: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.problems.append(dialog.message), dialog.dismiss()))
        self.page.on("requestfailed", self._failed)
        self.page.on("request", lambda request: self.asked.append(request.url))

    def _failed(self, request: sync_api.Request) -> None:
        if request.failure != "net::ERR_ABORTED":  # a view that was left before its pictures were there
            self.problems.append(f"failed: {request.url}: {request.failure}")

    def open(self, fragment: str = "") -> None:
        self.page.goto((self.folder / "index.html").as_uri() + (f"#{fragment}" if fragment else ""))
        self.page.wait_for_selector("h1, [role=alert]")

    def heading(self, text: str) -> None:
        sync_api.expect(self.page.locator("h1")).to_have_text(text)

    def loaded(self, image: sync_api.Locator) -> None:
        """Scroll to the image and wait until it is there."""
        handle = image.element_handle()
        handle.evaluate("(image) => image.scrollIntoView()")
        self.page.wait_for_function("(image) => image.complete", arg=handle)

    def check(self) -> None:
        assert self.problems == []
        for url in self.asked:
            parts = urlparse(url)
            assert parts.scheme in ("file", "data"), url
            if parts.scheme == "file":
                assert Path(unquote(parts.path)).resolve().is_relative_to(self.folder.resolve()), url
                assert Path(unquote(parts.path)).is_file(), url


@pytest.fixture
def visit(browser: sync_api.Browser, folder: Path) -> Iterator[Visit]:
    visit = Visit(browser, folder)
    yield visit
    visit.check()
    visit.context.close()


def test_every_view_is_reached_by_mouse(visit: Visit) -> None:
    visit.open()
    page = visit.page
    visit.heading("Sequential")
    page.locator(".layers h2 a", has_text="first").click()
    visit.heading("first")
    assert page.locator(".tile").count() == 12
    assert page.locator("#unit-4 em").inner_text() == "dead"
    page.locator("#unit-3").click()
    visit.heading("first unit 3")
    assert page.locator(".winners li").count() == 9
    assert page.locator(".winners li").first.locator("figcaption").all_inner_texts() == [
        "patch: receptive field",
        "projection",
        "whole image",
        "response map",
    ]
    page.get_by_text("4 →").click()
    visit.heading("first unit 4")
    sync_api.expect(page.locator("main")).to_contain_text("the ReLU that follows always gives 0")
    page.get_by_text("← 3").click()
    page.get_by_text("↑ all units").click()
    visit.heading("first")
    assert page.evaluate("document.activeElement.id") == "unit-3"  # where one came from
    page.get_by_text("All layers").click()
    visit.heading("Sequential")
    page.locator(".strip a").nth(2).click()
    visit.heading("first unit 2")
    page.go_back()
    visit.heading("Sequential")


def test_every_view_is_reached_by_keyboard(visit: Visit) -> None:
    visit.open()
    page, press = visit.page, visit.page.keyboard.press
    press("/")
    page.keyboard.type("first")
    press("Enter")
    visit.heading("first")
    press("ArrowRight")
    press("ArrowRight")
    press("Enter")
    visit.heading("first unit 1")
    for key, heading in (
        ("ArrowRight", "first unit 2"),
        ("ArrowLeft", "first unit 1"),
        ("ArrowLeft", "first unit 0"),
        ("ArrowLeft", "first unit 0"),  # there is none before it
        ("ArrowUp", "first"),
        ("Escape", "Sequential"),
    ):
        press(key)
        visit.heading(heading)
    press("/")
    page.keyboard.type(f"{ODD}/5")
    press("Enter")
    visit.heading(f"{ODD} unit 5")
    press("/")
    page.keyboard.type("2")
    press("Enter")
    visit.heading(f"{ODD} unit 2")
    press("/")
    page.keyboard.type("99")
    press("Enter")
    sync_api.expect(page.locator("#said")).to_contain_text("has units 0 to 5, and no 99")
    press("Escape")
    press("ArrowRight")
    visit.heading(f"{ODD} unit 3")


def test_addresses_open_the_right_unit(visit: Visit) -> None:
    for fragment, heading in (
        ("first/11", "first unit 11"),
        (f"{ODD_LINK}/3", f"{ODD} unit 3"),
        (ODD_LINK, ODD),
    ):
        visit.open(fragment)
        visit.heading(heading)
    for fragment, said in (
        ("second/3", "no layer second"),
        ("first/12", "units 0 to 11, and no 12"),
        ("first/x", "and no x"),
    ):
        visit.open(fragment)
        sync_api.expect(visit.page.get_by_role("alert")).to_contain_text(said)


def test_a_units_view_shows_its_numbers_and_boxes(visit: Visit) -> None:
    visit.open(f"{ODD_LINK}/3")
    page = visit.page
    first = page.locator(".winners li").first
    value, _, row, column, *box = _winner(visit.folder, 3, 0)
    sync_api.expect(first).to_contain_text(f"row {row}, column {column} of the map")
    sync_api.expect(first.locator("b")).to_have_text(f"1. {float(f'{value:.4g}'):g}")
    # Unit 3 is the fourth of six tiles of 3 x 3 cells: its cells are in the columns 9 to 11 of 18, in 3 rows.
    for rank, place in ((0, f"{100 * 9 / 17:.3f}% 0%"), (5, f"{100 * 11 / 17:.3f}% 50%")):
        patch = page.locator(".winners li").nth(rank).locator(".cell").first
        style = patch.evaluate("(e) => [getComputedStyle(e).backgroundSize, getComputedStyle(e).backgroundPosition]")
        x, y = (float(side.strip("%")) for side in style[1].split())
        assert [style[0], f"{x:.3f}% {y:g}%"] == ["1800% 300%", place]
    for image in first.locator("img").all():  # an image that comes later would move the boxes
        visit.loaded(image)
    scene = first.locator(".scene").first.bounding_box()
    frame = first.locator(".frame.field").bounding_box()
    assert scene
    assert frame
    left, top, right, bottom = (max(0, side) for side in box)
    assert abs(frame["x"] - scene["x"] - scene["width"] * left / 45) < 1.5
    assert abs(frame["y"] - scene["y"] - scene["height"] * top / 33) < 1.5
    assert abs(frame["width"] - scene["width"] * (min(right, 45) - left) / 45) < 2.5
    assert abs(frame["height"] - scene["height"] * (min(bottom, 33) - top) / 33) < 2.5


def _winner(folder: Path, unit: int, rank: int) -> list:
    return data(sprites.layer_folder(folder, ODD) / "layer.js")["winners"][unit][rank]


def test_a_hostile_file_name_shows_as_text(visit: Visit) -> None:
    visit.open("first/0")
    names = visit.page.locator(".name")
    for unit in range(12):
        visit.heading(f"first unit {unit}")
        if HOSTILE in names.all_inner_texts():
            break
        visit.page.keyboard.press("ArrowRight")
    assert HOSTILE in names.all_inner_texts()
    assert visit.page.locator("[onerror], main i").count() == 0


def test_units_by_number_or_by_value(visit: Visit) -> None:
    visit.open(ODD_LINK)
    page = visit.page
    assert page.locator(".tile b").all_inner_texts() == list("012345")
    page.get_by_label("largest response").check()
    best = [_winner(visit.folder, unit, 0)[0] for unit in range(6)]
    want = [str(unit) for unit in np.argsort(-np.array(best), kind="stable")]
    assert page.locator(".tile b").all_inner_texts() == want
    page.locator(f"#unit-{want[0]}").click()
    visit.heading(f"{ODD} unit {want[0]}")
    page.keyboard.press("ArrowRight")
    visit.heading(f"{ODD} unit {want[1]}")  # in the order that was chosen


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("fragment", ["", "first", "first/3"])
def test_all_views_fit_a_phone_and_all_pictures_have_words(
    fragment: str, scheme: str, browser: sync_api.Browser, folder: Path
) -> None:
    visit = Visit(browser, folder, 360, scheme)
    visit.open(fragment)
    page = visit.page
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for image in page.locator("img:not(.strip img)").all():  # of a strip only what fits into its line is loaded
        visit.loaded(image)
    assert page.evaluate("[...document.images].filter((image) => image.complete && !image.naturalWidth).length") == 0
    assert page.evaluate("[...document.images].filter((image) => image.naturalWidth).length") > 3
    assert page.locator("img:not([alt]), img[alt='']").count() == 0
    assert page.locator('[role=img]:not([aria-label]), [role=img][aria-label=""]').count() == 0
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 23, 26)"
    assert dark == (scheme == "dark")
    visit.check()
    visit.context.close()


def test_a_layer_of_2048_units_loads_what_is_looked_at(browser: sync_api.Browser, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 2048, 1)).eval()
    run = unitvis.scan(model, torch.rand(1, 3, 4, 4), k=1, progress=False)
    visit = Visit(browser, unitvis.gallery(run, tmp_path / "g").parent)
    visit.open("0")
    visit.page.wait_for_function("[...document.images].filter((image) => image.naturalWidth).length > 20")
    assert visit.page.locator(".tile").count() == 2048
    assert sum(url.endswith(".jpg") for url in visit.asked) < 1000
    visit.page.locator("#unit-2047").scroll_into_view_if_needed()
    visit.page.wait_for_function("document.querySelector('#unit-2047 img').naturalWidth > 0")
    visit.check()
    visit.context.close()


def test_units_without_projections_have_no_place_for_them(browser: sync_api.Browser, tmp_path: Path) -> None:
    page = unitvis.gallery(scanned(tmp_path), tmp_path / "some", network(), project=True, units={"first": [3]})
    visit = Visit(browser, page.parent)
    for link, captions in (("first/3", 4), ("first/5", 3), (f"{ODD_LINK}/3", 3)):
        visit.open(link)
        sync_api.expect(visit.page.locator(".winners li").first.locator("figcaption")).to_have_count(captions)
    visit.check()
    visit.context.close()
