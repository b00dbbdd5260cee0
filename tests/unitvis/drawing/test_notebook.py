"""How runs, layers, units and response maps show themselves in a notebook."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
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
