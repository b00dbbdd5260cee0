"""The gallery as a person uses it: in Chromium, from a disk, by mouse and by keyboard."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote, unquote, urlparse

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import unitvis
from support import browsers
from support.galleries import HOSTILE, ODD, contrast, data, network, scanned
from unitvis.pages import sprites

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = browsers.needed
ODD_LINK = quote(ODD, safe="")


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with browsers.launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery with everything in it, in a folder whose name needs escaping."""
    folder = tmp_path_factory.mktemp("site")
    run = scanned(folder)
    return unitvis.gallery(run, folder / "a run #1?", network(), project=True).parent


class Visit:
    """A page, and all that it asked for or complained about."""

    def __init__(
        self, browser: sync_api.Browser, folder: Path, width: int = 1280, scheme: str = "light", density: int = 1
    ) -> None:
        self.folder = folder
        size = {"width": width, "height": 800}
        self.context = browser.new_context(viewport=size, color_scheme=scheme, device_scale_factor=density)
        self.page = self.context.new_page()
        self.page.set_default_timeout(browsers.DEADLINE)
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
    for rank, column, line in ((0, 9, 0), (5, 11, 1)):
        patch = page.locator(".winners li").nth(rank).locator(".cell").first
        visit.loaded(patch.locator("img"))
        cell, sprite = patch.bounding_box(), patch.locator("img").bounding_box()
        assert cell
        assert sprite
        assert sprite["width"] == pytest.approx(18 * cell["width"], abs=0.1)
        assert sprite["height"] == pytest.approx(3 * cell["height"], abs=0.1)
        assert cell["x"] - sprite["x"] == pytest.approx(column * cell["width"], abs=0.1)
        assert cell["y"] - sprite["y"] == pytest.approx(line * cell["height"], abs=0.1)
    for image in first.locator("img").all():  # an image that comes later would move the boxes
        visit.loaded(image)
    scene = first.locator(".scene").first.bounding_box()
    ring = first.locator(".ring").bounding_box()
    frame = first.locator(".frame.field").bounding_box()
    assert scene
    assert frame
    left, top, right, bottom = (max(0, side) for side in box)
    assert abs(frame["x"] - scene["x"] - scene["width"] * left / 45) < 1.5
    assert abs(frame["y"] - scene["y"] - scene["height"] * top / 33) < 1.5
    assert abs(frame["width"] - scene["width"] * (min(right, 45) - left) / 45) < 2.5
    assert abs(frame["height"] - scene["height"] * (min(bottom, 33) - top) / 33) < 2.5
    mapped = first.locator(".scene").last.bounding_box()
    assert mapped
    assert ring
    # The largest response is that of the winner, in the middle of its receptive field.
    assert abs(ring["x"] + ring["width"] / 2 - mapped["x"] - mapped["width"] * (box[0] + box[2]) / 2 / 45) < 1
    assert abs(ring["y"] + ring["height"] / 2 - mapped["y"] - mapped["height"] * (box[1] + box[3]) / 2 / 33) < 1


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


def test_a_layer_of_2048_units_is_a_few_files(browser: sync_api.Browser, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 2048, 1)).eval()
    run = unitvis.scan(model, torch.rand(1, 3, 4, 4), k=1, progress=False)
    visit = Visit(browser, unitvis.gallery(run, tmp_path / "g").parent)
    visit.open("0")
    visit.page.wait_for_function("[...document.images].filter((image) => image.naturalWidth).length > 20")
    assert visit.page.locator(".tile").count() == 2048
    assert sum(url.endswith(".jpg") for url in visit.asked) < 10
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


def test_a_click_enlarges_the_whole_image_with_its_boxes(visit: Visit) -> None:
    visit.open(f"{ODD_LINK}/3")
    page, dialog = visit.page, visit.page.locator("dialog")
    small = page.locator(".winners li").first.locator(".scene").first.bounding_box()
    buttons = page.locator(".winners li").first.locator("button")
    assert buttons.count() == 3  # patch, whole image and response map
    for number in range(3):
        buttons.nth(number).click()
        visit.loaded(dialog.locator("img").first)
        large, frame = dialog.locator(".scene").bounding_box(), dialog.locator(".frame.field").bounding_box()
        _, _, _, _, left, _, right, _ = _winner(visit.folder, 3, 0)
        assert large["width"] > 2.5 * small["width"]
        assert large["x"] >= 0
        assert large["y"] + large["height"] <= 800
        assert large["width"] / large["height"] == pytest.approx(45 / 33, rel=0.01)
        assert frame["width"] == pytest.approx(large["width"] * (min(right, 45) - max(left, 0)) / 45, abs=2.5)
        assert dialog.locator(".ring").count() == (number == 2)
        page.keyboard.press("ArrowRight")  # from unit to unit only where the units are on view
        page.keyboard.press("Escape")
        sync_api.expect(dialog).to_have_count(0)
        visit.heading(f"{ODD} unit 3")
    page.keyboard.press("Enter")  # the focus is on the button again
    dialog.locator("button").click()
    sync_api.expect(dialog).to_have_count(0)


class Stripes(nn.Module):
    """Two layers of small boxes, and a head whose units see all of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.small, self.head = nn.Conv2d(3, 2, 12, 8), nn.Conv2d(3, 2, 5, 8), nn.Conv2d(2, 2, 1)
        for layer in (self.first, self.small):
            layer.weight.data.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.first(x)[..., :10, :10] + self.small(x)[..., :10, :10]).mean((2, 3), keepdim=True))


@pytest.fixture(scope="module")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> tuple[unitvis.Run, Path]:
    """A gallery of one photograph of 1,600 x 1,200 pixels with fine stripes, brightest below on the right."""
    folder = tmp_path_factory.mktemp("stripes")
    (folder / "photos").mkdir()
    pixels = np.where(np.arange(1600) % 8 < 4, 0, 180).astype(np.uint8)[None].repeat(1200, 0)
    pixels[900:1000, 1200:1400] += np.uint8(70) * (pixels[900:1000, 1200:1400] > 0)
    Image.fromarray(pixels).convert("RGB").save(folder / "photos" / "0.png")
    torch.manual_seed(0)
    model = Stripes().eval()
    transform = unitvis.Transform(resize=(96, 128))
    run = unitvis.scan(model, folder / "photos", ["first", "small", "head"], transform=transform, progress=False)
    return run, unitvis.gallery(run, folder / "gallery", model).parent


def test_patches_are_as_sharp_as_the_photograph(
    stripes: tuple[unitvis.Run, Path], browser: sync_api.Browser, tmp_path: Path
) -> None:
    """Of 12 x 12 pixels of the model's input the photograph has 150 x 150, more than a cell of a sprite."""
    run, folder = stripes
    visit = Visit(browser, folder, density=2)
    visit.open("first/0")
    patch = visit.page.locator(".winners .cell").first
    sync_api.expect(patch.locator(".piece")).to_have_count(1)
    shown = Image.open(io.BytesIO(patch.screenshot())).convert("L")
    left, upper, right, lower = (side * 12.5 for side in run["first"].boxes[0, 0].tolist())
    with Image.open(folder.parent / "photos" / "0.png") as photograph:
        want = photograph.convert("L").resize(shown.size, Image.Resampling.BICUBIC, (left, upper, right, lower))
    inner = (slice(4, -4), slice(4, -4))
    found, expected = (np.asarray(image).astype(float)[inner] for image in (shown, want))
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.98
    assert found.std() > 0.9 * expected.std()
    visit.check()
    visit.context.close()

    (kept,) = (folder / "gallery" / "images").iterdir()
    with Image.open(kept) as image:
        assert image.size == (1600, 1200)  # all that the photograph has
    (kept,) = (unitvis.gallery(run, tmp_path / "whole", crop="image").parent / "gallery" / "images").iterdir()
    with Image.open(kept) as image:
        assert image.size == (768, 576)  # no patch needs more


def test_small_boxes_are_shown_enlarged_beside_themselves(
    stripes: tuple[unitvis.Run, Path], browser: sync_api.Browser
) -> None:
    visit = Visit(browser, stripes[1])
    visit.open("small/0")
    scene = visit.page.locator(".winners .scene").first
    visit.loaded(scene.locator("img").first)
    box, inset = scene.locator("> .frame").bounding_box(), scene.locator(".inset").bounding_box()
    enlarged = scene.locator(".inset .frame").bounding_box()
    assert enlarged["width"] > 2 * box["width"]
    assert enlarged["x"] + enlarged["width"] / 2 == pytest.approx(inset["x"] + inset["width"] / 2, abs=1)
    assert inset["x"] + inset["width"] < box["x"]
    assert inset["y"] + inset["height"] < box["y"]
    visit.check()
    visit.context.close()


def test_units_that_see_the_whole_image_show_it(stripes: tuple[unitvis.Run, Path], browser: sync_api.Browser) -> None:
    run, folder = stripes
    assert run["head"].info["effective_box"]
    visit = Visit(browser, folder)
    for unit in range(2):
        visit.open(f"head/{unit}")
        captions = visit.page.locator(".winners figcaption").all_inner_texts()
        assert captions == ["whole image"] * int(run["head"].fired[unit].sum())  # of one position there is no map
    assert not list(folder.rglob("head/responses-*"))
    assert list(folder.rglob("first/responses-*"))
    visit.check()
    visit.context.close()


def rendered(browser: sync_api.Browser, path: Path, number: int, is_there: Callable[[np.ndarray], bool]) -> np.ndarray:
    """A page of a PDF file as the browser's own viewer shows it, [H, W, 3], when it is there, or after 20 seconds."""
    page = browser.new_page(viewport={"width": 600, "height": 840})
    (path.parent / "viewer.html").write_text(
        f'<embed src="{path.name}#toolbar=0&navpanes=0&page={number}" width="580" height="820">'
    )
    page.goto((path.parent / "viewer.html").as_uri())
    for _ in range(100):
        page.wait_for_timeout(200)
        pixels = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB")).astype(np.int16)
        if is_there(pixels):
            break
    page.close()
    return pixels


def test_printed_pages_show_every_picture(browser: sync_api.Browser, tmp_path: Path) -> None:
    """Images of one colour each, so that a picture which is printed can be told by its colour."""
    colours = [(r, g, b) for r in (30, 130) for g in (60, 200) for b in (50, 220)] + [(230, 40, 130)]
    (tmp_path / "photos").mkdir()
    for number, colour in enumerate(colours):
        Image.new("RGB", (24, 24), colour).save(tmp_path / "photos" / f"{number}.png")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 150, 5)).eval()
    model[0].weight.data.abs_()
    transform = unitvis.Transform(resize=24)
    run = unitvis.scan(model, tmp_path / "photos", transform=transform, progress=False)
    visit = Visit(browser, unitvis.gallery(run, tmp_path / "g").parent, scheme="dark")

    def areas(pixels: np.ndarray) -> list[int]:
        """Pixels of each colour, which JPEG changes by some levels."""
        return [int((abs(pixels - colour).max(axis=-1) < 12).sum()) for colour in colours]

    # On a unit's page each colour has a patch and a whole image; in a layer there are tiles on its last page, too.
    for fragment, pages, least in (("0/7", 1, 2000), ("0", 4, 200), ("", 1, 80)):
        visit.open(fragment)
        visit.page.wait_for_load_state("networkidle")
        path = tmp_path / f"{pages}.pdf"
        visit.page.pdf(path=path, format="A4")
        assert len(re.findall(rb"/Type /Page\b", path.read_bytes())) >= pages
        found = rendered(browser, path, pages, lambda pixels, least=least: min(areas(pixels)) > least)
        assert min(areas(found)) > least
        assert (found > 250).all(axis=-1).mean() > 0.2  # on white paper
    visit.check()
    visit.context.close()


def test_links_can_be_hit_and_placeholders_read_on_a_phone(browser: sync_api.Browser, folder: Path) -> None:
    visit = Visit(browser, folder, 360, "dark")
    visit.open("first/3")
    links = visit.page.locator(".steps a")
    assert links.count() == 3
    for box in (link.bounding_box() for link in links.all()):
        assert min(box["width"], box["height"]) >= 44  # CSS pixels, WCAG 2.5.5
    style = "(e) => [getComputedStyle(e, '::placeholder').color, getComputedStyle(e).backgroundColor]"
    ink, paper = (
        "#" + bytes(map(int, re.findall(r"\d+", colour))).hex()
        for colour in visit.page.locator("#goto").evaluate(style)
    )
    assert contrast(ink, paper) >= 4.5
    visit.check()
    visit.context.close()


def test_names_and_classes_are_text_on_tiles_and_units(browser: sync_api.Browser, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 5), nn.AdaptiveMaxPool2d(1), nn.Flatten())
    model.add_module("concat", nn.Linear(4, 3))
    classes = ("<b>cat</b>", "a dog whose name is far longer than a tile of nine patches is wide")
    for number in range(8):
        folder = tmp_path / "photos" / classes[number % 2].replace("/", "")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    transform = unitvis.Transform(crop=12)
    labels = [*classes, "cat"]
    run = unitvis.scan(
        model.eval(),
        tmp_path / "photos",
        ["concat"],
        transform=transform,
        labels=labels,
        precision="fp32",
        progress=False,
    )
    visit = Visit(browser, unitvis.gallery(run, tmp_path / "gallery").parent)
    visit.open("concat")
    page = visit.page
    assert page.locator("#unit-0 span", has_text="<b>cat</b>").first.is_visible()
    counted = page.locator("#unit-1 .classes")
    assert "<b>cat<b> 4" in counted.inner_text()
    assert counted.bounding_box()["width"] <= page.locator("#unit-1 .patches").bounding_box()["width"] + 1
    page.locator("#goto").fill("<b>cat</b>")
    page.keyboard.press("Enter")
    visit.heading("concat unit 0: <b>cat</b>")
    sync_api.expect(page.locator("main")).to_contain_text("Its images by class: ")
    sync_api.expect(page.locator("main")).to_contain_text("<b>cat<b> 4")
    page.locator("#goto").fill("cat")  # the class, not the layer or the images that have it in their names
    page.keyboard.press("Enter")
    visit.heading("concat unit 2: cat")
    visit.check()
    visit.context.close()
