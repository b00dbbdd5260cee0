"""Figures for print."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

import unitvis
from support.galleries import twelve_images
from unitvis import UnitvisError, cli
from unitvis.drawing import colours, patches
from unitvis.pages import figures
from unitvis.pages.pictures import PATCH_SIZE


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A run of arrays in a folder, with projections; unit 2 of the first layer is dead."""
    folder = tmp_path_factory.mktemp("figures")
    model, run = twelve_images(folder)
    run.save(folder / "run")
    unitvis.gallery(run, folder / "run", model, project=True)
    return model, folder / "run"


def holds(page: np.ndarray, tile: Image.Image) -> bool:
    """The tile stands somewhere on the page, pixel for pixel."""
    want = np.asarray(tile)
    first = (page[: -want.shape[0] + 1, : -want.shape[1] + 1] == want[0, 0]).all(axis=2)
    return any(
        np.array_equal(page[y : y + want.shape[0], x : x + want.shape[1]], want) for y, x in np.argwhere(first).tolist()
    )


def test_the_lectures_figure_has_nine_units_of_each_layer_and_no_dead_ones(shown: tuple[nn.Module, Path]) -> None:
    run = unitvis.load(shown[1])
    page = np.asarray(figures.figure(run, ["0", "2"], "lecture"))
    for layer, units in (("0", (0, 1, 3, 9)), ("2", (0, 8))):
        assert all(holds(page, run.tile(layer, unit, size=PATCH_SIZE)) for unit in units)
    for layer, unit in (("0", 2), ("0", 10), ("2", 9)):
        assert not holds(page, run.tile(layer, unit, size=PATCH_SIZE))
    assert page.shape[1] > 2 * 3 * 3 * PATCH_SIZE
    named = np.asarray(figures.figure(run, ["0"], "lecture", [11, 2]))
    assert holds(named, run.tile("0", 2, size=PATCH_SIZE))


def test_the_papers_figure_has_filters_and_projections_left_of_the_patches(shown: tuple[nn.Module, Path]) -> None:
    model, folder = shown
    run = unitvis.load(folder)
    page = figures.figure(run, ["0", "2"], "paper")
    pixels = np.asarray(page)
    assert holds(pixels, run.tile("2", 5, size=PATCH_SIZE))
    side = run.tile("0", 0, size=PATCH_SIZE).width
    weights = colours.signed(model[0].weight.detach()[3].numpy()).resize((side, side), Image.Resampling.NEAREST)
    assert holds(pixels, weights)
    beside = np.asarray(figures._left_tile(run, run["2"], 5, patches.crop_of(run, "2", None))).astype(int)
    assert holds(pixels, Image.fromarray(beside.astype(np.uint8)))
    for one in unitvis.project(model, run, "2", 5):
        box = patches.drawn_box(run["2"], 5, one.rank, patches.crop_of(run, "2", None), (24, 24))
        x, y = (place * (PATCH_SIZE + PATCH_SIZE // 24) for place in (one.rank % 3, one.rank // 3))
        want = np.asarray(one.picture(box, PATCH_SIZE)).astype(int)
        assert abs(beside[y : y + PATCH_SIZE, x : x + PATCH_SIZE] - want).mean() < 6  # JPEG
    assert len(list(unitvis.project(model, run, "2", 5))) == 9
    with pytest.raises(UnitvisError, match=r"no projections of layer '2' that are cut as its patches are \(image\)"):
        figures.figure(run, ["2"], "paper", crop="image")
    with pytest.raises(UnitvisError, match="lecture, paper, not 'poster'"):
        figures.figure(run, ["2"], "poster")


def test_the_command_draws_figures_in_print_resolution(
    shown: tuple[nn.Module, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, target = str(shown[1]), tmp_path / "page.png"
    assert cli.main(["sheet", run, "0", "2", "--figure", "paper", "--units", "0,1,3,4", "-o", str(target)]) == cli.DONE
    with Image.open(target) as page:
        assert round(page.info["dpi"][0]) == 300
    for arguments, message in (
        (["0", "2"], "several layers go on one page as a figure"),
        (["0", "--figure", "lecture", "--size", "20"], "leave out --size"),
    ):
        assert cli.main(["sheet", run, *arguments, "-o", str(target)]) == cli.USAGE
        assert message in capsys.readouterr().err
