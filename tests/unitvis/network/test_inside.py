"""Ranking inside the image: only positions whose boxes lie in it, exactly, however the scan is cut or computed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import unitvis
from support import brute
from support.scans import arrays, by_half, images, pictures, scan
from unitvis.drawing.patches import crop_of, drawn_box, units_at_the_border
from unitvis.errors import UnitvisError
from unitvis.network.inside import largest_rectangle
from unitvis.ranking.recorder import Recorder
from unitvis.scanning.merge import merge
from unitvis.scanning.verify import verify

LAYERS = ["0", "3", "5"]
FIELDS = {"0": (3, 1, -1), "3": (8, 2, -3)}  # side, stride and first pixel of the boxes, worked out by hand


def padded(seed: int = 0) -> nn.Sequential:
    """Three padded convolutions for images of 24 x 24; the last one sees more than half of the image."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 5, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(5, 4, 5, padding=2),
    ).eval()


def rectangle(run: unitvis.Run, layer: str) -> list[int]:
    """Rows and columns whose boxes lie in an image of 24 x 24: top, bottom, left, right."""
    if layer in FIELDS:
        side, stride, first = FIELDS[layer]
    else:  # boxes of 16 pixels, whose centres are those of the drawn ones
        side, stride = run[layer].info["effective_box"], 2
        first = (-7 + 9 - side) // 2
    inside = [n for n in range(24 // stride) if first + n * stride >= 0 and first + n * stride + side <= 24]
    return [inside[0], inside[-1] + 1] * 2


def inner_responses(model: nn.Module, run: unitvis.Run, pixels: Tensor) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Like `brute.responses`, of the positions inside alone."""
    found = {}
    for layer in LAYERS:
        top, bottom, left, right = rectangle(run, layer)
        parts = [
            brute.outputs(model, [layer], batch)[layer][: place.stop - place.start]
            for place, batch in brute.canonical_batches(pixels)
        ]
        maps = torch.cat(parts).numpy()
        part = maps[:, :, top:bottom, left:right].reshape(len(maps), maps.shape[1], -1)
        rows, columns = np.divmod(part.argmax(axis=2), right - left)
        found[layer] = part.max(axis=2) + 0.0, (rows + top) * maps.shape[3] + columns + left
    return found


def test_a_scan_equals_brute_force_over_the_positions_inside() -> None:
    model, pixels = padded(), images(45, 24)
    run = scan(model, pixels, LAYERS, 4, inside=True)
    everywhere = scan(model, pixels, LAYERS, 4)
    for layer in LAYERS:
        assert run[layer].info["inside"] == rectangle(run, layer)
    assert not np.array_equal(run["5"].values, everywhere["5"].values)  # the border wins somewhere
    brute.check(run, inner_responses(model, run, pixels))
    assert "inside" not in everywhere["0"].info
    assert verify(run, model)["wrong"] == 0


def test_every_drawn_box_lies_in_the_image() -> None:
    run = scan(padded(), images(30, 24), LAYERS, 4, inside=True)
    assert [crop_of(run, layer, None) for layer in LAYERS] == ["rf", "rf", "effective"]
    for layer in LAYERS:
        for unit in range(len(run[layer])):
            for rank in range(4):
                box = drawn_box(run[layer], unit, rank, crop_of(run, layer, None), run.input_size)
                assert min(box[:2]) >= 0, (layer, unit, rank, box)
                assert max(box[2:]) <= 24, (layer, unit, rank, box)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_after_half_precision_decided_units_are_those_of_brute_force(precision: str) -> None:
    model, pixels = padded(), pictures(400, 24)
    run = by_half(model, pixels, precision, 4, layers=LAYERS, inside=True)
    assert run.manifest["scan"]["precision"] == precision
    assert "chains" in run.manifest["scan"]["rewritten"]
    assert sum(top.separated.sum() for top in run.tops.values()) > 10
    exact = scan(model, pixels, LAYERS, 4, inside=True, precision="fp32")
    for layer in LAYERS:
        decided = run[layer].separated
        for name in ("values", "images", "positions", "boxes"):
            one, other = getattr(run[layer], name), getattr(exact[layer], name)
            np.testing.assert_array_equal(one[decided], other[decided], err_msg=f"{layer} {name}")
    brute.check(exact, inner_responses(model, exact, pixels))


def test_nan_counts_inside_only() -> None:
    class Holes(nn.Module):
        """Its maps are NaN where a pixel is below -3."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3, stride=2, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(torch.where(x < -3, torch.nan, x))

    pixels = images(6, 12).clamp(-2, 2)
    pixels[1, :, 0, 0] = pixels[4, :, 6, 6] = -9.0  # the first pixel is in the box of a position at the border alone
    info = scan(Holes().eval(), pixels, ["conv"], 3, inside=True)["conv"].info
    assert (info["inside"], info["nan"]) == ([1, 6, 1, 6], {"responses": 2, "units": 2, "first_image": 4})


def test_a_layer_without_such_positions_is_ranked_everywhere_and_named() -> None:
    wide, narrow = nn.Conv2d(4, 3, 9, stride=8, padding=8), nn.Conv2d(4, 3, 2, stride=9, padding=1)
    for last, reason in (wide, "no effective box lies in the image"), (narrow, "no position reads the image alone"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), last).eval()
        with pytest.warns(UserWarning, match=rf"in 1 of 2 layers {reason} \(1\), so all of their positions are ranked"):
            run = scan(model, images(5, 8), ["0", "1"], 2, inside=True)
    assert run["1"].info["inside"] == [0, run["1"].info["height"], 0, run["1"].info["width"]]
    assert run["0"].info["inside"] == [1, 7, 1, 7]


def test_shards_and_an_interrupted_scan_give_the_same_bytes(tmp_path: Path) -> None:
    model, pixels = padded(), images(40, 24)
    whole = scan(model, pixels, LAYERS, 4, inside=True)
    shards = [scan(model, pixels, LAYERS, 4, inside=True, shard=(n, 2)) for n in (1, 2)]
    assert arrays(merge(shards, model, images=pixels)) == arrays(whole)
    plain = scan(model, pixels, LAYERS, 4, shard=(2, 2))
    with pytest.raises(UnitvisError, match="cannot be merged: inside is"):
        merge([shards[0], plain], model, images=pixels)
    np.save(tmp_path / "pixels.npy", np.zeros((3, 24, 24, 3), np.uint8))
    options: dict[str, Any] = {"transform": unitvis.Transform(), "out": tmp_path / "run"}
    scan(model, tmp_path / "pixels.npy", LAYERS, 2, inside=True, **options)
    assert scan(model, tmp_path / "pixels.npy", LAYERS, 2, inside=True, resume=True, **options)["0"].info["inside"]
    with pytest.raises(UnitvisError, match=r"holds the run of another scan .*inside is"):
        scan(model, tmp_path / "pixels.npy", LAYERS, 2, resume=True, **options)


def test_a_forged_rectangle_is_refused() -> None:
    model = padded()
    run = scan(model, images(9, 24), LAYERS, 2, inside=True)
    run.manifest["layers"]["0"]["inside"] = [0, 24, 0, 24]
    with pytest.raises(UnitvisError, match=r"positions whose boxes lie in the image are not those .*0 is"):
        verify(run, model)


class Padded(nn.Sequential):
    """Convolutions whose padding is all one value; layers are numbered as those of `nn.Sequential`."""

    value = 0.0

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                (high, wide), own = layer.padding, (layer.weight, layer.bias, layer.stride, 0, layer.dilation)
                x = nn.functional.conv2d(nn.functional.pad(x, (wide, wide, high, high), value=self.value), *own)
            else:
                x = layer(x)
        return x


class Cropped(nn.Module):
    """Leaves out the two outermost rows and columns, so that padding follows on pixels that have neighbours."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., 2:-2, 2:-2]


def dilated(cin: int, cout: int, kernel: int, padding: int, dilation: int = 1, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, kernel, stride, padding, dilation)


PADDED = {
    "a row whose box leaves out a tap in the padding": [dilated(3, 4, 3, 2, 2)],
    "before another": [dilated(3, 4, 3, 2, 2), nn.ReLU(), dilated(4, 4, 3, 1)],
    "after another": [dilated(3, 4, 3, 1), nn.ReLU(), dilated(4, 4, 3, 2, 2)],
    "of one pixel": [dilated(3, 4, 3, 2, 2), dilated(4, 4, 1, 1)],
    "gaps": [dilated(3, 6, 4, 1, 2), nn.SiLU(), dilated(6, 8, 2, 2)],
    "stride": [dilated(3, 4, 3, 1, 2, 2), nn.ReLU(), dilated(4, 4, 3, 2, 2)],
    "pooling, and up again": [
        dilated(3, 4, 3, 1),
        nn.MaxPool2d(2),
        nn.Upsample(scale_factor=2),
        dilated(4, 4, 3, 2, 2),
    ],
    "a crop": [Cropped(), dilated(3, 4, 3, 1)],
}


@pytest.mark.parametrize("name", PADDED)
def test_positions_inside_are_those_that_no_padding_changes(name: str) -> None:
    model, pixels = Padded(*PADDED[name]).double().eval(), images(2, 32).double()
    layer = str(len(model) - 1)
    with torch.no_grad():
        maps = []
        for Padded.value in (0.0, 1000.0):
            maps.append(model(pixels))
        Padded.value = 0.0
    unchanged = (maps[0] == maps[1]).all(dim=1).all(dim=0).numpy()
    plain = nn.Sequential(*model).float().eval()
    assert np.array_equal(unitvis.receptive_field(plain, layer, 32).positions_inside(), unchanged)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        top, bottom, left, right = scan(plain, pixels.float(), [layer], 2, inside=True)[layer].info["inside"]
    rows = np.flatnonzero(unchanged.any(axis=1))
    assert [top, bottom, left, right] == [rows[0], rows[-1] + 1] * 2


def test_the_largest_rectangle_is_that_of_brute_force() -> None:
    generator = np.random.default_rng(0)
    for _ in range(60):
        inside = generator.random(generator.integers(1, 7, 2)) < 0.75
        spans = [[(a, b) for b in range(n + 1) for a in range(b)] for n in inside.shape]
        sizes = [inside[a:b, c:d].size for a, b in spans[0] for c, d in spans[1] if inside[a:b, c:d].all()]
        found = largest_rectangle(inside)
        if found is None:
            assert not sizes
            continue
        top, bottom, left, right = found
        assert inside[top:bottom, left:right].all()
        assert (bottom - top) * (right - left) == max(sizes)
    rows = np.isin(np.arange(31), [1, *range(3, 28), 29])
    assert largest_rectangle(rows[:, None] & rows) == (3, 28, 3, 28)


def test_neurons_are_refused() -> None:
    with pytest.raises(UnitvisError, match="rank channels"):
        Recorder(padded(), LAYERS, unit="neuron", inside=True)


def test_units_that_win_at_the_border_are_counted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 5, padding=4)).eval()  # from the corner a box shows 1 of 25 pixels
    with torch.no_grad():
        model[0].weight[0], model[0].weight[1], model[0].bias[:] = -1.0, 1.0, 0.0
    run = scan(model, torch.rand(8, 3, 12, 12, generator=torch.Generator().manual_seed(0)), ["0"], 3)
    assert units_at_the_border(run, "0") == 1  # the unit that pixels only lower
    assert units_at_the_border(scan(model, images(8, 12), ["0"], 3, inside=True), "0") == 0
    assert units_at_the_border(scan(model, images(8, 12), ["0"], 3, unit="neuron"), "0") == 0
