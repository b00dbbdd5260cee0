"""The overview: which units are chosen, and what the slide shows of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import unitvis
from support.commands import call
from support.scans import scan
from unitvis.drawing.overview import MAX_CANDIDATES, MAX_LAYERS, cells_of, firing_units, most_different, overview
from unitvis.errors import UnitvisError

COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}


def coloured(copies: int = 4) -> nn.Sequential:
    """Units that respond to red, green and blue in turns, and one that no image excites."""
    model = nn.Sequential(nn.Conv2d(3, 3 * copies + 1, 3), nn.ReLU()).eval()
    with torch.no_grad():
        model[0].weight.zero_()
        for unit in range(3 * copies):
            model[0].weight[unit, unit % 3] = 1.0 + unit // 3
            model[0].weight[unit, (unit + 1) % 3] = model[0].weight[unit, (unit + 2) % 3] = -1.0
        model[0].bias.zero_()
        model[0].bias[-1] = -1.0
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> unitvis.Run:
    folder = tmp_path_factory.mktemp("overview")
    for number in range(9):
        for name, colour in COLOURS.items():
            Image.new("RGB", (12, 12), tuple(value and value + number for value in colour)).save(
                folder / f"{name}{number}.png"
            )
    return scan(coloured(), folder, ["0"], 9, transform=unitvis.Transform(), out=folder.parent / f"{folder.name}-run")


def test_units_differ_as_much_as_they_can(run: unitvis.Run) -> None:
    firing = firing_units(run["0"])
    assert firing == list(range(12))
    chosen = most_different(run, "0", firing, cells_of(run, {"0": firing})["0"])
    assert len(set(chosen)) == 9
    assert {unit % 3 for unit in chosen[:3]} == {0, 1, 2}


def test_the_slide_shows_the_chosen_patches(run: unitvis.Run) -> None:
    page = np.asarray(run.overview(["0"]))
    shown = {tuple(pixel) for pixel in np.unique(page.reshape(-1, 3), axis=0).tolist()}
    assert {(208, 0, 0), (0, 208, 0), (0, 0, 208)} <= shown
    assert np.array_equal(page, np.asarray(overview(run)))  # the only layer


def test_layers_are_chosen_evenly_and_dead_ones_are_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(9)], nn.ReLU()).eval()
    with torch.no_grad():
        model[8].bias[:] = -1e6
    whole = scan(model, torch.rand(12, 3, 6, 6), None, 2)
    page = overview(whole)
    assert page.width == overview(whole, ["0", "2", "4", "6", "8"]).width
    assert np.array_equal(np.asarray(page), np.asarray(overview(whole, ["0", "2", "4", "6", "8"])))
    with pytest.raises(UnitvisError, match=rf"at most {MAX_LAYERS} layers, not {MAX_LAYERS + 1}"):
        overview(whole, ["0"] * (MAX_LAYERS + 1))
    with pytest.raises(UnitvisError, match="the run has no layer 'x'"):
        overview(whole, ["x"])


def test_of_many_units_some_are_looked_at() -> None:
    torch.manual_seed(0)
    run = scan(nn.Sequential(nn.Conv2d(3, 2 * MAX_CANDIDATES, 1)).eval(), torch.rand(12, 3, 6, 6), None, 2)
    read = []
    cut = run.source.picture
    run.source.picture = lambda *args: read.append(args[0]) or cut(*args)
    assert overview(run).height > 300
    assert len(read) <= 12  # each image once


def test_the_command_writes_a_picture(run: unitvis.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = call(capsys, "overview", run.folder)
    assert (code, printed) == (
        0,
        f"{run.folder / 'overview.png'}: {run.overview().width} x {run.overview().height} pixels\n",
    )
    assert call(capsys, "overview", run.folder, "0", "-o", tmp_path / "slide.doc")[2].endswith(".svg or .pdf")
