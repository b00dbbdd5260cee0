"""Folders and lists of files: which images they hold, in which order, and what cannot be listed."""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

from support.clock import in_time
from support.sources import PLAIN, everything, noise, write
from unitvis.errors import UnitvisError
from unitvis.sources import Failure, open_source
from unitvis.sources.image_names import ImageNames, _whole_ending, others_in_words


def test_a_folder_in_the_order_of_its_paths(tmp_path):
    names = ["b/x.png", "b-c/x.png", "b.png", "a/z.JPEG", "a/deep/er/y.bmp", "a/deep.png", "Z.png", "é.png", "a b.webp"]
    for name in names:
        write(tmp_path / name, len(name))
    for other in ("readme.md", "a/list.txt", ".hidden.png", ".git/x.png", "a/._z.jpg"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_bytes(b"")
    source = open_source(tmp_path, PLAIN)
    assert [source.name(id) for id in range(source.length)] == sorted(names, key=os.fsencode)
    assert source.other_files == 5
    assert source.describe()["images"] == len(names)
    assert source.describe()["others"] == 5


def test_links_and_loops_end(tmp_path):
    root = tmp_path / "root"
    write(root / "a" / "1.png", 1)
    write(tmp_path / "elsewhere" / "2.png", 2)
    (root / "a" / "up").symlink_to(root)
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "c").symlink_to(tmp_path / "elsewhere")
    (root / "self.png").symlink_to(root / "self.png")
    (root / "gone.png").symlink_to(root / "nothing")
    (root / "link.png").symlink_to(root / "a" / "1.png")
    source = open_source(root, PLAIN)
    assert [source.name(id) for id in range(source.length)] == [
        "a/1.png",
        "b/2.png",
        "gone.png",
        "link.png",
        "self.png",
    ]
    assert everything(source)[0] == [0, 1, 3]
    reasons = {failure.name: failure.reason for failure in source.failures}
    assert reasons == {"gone.png": "No such file or directory", "self.png": "Too many levels of symbolic links"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_or_a_huge_file_does_not_stop_the_scan(tmp_path):
    write(tmp_path / "a.png", 1)
    os.mkfifo(tmp_path / "pipe.png")
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(10**10)
    source = open_source(tmp_path, PLAIN)
    assert everything(source)[0] == [0]
    assert [(failure.name, failure.reason) for failure in source.failures] == [
        ("huge.png", "a file of 10,000,000,000 bytes; more than 536,870,912 are refused"),
        ("pipe.png", "not a regular file"),
    ]


def test_odd_names_survive_json(tmp_path):
    names = [b"line\nbreak.png", b'quote".png', b"<b>'.png", b"caf\xe9.png", b"\xff\xfe.png", b"-rf.png"]
    for seed, name in enumerate(names):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            Image.fromarray(noise(seed)).save(file, "PNG")
    source = open_source(tmp_path, PLAIN)
    assert everything(source)[0] == list(range(len(names)))
    for id, name in enumerate(sorted(names)):
        record = json.loads(json.dumps(source.record(id)))
        assert record == source.record(id)
        assert os.fsencode(record["name"]) == name
        source.check(record)


def test_a_text_list(tmp_path):
    write(tmp_path / "sub" / "b.png", 1)
    write(tmp_path / "a.png", 2)
    far = write(tmp_path / "far" / "c.png", 3)
    listing = tmp_path / "sub" / "list.TXT"
    listing.write_bytes(b"\xef\xbb\xbfb.png\r\n\r\n../a.png\n" + os.fsencode(far) + b"\n  \nmissing.png")
    source = open_source(str(listing), PLAIN)
    assert [source.name(id) for id in range(source.length)] == ["b.png", "../a.png", str(far), "missing.png"]
    ids, pixels = everything(source)
    assert ids == [0, 1, 2]
    assert (pixels.numpy() == np.stack([noise(1), noise(2), noise(3)])).all()
    assert source.failures == [Failure(3, "missing.png", "No such file or directory")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a.png\nb.png\na.png\n", r"entries 1 and 3 of the list '.*list.txt' are both 'a.png'"),
        (b"a.png\n./a.png\n", r"entries 1 and 2 of .* are both './a.png'"),
        (b"\n\r\n", "names no file"),
        ("a.png\n".encode("utf-16"), "entry 1 of .* holds a NUL byte"),
    ],
)
def test_a_wrong_list(tmp_path, content, message):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(UnitvisError, match=message):
        open_source(tmp_path / "list.txt", PLAIN)


def test_a_python_list_of_paths(tmp_path):
    paths = [write(tmp_path / f"{name}.png", seed) for seed, name in enumerate("ba")]
    source = open_source(paths, PLAIN)
    assert (everything(source)[1].numpy() == np.stack([noise(0), noise(1)])).all()
    with pytest.raises(UnitvisError, match="entries 1 and 2 of the paths are both"):
        open_source([paths[0], paths[0]], PLAIN)


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    write(tmp_path / "a" / "x.png", 1)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(UnitvisError, match=r"cannot read the folder '.*': Permission denied"):
        open_source(tmp_path, PLAIN)


def test_files_that_are_no_image_by_name_are_counted_by_ending(tmp_path):
    for name in ("a.heic", "b.HEIC", "c.heic", "d.jxl", "noending", "other", "e.tar.gz", "f.a long story", "x.png"):
        write(tmp_path / "x.png", 0) if name == "x.png" else (tmp_path / name).write_bytes(b"x")
    source = open_source(tmp_path, PLAIN)
    assert source.length == 1
    assert source.others == {".heic": 3, ".jxl": 1, "none": 3, ".gz": 1}
    assert others_in_words(source.others) == "8 other files (.heic 3, none 3, .gz 1, .jxl 1)"


def test_names_without_an_ending_can_be_read(tmp_path):
    for number in range(3):
        os.rename(write(tmp_path / f"{number}.png", number), tmp_path / f"{number}")
    (tmp_path / "list.csv").write_text("x")
    source = open_source(tmp_path, PLAIN, images_ending="")
    assert [source.name(id) for id in range(3)] == ["0", "1", "2"]
    assert (everything(source)[1].numpy() == np.stack([noise(number) for number in range(3)])).all()


@pytest.mark.parametrize("ending", ["jpg", "*.jpg", ".a/b", [], [3]])
def test_what_is_no_ending(tmp_path, ending):
    write(tmp_path / "x.png", 0)
    with pytest.raises(UnitvisError, match="an ending is all that follows the first dot"):
        open_source(tmp_path, PLAIN, images_ending=ending)


def test_endings_and_entries_where_there_are_none(tmp_path):
    write(tmp_path / "x.png", 0)
    (tmp_path / "list.txt").write_text("x.png")
    with pytest.raises(
        UnitvisError, match=r"images_ending='.png' chooses files of folders and archives, not of a list"
    ):
        open_source(tmp_path / "list.txt", PLAIN, images_ending=".png")
    with pytest.raises(
        UnitvisError, match="entry='x' names the image in items of a dataset or batches, not in a folder"
    ):
        open_source(tmp_path, PLAIN, entry="x")


def test_hidden_files_and_folders_are_counted_as_left_alone(tmp_path):
    for name in ("b.png", "inside/c.png", ".hidden.png", "inside/.d.txt", ".folder/e.png", ".folder/f.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    source = open_source(tmp_path, PLAIN)
    assert [source.name(id) for id in range(source.length)] == ["b.png", "inside/c.png"]
    assert others_in_words(source.others) == "3 other files (hidden 3)"


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are text there")
def test_a_name_is_the_same_under_another_locale(tmp_path, monkeypatch):
    for raw in ("bär.png".encode(), b"b\xe4r.png"):
        folder = tmp_path / str(len(raw))
        write(folder / os.fsdecode(raw), 1)
        source = open_source(folder, PLAIN)
        record = source.record(0)
        other = record | {"name": raw.decode("ascii", "surrogateescape")}  # as LC_ALL=C reads it
        source.check(other)
        with monkeypatch.context() as patch:
            patch.setattr(type(source), "name", lambda self, id, name=other["name"]: name)
            source.check(record)
        for name in ("bar.png", "b\udce5r.png", "b\ud800r.png"):
            with pytest.raises(UnitvisError, match="image 0 is another one here"):
                source.check(record | {"name": name})


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (b"a/0001.seg.png", b"a/0001"),
        (b"b.c/frame.0001.png", b"b.c/frame.0001"),
        (b"x..png", b"x."),
        (b"x.png.1", b"x.png.1"),
        (b".1a" * 2**17 + b".1", b".1a" * 2**17 + b".1"),
        (b"x" + b".a" * 2**17, b"x"),
    ],
    ids=["two", "number", "dots", "numbered", "long", "endings"],
)
def test_the_key_of_a_name_takes_linear_time(name, key):
    with in_time():
        assert name.removesuffix(_whole_ending(name)) == key


def test_images_of_one_key_are_counted_in_linear_time():
    names = ImageNames(None)
    with in_time():
        for number in range(200_000):
            assert names.take(b"key.a%xx.png" % number)
    assert names.warning.startswith("of 1 samples several files are images ('key.a0x.png', 'key.a1x.png', ")
