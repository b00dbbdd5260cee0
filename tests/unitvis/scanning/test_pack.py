"""Packing: a pack that was stopped, killed or had no room goes on to the same bytes; half a pack is never one."""

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
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import unitvis
from support.packs import BROKEN, COUNT, NORMAL, originals, pack, same, scan
from unitvis import Interrupted, UnitvisError
from unitvis.sources import FileSource, open_source

packing = importlib.import_module("unitvis.scanning.pack")


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


def files(path: Path) -> dict[str, bytes]:
    """What a pack consists of; the JSON without the place of the originals."""
    found = {ending: path.with_suffix(ending).read_bytes() for ending in (".npy", ".npz")}
    about = json.loads(path.with_suffix(".json").read_text())
    about["source"]["path"] = about["source"]["others"] = None
    return found | {"json": json.dumps(about).encode(), "left": str(sorted(os.listdir(path.parent))).encode()}


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
    with pytest.raises(Interrupted, match=r"interrupted after 25 of 70 images; resume with .*--resume") as stopped:
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
import importlib, io, os, signal, sys
from pathlib import Path
import unitvis
packing = importlib.import_module("unitvis.scanning.pack")
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


def test_kill_9_wherever_it_strikes(unchanged: Path, tmp_path: Path) -> None:
    """Twice at each change of a file: FILE.npy is the old pack, the new one or not there, and goes on to its bytes."""
    for name in ("images", "out"):
        (tmp_path / name).mkdir()
    for path in sorted((unchanged / "0").iterdir())[:6]:
        shutil.copy(path, tmp_path / "images")
    command = [sys.executable, "-W", "ignore", "-c", KILLED, tmp_path / "images", tmp_path / "out" / "x.npy"]
    path = os.pathsep.join(sys.path)
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps, seen = done.stdout.split(maxsplit=1)
    assert int(steps) > 20
    assert seen == "[('pack', 20), ('pack', 30)]\n"


def test_without_locks_a_pack_is_the_same(
    folder: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unitvis.files.fcntl", None)  # as on Windows
    pack(folder, tmp_path / "x.npy")
    assert (tmp_path / "x.npy").read_bytes() == packed.read_bytes()


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


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["link", "hard link"])
@pytest.mark.parametrize("ending", [".npy.part", ".npy", ".npz", ".json", ".npy.progress", ".npy.progress.part"])
def test_a_pack_is_never_written_through_a_link(
    link: Callable[[Path, Path], None], ending: str, folder: Path, packed: Path, tmp_path: Path
) -> None:
    victim, out = tmp_path / "victim", tmp_path / "out" / "x.npy"
    out.parent.mkdir()
    for file in packed.parent.glob("whole.*"):
        shutil.copy(file, out.with_suffix(file.suffix))
    victim.write_bytes(out.with_suffix(ending).read_bytes() if ending.count(".") == 1 else b"untouched")
    before = victim.read_bytes()
    out.with_suffix(ending).unlink(missing_ok=True)
    link(victim, out.with_suffix(ending))
    pack(folder, out, overwrite=True, every=1e-9)
    assert victim.read_bytes() == before
    assert not os.path.samefile(victim, out)
    assert files(out) == files(packed) | {"left": b"['x.json', 'x.npy', 'x.npz']"}


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["link", "hard link"])
def test_a_pack_is_not_resumed_through_a_link(
    link: Callable[[Path, Path], None], folder: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, victim = tmp_path / "x.npy", tmp_path / "victim"
    with monkeypatch.context() as patch:
        stop(3, crash, patch)
        with pytest.raises(StoppedError):
            pack(folder, out, every=1e-9)
    part = tmp_path / "x.npy.part"
    shutil.move(part, victim)
    before = victim.read_bytes()
    link(victim, part)
    with pytest.raises(UnitvisError, match=r"x.npy.part is a link .*, so nothing is written into it; start again"):
        pack(folder, out, resume=True)
    assert victim.read_bytes() == before
    pack(folder, out, overwrite=True)
    assert victim.read_bytes() == before
    assert out.read_bytes() == packed.read_bytes()


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


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"others": "x"}, "source.others is 'x', not a whole number from 0"),
        ({"images_ending": [b"x"]}, "Object of type bytes is not JSON serializable"),
    ],
)
def test_a_pack_that_could_not_be_read_is_refused_before_an_image_is(
    entry: dict[str, object], message: str, unchanged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = FileSource.describe
    monkeypatch.setattr(FileSource, "describe", lambda self: described(self) | entry)
    with pytest.raises(UnitvisError, match=f"a pack is not written that nothing could read again: {message}"):
        pack(unchanged, tmp_path / "x.npy")
    assert not list(tmp_path.iterdir())
