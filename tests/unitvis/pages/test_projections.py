"""Projections that a run keeps: only those that are drawn are computed, each once, and no others are believed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import unitvis
from support.commands import call
from support.foreign import CONTENTS, FOREIGN, put, refusal
from support.galleries import data, twelve_images
from unitvis import UnitvisError, cli
from unitvis.attribution import deconvnet
from unitvis.drawing import sheets
from unitvis.drawing.sheets import PATCH_SIZE
from unitvis.pages import figures, projections, sprites

NETWORK = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 5), nn.ReLU(), nn.Conv2d(12, 10, 3)).eval()
    model[0].bias.data[2] = -100.0
    return model
"""


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A run without a gallery, and its network; unit 2 of the first layer is dead."""
    folder = tmp_path_factory.mktemp("kept")
    model, run = twelve_images(folder)
    return model, run.save(folder / "run")


@pytest.fixture
def shown(scanned: tuple[nn.Module, Path], tmp_path: Path) -> tuple[nn.Module, unitvis.Run]:
    """The network and a copy of the run that a test may change."""
    return scanned[0], unitvis.load(shutil.copytree(scanned[1], tmp_path / "run"))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """(slot, neuron) of every signal that is carried back from here on."""
    seeds: list[Any] = []
    passes = deconvnet._ForwardPass.signals
    monkeypatch.setattr(deconvnet._ForwardPass, "signals", lambda *a, **k: seeds.extend(a[1]) or passes(*a, **k))
    return seeds


def units_of(seeds: list[Any]) -> list[int]:
    """The units among computed signals, each once."""
    return sorted({neuron[0] for _, neuron in seeds})


def paper(run: unitvis.Run, units: list[int], layer: str = "2", **options: Any) -> Image.Image:
    return figures.figure(run, [layer], "paper", units, **options).image()


def kept(run: unitvis.Run) -> list[str]:
    assert run.folder
    folder = run.folder / "projections"
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_figure_computes_what_it_draws_once(
    shown: tuple[nn.Module, unitvis.Run], computed: list[Any], tmp_path: Path
) -> None:
    model, run = shown
    page = paper(run, [5, 7], model=model)
    assert units_of(computed) == [5, 7]
    assert len(computed) == run["2"].fired[[5, 7]].sum()
    assert kept(run) == ["2/deconvnet-rf/5.jpg", "2/deconvnet-rf/7.jpg"]
    computed.clear()
    again = unitvis.load(tmp_path / "run")
    assert np.array_equal(np.asarray(paper(again, [5, 7])), np.asarray(page))  # without the network
    paper(again, [8, 5], model=model)
    assert units_of(computed) == [8]
    computed.clear()
    for options, found in (
        ({"project": "guided"}, "2/guided-rf/5.jpg"),
        ({"crop": "image"}, "2/deconvnet-image/5.jpg"),
    ):
        assert not np.array_equal(np.asarray(paper(again, [5, 7], model=model, **options)), np.asarray(page))
        assert units_of(computed) == [5, 7]  # another picture, not the kept one
        computed.clear()
        assert found in kept(run)
    told = refusal(lambda: paper(again, [5, 8], project="guided"))
    assert "no projections of layer '2' that are cut as its patches are (rf) by the method guided, of unit 8" in told
    other = nn.Sequential(nn.Conv2d(3, 12, 5), nn.ReLU(), nn.Conv2d(12, 10, 3)).eval()
    assert "the model is not the one that was scanned" in refusal(lambda: paper(again, [5], model=other))


def test_a_bar_counts_what_is_computed(shown: tuple[nn.Module, unitvis.Run], monkeypatch: pytest.MonkeyPatch) -> None:
    model, run = shown
    counts: list[Any] = []

    @contextmanager
    def bar(total: int, what: str, **_: Any) -> Iterator[SimpleNamespace]:
        counts.append([total, what, 0])
        yield SimpleNamespace(update=lambda: counts[-1].__setitem__(2, counts[-1][2] + 1))

    monkeypatch.setattr(projections, "bar", bar)
    paper(run, [5], model=model)
    paper(run, [5, 6, 7], model=model)
    assert counts == [[9, "project", 9], [18, "project", 18]]


def test_what_is_kept_is_each_unit_s_own_projections(shown: tuple[nn.Module, unitvis.Run]) -> None:
    """JPEG: a mean error of 6 levels of 255 is allowed, which another picture would exceed many times."""
    model, run = shown
    (one,) = projections.projected(run, {"2": [5]}, "guided", None, model)
    found = list(unitvis.project(model, run, "2", 5, method="guided"))
    assert [(5, projection.rank) for projection in found] == list(one.cells(9))
    for projection in found:
        cell = np.asarray(one.cells(9)[5, projection.rank]).astype(int)
        assert abs(cell - np.asarray(projection.picture(size=PATCH_SIZE))).mean() < 6
    assert (one.layer, one.unit, one.method) == ("2", 5, "guided backpropagation")


def test_ctrl_c_keeps_finished_units_and_the_same_command_goes_on(
    shown: tuple[nn.Module, unitvis.Run],
    computed: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = shown[1]
    (tmp_path / "net.py").write_text(NETWORK)
    command = ["sheet", run.folder, "2", "--figure", "paper", "--model", tmp_path / "net.py:net", "--units", "2/3-6"]
    command += ["-o", tmp_path / "page.png"]
    picture = deconvnet.Projection.picture

    def interrupted(projection: unitvis.Projection, *rest: Any) -> Image.Image:
        if projection.unit == 5 and projection.rank == 4:
            raise KeyboardInterrupt
        return picture(projection, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(deconvnet.Projection, "picture", interrupted)
        code, _, told = call(capsys, *command)
    assert code == 130
    assert told == (
        f"unitvis: interrupted: the projections of finished units are kept in {run.folder}; the same command goes on"
    )
    assert not (tmp_path / "page.png").exists()
    assert kept(run) == ["2/deconvnet-rf/3.jpg", "2/deconvnet-rf/4.jpg"]
    computed.clear()
    assert call(capsys, *command)[0] == cli.DONE
    assert units_of(computed) == [5, 6]
    drawn = np.asarray(Image.open(tmp_path / "page.png"))
    assert np.array_equal(drawn, np.asarray(paper(run, [3, 4, 5, 6])))


@pytest.mark.parametrize(
    ("what", "labelled"), [*((what, False) for what in FOREIGN), *((what, True) for what in CONTENTS if what != "none")]
)
def test_what_was_not_kept_is_not_shown(
    what: str,
    labelled: bool,
    shown: tuple[nn.Module, unitvis.Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """labelled: with a label that is right, as somebody could write who wants it to be believed."""
    model, run = shown
    page = paper(run, [3], model=model)
    file = tmp_path / "run" / "projections" / "2" / "deconvnet-rf" / "3.jpg"
    reason = put(what, file, tmp_path, monkeypatch)
    if what in CONTENTS and what != "none":
        content = file.read_bytes()
        if labelled:
            store = projections._stores(run, ["2"], "deconvnet", None)["2"]
            store.keep(projections.Projected("2", 3, "deconvnet", content))
        else:
            reason = "it is not a picture that was kept"
    told = refusal(lambda: paper(run, [3]))
    if what == "none":
        assert "the run has no projections of layer '2'" in told
    else:
        assert f"3.jpg cannot be used: {reason.split('(')[0]}" in told
        assert "draw it again with the network: --model MODEL" in told
    assert not (tmp_path / "executed").exists()
    if what != "a folder":
        assert np.array_equal(np.asarray(paper(run, [3], model=model)), np.asarray(page))  # computed again
        assert np.array_equal(np.asarray(paper(run, [3])), np.asarray(page))


def test_kept_projections_of_another_run_unit_or_content_are_not_shown(
    shown: tuple[nn.Module, unitvis.Run], tmp_path: Path, computed: list[Any]
) -> None:
    model, run = shown
    page = np.asarray(paper(run, [3, 4], model=model))
    folder = tmp_path / "run" / "projections" / "2" / "deconvnet-rf"
    content, fourth = (folder / "3.jpg").read_bytes(), (folder / "4.jpg").read_bytes()
    label = json.loads(content[6 : 4 + int.from_bytes(content[4:6], "big")])
    assert label["method"] == "deconvnet (no max-pooling lies below, so the same for every image)"
    other_words = content.replace(b"same for every image", b"best for every image")
    sprite = content[:-400] + bytes([content[-400] ^ 1]) + content[-399:]
    for wrong in (fourth, other_words, sprite, content[:-50]):
        (folder / "3.jpg").write_bytes(wrong)
        assert "no projections of layer '2'" in (told := refusal(lambda: paper(run, [3]))) or "was kept" in told
        computed.clear()
        assert np.array_equal(np.asarray(paper(run, [3, 4], model=model)), page)
        assert units_of(computed) == [3]

    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(3, 12, 5), nn.ReLU(), nn.Conv2d(12, 10, 3)).eval()
    unitvis.scan(network, run.source, transform=unitvis.Transform(), out=(other := tmp_path / "other"), progress=False)
    shutil.copytree(tmp_path / "run" / "projections", other / "projections")
    assert "no projections of layer '2'" in refusal(lambda: paper(unitvis.load(other), [3]))


@pytest.mark.parametrize("name", ["projections", "projections/2", "projections/2/deconvnet-rf"])
def test_nothing_is_kept_through_a_link(name: str, shown: tuple[nn.Module, unitvis.Run], tmp_path: Path) -> None:
    model, run = shown
    paper(run, [3], model=model)
    elsewhere = Path(shutil.move(tmp_path / "run" / name, tmp_path / "elsewhere"))
    (tmp_path / "run" / name).symlink_to(elsewhere)
    assert "it is reached through a link" in refusal(lambda: paper(run, [3]))
    assert "is a link, so nothing is written into it" in refusal(lambda: paper(run, [4], model=model))
    assert not list(elsewhere.rglob("4.jpg"))


def test_projections_are_drawn_where_they_cannot_be_kept(
    shown: tuple[nn.Module, unitvis.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    model, run = shown
    monkeypatch.setattr(projections, "replacing", full)
    told_of = "cannot be kept in .*: No space left on device; they are computed again"
    with pytest.warns(UserWarning, match=told_of) as told:
        page = np.asarray(paper(run, [3, 4], model=model))
    assert len(told) == 1
    monkeypatch.undo()
    assert np.array_equal(page, np.asarray(paper(run, [3, 4], model=model)))
    assert kept(run)
    run.save(run.folder, overwrite=True)
    assert not (run.folder / "projections").exists()
    run.folder = None
    assert np.array_equal(page, np.asarray(paper(run, [3, 4], model=model)))  # of a run that was never saved


def tiles(path: Path, units: int) -> list[np.ndarray]:
    """The tiles of a sprite with six columns of tiles of nine cells."""
    with Image.open(path) as image:
        sprite = np.asarray(image).astype(int)
    side = 3 * PATCH_SIZE
    places = [divmod(number, 6) for number in range(units)]
    return [sprite[side * row : side * (row + 1), side * column : side * (column + 1)] for row, column in places]


def test_the_gallery_shows_chosen_units_and_those_that_are_kept(
    scanned: tuple[nn.Module, Path], computed: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(scanned[1], tmp_path / "run"))
    run = unitvis.load(folder)
    (tmp_path / "net.py").write_text(NETWORK)
    render = ["render", folder, "--model", tmp_path / "net.py:net", "--project"]
    layer = sprites.layer_folder(folder, "2")

    assert call(capsys, *render, "--units", "2/1-2")[0] == cli.DONE
    assert units_of(computed) == [1, 2]
    assert data(layer / "layer.js")["projected"] == [1, 2]
    assert data(sprites.layer_folder(folder, "0") / "layer.js")["projections"] is None
    paper(run, [7], model=scanned[0])
    computed.clear()
    assert call(capsys, *render, "--units", "2/4")[0] == cli.DONE
    assert units_of(computed) == [4]
    assert data(layer / "layer.js")["projected"] == [1, 2, 4, 7]
    by_deconvnet = tiles(layer / "projections-0.jpg", 10)
    assert not (sprites.layer_folder(folder, "0") / "projections-0.jpg").exists()
    for unit, found in enumerate(by_deconvnet):
        want = np.full((336, 336, 3), sheets.EMPTY)
        if unit in (1, 2, 4, 7):
            with Image.open(folder / "projections" / "2" / "deconvnet-rf" / f"{unit}.jpg") as tile:
                want = np.asarray(tile)
        assert abs(found - want.astype(int)).mean() < 1
    computed.clear()
    assert call(capsys, *render, "guided", "--units", "2/4")[0] == cli.DONE
    assert units_of(computed) == [4]
    assert data(layer / "layer.js")["projections"] == "guided backpropagation"
    assert data(layer / "layer.js")["projected"] == [4]  # the others' pictures are of the other method
    guided = tiles(layer / "projections-0.jpg", 10)
    assert abs(guided[4] - by_deconvnet[4]).mean() > 1
    assert abs(guided[7] - np.array(sheets.EMPTY)).mean() < 1
    for arguments, message in (
        (
            ["render", folder, "--units", "0-3"],
            "--units chooses of which units projections are drawn; it needs --project",
        ),
        ([*render, "--units", "0-10"], "layer '2' has no unit 10; it has 10, from 0"),
        ([*render, "--units", "conv9/1"], "units are chosen of layer 'conv9', which is not drawn here; drawn are 0, 2"),
    ):
        code, _, told = call(capsys, *arguments)
        assert code == cli.USAGE
        assert message in told


def activated(activation: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), activation, nn.MaxPool2d(2), nn.Conv2d(4, 3, 3)).eval()


@pytest.mark.parametrize(
    ("activation", "project", "said"),
    [
        (nn.ReLU(), True, "deconvnet"),
        (nn.ReLU(), "guided", "guided backpropagation"),
        (nn.Sigmoid(), "deconvnet", "the ordinary gradient through Sigmoid"),
        (nn.Tanh(), "guided", "the ordinary gradient through Tanh"),
    ],
)
def test_a_figure_says_what_its_left_halves_are(activation: nn.Module, project: bool | str, said: str) -> None:
    model = activated(activation)
    run = unitvis.scan(model, torch.rand(4, 3, 14, 14), ["0", "3"], k=2, progress=False)
    svg = figures.figure(run, ["0", "3"], "paper", [1], model=model, project=project).svg()
    text = " ".join(re.findall("<text[^>]*>([^<]*)", svg))
    found = re.findall("(?:left|above): (.*?) (?:1 |$)", text)  # the unit's number follows
    assert found == ["filters, the weights of a unit", said]
    assert "Projections and filters: grey is 0, and each picture has its own scale." in svg
    patches_alone = figures.figure(run, ["0", "3"], "lecture", [1]).svg()
    assert not re.search("left|above|grey", patches_alone.partition("</style>")[2])


def test_methods_are_named_and_options_that_would_do_nothing_refused(
    shown: tuple[nn.Module, unitvis.Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UnitvisError, match="project must be one of deconvnet, guided, not 'gradients'"):
        paper(shown[1], [3], model=shown[0], project="gradients")
    sheet = ["sheet", tmp_path / "run", "2", "-o", tmp_path / "page.png"]
    for arguments, message in (
        (["--model", "x.py:net"], "--model and --project are for projections, which --figure paper alone draws"),
        (["--figure", "lecture", "--project", "guided"], "--model and --project are for projections"),
        (["--figure", "paper", "--weights", "w.pt"], "--weights needs --model"),
    ):
        code, _, told = call(capsys, *sheet, *arguments)
        assert code == cli.USAGE
        assert message in told
    joined = cli.options.with_joined_values(["scan", "--project", "guided", "net", "photos", "--project", "net"])
    assert joined == ["scan", "--project=guided", "net", "photos", "--project=deconvnet", "net"]
