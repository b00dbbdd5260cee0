"""Worker processes: the same images, failures and bytes as without them, whatever becomes of a worker."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from PIL import Image, ImageFile, PngImagePlugin

from support.sources import PLAIN, everything, write
from unitvis.decoding import pool
from unitvis.decoding.board import Board, slot_bytes
from unitvis.decoding.contents import FileContents
from unitvis.decoding.crew import Crew
from unitvis.decoding.processes import may_start
from unitvis.errors import UnitvisError
from unitvis.sources import encoded, open_source
from unitvis.sources.transform import Transform

pytestmark = pytest.mark.skipif(not may_start(), reason="there are no worker processes on this system")

DEADLINE = 300  # seconds after which what a test waits for is taken to never happen
ODD = (7, 13)  # height and width of an image that the decoder of `bad_decoder` does not survive

BAD_DECODER = """
import os, signal
from PIL import Image, ImageFile, PngImagePlugin
load = ImageFile.ImageFile.load
def bad_load(self):
    if self.size == (13, 7):
        with open(os.environ["BAD_TIMES"], "a") as file:
            file.write("x")
        if os.path.getsize(os.environ["BAD_TIMES"]) <= int(os.environ["BAD_COUNT"]):
            {}
    return load(self)
ImageFile.ImageFile.load = bad_load
"""


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """Processes read even few images."""
    monkeypatch.setattr(encoded, "MIN_IMAGES", 1)


def everything_about(source, batch_size=4, **options):
    """What reading a source gives, in plain Python objects: pixels, ids, failures and the records of images."""
    ids, pixels = everything(source, batch_size, **options)
    return ids, pixels.tolist(), source.failures, [source.record(id) for id in ids]


@pytest.mark.parametrize("batch_size", [3, 8, 100])
@pytest.mark.parametrize("tar", [False, True])
def test_processes_change_nothing(folder, tmp_path, batch_size, tar):
    (folder / ("x" * 200)).mkdir()
    if tar:
        with tarfile.open(tmp_path / "images.tar", "w") as archive:
            archive.add(folder, "")
        folder = tmp_path / "images.tar"
    wanted = everything_about(open_source(folder, PLAIN), batch_size, workers=0)
    assert len(wanted[0]) == 23
    assert len(wanted[2]) == 4
    for workers in (1, 3):
        assert everything_about(open_source(folder, PLAIN), batch_size, workers=workers) == wanted
    some = [3, 20, 5, 4, 21, 22, 1, 0]
    again = open_source(folder, PLAIN)
    assert everything_about(again, workers=2, ids=some) == everything_about(open_source(folder, PLAIN), ids=some)
    assert everything_about(again, batch_size, workers=2) == wanted


def test_paths_that_no_file_can_have(folder):
    paths = [folder / "00.png", folder / ("x" * 5000), folder / "01.png", folder / ("y" * 300)]
    wanted = everything_about(open_source(paths, PLAIN), workers=0)
    assert [failure.reason for failure in wanted[2]] == ["File name too long"] * 2
    assert everything_about(open_source(paths, PLAIN), workers=2) == wanted


def test_errors_are_those_of_one_process(folder):
    with pytest.raises(UnitvisError, match=r"'03b.jpg' cannot be used: not an image"):
        everything(open_source(folder, PLAIN, on_error="raise"), workers=2)
    with pytest.raises(UnitvisError, match=r"more than max_failures=1; the last is '07b.JPG' \(empty file\)"):
        everything(open_source(folder, PLAIN, max_failures=1), workers=2)
    write(folder / "10b.png", 0, 9, 10)
    with pytest.raises(UnitvisError, match=r"'00.png' gives 8 x 8 pixels, '10b.png' gives 10 x 9 pixels; one size"):
        everything(open_source(folder, PLAIN), workers=2)
    (folder / "10b.png").unlink()
    source = open_source(folder, PLAIN)
    everything(source, workers=2)
    write(folder / "05.png", 77)
    with pytest.raises(UnitvisError, match=r"'05.png' is no longer the file that was scanned: read again, it differs"):
        everything(source, workers=2)
    (folder / "05.png").write_bytes(b"")
    with pytest.raises(UnitvisError, match=r"'05.png' is no longer the file that was scanned: empty file"):
        everything(source, workers=2)


def test_a_users_settings_of_pillow_are_those_of_the_workers(folder, monkeypatch):
    source = open_source(folder, PLAIN)
    assert "pillow" not in source.describe()
    wanted = everything_about(open_source(folder, PLAIN), workers=0)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    taken = everything_about(open_source(folder, PLAIN), workers=0)
    assert len(taken[0]) == len(wanted[0]) + 1  # 11b.png ends early
    assert everything_about(open_source(folder, PLAIN), workers=2) == taken
    assert source.describe()["pillow"] == {"LOAD_TRUNCATED_IMAGES": True}  # by which runs are told apart
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    text = PngImagePlugin.PngInfo()
    text.add_text("key", "x" * 2_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(folder / "text.png", pnginfo=text)
    for limit, unreadable in ((PngImagePlugin.MAX_TEXT_CHUNK, 5), (4_000_000, 4)):
        monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", limit)
        wanted = everything_about(open_source(folder, PLAIN), workers=0)
        assert len(wanted[2]) == unreadable
        assert everything_about(open_source(folder, PLAIN), workers=2) == wanted


@pytest.mark.parametrize(
    ("setting", "described"),
    [
        ("", {}),
        ("ImageFile.LOAD_TRUNCATED_IMAGES = True", {"LOAD_TRUNCATED_IMAGES": True}),
        ("ImageFile.SAFEBLOCK = 4_000_000", {"MAX_TEXT_CHUNK": 4_000_000, "MAX_TEXT_MEMORY": 256_000_000}),
        ("Image.MAX_IMAGE_PIXELS = 1000", {"MAX_IMAGE_PIXELS": 1000}),  # fewer than are refused anyway
        ("Image.MAX_IMAGE_PIXELS = None", {}),
        ("Image.MAX_IMAGE_PIXELS = 10**9", {}),
    ],
)
def test_settings_of_pillow_from_before_the_import_are_told(setting: str, described: dict[str, object]) -> None:
    code = f"from PIL import Image, ImageFile\n{setting}\nfrom unitvis.decoding import decode\n"
    code += "print(decode.changed_globals())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(described)


@pytest.fixture
def bad_decoder(tmp_path, monkeypatch):
    """A function that gives workers a decoder which does something, so many times, with images of the size `ODD`."""

    def install(action, times=10):
        (tmp_path / "bad").mkdir()
        (tmp_path / "bad" / "sitecustomize.py").write_text(BAD_DECODER.format(action))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "bad"))
        monkeypatch.setenv("BAD_TIMES", str(tmp_path / "times"))
        monkeypatch.setenv("BAD_COUNT", str(times))

    return install


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the decoder crashed (SIGSEGV)"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "the process that decoded it was killed twice, perhaps because"),
        ("os._exit(7)", "the decoder ended its process with exit code 7"),
        ("while True: pass", "decoding it took more than 0.2 s of processor time"),
    ],
)
def test_an_image_that_the_decoder_does_not_survive_is_a_failure(folder, bad_decoder, action, reason, monkeypatch):
    write(folder / "12b.png", 0, *ODD)
    (folder / "05.png").write_bytes(b"")
    wanted = everything_about(open_source(folder, Transform(resize=(8, 8))), workers=0)
    place = wanted[0].index(16)
    for one in (wanted[0], wanted[1], wanted[3]):
        one.pop(place)
    monkeypatch.setattr(pool, "MAX_SECONDS", 0.2)
    bad_decoder(action)
    found = everything_about(open_source(folder, Transform(resize=(8, 8))), workers=2)
    assert found[0] == wanted[0]
    assert found[1] == wanted[1]
    assert found[3] == wanted[3]
    new = [failure for failure in found[2] if failure not in wanted[2]]
    assert [(one.id, one.name) for one in new] == [(16, "12b.png")]
    assert new[0].reason.startswith(reason)
    assert Path(os.environ["BAD_TIMES"]).read_text() == "xx"  # it was tried twice


def test_an_image_that_was_at_hand_when_a_worker_was_killed_is_read_again(folder, bad_decoder):
    write(folder / "12b.png", 0, *ODD)
    wanted = everything_about(open_source(folder, Transform(resize=(8, 8))), workers=0)
    bad_decoder("os.kill(os.getpid(), signal.SIGKILL)", times=1)
    assert everything_about(open_source(folder, Transform(resize=(8, 8))), workers=2) == wanted


def test_without_processes_threads_read(folder, monkeypatch):
    wanted = everything_about(open_source(folder, PLAIN), workers=0)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.warns(UserWarning, match="decoded in threads, since worker processes cannot be had: they end with"):
        assert everything_about(open_source(folder, PLAIN), workers=2) == wanted
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.warns(UserWarning, match="cannot be had: '/no/such/python' cannot be started: No such file"):
        assert everything_about(open_source(folder, PLAIN), workers=2) == wanted
    monkeypatch.setattr(sys, "executable", "")
    assert everything_about(open_source(folder, PLAIN), workers=2) == wanted


def test_nothing_is_decoded_while_somebody_else_has_the_cores(folder):
    batches = open_source(folder, PLAIN).batches(4, workers=1)
    source = batches.gi_frame.f_locals["self"]
    next(batches)  # the second one is waited for below
    (workers,) = source._pools
    with source.pause_decoding():
        states = workers._board.records["state"]
        time.sleep(0.2)  # an image that is being decoded may be finished
        before = (states != 0).sum()
        time.sleep(0.3)
        assert (states != 0).sum() == before
    assert [len(batch.ids) for batch in batches] == [4, 4, 4, 4, 3]


def children_with(marker):
    """Numbers of the processes whose environment holds a marker."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and marker in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


SCRIPT = """
import os, sys, time
from unitvis.sources import encoded, open_source
from unitvis.sources.transform import Transform
encoded.MIN_IMAGES = 1
batches = open_source(sys.argv[1], Transform()).batches(4, workers=2)
print(next(batches).ids.tolist(), flush=True)
if sys.argv[2] == "fork" and not os.fork():
    time.sleep(60)  # holds all that the parent had open
if sys.argv[2] == "daemon":
    import multiprocessing
    def read():
        print(sum(len(batch.ids) for batch in open_source(sys.argv[1], Transform()).batches(4, workers=2)), flush=True)
    child = multiprocessing.get_context("fork").Process(target=read, daemon=True)
    child.start()
    child.join()
    sys.exit()
time.sleep(600)
"""


@pytest.mark.parametrize("how", ["kill", "fork", "interrupt", "terminate", "daemon"])
def test_no_worker_outlives_its_parent(folder, tmp_path, how):
    marker = f"UNITVIS_TEST={os.urandom(8).hex()}"
    script = tmp_path / "script.py"  # without a guard of __main__
    script.write_text(SCRIPT)
    name, value = marker.split("=")
    root = Path(__file__).parents[3]
    environment = {**os.environ, name: value, "PYTHONPATH": f"{root}:{root / 'kernels'}", "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen(
        [sys.executable, script, folder, how], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    )
    try:
        assert parent.stdout.readline() == b"[0, 1, 2, 3]\n"
        if how == "daemon":
            assert parent.stdout.readline() == b"23\n"
        else:
            assert len(children_with(marker.encode())) >= 3
            signals = {"interrupt": signal.SIGINT, "terminate": signal.SIGTERM}
            parent.send_signal(signals.get(how, signal.SIGKILL))
        parent.wait(DEADLINE)
        deadline = time.monotonic() + DEADLINE
        left = 1 if how == "fork" else 0  # the copy of the parent
        while len(children_with(marker.encode())) > left:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
        for number in children_with(marker.encode()):
            os.kill(number, signal.SIGKILL)


def test_workers_start_without_pytorch():
    code = "import sys, unitvis.decoding.worker; assert 'torch' not in sys.modules; print(len(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) > 50


def test_batches_that_a_caller_keeps_stay_as_they_were(folder):
    for i in range(100):
        write(folder / f"more{i:03}.png", 100 + i)
    wanted = everything_about(open_source(folder, PLAIN), 8, workers=0)
    assert everything_about(open_source(folder, PLAIN), 8, workers=1) == wanted


def test_closed_standard_files_do_not_matter(folder):
    code = """
import os, sys
out = os.dup(1)
for number in (0, 1, 2):
    os.close(number)
from unitvis.decoding.crew import Crew
from unitvis.sources import encoded, open_source
from unitvis.sources.transform import Transform
encoded.MIN_IMAGES = 1
read = sum(len(batch.ids) for batch in open_source(sys.argv[1], Transform()).batches(4, workers=2))
with Crew(1) as crew:
    os.write(out, f"{read} {crew.submit(abs, -3).result()}".encode())
"""
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'kernels'}"}
    found = subprocess.run([sys.executable, "-c", code, folder], stdout=subprocess.PIPE, env=environment, check=False)
    assert found.stdout == b"23 3"


def test_nothing_of_the_working_directory_is_imported(folder, tmp_path, monkeypatch):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("json", "importlib", "signal", "numpy", "PIL", "unitvis", "sitecustomize"):
        (foreign / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    monkeypatch.chdir(foreign)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one not in ("", str(foreign))])
    assert len(everything_about(open_source(folder, PLAIN), workers=2)[0]) == 23
    with Crew(1) as crew:
        assert crew.submit(abs, -3).result() == 3
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_open_files_are_no_fault_of_the_images(folder, tmp_path, monkeypatch, workers):
    def opened(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    source = open_source(folder, PLAIN)
    if workers:
        (tmp_path / "sitecustomize.py").write_text(
            "import errno, os\nfrom unitvis.decoding.contents import FileContents\n"
            "def opened(*_):\n    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))\nFileContents._read = opened"
        )
        root = Path(__file__).parents[3]
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{root}:{root / 'kernels'}")
    else:
        monkeypatch.setattr(FileContents, "_read", opened)
    with pytest.raises(UnitvisError, match=r"files cannot be read: Too many open files; raise the limit \(ulimit -n\)"):
        list(source.batches(4, workers=workers))


@pytest.mark.parametrize(
    ("free", "options", "slots"),
    [
        (None, {"workers": 1, "batch_size": 4}, 3),
        (None, {"workers": 2, "batch_size": 10**9}, 4),  # of 27 images
        (7, {"workers": 2, "batch_size": 10**9}, 3),
        (4, {"workers": 60, "batch_size": 4}, 2),
        (3, {"workers": 2, "batch_size": 4}, None),
    ],
)
def test_reading_ahead_takes_no_more_memory_than_there_is(free, options, slots, folder, monkeypatch):
    """free: memory, in slots of the board."""
    wanted = everything_about(open_source(folder, PLAIN), options["batch_size"], workers=0)
    made = []
    create = Board.create
    monkeypatch.setattr(Board, "create", lambda slots, *rest: made.append(slots) or create(slots, *rest))
    if free is not None:
        monkeypatch.setattr(pool, "available_memory", lambda: float(free * slot_bytes((8, 8))))
    told = pytest.warns(UserWarning, match=r"in threads, since .* 0 MB of shared memory cannot hold two jobs of 8 x 8")
    with nullcontext() if slots else told:
        assert everything_about(open_source(folder, PLAIN), **options) == wanted
    assert made == ([slots] if slots else [])


def test_a_slot_takes_the_memory_that_a_board_needs_for_it():
    sizes = []
    for slots in (100, 300):
        board = Board.create(slots, (5, 7), None)
        sizes.append(os.fstat(board.arguments[0]).st_size)
        board.close()
    assert sizes[1] - sizes[0] == pytest.approx(200 * slot_bytes((5, 7)), abs=3 * 4096)
