"""Pages for print: their size on paper, text that is text and large enough, nothing on anything else, no holes."""

from __future__ import annotations

import io
import re
import struct
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import unitvis
from support import browsers
from support.commands import call
from support.drawings import Drawing
from support.scans import scan
from unitvis import UnitvisError
from unitvis.drawing.page import Page, page_dots
from unitvis.drawing.printing import LEAST_POINTS
from unitvis.pages.figures import figure

NAMES = ("stem", "<b>&", "third", "fourth", "fifth")  # the second would be markup in an SVG that does not escape it


def network() -> nn.Module:
    """Five layers of thirteen units that always fire."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for number, name in enumerate(NAMES):
        model.add_module(name, nn.Conv2d(13 if number else 3, 13, 3, padding=1))
        model[-1].bias.data += 9
        model.add_module(f"relu{number}", nn.ReLU())
    return model.eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> unitvis.Run:
    """Thirteen units of five layers, of coloured pictures without white in them."""
    folder = tmp_path_factory.mktemp("printing")
    images = np.random.default_rng(0).integers(20, 220, (12, 8, 8, 3), dtype=np.uint8).repeat(3, 1).repeat(3, 2)
    np.save(folder / "images.npy", images)
    transform = unitvis.Transform()
    return scan(network(), folder / "images.npy", list(NAMES), 9, transform=transform, out=folder / "run")


def paper(run: unitvis.Run, layers: int, **options: object) -> Page:
    return figure(run, NAMES[:layers], "paper", model=network(), **options)


PAGES = {
    "sheet": lambda run: run.sheet("third", width="160mm"),
    "narrow sheet": lambda run: run.sheet("third", range(9), width=40),
    "overview": lambda run: run.overview(width=160.0),
    "narrow overview": lambda run: run.overview(width="8 cm"),
    "one layer": lambda run: figure(run, NAMES[:1], "lecture", width="160mm"),
    "two layers": lambda run: figure(run, NAMES[:2], "lecture", width="160mm"),
    "five layers": lambda run: figure(run, NAMES, "lecture", width="160mm"),
    "paper": lambda run: paper(run, 5, width="160mm"),
    "narrow paper": lambda run: paper(run, 2, width="80mm"),
    "slide": lambda run: figure(run, NAMES, "lecture"),
    "paper without a width": lambda run: paper(run, 5),
}


@pytest.fixture(scope="module", params=PAGES)
def page(request: pytest.FixtureRequest, run: unitvis.Run) -> Page:
    return PAGES[request.param](run)


def test_text_is_text_and_large_enough(page: Page) -> None:
    found = Drawing(page.svg())
    assert LEAST_POINTS == 7
    assert min(found.points) >= 6.99
    assert set(found.texts) & set(NAMES)
    assert {"1", "2"} <= set(found.texts)  # units


def test_nothing_lies_on_anything_or_outside_the_page(page: Page) -> None:
    Drawing(page.svg()).check()


def test_a_slide_has_its_layers_side_by_side_each_with_its_tiles_in_a_square(run: unitvis.Run) -> None:
    found = Drawing(figure(run, NAMES, "lecture").svg())
    left, upper = ({box[axis] for box in found.boxes[:45]} for axis in (0, 1))
    assert (len(left), len(upper)) == (15, 3)


def test_pictures_have_print_resolution_and_are_those_of_the_run(run: unitvis.Run) -> None:
    found = Drawing(run.sheet("third", range(4), width="120mm").svg())
    assert found.size[0] == 120
    assert len(found.images) == 4
    for unit, (box, image) in enumerate(zip(found.boxes, found.images, strict=False)):
        assert image.width / (box[2] / 25.4) == pytest.approx(300, rel=0.01)
        size = next(n for n in range(1, image.width) if 3 * n + 2 * max(1, n // 24) == image.width)
        want = np.asarray(run.tile("third", unit, size=size)).astype(int)
        assert abs(np.asarray(image).astype(int) - want).mean() < 2  # JPEG


@pytest.mark.browser
@pytest.mark.skipif(browsers.CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")
def test_a_browser_shows_the_page_that_is_painted(run: unitvis.Run, tmp_path: Path) -> None:
    """Text in the embedded font and pictures at their places; letters are drawn a little differently."""
    page = run.sheet("third", range(6), width="2in")
    page.save(tmp_path / "page.svg")
    with browsers.launched() as browser:
        # A browser has 96 pixels an inch, here of 3.125 dots each: 300 dots an inch.
        sheet = browser.new_page(viewport={"width": 192, "height": page.height * 96 // 300}, device_scale_factor=3.125)
        asked = []
        sheet.on("request", lambda request: asked.append(request.url.partition(":")[0]))
        sheet.goto((tmp_path / "page.svg").as_uri())
        sheet.evaluate("document.fonts.ready")
        shown = Image.open(io.BytesIO(sheet.screenshot())).convert("L")
    assert asked.count("file") == 1
    assert set(asked) <= {"file", "data"}
    painted = page.image().convert("L").crop((0, 0, *shown.size))
    assert shown.width == 600
    # In another font, or a size of text that is wrong by a tenth, the mean is 6 and more.
    apart = [np.asarray(image.reduce(4)).astype(int) for image in (shown, painted)]
    assert abs(apart[0] - apart[1]).mean() < 4


def largest_hole(image: Image.Image, cells: int = 40) -> float:
    """The share of a page that its largest rectangle of bare paper takes, of a page cut into cells x cells."""
    bare = np.asarray(image.convert("L").resize((cells * 8, cells * 8), Image.Resampling.BOX)) > 250
    bare = bare.reshape(cells, 8, cells, 8).all(axis=(1, 3))
    most, heights = 0, np.zeros(cells, int)
    for row in bare:
        heights = np.where(row, heights + 1, 0)
        most = max(most, *(heights[a:b].min() * (b - a) for a, b in combinations(range(cells + 1), 2)))
    return most / cells**2


def test_there_are_no_large_holes(page: Page) -> None:
    """The last places of a row of tiles may be empty."""
    assert largest_hole(page.image()) < 0.09


def test_layers_of_few_and_many_units_leave_less_than_half_a_row(run: unitvis.Run) -> None:
    page = figure(run, NAMES[:2], "lecture", {"stem": [1, 2], "<b>&": range(9)}, width="6.3in")
    assert largest_hole(page.image()) < 0.25


def test_a_hole_would_be_found() -> None:
    page = Image.new("RGB", (400, 400), (90, 90, 90))
    page.paste((255, 255, 255), (200, 200, 400, 400))
    assert largest_hole(page) == 0.25


def test_files_have_the_size_that_was_asked_for(run: unitvis.Run, tmp_path: Path) -> None:
    page = run.sheet("third", range(9), width="60mm")
    for ending in ("png", "jpg", "svg", "pdf"):
        page.save(tmp_path / f"page.{ending}")
    data = (tmp_path / "page.png").read_bytes()
    across, _, unit = struct.unpack(">IIB", data[(at := data.index(b"pHYs") + 4) : at + 9])
    with Image.open(tmp_path / "page.png") as png, Image.open(tmp_path / "page.jpg") as jpeg:
        assert unit == 1  # a metre
        assert png.width / across == pytest.approx(0.060, abs=1e-4)
        assert jpeg.size == png.size
        assert jpeg.info["dpi"] == (300, 300)
        pixels = np.asarray(png).astype(int)
    assert Drawing((tmp_path / "page.svg").read_text()).size[0] == 60
    pdf = (tmp_path / "page.pdf").read_bytes()
    box = re.search(rb"/MediaBox \[ 0 0 ([\d.]+) ([\d.]+) \]", pdf)
    assert float(box[1]) / 72 * 25.4 == pytest.approx(60, abs=0.1)
    assert float(box[2]) / 72 * 25.4 == pytest.approx(page.height / 300 * 25.4, abs=0.1)
    with Image.open(io.BytesIO(pdf[pdf.index(b"\xff\xd8\xff") :])) as inner:
        assert inner.size == (2 * page.width, 2 * page.height)  # 600 dots an inch
        x, y, wide, high = (round(300 / 25.4 * length) for length in Drawing(page.svg()).boxes[0])
        within = slice(y, y + high), slice(x, x + wide)
        assert abs(np.asarray(inner.reduce(2)).astype(int) - pixels)[within].mean() < 2  # JPEG


def test_widths_and_endings_that_mean_nothing_are_refused(run: unitvis.Run, tmp_path: Path) -> None:
    assert page_dots("160mm") == page_dots("16 CM") == page_dots(160) == 1890
    assert page_dots("2in") == 600
    for width, message in (("160", "is no width of a page; write 160mm"), ("39mm", "40 to 1000 mm wide, not 39mm")):
        with pytest.raises(UnitvisError, match=message):
            run.overview(width=width)
    for number in (float("nan"), -160, 1e9):
        with pytest.raises(UnitvisError):
            page_dots(number)
    with pytest.raises(UnitvisError, match="leave out size=20"):
        run.sheet("third", size=20, width=160)
    with pytest.raises(UnitvisError, match=r"page\.tif must end in .*\.svg or \.pdf"):
        run.overview(width=160).save(tmp_path / "page.tif")


def test_a_page_of_too_many_units_is_refused_before_it_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    many = scan(nn.Sequential(nn.Conv2d(3, 1200, 1)).eval(), torch.rand(9, 3, 2, 2), None, 9)
    monkeypatch.setattr(many.source, "picture", lambda *_: pytest.fail("a picture was read"))
    with pytest.raises(UnitvisError, match=r"1,200 units do not fit on one page, which would be 40 x [\d,.]+ mm"):
        many.sheet("0", width=40)


def test_the_command_draws_pages(run: unitvis.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["sheet", run.folder, "third"], ["overview", run.folder, "third"]):
        for name, width, told in (
            ("a.svg", [], r"a\.svg: 160 x [\d.]+ mm\n"),
            ("b.pdf", ["--width", "80mm"], r"b\.pdf: 80 x [\d.]+ mm\n"),
            ("c.png", ["--width", "8cm"], r"c\.png: 80 x [\d.]+ mm, 945 x \d+ pixels\n"),
        ):
            code, printed, _ = call(capsys, *command, "-o", tmp_path / name, *width)
            assert code == 0
            assert re.search(told, printed)
    assert Drawing((tmp_path / "a.svg").read_text()).size[0] == 160
    for arguments, message in (
        (["third", "-o", tmp_path / "d.eps"], "d.eps must end in .png, .jpg, .webp, .svg or .pdf"),
        (["third", "-o", tmp_path / "d.svg", "--width", "wide"], "'wide' is no width of a page; write 160mm"),
        (["third", "-o", tmp_path / "d.svg", "--size", "40"], "leave out --size"),
    ):
        code, _, told = call(capsys, "sheet", run.folder, *arguments)
        assert code == 2
        assert message in told
        assert "\n" not in told
    assert not (tmp_path / "d.svg").exists()
    code, _, told = call(capsys, "maps", "x.py:net", "x.png", "0", "-o", tmp_path / "maps.svg")
    assert (code, told) == (2, f"unitvis: {tmp_path / 'maps.svg'} must end in .png, .jpg or .webp")


def test_names_of_neurons_fit_below_their_tiles() -> None:
    model = nn.Sequential(nn.Conv2d(3, 130, 1)).eval()
    run = scan(model, torch.rand(9, 3, 12, 12), None, 1, unit="neuron")
    found = Drawing(run.sheet("0", range(18_700, 18_720), width="80mm").svg())
    assert "129/11/10" in found.texts
    below = sorted(box for box, text in zip(found.boxes[20:], found.texts, strict=True) if text.count("/") == 2)
    for (x, y, wide, _), (after, same, *_) in pairwise(below):
        assert y != same or x + wide < after


def test_tall_pictures_are_refused_as_webp(run: unitvis.Run, tmp_path: Path) -> None:
    with pytest.raises(UnitvisError, match=r"a WEBP file has at most 16,383 pixels a side, not 17,000; write a \.png"):
        Page(10, 17_000).save(tmp_path / "page.webp")
