"""A run that takes the place of another leaves all files that unitvis did not write where they are."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import unitvis
from unitvis import UnitvisError
from unitvis.drawing.sheets import render
from unitvis.scanning.merge import merge

RUN = {"images.jsonl", "manifest.json", "sample.npz", "top.npz"}  # files of a run that is not drawn
OPTIONS = {"transform": unitvis.Transform(mean=(0.5,) * 3, std=(0.25,) * 3), "progress": False, "device": "cpu"}
# Files of a user in the folders of pictures, each with a name that unitvis does not give there.
MINE = [
    "sheets/mine.txt",
    "sheets/photo.png",
    "sheets/0.jpg",
    "sheets/photos/0.png",
    "gallery/mine.txt",
    "gallery/index.html",
    "gallery/images/007.jpg",
    "gallery/images/photo.jpg",
    "gallery/images/1.png",
    "gallery/layers/notes.txt",
    "gallery/layers/0/patches.jpg",
    "gallery/layers/0/more/patches-0.jpg",
    "projections/mine.txt",
    "projections/0/deconvnet-rf/best.jpg",
    "projections/0/mine-rf/0.jpg",
]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3)).eval()


def photographs(folder: Path, names: str = "{}.png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)
        Image.fromarray(pixels).save(folder / names.format(number))
    return folder


def scan(images: Path, out: Path | None = None, seed: int = 0, **options: object) -> unitvis.Run:
    return unitvis.scan(network(seed), str(images), out=out, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images and a run of them with all that unitvis draws: sheets, gallery, projections."""
    folder = tmp_path_factory.mktemp("drawn")
    run = scan(photographs(folder / "images"), folder / "run")
    render(run, folder / "run")
    unitvis.gallery(run, folder / "run", network(), project=True)
    return folder


@pytest.fixture
def images(drawn: Path) -> Path:
    return drawn / "images"


@pytest.fixture
def out(drawn: Path, tmp_path: Path) -> Path:
    """A copy of the drawn run."""
    return shutil.copytree(drawn / "run", tmp_path / "run")


def files(folder: Path) -> set[str]:
    """Names of all files but the state that a merged run has."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {"state.npz"}


def by_scanning(images: Path, out: Path) -> None:
    scan(images, out, seed=1, overwrite=True)


def by_saving(images: Path, out: Path) -> None:
    scan(images, seed=1).save(out, overwrite=True)


def by_merging(images: Path, out: Path) -> None:
    shards = [scan(images, seed=1, shard=(number, 2)) for number in (1, 2)]
    merge(shards, network(1), images=str(images), out=out, overwrite=True, device="cpu")


WAYS = [by_scanning, by_saving, by_merging]


@pytest.mark.parametrize("overwrite", WAYS)
def test_files_of_the_user_stay_and_all_others_go(
    overwrite: Callable[[Path, Path], None], images: Path, out: Path, tmp_path: Path
) -> None:
    assert {name.split("/")[0] for name in files(out)} == RUN | {"index.html", "sheets", "gallery", "projections"}
    shutil.copytree(out, tmp_path / "alone")
    for name in MINE:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(name)
    (tmp_path / "elsewhere.jpg").write_text("mine")
    (out / "gallery/images/9.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    with pytest.warns(UserWarning, match=r"kept in .*run, because unitvis did not write it: .*sheets/0.jpg"):
        overwrite(images, out)
    assert files(out) == RUN | {*MINE, "gallery/images/9.jpg"}
    assert all((out / name).read_text() == name for name in MINE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        overwrite(images, tmp_path / "alone")
    assert {path.name for path in (tmp_path / "alone").iterdir()} - {
        "state.npz"
    } == RUN  # not even empty folders of pictures


def test_the_warning_comes_when_the_run_is_saved(images: Path, out: Path) -> None:
    (out / "sheets/mine.txt").write_text("mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="kept in"):
            by_saving(images, out)
    assert unitvis.load(out)["0"].values.tobytes() == scan(images, seed=1)["0"].values.tobytes()


def test_sheets_of_a_run_with_a_damaged_manifest_go(images: Path, out: Path) -> None:
    (out / "manifest.json").write_text("{")
    by_saving(images, out)
    assert files(out) == RUN


@pytest.mark.parametrize("overwrite", WAYS)
def test_images_inside_the_run_are_scanned_and_stay(overwrite: Callable[[Path, Path], None], out: Path) -> None:
    inside = photographs(out / "sheets/photos")
    with pytest.warns(UserWarning, match="kept in .*sheets/photos/0.png"):
        overwrite(inside, out)
    assert files(out) == RUN | {f"sheets/photos/{number}.png" for number in range(5)}
    assert unitvis.load(out).manifest["images"] == 5


@pytest.mark.parametrize("overwrite", WAYS)
@pytest.mark.parametrize("linked", [False, True])
def test_images_with_names_of_pictures_are_refused(
    overwrite: Callable[[Path, Path], None], linked: bool, out: Path, tmp_path: Path
) -> None:
    inside = photographs(out / "gallery/images", "{}.jpg")
    if linked:
        inside = tmp_path / "links"
        inside.mkdir()
        for path in (out / "gallery/images").iterdir():
            (inside / f"photo {path.name}").symlink_to(path)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UnitvisError, match=r"images/\d.jpg is one of the images and has the name of a picture of the"):
        overwrite(inside, out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_gallery_in_the_place_of_another_leaves_files_of_the_user(images: Path, tmp_path: Path) -> None:
    first, second = scan(images), scan(images, seed=1, layers="2")
    unitvis.gallery(first, tmp_path / "pages")
    (tmp_path / "pages/gallery/mine.txt").write_text("mine")
    with pytest.warns(UserWarning, match=r"kept in .*pages, because unitvis did not write it: gallery/mine.txt"):
        unitvis.gallery(second, tmp_path / "pages")
    assert (tmp_path / "pages/gallery/mine.txt").read_text() == "mine"
    assert [path.name for path in (tmp_path / "pages/gallery/layers").iterdir()] == ["2"]


class Stopped(BaseException):
    """In the place of a process that is killed."""


@pytest.mark.parametrize("name", ["index.html", "drawn.json", "0.png"])
def test_a_kill_while_the_old_run_is_removed_costs_neither(
    name: str, images: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before a file is removed, the old run is whole, and the new scan can be resumed."""
    old, unlink = unitvis.load(out), Path.unlink

    def stop(path: Path, missing_ok: bool = False) -> None:
        if path.name == name:
            raise Stopped
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stop)
        with pytest.raises(Stopped):
            by_scanning(images, out)
    assert unitvis.load(out)["0"].values.tobytes() == old["0"].values.tobytes()
    scan(images, out, seed=1, resume=True)
    assert unitvis.load(out)["0"].values.tobytes() == scan(images, seed=1)["0"].values.tobytes()
    assert not (out / "progress.npz").exists()


@pytest.mark.parametrize("link", ["gallery", "gallery/images", "gallery/layers", "sheets", "projections"])
def test_nothing_is_removed_behind_a_link(link: str, images: Path, out: Path, tmp_path: Path) -> None:
    """Files that bear the names of pictures, in a folder of the user that a folder of the run leads to."""
    behind = tmp_path / "elsewhere"
    if (out / link).exists():
        shutil.copytree(out / link, behind)
        shutil.rmtree(out / link)
    for name in ("index.js", "images/1.jpg", "0.jpg", "0.png", "0/patches-0.jpg", "deconvnet-rf/0.jpg"):
        (behind / name).parent.mkdir(parents=True, exist_ok=True)
        (behind / name).write_text("mine")
    (behind / "drawn.json").write_text("{}")  # of no drawing that is known, so that all is drawn anew
    (out / link).symlink_to(behind)
    before = {path: path.read_bytes() for path in behind.rglob("*") if path.is_file()}
    run = unitvis.load(out)
    for command in (lambda: unitvis.gallery(run, out, network()), lambda: scan(images, out, seed=1, overwrite=True)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with suppress(UnitvisError):
                command()
        assert {path: path.read_bytes() for path in behind.rglob("*") if path.is_file()} == before
