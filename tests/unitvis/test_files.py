"""Files are written whole or not at all, and never through a link."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import unitvis
from support.clock import in_time
from support.memory import tracing
from unitvis import UnitvisError, files
from unitvis.drawing import sheets
from unitvis.files import (
    file_name,
    lock,
    make_folder,
    only_writer,
    parsed_json,
    read_arrays,
    read_json,
    replacing,
    unoccupied,
)
from unitvis.pages import sprites
from unitvis.pages.figures import figure


def test_a_failure_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(TypeError), replacing(path) as part:
        part.write_text(0)  # type: ignore[arg-type]
    assert path.read_text() == "before"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("link", ["file", "file.part"])
def test_a_link_is_replaced_and_not_followed(link: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / link).symlink_to(victim)
    with replacing(tmp_path / "file") as part:
        part.write_text("new")
    assert victim.read_text() == "untouched"
    assert (tmp_path / "file").read_text() == "new"
    assert not (tmp_path / "file").is_symlink()


def test_a_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "folder").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnitvisError, match="folder is a link"):
        make_folder(tmp_path / "folder")
    assert make_folder(make_folder(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert unoccupied(tmp_path / "folder") == tmp_path / "folder"
    assert (tmp_path / "elsewhere").is_dir()


KILLED = """
import io, os, signal, sys
from pathlib import Path
from unitvis.files import lock, only_writer

folder, kind = Path(sys.argv[1]), sys.argv[2]
if kind == "folder":
    context = only_writer(folder)
    context.__enter__()
else:
    file = io.FileIO(folder / "file", "w")
    assert lock(file)
if not os.fork():  # a worker that is busy until the test ends it
    print("forked", flush=True)
    sys.stdin.read()
    os._exit(0)
signal.pause()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no process is forked")
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_workers_of_a_killed_process_do_not_keep_its_lock(kind: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"forked\n"

        def is_free() -> bool:
            if kind == "file":
                with io.FileIO(tmp_path / "file") as file:
                    return lock(file)
            try:
                with only_writer(tmp_path):
                    return True
            except UnitvisError:
                return False

        assert not is_free()
        process.kill()
        process.wait()
        assert is_free()  # the worker still waits for the end of its input, which this test holds


LEFT = """
import os, sys
from pathlib import Path
from unitvis import UnitvisError
from unitvis.files import only_writer

folder, child = Path(sys.argv[1]), 0
with only_writer(folder):
    if child := os.fork():
        print(os.waitpid(child, 0)[1])
        try:
            with only_writer(folder):
                print("free")
        except UnitvisError as error:
            print(error)
if not child:
    os._exit(7)
with only_writer(folder):
    print("free again")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no process is forked")
def test_a_forked_process_that_leaves_the_block_does_not_release_the_lock(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LEFT, str(tmp_path)], capture_output=True, text=True, check=True)
    refused = f"another command is writing into {tmp_path}; wait for its end, or give another path"
    assert done.stdout.splitlines() == [str(7 << 8), refused, "free again"]
    assert not done.stderr


@pytest.mark.parametrize("layer", [".", "..", "...", "a/b", "../x", "\0", "a b.c", "é", "\ud800"])
def test_no_layer_name_leads_out_of_its_folder(layer: str, tmp_path: Path) -> None:
    name = file_name(layer)
    assert (tmp_path / name).resolve().parent == tmp_path.resolve()
    assert name not in (".", "..")
    assert (file_name(layer) == layer) == (layer in ("a b.c",))


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def hollow(path: Path) -> None:
    path.touch()
    os.truncate(path, 20 << 30)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (pipe, "not a regular file"),
        (endless, "not a regular file"),
        (hollow, "a file of 21,474,836,480 bytes"),
    ],
)
def test_only_files_that_end_are_read(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    make(tmp_path / "file")
    with in_time(), pytest.raises(OSError, match=message):
        read_json(tmp_path / "file")
    with in_time(), pytest.raises((OSError, zipfile.BadZipFile)):
        read_arrays(tmp_path / "file", ["x"])


def npy(array: object) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_arrays_that_claim_more_than_a_file_can_hold_are_refused(tmp_path: Path) -> None:
    """The table at the end of a zip file may say of an array that it is stored, and no smaller than unpacked."""
    path, big = tmp_path / "x.npz", npy(np.zeros(80 << 20, np.uint8))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", big)
    data = bytearray(path.read_bytes())
    table = data.rindex(b"PK\1\2")
    data[table + 20 : table + 24] = len(big).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"83,886,208 bytes in 8\d,\d\d\d$"):
        read_arrays(path, ["x"])


def compressed(path: Path, *, stray: int = 0, **sizes: int) -> Path:
    """An npz file with arrays of zeros of so many bytes, after bytes that belong to none."""
    with open(path, "wb") as file:
        file.truncate(stray)
        file.seek(stray)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, size in sizes.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(
                        member, {"descr": "|u1", "fortran_order": False, "shape": (size,)}
                    )
                    for _ in range(size >> 20):
                        member.write(bytes(1 << 20))
    return path


HUGE_ARRAYS = [
    ({"x": 1 << 20, "zzz": 48 << 20}, "has an array 'zzz', which does not belong there"),
    ({"x": 80 << 20, "stray": 64 << 20}, "67,10.,... bytes of .* belong to no array"),
    ({"x": 80 << 20}, "83,886,208 bytes in"),
]


@pytest.mark.parametrize(("sizes", "message"), HUGE_ARRAYS)
def test_arrays_that_are_not_wanted_or_too_large_are_not_allocated(
    sizes: dict[str, int], message: str, tmp_path: Path
) -> None:
    path = compressed(tmp_path / "x.npz", **sizes)
    with tracing() as traced, pytest.raises(ValueError, match=message):
        read_arrays(path, ["x"])
    assert traced.peak < 8 << 20


def test_holes_of_a_sparse_file_are_no_arrays(tmp_path: Path) -> None:
    path, size = tmp_path / "x.npz", 256 << 20
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (size,)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", header.getvalue())
    data = bytearray(path.read_bytes())
    table, whole = data.rindex(b"PK\1\2"), size + len(header.getvalue())
    for start in (table + 20, table + 24, 18, 22):  # both tables say that the array is stored, with all its bytes
        data[start : start + 4] = whole.to_bytes(4, "little")
    end = data.rindex(b"PK\5\6")
    data[end + 16 : end + 20] = (table + size).to_bytes(4, "little")
    with open(path, "wb") as file:
        file.write(data[:table])
        file.seek(table + size)
        file.write(data[table:])
    if path.stat().st_blocks * 512 > size:
        pytest.skip("this file system has no holes")
    with tracing() as traced, pytest.raises(ValueError, match=r"bytes in \d"):
        read_arrays(path, ["x"])
    assert traced.peak < 8 << 20


@pytest.mark.parametrize("text", [b"[" + b"[]," * (1 << 20) + b"0]", b"[" + b'"ab",' * (1 << 20) + b"0]"])
def test_json_is_refused_by_the_memory_that_its_values_would_take(
    text: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text)
    monkeypatch.setattr("unitvis.files._MAX_OBJECTS", 2**25)
    with tracing() as traced, pytest.raises(ValueError, match=r"its values would take up to [\d,]+ bytes; more than"):
        read_json(path)
    assert traced.peak < 2 * len(text)


def test_the_bound_on_json_lies_above_what_it_takes_and_what_large_runs_hold() -> None:
    """Of a thousandth of two million failures, and of every other image of ten million."""
    failure = {"id": 1_234_567, "name": "train/n01234567/n01234567_12345.JPEG", "reason": "not an image (JPEG, PNG)"}
    ranges = [[2 * number + 8_000_000, 2 * number + 8_000_001] for number in range(5_000)]
    for value in ([dict(failure) for _ in range(2_000)], ranges):
        text = json.dumps(value, indent=1).encode()
        with tracing() as traced:
            parsed_json(text)
        need = len(text) + sum(text.count(character) * size for character, size in files._BYTES_OF_OBJECTS.items())
        assert traced.peak < need < files._MAX_OBJECTS / 1000
        assert len(text) < files._MAX_JSON / 1000 * 1.6


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("second", ["x.npy", "x"])
def test_two_arrays_of_one_name_are_refused(second: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", npy(1))
        archive.writestr(second, npy(2))
    with pytest.raises(ValueError, match="two arrays have one name"):
        read_arrays(tmp_path / "x.npz", ["x"])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A run with its sheets and its gallery, which no test changes, and its images."""
    folder = tmp_path_factory.mktemp("drawn") / "run"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU()).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 9, 3), np.uint8)
    run = unitvis.scan(model, pixels, transform=unitvis.Transform(), out=folder, progress=False)
    sheets.render(run, folder)
    unitvis.gallery(run, folder, model, project=True)
    return folder, pixels


@pytest.fixture
def run(drawn: tuple[Path, np.ndarray], tmp_path: Path) -> unitvis.Run:
    folder, pixels = drawn
    return unitvis.load(shutil.copytree(folder, tmp_path / "run"), pixels)


def test_pictures_are_not_written_through_links_in_a_run_folder(run: unitvis.Run, tmp_path: Path) -> None:
    folder, victim = tmp_path / "run", tmp_path / "victim"
    victim.write_text("untouched")
    written = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("manifest.json", "top.npz")]
    assert {path.suffix for path in written} >= {".png", ".jpg", ".html", ".js", ".css"}
    for path in written:
        for link in (path, path.with_name(f"{path.name}.part")):
            # What the model drew for an earlier gallery stays as it is.
            if path.name != "drawn.json" and not path.name.startswith(sprites.BY_MODEL):
                link.unlink(missing_ok=True)
                link.symlink_to(victim)
    sheets.render(run, folder)
    unitvis.gallery(run, folder)
    assert victim.read_text() == "untouched"


@pytest.mark.parametrize("name", ["sheets", "gallery", "gallery/images", "gallery/layers", "gallery/layers/0"])
def test_pictures_are_not_written_into_linked_folders(name: str, run: unitvis.Run, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.rmtree(folder / name)
    (folder / name).symlink_to(elsewhere)
    draw = sheets.render if name == "sheets" else unitvis.gallery
    with pytest.raises(UnitvisError, match="is a link, so nothing is written into it"):
        draw(run, folder)
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("stands", ["link", "folder", "pipe"])
def test_a_gallery_elsewhere_copies_nothing_but_files(stands: str, run: unitvis.Run, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    picture = next((tmp_path / "run" / "gallery").rglob("responses-0.png"))
    picture.unlink()
    stand_in(picture, stands, secret)
    with pytest.raises(UnitvisError, match=r"responses-0.png cannot be used: it is no regular file .*; draw it again"):
        unitvis.gallery(run, tmp_path / "other")
    assert not any(path.read_bytes() == b"secret" for path in (tmp_path / "other").rglob("*") if path.is_file())


def test_a_gallery_elsewhere_copies_no_file_too_large_for_a_picture(run: unitvis.Run, tmp_path: Path) -> None:
    picture = next((tmp_path / "run" / "gallery").rglob("responses-0.png"))
    os.truncate(picture, 2**40)
    with pytest.raises(UnitvisError, match=r"responses-0.png cannot be used: a file of 1,099,511,627,776 bytes; more"):
        unitvis.gallery(run, tmp_path / "other")


def stand_in(path: Path, what: str, target: Path) -> None:
    """Put a link to `target`, a folder, a pipe or a file in the place of a file or folder."""
    if what == "link":
        path.symlink_to(target)
    elif what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path.write_text("a file")


@pytest.mark.parametrize("name", ["gallery", "gallery/layers", "gallery/layers/0"])
@pytest.mark.parametrize("stands", ["link", "pipe", "file"])
def test_reading_an_earlier_gallery_creates_nothing_and_follows_no_link(
    name: str, stands: str, run: unitvis.Run, tmp_path: Path
) -> None:
    elsewhere = Path(shutil.move(tmp_path / "run" / name, tmp_path / "elsewhere"))
    for inner in [path for path in elsewhere.iterdir() if path.is_dir()]:
        shutil.rmtree(inner)  # what is read from is not there, and must not be created
    stand_in(tmp_path / "run" / name, stands, elsewhere)
    before = sorted(elsewhere.rglob("*"))
    with suppress(UnitvisError):
        assert unitvis.gallery(run, tmp_path / "other")
    with pytest.raises(UnitvisError, match=r"no projections of layer|reached through a link|cannot be used"):
        figure(run, ["0"], "paper", crop="image")  # to which no kept projection is cut
    assert sorted(elsewhere.rglob("*")) == before


@pytest.mark.parametrize("name", ["sheets", "gallery", "gallery/images", "gallery/layers", "gallery/layers/0"])
def test_a_file_in_the_place_of_a_folder_is_named(name: str, run: unitvis.Run, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run" / name).write_text("a file")
    draw = sheets.render if name == "sheets" else unitvis.gallery
    with pytest.raises(UnitvisError, match=rf"{name} must be a folder and something else stands there; remove it"):
        draw(run, tmp_path / "run")


def test_a_folder_in_the_place_of_a_picture_is_named(run: unitvis.Run, tmp_path: Path) -> None:
    picture = tmp_path / "run" / "gallery" / "layers" / "0" / "patches-0.jpg"
    picture.unlink()
    picture.mkdir()
    with pytest.raises(UnitvisError, match=r"could not be written into .* Is a directory: '.*patches-0.jpg'"):
        unitvis.gallery(run, tmp_path / "run")
