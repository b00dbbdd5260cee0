"""Feature maps of one image: values, places, filters, and what the page shows of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import unitvis
from support import brute
from support.commands import SIZE, call, model_file
from unitvis.attribution.feature_maps import MAP_SIDE, RING
from unitvis.errors import UnitvisError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 5, padding=2), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2)).eval()


def test_every_map_is_that_of_a_hook() -> None:
    model, image = network(), torch.randn(3, 14, 12, generator=torch.Generator().manual_seed(1))
    batch = next(batch for _, batch in brute.canonical_batches(image[None]))
    for layer in ("0", "2"):
        maps = brute.outputs(model, [layer], batch)[layer][0].numpy()
        found = unitvis.feature_maps(model, image, layer)
        np.testing.assert_array_equal(found.maps, maps)
        flat = maps.reshape(len(maps), -1)
        np.testing.assert_array_equal(found.values, flat.max(axis=1))
        places = found.positions[:, 0] * maps.shape[2] + found.positions[:, 1]
        np.testing.assert_array_equal(places, flat.argmax(axis=1))
        assert (found.filters is None) == (layer == "2")
    np.testing.assert_array_equal(unitvis.feature_maps(model, image, "0").filters, model[0].weight.detach().numpy())


def test_the_page_shows_maps_and_rings() -> None:
    found = unitvis.feature_maps(network(), torch.randn(3, 15, 15), "2")  # maps of 7 x 7
    page = np.asarray(found.page([1]))
    cell = MAP_SIDE // 7
    levels = found.maps[1].astype(np.float64) - float(found.maps[1].min())
    grey = np.rint(255 * levels / levels.max()).astype(int)
    left, upper = 36, page.shape[0] - 36 - (7 * cell + 12 + 34)
    for row in range(7):
        for column in range(7):
            if max(abs(np.array([row, column]) - found.positions[1])) > 1:  # no ring there
                pixel = page[upper + row * cell + cell // 2, left + column * cell + cell // 2]
                assert pixel.tolist() == [grey[row, column]] * 3
    row, _ = found.positions[1].tolist()
    around = page[upper + max(row - 1, 0) * cell : upper + (row + 2) * cell, left : left + 7 * cell]
    assert (around == RING).all(axis=-1).any()


def test_maps_of_nan_and_of_one_value_are_drawn() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x / 0 - x / 0)

    found = unitvis.feature_maps(Odd().eval(), torch.ones(3, 4, 4), "conv")
    assert np.isnan(found.values).all()
    even = unitvis.feature_maps(nn.Sequential(nn.Conv2d(3, 2, 1)).eval(), torch.ones(3, 4, 4), "0")
    assert found.page().size == even.page().size


def test_what_is_refused() -> None:
    found = unitvis.feature_maps(network(), torch.randn(3, 15, 15), "2")
    with pytest.raises(UnitvisError, match="unit"):
        found.page([4])
    with pytest.raises(UnitvisError, match="no unit was named"):
        found.page([])
    with pytest.raises(UnitvisError, match="no layer 'x'"):
        unitvis.feature_maps(network(), torch.randn(3, 15, 15), "x")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, picture = model_file(tmp_path), tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(picture)
    code, printed, _ = call(capsys, "maps", model, picture, "0", "-o", tmp_path / "maps.png", *SIZE, "--units", "0-2")
    assert code == 0
    with Image.open(tmp_path / "maps.png") as page:
        assert printed == f"{tmp_path / 'maps.png'}: {page.width} x {page.height} pixels\n"
    whole = (tmp_path / "maps.png").read_bytes()
    named = ["--units", "0/0", "--units", "0/1-2"]
    assert call(capsys, "maps", model, picture, "0", "-o", tmp_path / "maps.png", *SIZE, *named)[0] == 0
    assert (tmp_path / "maps.png").read_bytes() == whole
    code, _, said = call(capsys, "maps", model, picture, "0", "-o", tmp_path / "maps.png", *SIZE, "--units", "2/1")
    assert code == 2
    assert "units are chosen of layer '2', which is not drawn here; drawn are 0" in said
    code, _, said = call(capsys, "maps", model, tmp_path / "none.png", "0", "-o", tmp_path / "maps.png", *SIZE)
    assert code == 2
    assert "none.png" in said
