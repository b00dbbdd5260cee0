"""A pack stands for what was packed: same ids, names, failures, bytes and patches; half a pack is never one."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

import unitvis
from half import rounded  # noqa: F401  # a fixture
from unitvis import Interrupted, UnitvisError, cli, models
from unitvis import pack as pack_function
from unitvis.drawing import sheets
from unitvis.results.arrays import ARRAYS
from unitvis.scanning.verify import verify
from unitvis.sources import PackSource, open_source, reopen_source

packing = sys.modules["unitvis.scanning.pack"]
COUNT = 70
BROKEN = (0, 31, 32, 69)
TRANSFORM = unitvis.Transform(20, 16, (0.5, 0.4, 0.3), (0.2, 0.2, 0.3), "bicubic")
NORMAL = unitvis.Transform(mean=TRANSFORM.mean, std=TRANSFORM.std)
NET = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 5, 3))
"""


def net() -> nn.Sequential:
    space: dict[str, Callable[[], nn.Sequential]] = {}
    exec(NET, space)  # noqa: S102
    return space["net"]().eval()


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seventy pictures of many sizes, of which four cannot be read, the first and the last among them."""
    root = tmp_path_factory.mktemp("pack") / "images"
    for id in range(COUNT):
        rng = np.random.default_rng(id)
        small = rng.integers(0, 256, (5, 6, 3), np.uint8)
        picture = Image.fromarray(small).resize(rng.integers(20, 60, 2).tolist(), Image.Resampling.NEAREST)
        path = root / f"{id // 20}" / f"{id:02}é.{'jpg' if id % 2 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[274] = 1 + id % 8
        picture.save(path, exif=exif)
        if id in BROKEN:
            path.write_bytes(b"" if id == 31 else path.read_bytes()[:60])
    return root


@pytest.fixture
def folder(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals, tmp_path / "images"))


@pytest.fixture(scope="module")
def packed(originals: Path) -> Path:
    """A pack that was made without a stop, of the folder that tests leave alone."""
    return Path(pack(originals, originals.parent / "whole.npy").path)


def pack(images: object, path: Path, **options: object) -> PackSource:
    return pack_function(images, path, options.pop("transform", TRANSFORM), progress=False, **options)


def scan(images: object, **options: object) -> unitvis.Run:
    return unitvis.scan(net(), images, transform=options.pop("transform", NORMAL), progress=False, **options)


def as_kind(kind: str, folder: Path) -> Path:
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
    if kind == "list":
        listing = folder / "list.txt"
        listing.write_text("\n".join(reversed(names)))
        return listing
    if kind == "tar":
        for number in range(3):
            with tarfile.open(folder.parent / f"shard-{number}.tar", "w") as archive:
                for name in names[number::3]:
                    archive.add(folder / name, name)
        return folder.parent / "shard-{0..2}.tar"
    return folder


def same(one: unitvis.Run, other: unitvis.Run) -> None:
    for name in other.layers:
        for key in ARRAYS:
            assert getattr(one[name], key).tobytes() == getattr(other[name], key).tobytes(), (name, key)
    for key in ("images", "coverage", "failures", "layers", "input"):
        assert one.manifest[key] == other.manifest[key], key
    assert one.records == other.records


def files(path: Path) -> dict[str, bytes]:
    """What a pack consists of; the JSON without the place of the originals."""
    found = {ending: path.with_suffix(ending).read_bytes() for ending in (".npy", ".npz")}
    about = json.loads(path.with_suffix(".json").read_text())
    about["source"]["path"] = about["source"]["others"] = None
    return found | {"json": json.dumps(about).encode(), "left": str(sorted(os.listdir(path.parent))).encode()}


# ----------------------------------------------------------------------------------------------------- as the originals


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


def test_a_pack_says_what_it_is(originals: Path, packed: Path) -> None:
    about = json.loads(packed.with_suffix(".json").read_text())
    source = open_source(originals, TRANSFORM)
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


@pytest.mark.usefixtures("rounded")
def test_candidates_of_half_precision_are_read_again_from_the_pack(
    packed: Path, originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = importlib.import_module("unitvis.scanning.precision").Plan("fp16", "as the test wants it")
    monkeypatch.setattr(importlib.import_module("unitvis.scanning.scan"), "plan", lambda *_, **__: half)
    want = scan(originals, transform=TRANSFORM)
    same(scan(packed, batch_size=16), want)
    runs = [scan(packed, shard=(n, 2)) for n in (2, 1)]
    same(unitvis.merge(runs, net()), want)
    assert want.manifest["scan"]["precision"] == "fp16"


# ---------------------------------------------------------------------------------------------- what is asked of a pack


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


def test_files_that_do_not_belong_together(packed: Path, originals: Path, tmp_path: Path) -> None:
    pack(originals, tmp_path / "other.npy", transform=unitvis.Transform(21, 16))
    pack(as_kind("list", originals), tmp_path / "list.npy")

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
        (".json", b'["unitvis pack", 1]', r"x.json has format none; this version"),
        (
            ".json",
            b'{"unitvis pack": 1, "source": {}}',
            r"x.json is damaged: there is no failures, pixels, shape, tables",
        ),
    ]
    for ending, data, message in cases:
        with pytest.raises(UnitvisError, match=message):
            open_source(mixed(ending, data), NORMAL)
    (originals / "list.txt").unlink()


# -------------------------------------------------------------------------------------------- interrupted, and resumed


class StoppedError(BaseException):
    """The end of a process, as far as a test in one process can have it."""


def stop(after: int, how: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """`how` is called once so many batches were written down, the checkpoint that follows included."""
    real, seen = packing._Packing.add, [0]

    def add(self: object, batch: object) -> None:
        real(self, batch)
        seen[0] += 1
        if seen[0] == after:
            how()

    monkeypatch.setattr(packing._Packing, "add", add)
    monkeypatch.setattr(packing, "COMPUTE_BATCH", 2)  # eight images at a time


def crash() -> None:
    raise StoppedError


@pytest.mark.parametrize(("after", "every"), [(1, 1e-9), (4, 1e-9), (9, 1e-9), (5, 1e9)])
def test_a_pack_that_crashed_goes_on_to_the_same_bytes(
    after: int, every: float, folder: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "whole.npy"
    out.parent.mkdir()
    with monkeypatch.context() as patch:
        stop(after, crash, patch)
        with pytest.raises(StoppedError):
            pack(folder, out, every=every)
    (folder / "notes.txt").touch()  # no image, so of no matter
    with open(f"{out}.part", "ab") as file:  # what came after the checkpoint may be anything
        file.write(b"\xff" * 2000)
    with pytest.raises(UnitvisError, match=r"no file or folder .*whole.npy'; that pack is not finished: resume it"):
        open_source(out, NORMAL)
    with pytest.raises(UnitvisError, match=r"whole.npy is not finished; resume it \(--resume\) or start again"):
        pack(folder, out)
    asked: list[object] = []
    real = packing.EncodedSource.batches
    with monkeypatch.context() as patch:
        patch.setattr(
            packing.EncodedSource, "batches", lambda *a, ids, **b: asked.append(ids) or real(*a, ids=ids, **b)
        )
        pack(folder, out, resume=True)
    good = [id for id in range(COUNT) if id not in BROKEN]
    assert asked == [range([*good, COUNT][min(8 * after, len(good)) - 1] + 1, COUNT) if every < 1 else None]
    assert files(out) == files(packed) | {"left": b"['whole.json', 'whole.npy', 'whole.npz']"}
    same(scan(out), scan(packed))
    before = os.stat(out)
    pack(folder, out, resume=True)  # whole: nothing to do
    assert os.stat(out) == before
    with pytest.raises(UnitvisError, match=r"is another pack \(then and now\): transform.resize is 20 and 22"):
        pack(folder, out, resume=True, transform=unitvis.Transform(22, 16))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint(
    number: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stop(3, lambda: os.kill(os.getpid(), number), monkeypatch)
    with pytest.raises(Interrupted, match=r"interrupted after 25 of 70 images; go on with .*--resume") as stopped:
        pack(folder, tmp_path / "x.npy")
    assert stopped.value.code == 128 + number
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    left = {path: path.read_bytes() for path in tmp_path.glob("x.*")}
    for options, message in (
        ({"transform": unitvis.Transform(20, 18)}, "transform.crop is 16 and 18; *|interpolation"),
        ({"scaled": True}, "source.decoding.scaled is false and true"),
    ):
        with pytest.raises(UnitvisError, match=rf"x.npy cannot be resumed \(then and now\): .*{message}"):
            pack(folder, tmp_path / "x.npy", resume=True, **options)
    with open(tmp_path / "x.npy.part", "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(UnitvisError, match=r"another process is packing into .*x.npy; wait for its end"):
                pack(folder, tmp_path / "x.npy", **options)
    assert left == {path: path.read_bytes() for path in tmp_path.glob("x.*")}  # whoever is refused changes nothing
    progress = tmp_path / "x.npy.progress"
    progress.write_bytes(progress.read_bytes()[:-9])
    with pytest.raises(UnitvisError, match=r"x.npy.progress is damaged .*; start again with --overwrite"):
        pack(folder, tmp_path / "x.npy", resume=True)
    pack(folder, tmp_path / "x.npy", overwrite=True)


KILLED = """
import io, os, signal, sys
from pathlib import Path
import unitvis
packing = sys.modules["unitvis.scanning.pack"]
packing.COMPUTE_BATCH = 1
os.fsync = lambda file: None  # slow, and of no matter while the system lives
folder, out = sys.argv[1], Path(sys.argv[2])
wanted, old = unitvis.Transform(20, 16, interpolation="bicubic"), unitvis.Transform(30, 18)


def pack(**options):
    unitvis.pack(folder, out, options.pop("transform", wanted), every=1e-9, workers=0, progress=False, **options)


def files():
    return {path.name: path.read_bytes() for path in out.parent.iterdir()}


def killed(last, **options):  # at the last one of the steps that change a file; a write ends in its midst
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), status
        return status == signal.SIGKILL
    steps = iter(range(last))

    def dying(real, half=lambda *arguments: None):
        def call(*arguments, **options):
            if next(steps, None) is None:
                half(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)
        return call

    class Dying(io.FileIO):
        write = dying(io.FileIO.write, lambda file, data, write=io.FileIO.write: write(file, data[: len(data) // 2]))
        truncate = dying(io.FileIO.truncate)

    io.FileIO = Dying
    os.replace, os.fsync, Path.unlink = dying(os.replace), dying(os.fsync), dying(Path.unlink)
    packing.np.savez = dying(packing.np.savez, lambda file, **arrays: file.write(b"PK half"))
    pack(**options)
    os._exit(0)


def going_on():  # and whether what there is meanwhile may be
    if out.exists():
        source = unitvis.sources.open_source(out, unitvis.Transform())
        seen.add((source.kind, source.transform.resize))
    return {"overwrite" if files() == before else "resume": True}  # not begun: --resume would be asked of the old pack


pack()
whole, seen, last = files(), set(), 0
while True:
    for path in out.parent.iterdir():
        path.unlink()
    pack(transform=old)
    before = files()
    if not killed(last, overwrite=True):
        break
    killed(last % 7, **going_on())
    pack(**going_on())
    assert files() == whole, (last, files().keys())
    last += 1
print(last, sorted(seen))
"""


def test_kill_9_wherever_it_strikes(originals: Path, tmp_path: Path) -> None:
    """Twice at each change of a file: FILE.npy is the old pack, the new one or not there, and goes on to its bytes."""
    for name in ("images", "out"):
        (tmp_path / name).mkdir()
    for path in sorted((originals / "0").iterdir())[:6]:
        shutil.copy(path, tmp_path / "images")
    command = [sys.executable, "-W", "ignore", "-c", KILLED, tmp_path / "images", tmp_path / "out" / "x.npy"]
    path = os.pathsep.join(sys.path)
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps, seen = done.stdout.split(maxsplit=1)
    assert int(steps) > 20
    assert seen == "[('pack', 20), ('pack', 30)]\n"


def test_a_full_disk(folder: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out" / "whole.npy"
    out.parent.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 9999, 9999))
        with pytest.raises(UnitvisError, match=r"will take 53,888 bytes for 70 images and 9,999 are free"):
            pack(folder, out)
        assert not list(out.parent.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))  # the system refuses to make a file any longer
    try:
        with pytest.raises(
            UnitvisError, match=r"after 38 of 70 images .*whole.npy could not be written: File too large"
        ):
            pack(folder, out, every=1e-9)
        assert int(np.load(f"{out}.progress")["seen"].shape[0]) == 38
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    pack(folder, out, resume=True)
    assert files(out) == files(packed) | {"left": b"['whole.json', 'whole.npy', 'whole.npz']"}


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("x.npz", {}, "x.npz must end in .npy"),
        ("gone/x.npy", {}, "there is no folder .*gone to write x.npy into"),
        ("x.npy", {"resume": True, "overwrite": True}, "exclude each other"),
        ("x.npy", {"every": 0}, "checkpoints come every 0 seconds"),
        ("plain.npy", {"overwrite": True}, "plain.npy is there and belongs to no pack, so it is not overwritten"),
        ("labels.npy", {"overwrite": True}, "labels.json is there and belongs to no pack"),
        ("tables.npy", {}, "tables.npz is there and belongs to no pack"),
        ("there.npy", {}, r"there.npy holds a pack already; give another path, or overwrite it \(--overwrite\)"),
        ("x.npy", {"transform": None}, "need a transform"),
        ("x.npy", {"transform": unitvis.Transform()}, "one size is needed: give the transform"),
        ("x.npy", {"on_error": "raise"}, "'0/00é.png' cannot be used"),
        ("x.npy", {"max_failures": 2}, "more than max_failures=2"),
        (
            "x.npy",
            {"images": np.zeros((3, 8, 8, 3), np.uint8)},
            "images of the kind 'array' cannot be packed; give a folder",
        ),
        ("x.npy", {"images": "there.npy"}, "of the kind 'pack'"),
        ("x.npy", {"images": ["images/0/01é.jpg"]}, "of the kind 'paths'"),
    ],
)
def test_refusals(
    path: str,
    options: dict[str, object],
    message: str,
    folder: Path,
    packed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("plain.npy", np.zeros((3, 8, 8, 3), np.uint8))
    Path("labels.json").write_text("{}")
    Path("tables.npz").write_bytes(b"")
    for file in packed.parent.glob("whole.*"):
        shutil.copy(file, f"there{file.suffix}")
    with pytest.raises(UnitvisError, match=message):
        pack(options.pop("images", folder), Path(path), **options)


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "nets.py").write_text(NET)
    model, out = f"{tmp_path / 'nets.py'}:net", tmp_path / "x.npy"
    size = ["--resize", "20", "--crop", "16", "--interpolation", "bicubic"]

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    code, printed, _ = call("pack", folder, "-o", out, *size, "--workers", 1)
    assert (code, printed.splitlines()[0]) == (cli.SKIPPED, f"{out}: 70 images, 16 x 16 pixels")
    assert "4 images could not be read and were skipped (all are listed in x.json):" in printed
    code, _, err = call("pack", folder, "-o", out, *size)
    assert (code, err.strip()[-31:]) == (cli.USAGE, "or overwrite it (--overwrite)") or code == cli.USAGE
    assert call("pack", folder, "-o", out, *size, "--resume")[0] == cli.SKIPPED
    assert call("pack", folder, "-o", out, *size, "--overwrite", "--max-failures", "3")[0] == cli.USAGE
    assert call("pack", folder, "-o", out, "--like", model)[2].endswith(
        "names no transform; give --resize and --crop\n"
    )

    normal = ["--mean", ".5", ".4", ".3", "--std", ".2", ".2", ".3"]
    code, printed, _ = call("scan", model, out, "-o", tmp_path / "run", *normal)
    assert code == cli.SKIPPED
    assert "66 images, 11 units of 2 layers" in printed
    assert call("scan", model, folder, "-o", tmp_path / "want", *normal, *size)[0] == cli.SKIPPED
    for name in ("top.npz", "images.jsonl", "sheets/2.png"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "want" / name).read_bytes()
    assert call("verify", tmp_path / "run", model)[0] == cli.DONE
    assert call("verify", tmp_path / "run", model, "--images", folder)[0] == cli.DONE
    assert call("verify", tmp_path / "want", model, "--images", out)[0] == cli.DONE
    shutil.move(folder, tmp_path / "moved")
    code, _, err = call("render", tmp_path / "run")
    assert code == cli.DONE
    assert "unitvis: warning: the originals of the pack" in err
    code, _, err = call("render", tmp_path / "run", "--images", tmp_path / "moved")
    assert (code, err) == (cli.DONE, "")


def test_like_a_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the weights want is done as far as a pack does it, and what is said beside it goes first."""
    loaded = unitvis.models.Loaded("some:model", net(), TRANSFORM)
    asked = []
    monkeypatch.setattr(models, "load", lambda *a, **b: asked.append((a, b)) or loaded)
    command = ["pack", str(folder), "-o", str(tmp_path / "x.npy"), "--like", "some:model"]
    for more, crop in (([], 16), (["--crop", "12", "--overwrite"], [12, 12])):
        assert cli.main(command + more) == cli.SKIPPED
        about = json.loads((tmp_path / "x.json").read_text())
        assert about["transform"] == {"resize": 20, "crop": crop, "interpolation": "bicubic"}
    assert asked == [(("some:model",), {"pretrained": False})] * 2  # its weights are not needed
