"""Tar shards: the same images as in a folder, whatever wrote the archive; archives that lie; kept listings."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from support.clock import in_time
from support.memory import tracing
from unitvis.decoding import contents
from unitvis.errors import UnitvisError
from unitvis.sources import open_source, reopen_source, tar
from unitvis.sources.transform import Transform

PLAIN = Transform()


def encoded(seed, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(file, kind)
    return file.getvalue()


def write_tar(path, members, form=tarfile.PAX_FORMAT):
    """members: (name, bytes), or a TarInfo as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form, encoding="utf-8", errors="surrogateescape") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(os.fsdecode(member[0]))
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return path


def link(name, target, kind=tarfile.LNKTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.fixture
def shards(tmp_path):
    """Three WebDataset shards of 5, 0 and 4 samples, each with a label."""
    seed = 0
    for number, count in enumerate((5, 0, 4)):
        members = []
        for _ in range(count):
            members += [(f"{seed:04}.cls", b"7"), (f"{seed:04}.png", encoded(seed)), (f"{seed:04}.json", b"{}")]
            seed += 1
        write_tar(tmp_path / "set" / f"train-{number:03}.tar", members)
    return tmp_path / "set"


def read_all(source, **options):
    batches = list(source.batches(4, **options))
    return torch.cat([batch.ids for batch in batches]).tolist(), torch.cat([batch.pixels for batch in batches]).numpy()


def test_shards_give_what_lies_in_them(shards):
    source = open_source(shards / "train-{000..002}.tar", PLAIN)
    ids, pixels = read_all(source, workers=3)
    assert ids == list(range(9))
    for id in ids:
        want = np.asarray(Image.open(io.BytesIO(encoded(id))))
        assert (pixels[id] == want).all()
        assert (np.asarray(source.picture(id)[0]) == want).all()
    assert source.others == {".cls": 9, ".json": 9}
    names = [source.name(id) for id in range(9)]
    assert names == [f"train-{0 if i < 5 else 2:03}.tar/{i:04}.png" for i in range(9)]
    assert source.describe() | {"names": ""} == {
        "kind": "tar",
        "path": str(shards / "train-{000..002}.tar"),
        "images": 9,
        "names": "",
        "others": 18,
        "shards": 3,
        "decoding": {"decoder": "pillow", "scaled": False, "allow_truncated": False},
    }
    assert read_all(source, ids=[8, 0, 5])[0] == [8, 0, 5]
    record = source.record(7)
    again = reopen_source(json.loads(json.dumps(source.describe())), PLAIN.to_json())
    again.check(record)
    assert again.describe() == source.describe()


def test_a_list_keeps_its_order_and_opens_again(shards):
    paths = [shards / "train-002.tar", shards / "train-000.tar"]
    source = open_source(paths, PLAIN)
    assert [source.name(id)[:9] for id in range(9)] == ["train-002"] * 4 + ["train-000"] * 5
    assert reopen_source(source.describe(), PLAIN.to_json()).name(0) == source.name(0)
    elsewhere = shards.parent / "b" / "train-000.tar"
    elsewhere.parent.mkdir()
    shutil.copy(paths[1], elsewhere)
    both = open_source([paths[1], elsewhere], PLAIN)
    assert (both.name(0), both.name(5)) == ("set/train-000.tar/0000.png", "b/train-000.tar/0000.png")


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{8..11}.tar", ["a-8.tar", "a-9.tar", "a-10.tar", "a-11.tar"]),
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("{x,y}-{0..1}.tar", ["x-0.tar", "x-1.tar", "y-0.tar", "y-1.tar"]),
        ("a-{3..3}.tar", ["a-3.tar"]),
    ],
)
def test_braces(pattern, paths):
    assert tar.archives_of(pattern) == paths


def test_braces_in_the_name_of_a_file_are_that_file(tmp_path):
    path = write_tar(tmp_path / "a{0..1}.tar", [("x.png", encoded(0))])
    assert open_source(path, PLAIN).name(0) == "a{0..1}.tar/x.png"


LONG = "folder/" * 30 + "x" * 120 + ".png"
ODD = [b"line\nbreak.png", b'quote".png', b"<b>'.png", b"caf\xe9.png", b"\xff\xfe.png", b"-rf.png", b"../../up.png"]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
def test_odd_and_long_names(form, tmp_path):
    names = [*ODD, LONG.encode(), "é.jpg".encode(), b"x.PNG"]
    path = write_tar(tmp_path / "odd.tar", [(name, encoded(i)) for i, name in enumerate(names)], form)
    source = open_source(path, PLAIN)
    ids, pixels = read_all(source)
    assert ids == list(range(len(names)))
    for id, name in enumerate(names):
        assert (pixels[id] == np.asarray(Image.open(io.BytesIO(encoded(id))))).all()
        record = json.loads(json.dumps(source.record(id)))
        assert os.fsencode(record["name"]) == b"odd.tar/" + name
        source.check(record)


@pytest.mark.parametrize(
    "form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["ustar", "gnu", "pax"]
)
def test_files_of_any_length_are_read_whatever_byte_they_end_with(form, tmp_path):
    """Between whole blocks no padding lies, so that the byte before a header is the last of a file's content."""
    contents = {
        f"{folder}/{size}-{last:03}.png": bytes(size and [last]).rjust(size, b"1")
        for folder in ("short", "long" * 30)  # USTAR splits it at the slash; the others write an extended header
        for size in (0, 1, 511, 512, 513, 1024, 1536)
        for last in range(256)
    }
    path = write_tar(tmp_path / "a.tar", contents.items(), form)
    with tarfile.open(path) as archive:
        want = [(member.name, member.offset_data, member.size) for member in archive]
    assert len(want) == len(contents)
    source = open_source(path, PLAIN)
    found = []
    for id in range(source.length):
        _, offset, size = source.place(id)
        found.append((source.name(id).removeprefix("a.tar/"), offset, size))
    assert found == want
    data = path.read_bytes()
    assert all(data[offset : offset + size] == contents[name] for name, offset, size in found)


@pytest.mark.parametrize("size", [511, 512, 513, 1024, 1536])
def test_extended_headers_of_any_length_are_read(size, tmp_path):
    """Headers of a body of whole blocks, too, before a file of whole blocks; compared with Python's tarfile."""
    members = []
    for last in (b"0", b"1", b"x", b" ", b"=", b"\n", b"\xff"):
        info = tarfile.TarInfo(f"{len(members)}.png")
        record = len(b"%d k=\n" % size)
        info.pax_headers, info.size = {"k": "v" * (size - record)}, 1024
        members.append((info, last.rjust(1024, b"1")))
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    with tarfile.open(path) as archive:
        want = [(0, member.offset_data, member.size) for member in archive]
        assert {len(member.pax_headers["k"]) + record for member in archive.getmembers()} == {size}
    source = open_source(path, PLAIN)
    assert [source.place(id) for id in range(source.length)] == want


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs the program tar")
@pytest.mark.parametrize("form", ["gnu", "ustar", "v7", "pax"])
def test_what_the_program_tar_writes(form, tmp_path):
    (tmp_path / "in" / "b").mkdir(parents=True)
    for seed, name in enumerate(["a.png", "b/c.png", "b/d.jpg.txt", ".hidden.png", "b/._e.png"]):
        (tmp_path / "in" / name).write_bytes(encoded(seed))
    subprocess.run(
        ["tar", "--sort=name", f"--format={form}", "-cf", "x.tar", "-C", "in", "."], cwd=tmp_path, check=True
    )
    source = open_source(tmp_path / "x.tar", PLAIN)
    assert [source.name(id) for id in range(source.length)] == ["x.tar/a.png", "x.tar/b/c.png"]
    assert source.other_files == 3
    assert read_all(source)[0] == [0, 1]


def test_links_and_holes_are_failures_not_gaps(tmp_path):
    members = [("a.png", encoded(0)), link("b.png", "a.png"), link("c.png", "a.png", tarfile.SYMTYPE), ("d.png", b"")]
    source = open_source(write_tar(tmp_path / "x.tar", members), PLAIN)
    assert read_all(source)[0] == [0]
    assert [(failure.id, failure.reason) for failure in source.failures] == [
        (1, "a link or a file with holes inside a tar; make it with tar --dereference"),
        (2, "a link or a file with holes inside a tar; make it with tar --dereference"),
        (3, "empty file"),
    ]


def broken(case, path):
    """An archive that is not what it seems, and what must be said."""
    members = [(f"{i}.png", encoded(i)) for i in range(4)]
    write_tar(path, members, tarfile.USTAR_FORMAT)
    data = bytearray(path.read_bytes())
    second = 512 + 512 * -(-len(members[0][1]) // 512)
    end = 4 * second
    if case == "cut in a file":
        return data[: end - 300], "broken after 4 files: unexpected end of data; --allow-truncated takes"
    if case == "cut in a header":
        return data[: 3 * second + 100], "broken after 3 files: unexpected end of data"
    if case == "cut between files":
        return data[: 3 * second], "broken after 3 files: unexpected end of data"
    if case == "damaged header":
        data[2 * second + 5] ^= 255
        return data, f"broken after 2 files: no header of a file at byte {2 * second:,}"
    if case == "damaged first header":
        data[5] ^= 255
        return data, "broken after 0 files: bad checksum"
    if case == "joined":
        return data + data, "broken after 4 files: something follows its end"
    if case == "gzip":
        return bytes.fromhex("1f8b0800") + data, r"is compressed \(gzip\); unpack it"
    return b"", "broken after 0 files: empty file"


@pytest.mark.parametrize(
    "case",
    [
        "cut in a file",
        "cut in a header",
        "cut between files",
        "damaged header",
        "damaged first header",
        "joined",
        "gzip",
        "empty",
    ],
)
def test_an_archive_that_lost_images_is_refused(case, tmp_path):
    path = tmp_path / "x.tar"
    data, message = broken(case, path)
    path.write_bytes(data)
    with pytest.raises(UnitvisError, match=message):
        open_source(path, PLAIN)


def test_truncated_archives_count_where_that_is_allowed(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(broken("cut in a file", path)[0])
    source = open_source(path, PLAIN, allow_truncated=True)
    assert source.length == 4
    assert set(read_all(source)[0]) | {failure.id for failure in source.failures} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("train-{000..009}.tar", "7 of 10 archives are not there: .*train-003.tar.*train-009.tar"),
        ("train-{2..0}.tar", "counts down"),
        ("train-{0..999999999}.tar", "names more than 1,000,000 archives"),
        (f"train-{{0..{'9' * 5000}}}.tar", "names more than 1,000,000 archives"),
        ("{0..1000}/train-{0..1000}.tar", "names more than 1,000,000 archives"),
        ([f"{i}-{{0..999999}}.tar" for i in range(60)], "with the paths before it names more than 1,000,000 archives"),
        (f"{'a' * 3000}{{0..999999}}.tar", "names archives whose paths have 3,010,000,000 characters; 268,435,456 are"),
        ("{" + "a," * 1_000_000 + "}.tar", "names more than 1,000,000 archives"),
        ("{ab}" * 2**23 + ".tar", "has 33,554,436 characters, so it is no path of archives"),
        ("train-{all}.tar", "neither a range"),
        (["train-000.tar", "train-000.tar"], "is named twice"),
        (["train-000.tar", "x.png"], "'train-000.tar' is an archive and 'x.png' is none"),
        ("train-001.tar", "no image in 'train-001.tar', which holds 0 other members"),
    ],
)
def test_refusals(images, message, shards, monkeypatch):
    monkeypatch.chdir(shards)
    with tracing() as traced, pytest.raises(UnitvisError, match=message) as refused:
        open_source(images, PLAIN)
    assert traced.peak < 2**28
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(("before", "message"), [(0, "broken after 0 files"), (1, "broken after 4 files")])
def test_an_archive_of_terabytes_of_zeros_is_not_read_to_its_end(before, message, tmp_path):
    path = tmp_path / "x.tar"
    data = broken("joined", path)[0]
    data = data[: len(data) // 2] if before else b""
    path.write_bytes(data)
    os.truncate(path, 8 << 40)
    read = []
    real = io.BufferedReader.read

    class Counting(io.BufferedReader):
        def read(self, size=-1):
            read.append(size)
            return real(self, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tar, "open", lambda p, *_, **__: Counting(io.FileIO(p)), raising=False)
        with (
            in_time(),
            pytest.raises(UnitvisError, match=f"{message}: more than 16,777,216 bytes of zeros follow") as error,
        ):
            open_source(path, PLAIN)
    assert sum(read) < 2**25
    size = int(str(error.value).rpartition("=")[2].split(";")[0])
    os.truncate(path, size)
    if before:
        assert open_source(path, PLAIN).length == 4


@pytest.mark.parametrize("start", ["BZ", "BZh", "\x1f\udc8b", "\udcfd7zXZ", "(\udcb5/\udcfd"])
def test_a_name_that_begins_as_a_compressed_file_is_one(start, tmp_path):
    path = write_tar(tmp_path / "x.tar", [(f"{start}.png", encoded(0)), ("1.png", encoded(1))], tarfile.GNU_FORMAT)
    assert open_source(path, PLAIN).name(0) == f"x.tar/{start}.png"


def test_a_member_that_claims_to_be_huge_costs_nothing(tmp_path):
    info = tarfile.TarInfo("a.png")
    info.size = 1 << 28
    path = tmp_path / "x.tar"
    path.write_bytes(info.tobuf() + encoded(0))
    source = open_source(path, PLAIN, allow_truncated=True)
    assert len(source._contents.read(source.place(0))) == len(encoded(0))


def header(name, size, kind=tarfile.REGTYPE):
    """A block whose size field has this number, which may be negative, in base 256."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (b"\x80" if size >= 0 else b"\xff") + (size % 2**88).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(record):
    """An extended header with one record, without its length."""
    record = b"%d %s\n" % (len(record) + 4, record)
    return header("pax", len(record), tarfile.XHDTYPE) + record.ljust(512, b"\0")


@pytest.mark.parametrize(
    ("hostile", "message"),
    [
        (header("b.png", -512), "a file of -512 bytes"),
        (header("b", -512, tarfile.DIRTYPE), "a file of -512 bytes"),
        (header("b", -1024, tarfile.GNUTYPE_LONGNAME), "a file of -1024 bytes"),
        (pax(b"size=-512") + header("b.png", 0), "a file of -512 bytes"),
        (pax(b"size=" + b"9" * 20) + header("b.png", 0), "a file of 99999999999999999999 bytes"),
        (header("b", 8 << 30, tarfile.GNUTYPE_LONGNAME), "a header of 8,589,934,592 bytes"),
        (header("b", 8 << 30, tarfile.XHDTYPE), "a header of 8,589,934,592 bytes"),
    ],
)
def test_sizes_that_no_file_has_are_refused(hostile, message, tmp_path):
    """A size of -512 leads back to its own header, over and over."""
    path = tmp_path / "x.tar"
    image = encoded(0)
    path.write_bytes(header("a.png", len(image)) + image + bytes(-len(image) % 512) + hostile + bytes(1024))
    with in_time(), pytest.raises(UnitvisError, match=f"is broken after 1 files: {message}"):
        open_source(path, PLAIN)


def test_few_files_stay_open(shards, monkeypatch):
    monkeypatch.setattr(contents, "_MAX_OPEN_SHARDS", 1)
    source = open_source(shards / "train-{000..002}.tar", PLAIN)
    open_files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    threads = [threading.Thread(target=lambda: [source.read(i) for i in (0, 8) * 20]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(source._contents._open) == 1
    if open_files:
        assert len(os.listdir("/proc/self/fd")) <= open_files + 1


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Listings of any length are kept, in a folder of the test's own, and are taken for settled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module in ("files", "tar"):
        monkeypatch.setattr(f"unitvis.sources.{module}.MIN_SAVED_NAMES", 1)
        monkeypatch.setattr(f"unitvis.sources.{module}.SETTLE_NS", -1)
    return tmp_path / "cache" / "unitvis"


def age(path):
    os.utime(path, ns=(10**18, 10**18))


def test_an_index_is_kept_until_an_archive_changes(shards, kept, monkeypatch):
    pattern = shards / "train-{000..002}.tar"
    for path in shards.glob("*.tar"):
        age(path)  # one written anew within a tick of the file system's clock would have the time of the old one
    first = open_source(pattern, PLAIN)
    assert len(list(kept.iterdir())) == 1
    with monkeypatch.context() as blind:
        blind.setattr(tarfile, "open", None)
        second = open_source(pattern, PLAIN)
    assert second.describe() == first.describe()
    assert (read_all(second)[1] == read_all(first)[1]).all()
    write_tar(shards / "train-001.tar", [("new.png", encoded(77))])
    assert open_source(pattern, PLAIN).name(5) == "train-001.tar/new.png"
    for file in kept.iterdir():
        file.write_bytes(file.read_bytes()[:50])
    assert open_source(pattern, PLAIN).length == 10


@pytest.mark.parametrize("foreign", ["folder", "file", "link"])
def test_an_index_that_others_may_have_written_is_not_believed(shards, kept, monkeypatch, tmp_path, foreign):
    pattern = shards / "train-{000..002}.tar"
    for path in shards.glob("*.tar"):
        age(path)
    length = open_source(pattern, PLAIN).length
    (file,) = kept.iterdir()
    if foreign == "link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    else:
        (kept if foreign == "folder" else file).chmod(0o777)
    with monkeypatch.context() as blind:
        blind.setattr(tarfile, "open", None)
        with pytest.raises((TypeError, UnitvisError)):  # the archives are listed again, which fails here
            open_source(pattern, PLAIN)
    assert open_source(pattern, PLAIN).length == length


def test_a_folder_s_names_are_kept_until_it_changes(tmp_path, kept, monkeypatch):
    root = tmp_path / "images"
    for name in ("a/1.png", "a/2.png", "b/c/3.png", "x.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(len(name)))
    for folder in (root, root / "a", root / "b", root / "b" / "c"):
        age(folder)
    first = open_source(root, PLAIN)
    assert (first.length, first.other_files, len(list(kept.iterdir()))) == (3, 1, 1)
    with monkeypatch.context() as blind:
        blind.setattr(os, "scandir", None)
        second = open_source(root, PLAIN)
    assert second.describe() == first.describe()
    assert second.name(2) == "b/c/3.png"
    (root / "b" / "c" / "4.png").write_bytes(encoded(4))
    assert open_source(root, PLAIN).length == 4
    age(root / "b" / "c")
    shutil.rmtree(root / "b")
    assert open_source(root, PLAIN).length == 2


def test_a_listing_of_other_names_under_the_same_times_is_not_believed(tmp_path, kept):
    path, root = tmp_path / "x.tar", tmp_path / "images"
    members = [("a.png", encoded(1)), ("b.png", encoded(2))]
    for swapped in (False, True):
        write_tar(path, members[::-1] if swapped else members)
        for folder in (root, root / "b"):
            folder.mkdir(exist_ok=True)
        (root / "b" / "1.png").write_bytes(encoded(3))
        if swapped:
            (root / "b" / "1.png").rename(root / "b" / "2.png")
        for changed in (path, root / "b", root):
            os.utime(changed, ns=(10**18, 10**18))
        names = ["b", "a"] if swapped else ["a", "b"]
        source = open_source(path, PLAIN)
        assert [source.name(id) for id in range(2)] == [f"x.tar/{name}.png" for name in names]
        assert (read_all(source)[1][names.index("a")] == np.asarray(Image.open(io.BytesIO(encoded(1))))).all()
        assert open_source(root, PLAIN).name(0) == ("b/2.png" if swapped else "b/1.png")


def test_small_or_fresh_listings_leave_no_trace(shards, kept, tmp_path, monkeypatch):
    monkeypatch.setattr("unitvis.sources.tar.SETTLE_NS", 10**12)
    open_source(shards / "train-000.tar", PLAIN)
    monkeypatch.setattr("unitvis.sources.tar.SETTLE_NS", -1)
    monkeypatch.setattr("unitvis.sources.tar.MIN_SAVED_NAMES", 100)
    open_source(shards / "train-000.tar", PLAIN)
    assert not kept.exists()


def test_members_written_twice_are_one_image_with_its_last_content(tmp_path, kept):
    names = ["a.png", "b.png", "a.png", "c.png", ".//b.png", "a.png", "c.cls", "c.cls"]
    path = write_tar(tmp_path / "x.tar", [(name, encoded(seed)) for seed, name in enumerate(names)])
    age(path)
    other = write_tar(tmp_path / "y.tar", [("a.png", encoded(70)), ("d.png", encoded(71))])
    age(other)
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path / "out", filter="data")
    message = r"^2 members were written more than once, and the last of each counts, as in extraction: 'x.tar/a.png', "
    for _ in range(2):  # the second time from the saved index
        with pytest.warns(UserWarning, match=message):
            source = open_source([path, other], PLAIN)
        assert [source.name(id) for id in range(source.length)] == [
            *(f"x.tar/{name}.png" for name in "abc"),
            *(f"y.tar/{name}.png" for name in "ad"),
        ]
        ids, pixels = read_all(source)
        assert ids == [0, 1, 2, 3, 4]
        for id, name in enumerate("abc"):
            assert (pixels[id] == np.asarray(Image.open(tmp_path / "out" / f"{name}.png"))).all()
        assert (pixels[3] == np.asarray(Image.open(io.BytesIO(encoded(70))))).all()


def samples(folder):
    """Four samples of three images and a label each, as a folder and as an archive."""
    (folder / "set").mkdir()
    members = []
    for seed in range(4):
        for number, ending in enumerate(("jpg", "depth.png", "seg.png")):
            kind = "JPEG" if ending == "jpg" else "PNG"
            members.append((f"{seed:04}.{ending}", encoded(10 * seed + number, kind)))
        members.append((f"{seed:04}.cls", b"7"))
    for name, data in members:
        (folder / "set" / name).write_bytes(data)
    return folder / "set", write_tar(folder / "set.tar", members)


def test_of_samples_with_several_images_an_ending_chooses(tmp_path):
    for images in samples(tmp_path):
        with pytest.warns(UserWarning, match=r"^of 4 samples several files are images \('.*0000.*0000.* choose with"):
            assert open_source(images, PLAIN).length == 12
        for endings, names, others in (
            (".jpg", [".jpg"], {".png": 8, ".cls": 4}),
            ([".SEG.png"], [".seg.png"], {".png": 4, ".jpg": 4, ".cls": 4}),
        ):
            source = open_source(images, PLAIN, images_ending=endings)
            found = [source.name(id).removeprefix("set.tar/") for id in range(source.length)]
            assert found == [f"{seed:04}{ending}" for seed in range(4) for ending in names]
            assert source.others == others
            again = reopen_source(json.loads(json.dumps(source.describe())), PLAIN.to_json())
            assert again.describe() == source.describe()
        with pytest.raises(
            UnitvisError, match=r"no image .*, which holds 16 other (files|members) \(.png 8, .cls 4, .jpg 4\)"
        ):
            open_source(images, PLAIN, images_ending=".png")  # every .png has two endings


def test_numbers_are_no_endings(tmp_path):
    members = [(f"frame.{i:04}.png", encoded(i)) for i in range(3)]
    source = open_source(write_tar(tmp_path / "x.tar", members), PLAIN)  # without a warning of shared keys
    assert source.length == open_source(tmp_path / "x.tar", PLAIN, images_ending=".png").length == 3


def test_a_chosen_ending_is_part_of_the_saved_listing(tmp_path, kept):
    for images in samples(tmp_path):
        age(images)
        with pytest.warns(UserWarning, match="several files are images"):
            assert open_source(images, PLAIN).length == 12
        for _ in range(2):
            assert open_source(images, PLAIN, images_ending=".jpg").length == 4
        with pytest.warns(UserWarning, match="several files are images"):
            again = open_source(images, PLAIN)
        assert (again.length, again.others) == (12, {".cls": 4})


def pax_header(body, kind=tarfile.XHDTYPE):
    info = tarfile.TarInfo("header")
    info.type, info.size = kind, len(body)
    return info.tobuf(tarfile.USTAR_FORMAT) + body.ljust(-(-len(body) // 512) * 512, b"\0")


DIGITS = b"1" * 2**19
UNENDED = b"3 a" * 2**17 + b"="  # each record's "=" lies beyond its end
LONG_NAME = b".a" * 2**14 + b".png"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (pax_header(DIGITS), "a number of 524,288 digits"),
        (pax_header(DIGITS, tarfile.XGLTYPE), "a number of 524,288 digits"),
        (pax_header(DIGITS, tarfile.SOLARIS_XHDTYPE), "a number of 524,288 digits"),
        (pax_header(UNENDED), "byte 0 begins no record"),
        (pax_header(b"x" * 2**21), "a header of 2,097,152 bytes"),
        (pax_header(b"x" * 2**17, tarfile.GNUTYPE_LONGNAME), "a header of 131,072 bytes"),
        (pax_header(LONG_NAME, tarfile.GNUTYPE_LONGNAME), "a name of 32,772 bytes; more than 4,096 are refused"),
    ],
    ids=["x", "g", "X", "unended", "long", "longname", "name"],
)
def test_headers_that_take_quadratic_time_are_refused(header, message, tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.png", encoded(0))])
    path.write_bytes(header + path.read_bytes())
    with pytest.raises(UnitvisError, match=message):
        open_source(path, PLAIN)


def test_extended_headers_with_attributes_are_read(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("é" * 200 + "0" * 255 + ".png")
        info.size = len(encoded(0))
        info.pax_headers = {"SCHILY.xattr.user.note": "a=b\n7 c=" * 8000, "comment": "9" * 900}
        archive.addfile(info, io.BytesIO(encoded(0)))
    assert open_source(path, PLAIN).name(0) == f"a.tar/{info.name}"


def test_an_archive_that_comes_again_after_many_is_found_at_once(tmp_path):
    paths = [str(tmp_path / f"{number}.tar") for number in range(60_000)]
    with in_time(), pytest.raises(UnitvisError, match=r"the archive '.*59999.tar' is named twice"):
        open_source([*paths, paths[-1]], PLAIN)
