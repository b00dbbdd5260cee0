"""Run folders of any content: they are read, drawn and verified, or refused in one line."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import unitvis
from support.clock import in_time
from support.memory import tracing
from support.mutations import DELETED, changed, places, read, without_hashes, write
from unitvis import UnitvisError
from unitvis.drawing import sheets
from unitvis.scanning.verify import verify
from unitvis.sources import open_source

VALUES = [DELETED, None, -1, 10**18, "x", [], {}, float("nan"), True, 1.5, 10**400, "\ud800"]
FILES = ("manifest.json", "gallery/drawn.json", "images.jsonl")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3)).eval()


@pytest.fixture(scope="module")
def whole(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two layers over four images, with its gallery."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "photos").mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{number}.png")
    transform = unitvis.Transform(crop=16)
    run = unitvis.scan(model, folder / "photos", k=2, transform=transform, out=folder / "run", progress=False)
    unitvis.gallery(run, folder / "run", model)
    return without_hashes(folder / "run")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    (tmp_path / "photos").symlink_to(whole.parent / "photos")
    return Path(shutil.copytree(whole, tmp_path / "run"))


def use(folder: Path, model: nn.Module) -> list[str]:
    """Do everything with a run folder that commands do; the refusals, each of which is one line."""
    refusals = []

    def draw() -> None:
        run = unitvis.load(folder)
        assert repr(run)
        assert run._repr_html_()
        for layer in run:
            run.sheet(layer)

    for action in (
        draw,
        lambda: unitvis.gallery(unitvis.load(folder), folder, model),
        lambda: verify(unitvis.load(folder), model),
        lambda: unitvis.merge([folder], model),
        lambda: unitvis.load(folder, folder.parent / "photos"),
    ):
        try:
            action()
        except UnitvisError as error:
            refusals.append(str(error))
            assert "\n" not in refusals[-1]
    return refusals


def mutations(whole: Path) -> list[tuple[str, tuple[Any, ...], object]]:
    return [(file, place, new) for file in FILES for place in places(read(whole / file)) for new in VALUES]


def check(chosen: list[tuple[str, tuple[Any, ...], object]], whole: Path, folder: Path, model: nn.Module) -> None:
    for file, place, new in chosen:
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        write(folder / file, changed(read(whole / file), place, new))
        try:
            use(folder, model)
        except Exception as error:
            raise AssertionError(f"{file} with {new!r} at {place}: {error!r}") from error


@pytest.mark.filterwarnings("ignore")
def test_sixty_mutated_run_folders(whole: Path, folder: Path, model: nn.Module) -> None:
    (refusal,) = use(folder, model)
    assert "has no state to merge" in refusal
    check(random.Random(0).sample(mutations(whole), 60), whole, folder, model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_all_mutated_run_folders(whole: Path, folder: Path, model: nn.Module) -> None:
    check(mutations(whole), whole, folder, model)


ARRAYS: list[tuple[str, Any, str]] = [
    ("0/images", lambda a: a + 10**12, ""),
    ("0/images", lambda a: a - 5, "a winner is image -"),
    ("0/positions", lambda a: a + 1000, "a winner lies outside"),
    ("0/positions", lambda a: a.astype(np.float32), "positions is float32"),
    ("0/boxes", lambda a: a + 2**30, "a box lies far outside"),
    ("0/values", lambda a: a[:, :1], r"values is float32 \[3, 1\], not float32 \[3, 2\]"),
    ("0/values", lambda a: a.astype(">f4"), r"values is >f4 \[3, 2\], not float32 \[3, 2\]"),
    ("0/values", lambda a: a[:, ::-1], "values of winners do not descend"),
    ("0/images", lambda a: np.repeat(a[:, :1], 2, axis=1), "a unit has an image twice among its winners"),
    ("0/images", lambda a: np.where([[True, False]], -1, a), "a winner follows a blank place"),
    ("0/values", lambda a: np.where(np.arange(2) == 1, np.nan, a), "a winner has no value"),
    ("0/values", lambda a: np.array(["x"]), "values is <U1"),
    ("0/values", lambda a: np.broadcast_to(np.float32(0), (2**24, 2)).copy(), "bytes in"),
    ("0/status", lambda a: np.full_like(a, "exact"), "a status is none of"),
    ("0/status", lambda a: np.full_like(a, "unseparated"), "3 units are unseparated, and the manifest counts 0"),
    ("0/status", lambda a: None, "0/status"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "change", "message"), ARRAYS, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(ARRAYS)])
def test_arrays_that_do_not_belong_to_the_manifest(
    name: str, change: Any, message: str, folder: Path, model: nn.Module
) -> None:
    arrays = dict(np.load(folder / "top.npz"))
    new = change(arrays.pop(name))
    np.savez_compressed(folder / "top.npz", **arrays, **({} if new is None else {name: new}))
    refusals = use(folder, model)
    assert refusals
    if message:
        with pytest.raises(UnitvisError, match=rf"not a whole run .*{message}"):
            unitvis.load(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(2))
def test_states_of_any_content_are_merged_or_refused(seed: int, whole: Path, model: nn.Module, tmp_path: Path) -> None:
    options = {"transform": unitvis.Transform(crop=16), "k": 2, "progress": False}
    for number in (1, 2):
        unitvis.scan(model, whole.parent / "photos", shard=(number, 2), out=tmp_path / str(number), **options)
    shards = [without_hashes(tmp_path / str(number)) for number in (1, 2)]
    state = shards[1] / "state.npz"
    arrays = dict(np.load(state))
    about = json.loads(arrays["about"].tobytes())
    ways = [(place, new) for place in places(about) for new in VALUES]
    for place, new in random.Random(seed).sample(ways, 40):
        text = json.dumps(changed(about, place, new)).encode()
        merge(shards, model, arrays | {"about": np.frombuffer(text, np.uint8)}, (place, new))
    for name, array in arrays.items():
        others = [array[:1], array[:0], array[None], *([array - 7] if array.dtype.kind in "iu" else [])]
        for new in others:
            merge(shards, model, arrays | {name: new}, (name, new))


def merge(shards: list[Path], model: nn.Module, arrays: dict[str, np.ndarray], what: object) -> None:
    """Merge shards of which the second has this state."""
    np.savez(shards[1] / "state.npz", **arrays)
    try:
        assert unitvis.merge(shards, model).layers == ["0", "2"]
    except UnitvisError as error:
        assert "\n" not in str(error)  # noqa: PT017
    except Exception as error:
        raise AssertionError(f"{what}: {error!r}") from error


def keep_winners_alone(folder: Path) -> None:
    """Leave out of images.jsonl what is no winner any more."""
    with np.load(folder / "top.npz") as arrays:
        won = {id for name in arrays if name.endswith("/images") for id in arrays[name].ravel().tolist()}
    write(folder / "images.jsonl", [record for record in read(folder / "images.jsonl") if record["id"] in won])


def test_a_unit_with_a_blank_place_is_not_tied(folder: Path) -> None:
    arrays = dict(np.load(folder / "top.npz"))
    for key, value in {"images": -1, "values": np.nan, "positions": -1, "boxes": 0}.items():
        arrays[f"0/{key}"][1, 1] = value
    np.savez_compressed(folder / "top.npz", **arrays)
    with pytest.raises(UnitvisError, match="1 units have fewer than 2 winners of 4 images, and the manifest"):
        unitvis.load(folder)
    nan = {"responses": 3, "units": 1, "first_image": 0}
    write(folder / "manifest.json", changed(read(folder / "manifest.json"), ("layers", "0", "nan"), nan))
    keep_winners_alone(folder)
    assert unitvis.load(folder).layers == ["0", "2"]
    arrays["0/status"][1] = "tied"
    np.savez_compressed(folder / "top.npz", **arrays)
    with pytest.raises(UnitvisError, match=r"not a whole run .* layer '0': a unit without k winners is called tied"):
        unitvis.load(folder)


def test_nothing_is_allocated_for_a_length_that_is_only_claimed(folder: Path) -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 1000), }".ljust(117) + b"\n"
    with zipfile.ZipFile(folder / "top.npz", "w") as archive:
        archive.writestr("0/values.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(UnitvisError, match=r"not a whole run .*0/values.npy claims float32 \[1000000000, 1000\] in"):
        unitvis.load(folder)


def test_json_without_an_end_is_damaged(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"a":' * 100_000)
    with pytest.raises(UnitvisError, match=r"manifest.json is damaged \(.*\); scan again with --overwrite"):
        unitvis.load(folder)


def test_a_crop_of_another_size_than_the_input_is_refused(whole: Path, folder: Path) -> None:
    manifest = read(whole / "manifest.json")
    for crop in (8, [16, 8]):
        write(folder / "manifest.json", changed(manifest, ("transform", "crop"), crop))
        with pytest.raises(
            UnitvisError, match=r"is damaged \(transform.crop is .* and the input \[16, 16\]\); scan again"
        ):
            unitvis.load(folder)
    write(folder / "manifest.json", changed(manifest, ("transform", "crop"), [16, 16]))
    assert unitvis.load(folder).layers == ["0", "2"]


def test_patches_outside_of_their_picture_are_refused() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    run = unitvis.scan(nn.Sequential(nn.Conv2d(3, 8, 3)), pixels, transform=unitvis.Transform(), progress=False)
    other = unitvis.Run(run.tops, run.manifest, run.records, open_source(pixels, unitvis.Transform(crop=2)))
    with pytest.raises(
        UnitvisError, match="a patch lies outside of its picture of 16 x 16 pixels, so the transform or"
    ):
        other.sheet("0", crop="rf")


SINGLE = [
    ("manifest.json", ("layers", "0", "receptive_field", "stride"), [1e308, 1], "not a number of pixels"),
    ("manifest.json", ("layers", "\ud800"), {}, "layers has the name .* which is not text without lone surrogates"),
    ("manifest.json", ("model", "responses"), {"0": [10**400]}, "not a finite number"),
    ("manifest.json", ("model", "spec"), "\ud800", None),
    ("manifest.json", ("model", "weights"), "\ud800", "not text without lone surrogates"),
    ("manifest.json", ("source", "images_ending"), [".\ud800"], "an ending is all that follows"),
    ("manifest.json", ("source", "images_ending"), 5, "not a list"),
    ("manifest.json", ("source", "kind"), "recorder", "the run says that its images came from a recorder, and"),
    ("manifest.json", ("layers", "0", "receptive_field", "method"), "Traced", "not one of traced, unknown"),
    ("manifest.json", ("source", "path"), f"x{{0..{'9' * 5000}}}.tar", "more than 1,000,000 archives"),
    ("manifest.json", ("source", "decoding"), {"bogus": 1}, "decoding has no 'bogus'; a newer unitvis wrote it"),
    ("manifest.json", ("source", "decoding"), {"images": "/etc"}, "decoding has no 'images'"),
    ("manifest.json", ("source", "decoding"), {"on_error": "raise"}, "decoding has no 'on_error'"),
    ("manifest.json", ("source", "decoding"), {"scaled": 5}, "source.decoding.scaled is 5, not true or false"),
    ("manifest.json", ("kept",), "x", "kept is 'x', not a whole number"),
    ("manifest.json", ("transform", "interpolation"), [], r"interpolation=\[\]; it must be one of"),
    ("manifest.json", ("transform", "mean"), 10**400, "mean=1000"),
    ("manifest.json", ("transform", "resize"), 10**400, "resize=1000"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("file", "place", "new", "message"), SINGLE, ids=[f"{n}-{p[-1]}" for n, (_, p, *_) in enumerate(SINGLE)]
)
def test_single_values_are_drawn_or_refused(
    file: str, place: tuple[str, ...], new: object, message: str | None, whole: Path, folder: Path, model: nn.Module
) -> None:
    write(folder / file, changed(read(whole / file), place, new))
    refusals = use(folder, model)
    assert any("has no state to merge" in one for one in refusals) or message
    assert message is None or any(re.search(message, one) for one in refusals)
    shutil.rmtree(folder / "gallery")
    if message is None:
        assert unitvis.gallery(unitvis.load(folder), folder).exists()


@pytest.mark.parametrize("name", ["manifest.json", "top.npz", "images.jsonl", "state.npz", "gallery/drawn.json"])
def test_pipes_in_place_of_files_are_not_waited_for(name: str, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with in_time():
        if name == "gallery/drawn.json":
            assert unitvis.gallery(unitvis.load(folder), folder).exists()
            return
        with pytest.raises(UnitvisError, match="not a regular file"):
            unitvis.load(folder)


def test_records_without_an_end_are_damaged(folder: Path) -> None:
    os.truncate(folder / "images.jsonl", 20 << 30)
    with in_time(), pytest.raises(UnitvisError, match="not a whole run"):
        unitvis.load(folder)


def test_what_images_jsonl_may_hold_follows_from_the_winners(whole: Path, folder: Path) -> None:
    lines = (whole / "images.jsonl").read_text().splitlines(keepends=True)
    for text, message in (
        ("{}\n" * (3 << 20), "images.jsonl has 9,437,184 bytes, for 4 images that won"),
        (lines[0] + "{}\n" * (1 << 20), r"images.jsonl, line 2.id is missing"),
        ("".join(lines * 2), "images.jsonl, line 5: image 0 comes again"),
        ("".join(lines) + lines[0].replace('"id": 0', '"id": 9'), "images.jsonl, line 5: image 9 won nowhere"),
        (lines[0][:-2] + ', "x": "' + "x" * (1 << 20) + '"}\n', "line 1 of images.jsonl has 1,048,576 bytes or more"),
    ):
        (folder / "images.jsonl").write_text(text)
        with tracing() as traced, pytest.raises(UnitvisError, match=f"not a whole run .*{message}"):
            unitvis.load(folder)
        assert traced.peak < 32 << 20
    (folder / "images.jsonl").write_text("".join(line[:-2] + ', "x": [[],[],[]]}\n' for line in lines))
    assert all("x" not in record for record in unitvis.load(folder).records.values())


def test_of_more_channels_than_a_network_has_some_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sheets._MAX_ON_SHEET, "channel", 100)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    run = unitvis.scan(nn.Sequential(nn.Conv2d(3, 150, 1)), pixels, k=1, transform=unitvis.Transform(), progress=False)
    shown = sheets._units_on_sheet(run["0"])
    assert (len(set(shown)), shown[0], shown[-1]) == (100, 0, 149)
    assert sheets.caption(run, run["0"], shown, "rf")[0].startswith("100 of 150 channels")
    assert sheets.memory_groups(run, None) == [["0"]]
    monkeypatch.setattr(sheets, "MAX_BYTES_IN_MEMORY", 200_000)  # more than the few patches that all winners share
    two = unitvis.Run({"a": run["0"], "b": run["0"]}, run.manifest, {}, run.source)
    assert sheets.memory_groups(two, None) == [["a"], ["b"]]
