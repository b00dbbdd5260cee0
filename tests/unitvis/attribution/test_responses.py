"""Response maps: the numbers themselves, where they lie, and what their overlay covers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import unitvis
from support import brute
from unitvis import UnitvisError
from unitvis.attribution.responses import map_area


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1)).eval()


def test_a_response_map_is_the_layers_output_with_its_maximum() -> None:
    model, pixels = net(), torch.randn(20, 3, 21, 25)
    run = unitvis.scan(model, pixels, progress=False)
    for layer in ("0", "2"):
        top = run[layer]
        image = int(top.images[2, 4])
        (batch,) = (b for _, b in brute.canonical_batches(pixels[image : image + 1]))
        want = brute.outputs(model, [layer], batch)[layer][0, 2].numpy()
        found = unitvis.response_map(model, pixels[image], layer, 2)
        np.testing.assert_array_equal(found.map, want)
        assert np.float32(found.value) == top.values[2, 4]
        assert found.position == tuple(top.positions[2, 4])
        assert found.box == tuple(top.boxes[2, 4])
    with pytest.raises(UnitvisError, match="no unit 5; it has 5"):
        unitvis.response_map(model, pixels[0], "2", 5)
    with pytest.raises(UnitvisError, match=r"these images need a transform"):
        unitvis.response_map(model, np.zeros((21, 25, 3), np.uint8), "2", 0)


def test_the_image_may_be_a_file_a_picture_or_pixels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path := tmp_path / "a.png")
    transform = unitvis.Transform(resize=(24, 32), crop=(20, 28), mean=(0.5, 0.5, 0.5))
    maps = [
        unitvis.response_map(net(), image, "2", 1, transform=transform)
        for image in (path, str(path), Image.open(path), pixels)
    ]
    assert all(np.array_equal(maps[0].map, other.map) for other in maps[1:])
    assert maps[0].map.shape == (9, 13)
    assert maps[0].image.size == (28, 20)


def test_the_overlay_colours_the_pixels_about_the_strongest_neuron() -> None:
    """A 1x1 filter of stride 4 on an image with one bright pixel, worked out by hand."""
    model = nn.Sequential(nn.Conv2d(3, 1, 1, stride=4)).eval()
    nn.init.constant_(model[0].weight, 1.0)
    nn.init.constant_(model[0].bias, -0.1)
    pixels = torch.zeros(3, 16, 24)
    pixels[:, 8, 12] = 1.0
    found = unitvis.response_map(model, pixels, "0", 0)
    assert found.position == (2, 3)
    assert found.area == (-1.5, -1.5, 22.5, 14.5)  # cells of 4 about the pixels 0, 4, 8, ...
    drawn = np.asarray(found.overlay(24)).astype(int)
    plain = np.asarray(found.image).astype(int)
    rows, columns = np.nonzero((drawn != plain).any(axis=2))
    # Pixels whose centres lie in 10.5..14.5 and 6.5..10.5; a centre on the border belongs to the next cell.
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (6, 9, 10, 13)
    assert len(rows) == 16


def test_a_map_without_a_stride_covers_the_image() -> None:
    assert map_area(None, False, (0, 0, 9, 9), (0, 0), (1, 1), (30, 40)) == (0, 0, 40, 30)
    assert map_area((4, 4), True, (0, 0, 40, 30), (0, 0), (3, 3), (30, 40)) == (0, 0, 40, 30)
