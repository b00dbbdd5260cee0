"""No picture without a limit: winners of a unit, units of a page, neurons of a layer."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from torch import nn

import unitvis
from support.scans import scan
from unitvis import UnitvisError
from unitvis.drawing import sheets
from unitvis.pages.figures import figure


def wide_run(channels: int, k: int, images: int, **options: object) -> unitvis.Run:
    """A run of one 1x1 convolution over images of 4 x 4 pixels, each of one colour."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, channels, 1)).eval()
    pixels = torch.linspace(-1, 1, images).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
    return scan(model, pixels, k=k, **options)


def test_of_many_winners_the_strongest_are_drawn_and_the_others_named(tmp_path: Path) -> None:
    run = wide_run(2, 100, 100)
    tile = run.tile("0", 0, size=10)
    assert tile.size == (5 * 10 + 4, 5 * 10 + 4)
    assert np.array_equal(np.asarray(tile)[:10, :10], np.asarray(run.patch("0", 0, 0, size=10)))
    last = np.asarray(run.patch("0", 0, 24, size=10))
    assert np.array_equal(np.asarray(tile)[-9:-1, -9:-1], last[1:-1, 1:-1])  # within the outline of a white patch
    assert run.patch("0", 0, 99).size == (96, 96)
    assert run.sheet("0").width < 2000
    run.save(tmp_path / "run")
    unitvis.gallery(run, tmp_path / "run")
    with Image.open(tmp_path / "run" / "gallery" / "layers" / "0" / "patches-0.jpg") as sprite:
        assert sprite.size == (2 * 5 * 112, 5 * 112)
    said = (tmp_path / "run" / "gallery" / "index.js").read_text()
    assert "the 25 strongest (100 are kept) of the 100 images" in said
    assert unitvis.load(tmp_path / "run")["0"].values.shape == (2, 100)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The units of each page that is drawn from here on."""
    pages: list[list[int]] = []
    draw = sheets._sheet

    def recording(run: unitvis.Run, layer: str, units: list[int], *rest: object) -> Image.Image:
        pages.append(list(units))
        return draw(run, layer, units, *rest)

    monkeypatch.setattr(sheets, "_sheet", recording)
    return pages


def test_a_layer_of_many_units_has_several_pages(tmp_path: Path, drawn: list[list[int]]) -> None:
    run = wide_run(5000, 2, 4)
    paths = sheets.render(run, tmp_path)
    assert [path.name for path in paths] == ["0.png", "0+2.png"]
    assert [unit for page in drawn for unit in page] == list(range(5000))
    for path in paths:
        with Image.open(path) as page:
            assert page.width * page.height < 40e6


def test_single_neurons_are_drawn_by_choice(tmp_path: Path, drawn: list[list[int]]) -> None:
    run = wide_run(100, 2, 4, unit="neuron")
    assert len(run["0"]) == 1600
    captions = sheets.caption(run, run["0"], sheets._units_on_sheet(run["0"]), "rf")
    assert captions[0].startswith("1,024 of 1,600 neurons, map 4 x 4")
    sheets.render(run, tmp_path)
    (units,) = drawn
    assert (len(set(units)), units[0], units[-1]) == (1024, 0, 1599)
    assert set(np.diff(units)) == {1, 2}


def test_a_page_that_would_be_too_large_is_refused_before_it_is_drawn() -> None:
    run = wide_run(3000, 9, 9)
    with pytest.raises(
        UnitvisError, match=r"3,000 units do not fit on one page of 200 pixels a patch; name at most \d+ "
    ):
        run.sheet("0", size=200)
    with pytest.raises(UnitvisError, match="do not fit on one page"):
        figure(run, ["0"], "lecture", range(3000))
    assert run.sheet("0", range(5), size=200).height > 600


def named(name: str) -> unitvis.Run:
    """A run of one layer with this name."""
    torch.manual_seed(0)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 9, 9, 3), np.uint8)
    model = nn.Sequential(OrderedDict({name: nn.Conv2d(3, 4, 3)})).eval()
    return unitvis.scan(model, pixels, k=2, transform=unitvis.Transform(), progress=False)


@pytest.mark.parametrize("name", ["x" * 5000, "a\nb", "stage" * 40], ids=["long", "of two lines", "quite long"])
def test_no_name_makes_a_page_larger(name: str) -> None:
    short, run = named("conv"), named(name)
    assert run.sheet(name).size == short.sheet("conv").size
    assert run.sheet(name, [0], size=20).size == short.sheet("conv", [0], size=20).size
    assert figure(run, [name], "lecture").image().size == figure(short, ["conv"], "lecture").image().size


def test_a_name_keeps_its_ends_where_it_does_not_fit() -> None:
    font = ImageFont.load_default(20)
    name = "".join(f"{number}." for number in range(5000))
    for width in (60, 300, 1000):
        shown = sheets.fitting_name(name, font, width)
        first, last = shown.split("\u2026")
        assert name.startswith(first)
        assert name.endswith(last)
        assert 0 <= len(first) - len(last) <= 1
        longer = f"{name[: len(first) + 1]}\u2026{name[len(name) - len(last) - 1 :]}"
        assert font.getlength(shown) <= width < font.getlength(longer)
    whole = math.ceil(font.getlength("features.10"))
    assert sheets.fitting_name("features.10", font, whole) == "features.10"
    assert sheets.fitting_name("features.10", font, whole - 1) != "features.10"
    assert sheets.fitting_name("a\nb", font, 100) == r"a\nb"
    assert sheets.fitting_name(name, font, 1) == "\u2026"
    assert len(sheets.fitting_name(name, font, 10**6)) <= 401
