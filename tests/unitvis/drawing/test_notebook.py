"""How runs, layers, units and response maps show themselves in a notebook."""

from __future__ import annotations

import io
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageShow
from torch import nn

import unitvis
from support.galleries import network, twelve_images
from unitvis import UnitvisError


def test_pictures_of_notebooks_are_png() -> None:
    found = unitvis.response_map(network(), torch.rand(3, 33, 45), "first", 0)
    with Image.open(io.BytesIO(found._repr_png_())) as image:
        assert image.size == (448, 329)


def test_units_layers_and_runs_show_themselves_small(tmp_path: Path) -> None:
    _, run = twelve_images(tmp_path)
    top = run["2"]
    unit = top[3]
    np.testing.assert_array_equal(unit.values, top.values[3])
    np.testing.assert_array_equal(unit.images, top.images[3])
    np.testing.assert_array_equal(unit.positions, top.positions[3])
    np.testing.assert_array_equal(unit.boxes, top.boxes[3])
    assert repr(unit).startswith("<unit 3 of 2: separated, ")
    shown_png = unit._repr_png_()
    assert shown_png is not None
    assert len(shown_png) < 150_000
    with Image.open(io.BytesIO(shown_png)) as image:
        assert image.size == unit.tile(size=56).size
    assert [one.number for one in top] == list(range(10))
    with pytest.raises(UnitvisError, match="no unit 10; it has 10"):
        top[10]
    page = top._repr_html_()
    assert "2: the 9 strongest images of 10 channels, 0 dead" in page
    assert "data:image/jpeg;base64," in page
    assert len(page) < 200_000
    table = run._repr_html_()
    assert table.count("<tr>") == 3
    assert "<td>12</td><td>20 x 20</td><td>5 x 5</td><td>1</td>" in table
    assert len(table) < 2000


def test_without_images_the_words_have_to_do() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3)).eval()
    run = unitvis.scan(model, iter([torch.rand(3, 3, 8, 8)]), progress=False)
    assert run["0"][1]._repr_png_() is None
    assert "<img" not in run["0"]._repr_html_()
    assert repr(run["0"][1]).startswith("<unit 1 of 0")


def test_the_text_of_a_layer_and_of_a_unit_is_short_whatever_they_hold(tmp_path: Path) -> None:
    _, run = twelve_images(tmp_path)
    assert repr(run["0"]) == "<layer 0: 12 channels, top 9, map 20 x 20, 1 dead>"
    model = nn.Sequential(OrderedDict([("one\ntwo", nn.Conv2d(3, 2, 1))])).eval()
    many = unitvis.scan(model, torch.rand(40, 3, 2, 2), k=30, progress=False)["one\ntwo"]
    assert repr(many).startswith("<layer one\\ntwo: 2 channels, top 30")
    text = repr(many[1])
    assert text.endswith(" and 21 more>")
    assert "\n" not in text
    assert len(text.split(":")[1].split(",")[1].split(" and ")[0].split()) == 9


def test_slices_of_units_are_units_and_show_themselves_as_a_sheet(tmp_path: Path) -> None:
    _, run = twelve_images(tmp_path)
    top = run["2"]
    for part in (slice(0, 9), slice(None), slice(-3, None), slice(8, None, -3), slice(50, 60)):
        units = top[part]
        assert [unit.number for unit in units] == list(range(10))[part]
        assert len(units) == len(list(range(10))[part])
    np.testing.assert_array_equal(top[2:8][1:3][1].values, top.values[4])
    assert repr(top[1:4]) == "<3 units of 2: 1, 2, 3>"
    with Image.open(io.BytesIO(top[1:4]._repr_png_() or b"")) as image:
        assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(run.sheet("2", [1, 2, 3], size=56)))
    assert top[4:4]._repr_png_() is None
    with pytest.raises(UnitvisError, match="no unit was named"):
        top[4:4].sheet()
    with pytest.raises(IndexError):
        top[1:4][3]


def test_a_picture_that_cannot_be_shown_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, run = twelve_images(tmp_path)
    started = []
    for viewer in (ImageShow.XDGViewer, ImageShow.DisplayViewer, ImageShow.EogViewer, ImageShow.XVViewer):
        monkeypatch.setattr(viewer, "show", lambda self, image, **options: started.append(image) or 1)
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    with pytest.warns(UserWarning, match=r"no display .* save it \(picture\.save\('picture\.png'\)\)") as told:
        run.tile("2", 3).show()
    assert told[0].filename == __file__
    assert not started
    monkeypatch.setenv("DISPLAY", ":0")
    ImageShow.register(ImageShow.XDGViewer)  # where no program that shows pictures is installed
    run.tile("2", 3).show()
    assert len(started) == 1
    ImageShow._viewers.pop()
