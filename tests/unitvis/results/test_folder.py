"""A run that is there stays there until the new one is on the disk."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import unitvis
from unitvis import UnitvisError


@functools.cache
def scanned(seed: int) -> unitvis.Run:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU()).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 9, 3), np.uint8)
    return unitvis.scan(model, pixels, transform=unitvis.Transform(), progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("writer", ["numpy.savez_compressed", "pathlib.Path.write_text"])
def test_a_full_disk_does_not_cost_the_run_that_was_there(
    writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = scanned(0).save(tmp_path / "run")
    (folder / "index.html").write_text("pages")
    before = contents(folder)
    with monkeypatch.context() as patch:

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(writer, full)
        with pytest.raises(UnitvisError, match=r"could not be written into .*: No space left on device"):
            scanned(1).save(folder, overwrite=True)
    assert contents(folder) == before
    other = scanned(1)
    other.save(folder, overwrite=True)
    # Pictures of the old run are gone.
    assert set(contents(folder)) == {"manifest.json", "top.npz", "sample.npz", "images.jsonl"}
    assert unitvis.load(folder)["0"].values.tobytes() == other["0"].values.tobytes()


OBSTACLES = ["top.npz", "sample.npz", "state.npz", "images.jsonl", "index.html"]
OBSTACLES += ["top.npz.part", "manifest.json.part", "progress.npz"]


@pytest.mark.parametrize("name", OBSTACLES)
@pytest.mark.parametrize("late", [False, True], ids=["before the scan", "during the scan"])
def test_a_folder_in_the_place_of_a_file_does_not_cost_the_run_that_was_there(
    name: str, late: bool, tmp_path: Path
) -> None:
    old, new = scanned(0), scanned(1)
    folder = old.save(tmp_path / "run")
    if (folder / name).exists():
        (folder / name).rename(tmp_path / "kept")
    (folder / name).mkdir()
    before = contents(folder)
    with pytest.raises(UnitvisError, match=rf"{name} is a folder, where a file of the run belongs; remove it"):
        new.write(folder) if late else new.save(folder, overwrite=True)
    assert contents(folder) == before
    (folder / name).rmdir()
    if (tmp_path / "kept").exists():
        (tmp_path / "kept").rename(folder / name)
    assert unitvis.load(folder)["0"].values.tobytes() == old["0"].values.tobytes()


@pytest.mark.parametrize("name", ["sheets", "gallery"])
@pytest.mark.parametrize("link", [False, True])
def test_a_file_or_link_in_the_place_of_pictures_is_found_before_the_scan(
    name: str, link: bool, tmp_path: Path
) -> None:
    folder = scanned(0).save(tmp_path / "run")
    if link:
        (folder / name).symlink_to(tmp_path)
    else:
        (folder / name).write_text("")
    before = contents(folder)
    with pytest.raises(UnitvisError, match=rf"{name} is a file or a link, where a folder belongs; remove it"):
        scanned(1).save(folder, overwrite=True)
    assert contents(folder) == before


def without_hashes(folder: Path) -> None:
    """Make a run one of a version that did not hash its files."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["top.npz", "sample.npz", "images.jsonl"])
def test_files_that_were_not_written_together_are_refused(name: str, tmp_path: Path) -> None:
    one, other = (scanned(seed).save(tmp_path / str(seed)) for seed in (0, 1))
    (other / "images.jsonl").write_text((other / "images.jsonl").read_text().replace('"image 3"', '"image three"'))
    shutil.copy(other / name, one / name)
    with pytest.raises(UnitvisError, match=f"not a whole run \\({name} is not the one that was written with manifest"):
        unitvis.load(one)


def test_a_winner_without_a_record_is_refused(tmp_path: Path) -> None:
    folder = scanned(0).save(tmp_path / "run")
    without_hashes(folder)
    assert unitvis.load(folder).records  # the run of an older version is read
    lines = (folder / "images.jsonl").read_text().splitlines(keepends=True)
    for kept in (lines[1:], []):
        (folder / "images.jsonl").write_text("".join(kept))
        with pytest.raises(
            UnitvisError, match=r"not a whole run \(images.jsonl has no line for image \d+\); scan again"
        ):
            unitvis.load(folder)


def test_a_loop_without_images_has_no_records(tmp_path: Path) -> None:
    with unitvis.Recorder(nn.Sequential(nn.Conv2d(3, 2, 3))) as recorder:
        recorder(torch.rand(5, 3, 8, 8))
    folder = recorder.result().save(tmp_path / "run")
    assert unitvis.load(folder).records == {}
    stream = unitvis.scan(nn.Sequential(nn.Conv2d(3, 2, 3)), iter([torch.rand(5, 3, 8, 8)]), progress=False)
    assert unitvis.load(stream.save(tmp_path / "stream")).manifest == stream.manifest


def foreign_checkpoint(folder: Path) -> None:
    np.savez(folder / "progress.npz", losses=np.zeros(3))


def damaged_checkpoint(folder: Path) -> None:
    (folder / "progress.npz").write_bytes(b"PK")


def foreign_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": 1, "model": "x", "version": 3}')


def damaged_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")
    (folder / "images.jsonl").write_text('{"id": 0, "name": "x"}\n')


@pytest.mark.parametrize("make", [foreign_checkpoint, damaged_checkpoint, foreign_manifest, damaged_manifest])
def test_a_folder_of_another_program_is_not_overwritten(make: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (folder / "gallery").mkdir(parents=True)
    (folder / "gallery" / "drawn.json").write_text("{}")
    (folder / "index.html").write_text("mine")
    make(folder)
    before = contents(folder)
    with pytest.raises(UnitvisError, match="is not empty and holds no run, so it is not overwritten"):
        scanned(0).save(folder, overwrite=True)
    with pytest.raises(UnitvisError, match="is not empty and holds no gallery, so nothing is written there"):
        unitvis.gallery(scanned(0), folder)
    assert contents(folder) == before


@pytest.mark.parametrize("text", ["{", "", '{"format": 1}'], ids=["cut", "empty", "part"])
def test_a_damaged_run_is_overwritten(text: str, tmp_path: Path) -> None:
    folder = scanned(0).save(tmp_path / "run")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"k": "x", "format": 9}) if "format" in text else text)
    scanned(1).save(folder, overwrite=True)
    assert unitvis.load(folder)["0"].values.tobytes() == scanned(1)["0"].values.tobytes()


def test_a_damaged_checkpoint_alone_is_overwritten(tmp_path: Path) -> None:
    damaged_checkpoint(tmp_path)
    scanned(0).save(tmp_path, overwrite=True)


class Killed(BaseException):
    pass


@contextmanager
def stopping(after: int, dead: bool) -> Iterator[None]:
    """Context in which one of the system's calls that change a folder raises: that after so many others.

    dead: so do all later ones, so that nothing is cleaned up, as where the process is killed.
    """
    done, raised, opened = 0, list[int](), os.open

    def counted(call: Callable[..., object]) -> Callable[..., object]:
        def stopped(*args: Any, **kwargs: Any) -> object:
            nonlocal done
            done += call is not opened or bool(args[1] & os.O_CREAT)
            if done > after and (dead or not raised):
                raised.append(done)
                raise Killed
            return call(*args, **kwargs)

        return stopped

    with pytest.MonkeyPatch.context() as patch:
        for name in ("open", "replace", "rename", "unlink", "remove", "rmdir", "mkdir"):
            patch.setattr(os, name, counted(getattr(os, name)))
        yield


def shard(images: int, labelled: bool = False) -> unitvis.Run:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU()).eval()
    with unitvis.Recorder(model) as recorder:
        recorder(torch.rand(images, 3, 8, 8))
    run = recorder.partial()
    if labelled:
        run.set_labels(unitvis.models.labels.Labels(("cat", "dog"), "text"))
    return run


def fingerprint(run: unitvis.Run) -> str:
    state = b"" if run.partial is None else run.partial.topk.tensor.numpy().tobytes()
    winners = {name: (top.values.tobytes(), top.images.tobytes()) for name, top in run.tops.items()}
    sample = None if run.sample is None else repr(run.sample)
    return repr((run.manifest, run.records, run.labels, state, winners, sample))


def runs_of_a_kind(kind: str) -> tuple[unitvis.Run | None, unitvis.Run]:
    """The run that is there and the one that replaces it."""
    return {
        "a first run": lambda: (None, scanned(1)),
        "a run": lambda: (scanned(0), scanned(1)),
        "a shard": lambda: (shard(16), shard(32)),
        "a run by a shard": lambda: (scanned(0), shard(16)),
        "a shard by a run": lambda: (shard(16), scanned(0)),
        "names of classes": lambda: (shard(16), shard(16, labelled=True)),
    }[kind]()


@pytest.mark.parametrize("dead", [True, False], ids=["killed", "interrupted"])
@pytest.mark.parametrize(
    "kind", ["a first run", "a run", "a shard", "a run by a shard", "a shard by a run", "names of classes"]
)
def test_a_run_whose_writing_stops_anywhere_is_the_old_or_the_new_one(kind: str, dead: bool, tmp_path: Path) -> None:
    old, new = runs_of_a_kind(kind)
    wanted = [fingerprint(new)] if old is None else [fingerprint(old), fingerprint(new)]
    found = []
    for after in range(60):
        folder = tmp_path / str(after)
        if old is not None:
            old.save(folder)
            (folder / "index.html").write_text("pages")
        else:
            folder.mkdir()
        try:
            with stopping(after, dead):
                new.write(folder)
            break
        except Killed:
            pass
        if old is not None or (folder / "manifest.json").exists():
            found.append(fingerprint(unitvis.load(folder)))
        again = new if after % 2 else old or new
        again.save(folder, overwrite=True)
        assert fingerprint(unitvis.load(folder)) == fingerprint(again)
        assert not list(folder.glob("*.part"))
    else:
        raise AssertionError("it does not end")
    assert set(found) == set(wanted)
    assert fingerprint(unitvis.load(folder)) == wanted[-1]


def test_files_that_an_earlier_version_left_without_a_manifest_are_overwritten(tmp_path: Path) -> None:
    folder = shard(16).save(tmp_path / "run")
    for name in ("manifest.json", "state.npz"):
        (folder / name).rename(folder / f"{name}.part")
    scanned(1).save(folder, overwrite=True)
    assert fingerprint(unitvis.load(folder)) == fingerprint(scanned(1))


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("positions", lambda a: a + 99, "a winner lies outside of the feature map"),
        ("images", lambda a: a * 0, "a unit has an image twice among its winners"),
        ("values", lambda a: a[:, ::-1], "values of winners do not descend"),
    ],
)
def test_a_run_that_nothing_could_read_is_not_written(
    name: str, change: Callable[[np.ndarray], np.ndarray], said: str, tmp_path: Path
) -> None:
    folder = scanned(0).save(tmp_path / "run")
    (folder / "progress.npz").write_bytes(b"a checkpoint")
    before, good = contents(folder), scanned(1)
    tops = {layer: replace(top, **{name: change(getattr(top, name))}) for layer, top in good.tops.items()}
    wrong = unitvis.Run(tops, dict(good.manifest), good.records)
    with pytest.raises(UnitvisError, match=f"a run is not written that nothing could read again: layer '0': {said}"):
        wrong.write(folder)
    assert contents(folder) == before
