"""Figures for print."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import unitvis
from support.foreign import FOREIGN, put, refusal
from support.galleries import twelve_images
from unitvis import UnitvisError, cli
from unitvis.drawing import colours, patches
from unitvis.drawing.sheets import PATCH_SIZE
from unitvis.pages import figures


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
    page = np.asarray(figures.figure(run, ["0", "2"], "lecture").image())
    for layer, units in (("0", (0, 1, 3, 9)), ("2", (0, 8))):
        assert all(holds(page, run.tile(layer, unit, size=PATCH_SIZE)) for unit in units)
    for layer, unit in (("0", 2), ("0", 10), ("2", 9)):
        assert not holds(page, run.tile(layer, unit, size=PATCH_SIZE))
    assert page.shape[1] > 2 * 3 * 3 * PATCH_SIZE
    named = np.asarray(figures.figure(run, ["0"], "lecture", [11, 2]).image())
    assert holds(named, run.tile("0", 2, size=PATCH_SIZE))


def test_the_papers_figure_has_filters_and_projections_left_of_the_patches(shown: tuple[nn.Module, Path]) -> None:
    model, folder = shown
    run = unitvis.load(folder)
    page = figures.figure(run, ["0", "2"], "paper").image()
    pixels = np.asarray(page)
    assert holds(pixels, run.tile("2", 5, size=PATCH_SIZE))
    side = run.tile("0", 0, size=PATCH_SIZE).width
    weights = colours.signed(model[0].weight.detach()[3].numpy()).resize((side, side), Image.Resampling.NEAREST)
    assert holds(pixels, weights)
    beside = np.asarray(
        figures._left_halves(run, {"2": [5]}, None, None, "deconvnet", None)["2"].draw(5, PATCH_SIZE)
    ).astype(int)
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


@pytest.fixture
def copy(shown: tuple[nn.Module, Path], tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(shown[1], tmp_path / "run"))


@pytest.mark.parametrize("what", FOREIGN)
def test_pictures_that_the_gallery_never_drew_are_refused(
    what: str, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = put(what, picture := copy / "gallery" / "layers" / "0" / "filters-0.png", tmp_path, monkeypatch)
    told = refusal(lambda: figures.figure(unitvis.load(copy), ["0"], "paper", [3]))
    assert re.search(
        rf"^the picture \S*{picture.name} cannot be used: {reason}.*; draw it again: unitvis render RUN --model", told
    )
    assert not (tmp_path / "executed").exists()


def test_pictures_of_another_run_are_not_shown(copy: Path, tmp_path: Path) -> None:
    """Where somebody put the files of a run beside the gallery and the projections of another one."""
    torch.manual_seed(1)
    other = nn.Sequential(nn.Conv2d(3, 12, 5), nn.ReLU(), nn.Conv2d(12, 10, 3)).eval()
    source = unitvis.load(copy).manifest["source"]["path"]
    unitvis.scan(other, source, transform=unitvis.Transform(), out=tmp_path / "other", progress=False)
    for name in ("manifest.json", "top.npz", "sample.npz", "images.jsonl"):
        shutil.copy(tmp_path / "other" / name, copy / name)
    for layer in ("0", "2"):
        with pytest.raises(UnitvisError, match=f"no projections of layer '{layer}'"):
            figures.figure(unitvis.load(copy), [layer], "paper")
