"""How often files are read and decoded while a run is drawn, and how many files a gallery has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import unitvis
from support.galleries import network, photographs
from unitvis.decoding import contents, cutting, options
from unitvis.drawing import hands
from unitvis.pages import draw, sprites
from unitvis.sources import encoded

TRANSFORM = unitvis.Transform(resize=(33, 45), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, key: Callable[..., object]) -> Counter[object]:
    """Count the calls of a function by key(*arguments)."""
    counts: Counter[object] = Counter()
    function = getattr(module, name)

    def counting(*arguments: Any, **named: Any) -> Any:
        counts[key(*arguments)] += 1
        return function(*arguments, **named)

    monkeypatch.setattr(module, name, counting)
    return counts


@pytest.mark.parametrize("packed", [False, True])
def test_each_winning_file_is_read_hashed_and_decoded_once(
    packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For sheets, patches, whole images and response maps together."""
    photos = photographs(tmp_path / "photos")
    data = {path.read_bytes(): path.name for path in photos.iterdir()}
    images = photos
    if packed:
        unitvis.pack(photos, images := tmp_path / "pack.npy", TRANSFORM, progress=False)
    unitvis.scan(network(), images, transform=TRANSFORM, out=tmp_path / "run", progress=False)
    run = unitvis.load(tmp_path / "run")
    winners = {run.records[image]["name"] for image in run.winners.tolist()}
    assert len(winners) == 12

    read = counted(monkeypatch, contents.FileContents, "read", lambda _, place: Path(bytes(place).decode()).name)
    hashes = [counted(monkeypatch, module, "digest", lambda found: data[found]) for module in (cutting, encoded)]
    decoded = counted(monkeypatch, options, "decode_sized", lambda found, *_: data[found])
    draw(run, tmp_path / "run", network(), with_sheets=True)
    once = dict.fromkeys(winners, 1)
    assert dict(read) == once
    assert dict(sum(hashes, Counter())) == once
    assert dict(decoded) == once
    assert len(list((tmp_path / "run" / "gallery").rglob("responses-*.png"))) == 2
    assert len(list((tmp_path / "run" / "sheets").iterdir())) == 2


@pytest.mark.parametrize("scaled", [False, True])
def test_response_maps_are_those_of_the_pixels_that_were_scanned(scaled: bool, tmp_path: Path) -> None:
    """Also where the scan decoded JPEG files at a fraction of their size, and patches are cut from the whole."""
    (tmp_path / "photos").mkdir()
    random = np.random.default_rng(3)
    for number in range(hands.MIN_FILES):  # so many that processes cut them
        coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((320, 240), Image.Resampling.BICUBIC).save(tmp_path / "photos" / f"{number:02}.jpg")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 3)).eval()
    transform = unitvis.Transform(resize=(30, 40))
    run = unitvis.scan(model, tmp_path / "photos", transform=transform, k=40, scaled=scaled, progress=False)
    assert len(run.winners) >= hands.MIN_FILES * 5 // 8
    folder = unitvis.gallery(run, tmp_path / "g", model).parent
    with Image.open(sprites.layer_folder(folder, "0") / "responses-0.png") as image:
        found = np.asarray(image)
    top = run["0"]
    for unit in range(2):
        for rank in range(25):  # that are drawn
            pixels = transform.normalize(run.source.read(int(top.images[unit, rank]))[None])
            response = model(pixels)[0, unit].detach().clamp(min=0).numpy()
            median = np.sort(response, axis=None)[response.size // 2 - 1]
            want = np.ceil((response - median).clip(min=0) / (response.max() - median) * 15)
            row, column = rank // 5 * 28, (unit * 5 + rank % 5) * 38
            np.testing.assert_array_equal(found[row : row + 28, column : column + 38], want)


def test_a_gallery_of_many_units_has_few_files_of_bounded_size(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 100, 2)).eval()
    run = unitvis.scan(model, torch.rand(9, 3, 5, 4), progress=False)
    folder = unitvis.gallery(run, tmp_path / "g", model, project=True).parent
    names = sorted(path.name for path in sprites.layer_folder(folder, "0").iterdir())
    kinds = {"filters": "png", "patches": "jpg", "projections": "jpg", "responses": "png"}
    blocks = [f"{kind}-{first}.{ending}" for kind, ending in kinds.items() for first in (0, 36, 72)]
    assert names == sorted(["layer.js", "strip.jpg", *blocks])
    for path in folder.rglob("*.jpg"):
        with Image.open(path) as image:
            assert max(image.size) <= 2048
    with Image.open(sprites.layer_folder(folder, "0") / "patches-72.jpg") as image:
        sprite = np.asarray(image).astype(int)
    assert sprite.shape == (5 * 336, 6 * 336, 3)  # of 28 units
    assert abs(sprite[4 * 336 + 1 :, 4 * 336 + 1 :] - 238).max() < 8  # nothing stands behind the last one
    for unit, rank in ((72, 0), (85, 4), (99, 8)):
        row, column = divmod(unit - 72, 6)
        y, x = 336 * row + 112 * (rank // 3), 336 * column + 112 * (rank % 3)
        patch = np.asarray(run.patch("0", unit, rank, size=112)).astype(int)
        assert abs(sprite[y : y + 112, x : x + 112] - patch).mean() < 6
