"""A pack stands for what was packed: the same ids, names, failures, values and patches."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import unitvis
from support.clock import in_time
from support.packs import BROKEN, COUNT, NORMAL, TRANSFORM, as_kind, net, originals, pack, same, scan
from unitvis import UnitvisError
from unitvis.drawing import sheets
from unitvis.scanning.verify import verify
from unitvis.sources import PackSource, open_source, reopen_source
from unitvis.sources.names import Names
from unitvis.sources.packed import tables_hash


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of originals that no test changes."""
    return originals(tmp_path_factory.mktemp("pack") / "images")


@pytest.fixture
def folder(unchanged: Path, tmp_path: Path) -> Path:
    """A copy of the originals."""
    return Path(shutil.copytree(unchanged, tmp_path / "images"))


@pytest.fixture(scope="module")
def packed(unchanged: Path) -> Path:
    """A pack of the originals that no test changes."""
    return Path(pack(unchanged, unchanged.parent / "whole.npy").path)


@pytest.mark.parametrize("kind", ["folder", "list", "tar"])
def test_a_scan_of_a_pack_is_one_of_its_source(kind: str, folder: Path, tmp_path: Path) -> None:
    images = as_kind(kind, folder)
    source = open_source(images, TRANSFORM)
    made = pack(images, tmp_path / "x.npy")
    array = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert (array.shape, array.dtype) == ((COUNT, 16, 16, 3), np.uint8)
    assert len(made.unusable) == len(BROKEN)
    for id in range(COUNT):
        assert made.name(id) == source.name(id)
        if id in made.unusable:
            assert not array[id].any()
            continue
        assert (array[id] == source.read(id).numpy()).all()
        assert made.record(id) == source.record(id)
    want = scan(images, transform=TRANSFORM)
    again = scan(tmp_path / "x.npy", batch_size=7)
    same(again, want)
    same(scan(made, batch_size=64, workers=0), want)
    assert [one["id"] for one in want.manifest["failures"]] == sorted(made.unusable)
    assert again.manifest["transform"] == want.manifest["transform"]
    for unit in range(5):
        assert again.tile("2", unit, crop="rf").tobytes() == want.tile("2", unit, crop="rf").tobytes()


def test_a_pack_says_what_it_is(unchanged: Path, packed: Path) -> None:
    about = json.loads(packed.with_suffix(".json").read_text())
    source = open_source(unchanged, TRANSFORM)
    list(source.batches(8))
    assert about["source"] == source.describe()
    assert about["transform"] == {"resize": 20, "crop": 16, "interpolation": "bicubic"}
    assert about["failures"] == [vars(failure) for failure in source.failures]
    described = open_source(packed, NORMAL).describe()
    assert described == json.loads(json.dumps(described))
    assert (described["kind"], described["of"], described["path"]) == ("pack", "folder", str(packed))
    assert described["names"] == source.describe()["names"]
    again = reopen_source(described, TRANSFORM.to_json())
    assert again.describe() == described
    with pytest.raises(UnitvisError, match=r"'0/00é.png' could not be used when it was packed: broken PNG"):
        again.read(0)
    with pytest.raises(UnitvisError, match="there is no image 70"):
        again.picture(70)


def test_shards_resume_and_merge(folder: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in packed.parent.glob("whole.*"):  # another machine has its own copy
        shutil.copy(path, tmp_path / f"copy{path.suffix}")
    runs = [scan(place, shard=(n, 3)) for n, place in ((1, packed), (2, tmp_path / "copy.npy"), (3, packed))]
    assert [len(run.manifest["failures"]) for run in runs] == [1, 2, 1]
    want = scan(folder, transform=TRANSFORM)
    merged = unitvis.merge(runs, net())
    same(merged, want)
    other = pack(folder, tmp_path / "other.npy", transform=unitvis.Transform(16, 16))
    with pytest.raises(UnitvisError, match=r"cannot be merged: transform.resize is 20 and 16"):
        unitvis.merge([runs[0], scan(tmp_path / "other.npy", shard="2/3")], net(), partial=True)
    assert other.describe()["pixels"] != merged.manifest["source"]["pixels"]

    options = {"batch_size": 8, "every": 1e-6, "out": tmp_path / "run"}
    with monkeypatch.context() as patch:
        patch.setattr(PackSource, "_readable", lambda self, ids: iter([*range(1, 31), 99]))  # reads two batches ahead
        with pytest.raises(UnitvisError, match="no image 99"):
            scan(packed, **options)
    assert (tmp_path / "run" / "progress.npz").exists()
    same(scan(packed, resume=True, **options), want)


def test_failures_count_as_those_of_the_scan(packed: Path) -> None:
    with pytest.raises(UnitvisError, match=r"'0/00é.png' cannot be used: broken PNG"):
        scan(packed, on_error="raise")
    with pytest.raises(UnitvisError, match=r"3 images could not be used, more than max_failures=2"):
        scan(packed, max_failures=2)
    assert len(scan(packed, max_failures=4).manifest["failures"]) == 4


def test_a_changed_or_lost_original_is_refused(folder: Path, tmp_path: Path) -> None:
    made = pack(folder, tmp_path / "x.npy")
    run = scan(tmp_path / "x.npy", out=tmp_path / "run")
    assert verify(unitvis.load(tmp_path / "run"), net())["wrong"] == 0
    image = int(run.winners[0])
    path = folder / made.name(image)
    whole = path.read_bytes()
    for change, why in (
        (path.unlink, "No such file"),
        (lambda: path.write_bytes(whole[:-1]), "its content has changed"),
    ):
        change()
        run = unitvis.load(tmp_path / "run")
        match = rf"'{made.name(image)}' is no longer the file that was packed: {why}"
        with pytest.raises(UnitvisError, match=match):
            verify(run, net())
        with pytest.raises(UnitvisError, match=match):
            sheets.render(run, tmp_path / "run")
        with pytest.raises(UnitvisError, match=r"is no longer the file|cannot be used: No such file"):
            run.source.picture(image)
    path.write_bytes(whole)
    (folder / "0" / "00.png").write_bytes(whole)  # shifts the ids of the folder, not those of the pack
    run = unitvis.load(tmp_path / "run")
    assert verify(run, net())["wrong"] == 0
    sheets.render(run, tmp_path / "run")


def test_changed_archives_are_refused(folder: Path, tmp_path: Path) -> None:
    images = as_kind("tar", folder)
    pack(images, tmp_path / "x.npy")
    run = scan(tmp_path / "x.npy")
    shutil.copy(tmp_path / "shard-0.tar", tmp_path / "shard-1.tar")
    with pytest.raises(UnitvisError, match=r"shard-2.tar are no longer those that were packed; restore them"):
        run.tile("2", 0)


@pytest.mark.parametrize("kind", ["folder", "list", "tar"])
def test_without_the_originals_patches_come_from_the_pack(kind: str, folder: Path, tmp_path: Path) -> None:
    images = as_kind(kind, folder)
    pack(images, tmp_path / "x.npy")
    shutil.rmtree(folder)
    (tmp_path / "shard-1.tar").unlink(missing_ok=True)
    run = scan(tmp_path / "x.npy", transform=TRANSFORM)
    gone = {"tar": "shard-1.tar"}.get(kind, str(folder))
    with pytest.warns(UserWarning, match=rf"are gone, so patches are cut from its 16 x 16 pixels, .*{gone}"):
        patch = run.patch("2", 3, 0, size=64, crop="image")
    run.patch("2", 3, 1, size=64)  # said once: another warning is an error in the tests
    image = Image.fromarray(np.load(tmp_path / "x.npy")[run["2"].images[3, 0]])
    assert patch.tobytes() == image.resize((64, 64), Image.Resampling.BICUBIC).tobytes()
    assert verify(run, net())["wrong"] == 0


def test_files_count_as_gone_where_none_is_left(folder: Path, tmp_path: Path) -> None:
    """An empty folder is where a disk was; a list may be gone while the files that it names are there."""
    listing = tmp_path / "lists" / "list.txt"
    listing.parent.mkdir()
    listing.write_text("\n".join(str(path) for path in sorted(folder.rglob("*.*"))))
    pack(listing, tmp_path / "x.npy")
    run = scan(tmp_path / "x.npy")
    shutil.rmtree(listing.parent)
    want = run.patch("2", 3, 0, size=64)
    for one in folder.iterdir():
        shutil.rmtree(one)
    run = scan(tmp_path / "x.npy")
    with pytest.warns(UserWarning, match=rf"the originals of the pack .* are gone.*there is no '{folder}/0/00é.png'"):
        assert run.patch("2", 3, 0, size=64).tobytes() != want.tobytes()


@pytest.mark.usefixtures("emulated_half")
def test_candidates_of_half_precision_are_read_again_from_the_pack(
    packed: Path, unchanged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = importlib.import_module("unitvis.scanning.precision").Plan("fp16", "as the test wants it")
    monkeypatch.setattr(importlib.import_module("unitvis.scanning.scan"), "plan", lambda *_, **__: half)
    want = scan(unchanged, transform=TRANSFORM)
    same(scan(packed, batch_size=16), want)
    runs = [scan(packed, shard=(n, 2)) for n in (2, 1)]
    same(unitvis.merge(runs, net()), want)
    assert want.manifest["scan"]["precision"] == "fp16"


@pytest.mark.parametrize(
    "given",
    [
        unitvis.Transform(20, 16, interpolation="bicubic"),
        unitvis.Transform(20, (16, 16), interpolation="bicubic"),
        unitvis.Transform(),
        unitvis.Transform(interpolation="bicubic"),
    ],
)
def test_the_same_transform_or_none(given: unitvis.Transform, packed: Path) -> None:
    found = open_source(packed, given).transform
    assert found == unitvis.Transform(20, 16, given.mean, given.std, "bicubic")


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (
            unitvis.Transform(24, 16),
            {},
            "with resize=20, crop=(16, 16), interpolation='bicubic' and resize=24, crop=(16",
        ),
        (
            unitvis.Transform(20, 16),
            {},
            "interpolation='bicubic' and resize=20, crop=(16, 16), interpolation='bilinear'",
        ),
        (
            unitvis.Transform(20),
            {},
            "and resize=20, crop=None, interpolation='bilinear' is asked for, by you or by",
        ),
        (unitvis.Transform(crop=16), {}, "and resize=None, crop=(16, 16) is asked for"),
        (unitvis.Transform(interpolation="box"), {}, "and resize=None, crop=None is asked for"),
        (NORMAL, {"scaled": True}, "scaled=False, allow_truncated=False and decoder='pillow', scaled=True"),
        (None, {}, "is a pack and needs mean and std"),
    ],
)
def test_another_transform_is_refused(
    given: unitvis.Transform | None, options: dict[str, object], message: str, packed: Path
) -> None:
    with pytest.raises(UnitvisError) as refused:
        open_source(packed, given, **options)
    assert message in str(refused.value)


def test_how_files_were_decoded_goes_with_the_pack(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "x.npy", scaled=True, allow_truncated=True)
    want = scan(folder, transform=TRANSFORM, scaled=True, allow_truncated=True)
    for options in ({}, {"scaled": True, "allow_truncated": True}):
        same(scan(tmp_path / "x.npy", **options), want)
    with pytest.raises(UnitvisError, match=r"scaled=True, allow_truncated=True and .*allow_truncated=False"):
        scan(tmp_path / "x.npy", scaled=True)


def test_a_plain_array_stays_one(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 24, 24, 3), np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    for other in ("", "{}", '{"unitvis pack 1": 2}', "[1, 2"):
        (tmp_path / "x.json").write_text(other)
        source = open_source(tmp_path / "x.npy", TRANSFORM)
        assert source.kind == "array"
        assert source.read(0).shape == (16, 16, 3)  # resized and cropped as ever


def test_files_that_do_not_belong_together(packed: Path, unchanged: Path, tmp_path: Path) -> None:
    pack(unchanged, tmp_path / "other.npy", transform=unitvis.Transform(21, 16))
    pack(as_kind("list", unchanged), tmp_path / "list.npy")

    def mixed(ending: str, data: bytes) -> Path:
        for path in packed.parent.glob("whole.*"):
            shutil.copy(path, tmp_path / f"x{path.suffix}")
        (tmp_path / f"x{ending}").write_bytes(data)
        return tmp_path / "x.npy"

    whole = packed.read_bytes()
    cases = [
        (".npy", (tmp_path / "other.npy").read_bytes(), r"its .npy and .json files do not belong together; pack again"),
        (".npy", whole[:-1], "cannot read .*x.npy"),
        (".npy", whole[:-20000] + bytes(20000), "its .npy and .json files do not belong together"),
        (".npz", (tmp_path / "list.npz").read_bytes(), r"its .npz and .json files do not belong together"),
        (".npz", packed.with_suffix(".npz").read_bytes()[:-9], r"an incomplete pack: its .npz file: .*; pack again"),
        (".json", packed.with_suffix(".json").read_bytes()[:-9], r"x.json is damaged: .*; pack again"),
        (".json", b'{"unitvis pack": 2}', r"x.json has format 2; this version of unitvis reads format 1"),
        (".json", b'["unitvis pack", 1]', r"x.npz is that of a pack, and there is no .json file of one; restore that"),
        (
            ".json",
            b'{"unitvis pack": 1, "source": {}}',
            r"x.json is damaged: source.kind is missing; pack again",
        ),
    ]
    for ending, data, message in cases:
        with pytest.raises(UnitvisError, match=message):
            open_source(mixed(ending, data), NORMAL)
    (unchanged / "list.txt").unlink()


def changed_pack(packed: Path, folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> Path:
    """Copy a pack whose JSON file and tables were changed by somebody who also wrote the hashes anew."""
    for path in packed.parent.glob("whole.*"):
        shutil.copy(path, folder / f"x{path.suffix}")
    about, tables = json.loads((folder / "x.json").read_text()), dict(np.load(folder / "x.npz"))
    change(about, tables)
    np.savez(folder / "x.npz", **tables)
    (folder / "x.json").write_text(json.dumps(about | {"tables": tables_hash(tables)}))
    return folder / "x.npy"


@pytest.mark.parametrize("names_too", [False, True])
def test_names_that_were_exchanged_show_no_other_image(
    names_too: bool, packed: Path, folder: Path, tmp_path: Path
) -> None:
    """Names and hashes in the order of other images."""

    def change(about: dict[str, Any], tables: dict[str, Any]) -> None:
        names = Names.from_arrays(tables)
        turned = Names(names[id] for id in reversed(range(COUNT)))
        tables |= {**turned.arrays(), "seen": tables["seen"][::-1]}
        about["failures"] = [one | {"id": COUNT - 1 - one["id"]} for one in about["failures"]]
        about["source"]["path"] = str(folder)
        if names_too:
            about["source"]["names"] = turned.hash()

    path = changed_pack(packed, tmp_path, change)
    if not names_too:
        with pytest.raises(UnitvisError, match=r"x.npy' is damaged: its 70 names are not those of the 70 images that"):
            open_source(path, NORMAL)
        return
    run = scan(path, out=tmp_path / "run")
    match = r"'.*' cannot be used: it does not give the pixels that were packed; pack again"
    with pytest.raises(UnitvisError, match=match):
        run.patch("2", 0, 0)
    with pytest.raises(UnitvisError, match=match):
        sheets.render(run, tmp_path / "run")
    with pytest.raises(UnitvisError, match=match):
        run.source.picture(int(run.winners[0]))
    with pytest.raises(UnitvisError, match=match):
        verify(run, net())


def test_decoders_that_round_otherwise_give_the_packed_pixels(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "x.npy")
    pixels = np.load(tmp_path / "x.npy", mmap_mode="r+")
    pixels[5] ^= 1  # not one of the rows whose hash is known
    pixels.flush()
    assert isinstance(open_source(tmp_path / "x.npy", NORMAL).picture(5)[0], Image.Image)


@pytest.mark.parametrize(("ending", "message"), [("npz", "not a regular file"), ("npy", "is not a regular file")])
def test_pipes_in_place_of_a_pack_s_files_are_not_waited_for(
    ending: str, message: str, packed: Path, tmp_path: Path
) -> None:
    path = changed_pack(packed, tmp_path, lambda *_: None)
    path.with_suffix(f".{ending}").unlink()
    os.mkfifo(path.with_suffix(f".{ending}"))
    with in_time(), pytest.raises(UnitvisError, match=message):
        open_source(path, NORMAL)


def test_a_json_file_without_an_end_is_refused(packed: Path, tmp_path: Path) -> None:
    path = changed_pack(packed, tmp_path, lambda *_: None)
    os.truncate(path.with_suffix(".json"), 20 << 30)
    with (
        in_time(),
        pytest.raises(UnitvisError, match=r"x.json: a file of 21,474,836,480 bytes; more"),
    ):
        open_source(path, NORMAL)


def at(keys: str, value: object) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """Set an entry of the JSON file."""

    def change(about: dict[str, Any], tables: dict[str, Any]) -> None:
        *above, last = keys.split(".")
        for key in above:
            about = about[key]
        about[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (at("source", []), "source is .., not an object"),
        (at("source.kind", {}), "source.kind is {}, not one of folder, list, tar"),
        (at("source.path", 5), "source.path is 5"),
        (at("source.path", None), "source.path is None"),
        (at("source.path", ["/a"]), "source.path is a list, of a folder"),
        (at("source.decoding", {"bogus": 1}), "decoding has no 'bogus'; a newer unitvis wrote it"),
        (at("source.decoding", {"scaled": "x"}), "source.decoding.scaled is 'x', not true or false"),
        (at("source.images_ending", 5), "source.images_ending is 5, not a list"),
        (at("source.others", "x"), "source.others is 'x', not a whole number"),
        (at("source.others", None), "source.others is None"),
        (at("source.others", -1), "source.others is -1"),
        (at("source.others", 2**70), "source.others is 1180591620717411303424"),
        (at("source.others", [["a"]]), r"source.others is \[\['a'\]\]"),
        (at("source.other_endings", 3), "source.other_endings is 3, not an object"),
        (at("source.pillow", 7), "source.pillow is 7, not an object"),
        (at("source.entry", []), r"source.entry is \[\], not text or the number of an entry"),
        (at("transform", None), "transform is None, not an object"),
        (at("transform.crop", 10**400), "crop=1000"),
        (at("transform.interpolation", []), r"interpolation=\[\]; it must be one of"),
        (at("shape", [9, 9, 9, 9]), r"shape\[3\] is 9"),
        (at("shape", [9, 9, 9, 3]), r"the array is uint8 \[70, 16, 16, 3\], not uint8 \[9, 9, 9, 3\]"),
        (at("failures", [5]), r"failures\[0\] is 5, not an object"),
        (at("failures", [{"id": 10**6, "reason": "x"}]), "image 1000000 is said to have failed, of 70"),
        (at("failures", []), "nothing is noted of image 0"),
        (lambda _, tables: tables.pop("names"), "'names'"),
        (lambda _, tables: tables.pop("seen"), "it has no table of the files that were packed"),
        (lambda _, tables: tables.update(seen=tables["seen"][:2]), "it has no table of the files"),
        (lambda _, tables: tables.update(seen=np.zeros(COUNT, "u1")), "it has no table of the files"),
        (lambda _, tables: tables.update(seen=np.zeros_like(tables["seen"])), "nothing is noted of image 1"),
        (
            lambda about, _: about["failures"][1].update(reason=""),
            r"failures\[1\].reason is '', not text that is not empty",
        ),
        (lambda about, _: about["failures"][1].update(id=30), "nothing is noted of image 31"),
        (lambda about, _: about["failures"].append({"id": 30, "reason": "x"}), "image 30 is said to have failed, and"),
        (lambda about, _: about["failures"].append(about["failures"][0]), "an image is listed twice among the failure"),
        (lambda _, tables: tables.update(starts=-tables["starts"]), "names do not start where others end"),
        (lambda _, tables: tables.update(starts=tables["starts"][:3]), "names do not start where others end"),
        (
            lambda _, tables: tables.update(starts=tables["starts"].astype("f8")),
            "names are uint8 .*, their starts float64",
        ),
    ],
)
def test_packs_of_any_content_are_refused(
    change: Callable[[dict[str, Any], dict[str, Any]], object], message: str, packed: Path, tmp_path: Path
) -> None:
    path = changed_pack(packed, tmp_path, change)
    with pytest.raises(UnitvisError, match=rf"x\..* damaged: {message}.*; pack again") as refused:
        open_source(path, NORMAL)
    assert "\n" not in str(refused.value)
    with pytest.raises(UnitvisError, match="damaged"):
        pack(packed.parent / "images", path, resume=True)


def copied_pack(packed: Path, folder: Path) -> Path:
    for path in packed.parent.glob("whole.*"):
        shutil.copy(path, folder / f"x{path.suffix}")
    return folder / "x.npy"


@pytest.mark.parametrize(
    "write",
    [
        lambda text: json.dumps(json.loads(text), sort_keys=True),
        lambda text: " " * 1000 + text,
        lambda text: json.dumps({"more": "x" * 2**16} | json.loads(text)),
    ],
    ids=["sorted", "blanks", "more"],
)
def test_the_json_file_may_be_written_again(write: Callable[[str], str], packed: Path, tmp_path: Path) -> None:
    path = copied_pack(packed, tmp_path)
    path.with_suffix(".json").write_text(write(path.with_suffix(".json").read_text()))
    source = open_source(path, NORMAL)
    assert isinstance(source, PackSource)
    assert sorted(source.unusable) == list(BROKEN)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_text("{}"),
        lambda path: path.write_text('{"a": "unitvis pack"}'),
        lambda path: path.write_text("no json"),
        lambda path: path.symlink_to("nowhere"),
        os.mkfifo,
        Path.mkdir,
        lambda path: None,
    ],
    ids=["empty", "value", "text", "dangling", "pipe", "folder", "missing"],
)
def test_a_pack_without_its_json_file_is_no_array(make: Callable[[Path], object], packed: Path, tmp_path: Path) -> None:
    path = copied_pack(packed, tmp_path)
    path.with_suffix(".json").unlink()
    make(path.with_suffix(".json"))
    with pytest.raises(UnitvisError, match=r"an incomplete pack: x.npz is that of a pack, and there is no .json file"):
        open_source(path, NORMAL)
    np.savez(path.with_suffix(".npz"), values=np.zeros(3))
    assert open_source(path, NORMAL).kind == "array"
