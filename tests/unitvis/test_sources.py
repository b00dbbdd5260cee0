import gc
import hashlib
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Subset, TensorDataset

from unitvis.errors import UnitvisError
from unitvis.sources import Failure, files, open_source, reopen_source
from unitvis.sources.transform import Transform

PLAIN = Transform()
DEADLINE = 300  # seconds after which what a test waits for is taken to never happen
SMALL = Transform(resize=(8, 8))


def noise(seed, height=8, width=8):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def write(path, seed, height=8, width=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(seed, height, width)).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """23 readable images of 8 x 8, four that are not, two other files; ids are the places in the sorted names."""
    root = tmp_path / "images"
    for i in range(23):
        write(root / f"{i:02}.png", i)
    whole = (root / "00.png").read_bytes()
    (root / "03b.jpg").write_text("not a photograph")
    (root / "07b.JPG").write_bytes(b"")
    (root / "11b.png").write_bytes(whole[:100])
    (root / "22b.gif").write_bytes(b"GIF89a")
    (root / "notes.txt").write_text("x")
    (root / "labels.csv").write_text("x")
    return root


def everything(source, batch_size=4, **options):
    batches = list(source.batches(batch_size, **options))
    sizes = [len(batch.ids) for batch in batches]
    assert all(size == batch_size for size in sizes[:-1])
    assert all(batch.ids.dtype == torch.int64 and len(batch.pixels) == len(batch.ids) for batch in batches)
    ids = torch.cat([batch.ids for batch in batches]) if batches else torch.empty(0, dtype=torch.int64)
    return ids.tolist(), torch.cat([batch.pixels for batch in batches]) if batches else None


# ------------------------------------------------------------------------------------------------------------ folders


def test_a_folder_in_the_order_of_its_paths(tmp_path):
    names = ["b/x.png", "b-c/x.png", "b.png", "a/z.JPEG", "a/deep/er/y.bmp", "a/deep.png", "Z.png", "é.png", "a b.webp"]
    for name in names:
        write(tmp_path / name, len(name))
    for other in ("readme.md", "a/list.txt", ".hidden.png", ".git/x.png", "a/._z.jpg"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_bytes(b"")
    source = open_source(tmp_path, PLAIN)
    assert [source.name(id) for id in range(source.length)] == sorted(names, key=os.fsencode)
    assert source.other_files == 2
    assert source.describe()["images"] == len(names)
    assert source.describe()["others"] == 2


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


# --------------------------------------------------------------------------------------------- order, batches, threads


def test_batches_are_full_whatever_fails_and_whoever_reads(folder):
    good = [i for i in range(27) if i not in (4, 9, 14, 26)]
    expected = [
        Failure(4, "03b.jpg", "not an image (JPEG, PNG, WebP, BMP, GIF, TIFF or PPM)"),
        Failure(9, "07b.JPG", "empty file"),
        Failure(14, "11b.png", "broken PNG: image file is truncated"),
        Failure(26, "22b.gif", "broken GIF: index out of range"),
    ]
    results = []
    for batch_size, workers in ((1, 0), (4, 1), (4, 3), (5, None), (23, 2), (64, 8)):
        source = open_source(folder, PLAIN)
        ids, pixels = everything(source, batch_size, workers=workers)
        assert ids == good
        assert [(f.id, f.name) for f in source.failures] == [(f.id, f.name) for f in expected]
        assert source.failures[:3] == expected[:3]
        assert source.failures[3].reason.startswith("broken GIF: ")
        results.append(pixels)
    seeds = [int(open_source(folder, PLAIN).name(id)[:2]) for id in good]
    truth = np.stack([noise(seed) for seed in seeds])
    for pixels in results:
        assert pixels.dtype == torch.uint8
        assert (pixels.numpy() == truth).all()


def test_the_reason_of_a_jpeg_that_ends_early(tmp_path):
    write(tmp_path / "a.png", 0, 64, 64)
    whole = write(tmp_path / "b.jpg", 1, 64, 64).read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole[: len(whole) // 2])
    source = open_source(tmp_path, PLAIN)
    assert everything(source)[0] == [0]
    (failure,) = source.failures
    assert failure.reason.startswith("broken JPEG: image file is truncated (")
    assert everything(open_source(tmp_path, PLAIN, allow_truncated=True))[0] == [0, 1]


def test_ids_choose_and_order(folder):
    source = open_source(folder, PLAIN)
    ids, pixels = everything(source, 3, ids=iter([20, 3, 26, 0, 7]), workers=2)
    assert ids == [20, 3, 0, 7]
    for id, image in zip(ids, pixels, strict=True):
        assert (image == source.read(id)).all()
    assert [failure.id for failure in source.failures] == [26]
    assert everything(source, 4, ids=[])[0] == []
    assert everything(source, 4, ids=torch.tensor([5, 6]))[0] == [5, 6]
    for wrong in (27, -1):
        with pytest.raises(UnitvisError, match=f"there is no image {wrong}; the folder has 27"):
            everything(source, 4, ids=[wrong])


def test_a_failure_is_listed_once(folder):
    source = open_source(folder, PLAIN)
    for _ in range(3):
        everything(source)
    assert [failure.id for failure in source.failures] == [4, 9, 14, 26]


def test_on_error_raise_names_the_file(folder):
    source = open_source(folder, PLAIN, on_error="raise")
    with pytest.raises(UnitvisError, match=r"'03b.jpg' cannot be used: not an image"):
        everything(source, workers=3)
    with pytest.raises(UnitvisError, match="on_error='ignore'"):
        open_source(folder, PLAIN, on_error="ignore")


def test_reading_ahead_is_bounded(folder, monkeypatch):
    opened, submitted = [], []
    contents = files.FileSource._contents
    monkeypatch.setattr(files.FileSource, "_contents", lambda self, id: opened.append(id) or contents(self, id))
    submit = ThreadPoolExecutor.submit
    monkeypatch.setattr(ThreadPoolExecutor, "submit", lambda *job: submitted.append(submit(*job)) or submitted[-1])
    batches = open_source(folder, PLAIN).batches(3, workers=4)
    next(batches)
    assert not wait(submitted, timeout=DEADLINE).not_done  # the threads have read all that they may
    assert len(opened) > 3
    assert set(opened) <= set(range(3 + 2 * 3 + 1))
    batches.close()
    assert max(opened) < 10


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("unitvis-read")]


def test_an_abandoned_pass_leaves_no_thread(folder):
    source = open_source(folder, PLAIN)
    batches = source.batches(3, workers=4)
    next(batches)
    assert reading_threads()
    batches.close()
    assert not reading_threads()

    def interrupted():
        for _ in source.batches(3, workers=4):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    gc.collect()
    assert not reading_threads()


def test_nothing_is_left_in_the_temporary_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    source = open_source(folder, PLAIN)
    everything(source)
    assert not os.listdir(tmp_path / "tmp")
    assert source.record(0)["width"] == 8
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(UnitvisError, match=r"bytes are needed in .*nowhere.*; set TMPDIR"):
        open_source(folder, PLAIN)


# ----------------------------------------------------------------------------------- records, pictures, changed files


def test_records_tell_what_was_ranked(tmp_path):
    path = write(tmp_path / "a" / "x.png", 5, 30, 40)
    source = open_source(tmp_path, SMALL)
    digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    expected = {"id": 0, "name": "a/x.png", "width": 40, "height": 30, "hash": digest}
    assert source.record(0) == expected  # not read yet
    everything(source)
    assert source.record(0) == expected
    source.check(expected)


def test_a_changed_file_is_refused(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.png", i)
    source = open_source(tmp_path, PLAIN)
    everything(source)
    record = source.record(1)
    write(tmp_path / "1.png", 99)
    for use in (source.check, lambda _: source.picture(1), lambda _: source.read(1), lambda _: everything(source)):
        with pytest.raises(UnitvisError, match=r"'1.png' is no longer the file that was scanned"):
            use(record)
    with pytest.raises(UnitvisError, match=r"'1.png' is no longer the file that was scanned: its content has changed"):
        open_source(tmp_path, PLAIN).check(record)
    (tmp_path / "1.png").unlink()
    with pytest.raises(UnitvisError, match=r"'1.png' is no longer .*: No such file"):
        source.check(record)
    with pytest.raises(UnitvisError, match=r"'1.png' is no longer the file that was scanned: No such file"):
        everything(source)
    with pytest.raises(UnitvisError, match=r"'1.png' is no longer .*: image 1 is another one here"):
        open_source(tmp_path, PLAIN).check(record)


def test_a_patch_is_found_in_the_original(tmp_path):
    """A checkerboard photograph, turned by EXIF: the model's box maps to the very pixels that it shows."""
    cells = np.random.default_rng(3).integers(0, 256, (12, 16, 3), np.uint8)
    board = np.kron(cells, np.ones((20, 20, 1), np.uint8)).astype(np.uint8)  # 240 high, 320 wide
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.rot90(board, 1).copy()).save(tmp_path / "board.png", exif=exif)
    source = open_source(tmp_path, Transform(resize=120, crop=(100, 140), interpolation="box"))
    pixels = source.read(0)  # half size: a cell is 10 pixels, the crop starts at column 10, row 10
    assert pixels.shape == (100, 140, 3)
    picture, to_source = source.picture(0)
    assert picture.size == (320, 240)
    for row, column in ((0, 0), (3, 7), (9, 13)):
        box = (10 * column, 10 * row, 10 * column + 10, 10 * row + 10)
        patch = np.asarray(picture.crop(to_source(box)))
        assert patch.shape == (20, 20, 3)
        assert (patch == pixels[10 * row + 5, 10 * column + 5].numpy()).all()
        assert (patch == cells[row + 1, column + 1]).all()


# --------------------------------------------------------------------------------------------------- lists and mistakes


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


def test_what_cannot_be_opened(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "words").mkdir()
    for i in range(3):
        (tmp_path / "words" / f"{i}.doc").write_text("x")
    (tmp_path / "x.zip").write_bytes(b"x")
    picture = write(tmp_path / "cat.JPG", 1)
    for images, message in (
        (tmp_path / "nothing", "there is no file or folder '.*nothing'"),
        (tmp_path / "empty", "no image .* below '.*empty', which holds nothing"),
        (tmp_path / "words", "no image .* below '.*words', which holds 3 other files"),
        (picture, r"'.*cat.JPG' is one image; give the folder that holds it"),
        (tmp_path / "x.zip", r"'.*x.zip' is neither a folder, a .txt list of paths, a .tar archive nor a .npy array"),
        (7, "no images can be read from int; give a folder"),
        (Image.new("RGB", (3, 3)), "no images can be read from Image"),
        ({"a": 1}, "no images can be read from dict"),
        (b"abc", "no images can be read from bytes"),
        ([], "the dataset holds no image"),
        (Dataset(), "no images can be read from Dataset; a map-style dataset needs __len__"),
    ):
        with pytest.raises(UnitvisError, match=message) as error:
            open_source(images, PLAIN)
        assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    write(tmp_path / "a" / "x.png", 1)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(UnitvisError, match=r"cannot read the folder '.*': Permission denied"):
        open_source(tmp_path, PLAIN)


def test_no_readable_image(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"" if i else b"words")
    source = open_source(tmp_path, PLAIN)
    with pytest.raises(
        UnitvisError, match=r"no image of the folder could be read: 3 failed, the first is '0.jpg' \(not an"
    ):
        everything(source)
    assert len(source.failures) == 3


def test_pixels_need_a_transform(tmp_path):
    write(tmp_path / "x.png", 1)
    np.save(tmp_path / "x.npy", noise(1)[None])
    for images in (tmp_path, tmp_path / "x.npy", noise(1)[None], torch.from_numpy(noise(1)[None])):
        with pytest.raises(UnitvisError, match=r"Transform\(resize=, crop=, mean=, std=\) .*--resize.* divides by 255"):
            open_source(images)
    for images in ([Image.new("RGB", (8, 8))], [noise(1)], iter([noise(1)[None]])):
        with pytest.raises(UnitvisError, match="need a transform"):
            everything(open_source(images))


def test_images_of_two_sizes(tmp_path):
    write(tmp_path / "a.png", 1, 8, 8)
    write(tmp_path / "b.png", 1, 8, 8)
    write(tmp_path / "c.png", 1, 8, 9)
    for batch_size in (1, 2, 4):
        with pytest.raises(
            UnitvisError, match=r"'a.png' gives 8 x 8 pixels, 'c.png' gives 9 x 8 pixels; .*resize=\(height"
        ):
            everything(open_source(tmp_path, PLAIN), batch_size)
    assert everything(open_source(tmp_path, SMALL))[0] == [0, 1, 2]
    with pytest.raises(UnitvisError, match=r"'image 0' gives torch.float32 \[3, 8, 8\], 'image 1'"):
        everything(open_source([torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)]))


def test_an_image_smaller_than_the_crop_is_a_failure(tmp_path):
    write(tmp_path / "a.png", 1, 16, 16)
    write(tmp_path / "b.png", 1, 8, 30)
    source = open_source(tmp_path, Transform(crop=12))
    assert everything(source)[0] == [0]
    reason = "the crop of 12 x 12 is larger than the image, 30 x 8 when resized"
    assert source.failures == [Failure(1, "b.png", reason)]
    with pytest.raises(UnitvisError, match=f"'b.png' cannot be used: {reason}"):
        source.read(1)


def test_wrong_batch_size(folder):
    with pytest.raises(UnitvisError, match="batch_size=0"):
        open_source(folder, PLAIN).batches(0)


def test_a_source_opens_again(folder, tmp_path):
    np.save(tmp_path / "x.npy", noise(1)[None])
    for images, transform in ((folder, SMALL), (tmp_path / "x.npy", PLAIN)):
        source = open_source(images, transform)
        described = json.loads(json.dumps(source.describe()))
        again = reopen_source(described, json.loads(json.dumps(transform.to_json())))
        assert again.describe() == source.describe()
        assert again.transform == transform
        again.check(source.record(0))
    with pytest.raises(UnitvisError, match="the images came from a dataset, which has no path"):
        reopen_source(open_source([noise(1)], PLAIN).describe(), None)
    with pytest.raises(
        UnitvisError, match=r"the images of the run are not where they were: there is no file or folder"
    ):
        reopen_source({"kind": "folder", "path": str(tmp_path / "moved")}, PLAIN.to_json())
    assert open_source(source) is source


# -------------------------------------------------------------------------------------------------------------- arrays


def stack(n, height=8, width=8):
    return np.stack([noise(i, height, width) for i in range(n)])


def test_uint8_arrays(tmp_path):
    array = stack(11)
    np.save(tmp_path / "x.npy", array)
    for images in (array, torch.from_numpy(array), tmp_path / "x.npy", np.asfortranarray(array)):
        source = open_source(images, PLAIN)
        assert source.length == 11
        for batch_size in (1, 4, 16):
            ids, pixels = everything(source, batch_size)
            assert ids == list(range(11))
            assert (pixels.numpy() == array).all()
        ids, pixels = everything(source, 2, ids=[7, 3, 4])
        assert ids == [7, 3, 4]
        assert (pixels.numpy() == array[[7, 3, 4]]).all()
        assert (source.read(5).numpy() == array[5]).all()
        record = source.record(5)
        assert record["hash"] == hashlib.blake2b(array[5].tobytes(), digest_size=16).hexdigest()
        assert (record["width"], record["height"]) == (8, 8)
        source.check(record)
        with pytest.raises(UnitvisError, match="'image 5' is no longer the image that was scanned"):
            source.check({**record, "hash": "0"})
        with pytest.raises(UnitvisError, match="there is no image 11"):
            source.read(11)
    assert isinstance(open_source(tmp_path / "x.npy", PLAIN)._array, np.memmap)


def test_uint8_arrays_are_resized_and_cropped():
    array = stack(5, 20, 30)
    transform = Transform(resize=10, crop=8)
    source = open_source(array, transform)
    expected = np.stack([transform(Image.fromarray(row)) for row in array])
    assert (everything(source, 2, workers=3)[1].numpy() == expected).all()
    picture, to_source = source.picture(2)
    assert (np.asarray(picture) == array[2]).all()
    assert to_source((0, 0, 8, 8)) == (8, 2, 24, 18)  # half size, cut at column 4 (3.5, to even) and row 1
    with pytest.raises(UnitvisError, match="crop"):
        everything(open_source(array, Transform(crop=21)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_float_tensors_are_taken_as_normalised(dtype):
    values = torch.randn(7, 3, 5, 6).to(dtype)
    ids, pixels = everything(open_source(values))
    assert ids == list(range(7))
    assert pixels.dtype == torch.float32
    assert (pixels == values.float()).all()
    if dtype != torch.bfloat16:
        assert (everything(open_source(values.numpy()))[1] == values.float()).all()
        assert (everything(open_source(values.numpy().astype(values.numpy().dtype.newbyteorder())))[1] == values).all()


def test_pictures_of_float_images():
    raw = torch.from_numpy(stack(3))
    transform = Transform(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    source = open_source(transform.normalize(raw), transform)
    picture, to_source = source.picture(1)
    assert (np.asarray(picture) == raw[1].numpy()).all()
    assert to_source((1, -2, 3, 4)) == (1, -2, 3, 4)
    assert source.value_range([0, 1]) == (0, 1)

    values = torch.linspace(-3, 5, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    values[0, 0, 0, 0] = float("nan")
    source = open_source(values)
    low, high = source.value_range(range(2))
    assert (low, high) == (values[0, 0, 0, 1].item(), 5)
    picture, _ = source.picture(1, (low, high))
    expected = ((values[1].double() - low) / (high - low) * 255).round().permute(1, 2, 0)
    assert np.abs(np.asarray(picture).astype(int) - expected.numpy()).max() <= 1
    for channels, shown in ((1, [0, 0, 0]), (2, [0, 0, 0]), (5, [0, 1, 2])):
        values = torch.arange(channels).float().reshape(1, -1, 1, 1).expand(1, channels, 4, 4)
        picture, _ = open_source(values).picture(0, (0.0, 255.0))
        assert (np.asarray(picture) == shown).all()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 8, 8), np.uint8), r"the array is uint8 \[2, 8, 8\], not an image; uint8 \[N, H, W, 3\] or"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"uint8 \[2, 3, 8, 8\].* is needed, channels last"),
        (np.zeros((2, 8, 8, 4), np.uint8), r"is needed, three channels"),
        (np.zeros((2, 8, 8, 3), np.float32), r"float32 \[2, 8, 8, 3\].* is needed, channels first"),
        (np.zeros((2, 8, 8, 3), np.int64), r"int64 \[2, 8, 8, 3\], not an image"),
        (np.zeros((2, 3, 8, 8), bool), "bool"),
        (np.zeros((2, 3, 8, 8), complex), "complex128"),
        (torch.zeros(3, 8, 8), r"torch.float32 \[3, 8, 8\], not an image"),
        (torch.zeros(2, 3, 0, 8), r"\[2, 3, 0, 8\], not an image"),
        (torch.zeros(0, 3, 8, 8), "the array holds no image"),
    ],
)
def test_a_tensor_that_is_not_an_image(array, message, tmp_path):
    with pytest.raises(UnitvisError, match=message):
        open_source(array, PLAIN)
    if isinstance(array, np.ndarray):
        np.save(tmp_path / "x.npy", array)
        with pytest.raises(UnitvisError, match=message.replace("the array", ".*x.npy'")):
            open_source(tmp_path / "x.npy", PLAIN)


def test_a_wrong_npy(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "words.npy").write_text("words")
    np.save(tmp_path / "cut.npy", stack(9))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:900])
    (tmp_path / "empty.npy").write_bytes(b"")
    for name in ("objects", "words", "cut", "empty"):
        with pytest.raises(UnitvisError, match=f"cannot read '.*{name}.npy': ") as error:
            open_source(tmp_path / f"{name}.npy", PLAIN)
        assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------- datasets and DataLoaders


class Pictures(Dataset):
    """PIL images with labels; one of them fails."""

    def __init__(self, kind="pil", broken=()):
        self.kind, self.broken = kind, broken

    def __len__(self):
        return 10

    def __getitem__(self, i):
        if i in self.broken:
            raise OSError(f"no bytes of {i}\nto be had")
        image = noise(i, 12, 10)
        floats = torch.from_numpy(image).permute(2, 0, 1).float()
        return {"pil": Image.fromarray(image), "array": image, "tensor": torch.from_numpy(image), "float": floats}[
            self.kind
        ]


class Labelled(Pictures):
    def __getitem__(self, i):
        return super().__getitem__(i), i


class Named(Pictures):
    def __getitem__(self, i):
        return {"image": super().__getitem__(i), "label": i}


TRUTH = np.stack([noise(i, 12, 10) for i in range(10)])


@pytest.mark.parametrize("form", [Pictures, Labelled, Named])
@pytest.mark.parametrize("kind", ["pil", "array", "tensor"])
def test_map_style_datasets_of_pixels(form, kind):
    source = open_source(form(kind), PLAIN)
    assert source.length == 10
    ids, pixels = everything(source, 3)
    assert ids == list(range(10))
    assert (pixels.numpy() == TRUTH).all()
    ids, pixels = everything(source, 3, ids=[9, 2])
    assert (pixels.numpy() == TRUTH[[9, 2]]).all()
    transform = Transform(resize=(6, 5))
    small = open_source(form(kind), transform)
    assert (small.read(4).numpy() == transform(Image.fromarray(TRUTH[4]))).all()
    picture, to_source = small.picture(4)
    assert (np.asarray(picture) == TRUTH[4]).all()
    assert to_source((1, 1, 2, 3)) == (2, 2, 4, 6)
    assert small.record(4)["width"] == 10
    small.check(small.record(4))


def test_map_style_datasets_of_floats():
    source = open_source(Labelled("float"), PLAIN)
    _, pixels = everything(source, 4)
    assert pixels.dtype == torch.float32
    assert (pixels.permute(0, 2, 3, 1).numpy() == TRUTH).all()


def test_an_item_that_fails_is_listed():
    source = open_source(Labelled(broken=(0, 6)), PLAIN)
    assert everything(source, 4)[0] == [1, 2, 3, 4, 5, 7, 8, 9]
    assert source.failures == [Failure(i, f"image {i}", f"OSError: no bytes of {i} to be had") for i in (0, 6)]
    with pytest.raises(UnitvisError, match="'image 0' cannot be used: OSError"):
        everything(open_source(Labelled(broken=(0,)), PLAIN, on_error="raise"))
    with pytest.raises(UnitvisError, match="no image of the dataset could be read: 10 failed, the first is 'image 0'"):
        everything(open_source(Pictures(broken=range(10)), PLAIN))


def test_an_item_that_is_not_an_image_stops():
    for item, message in (
        ("x", r"image 0 of the dataset is str, not a tensor or array; uint8 \[H, W, 3\] or normalised float"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "channels last"),
        (torch.zeros(8, 8), r"\[8, 8\], not an image"),
        ((), "an item is empty"),
    ):
        with pytest.raises(UnitvisError, match=message):
            everything(open_source([[item], 1] if isinstance(item, str) else [item], PLAIN))


class Augmented(Pictures):
    def __getitem__(self, i):
        return torch.rand(3, 8, 8), i


def test_random_augmentation_is_noticed():
    for images in (Augmented(), DataLoader(Augmented(), batch_size=4)):
        source = open_source(images, PLAIN)
        everything(source)
        with pytest.raises(
            UnitvisError, match=r"'image 3' is no longer .* augment at random\): read again, it differs"
        ):
            everything(source, ids=[3])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_dataloaders_are_read_whole_and_by_id(workers):
    loader = DataLoader(Labelled("tensor"), batch_size=4, num_workers=workers)
    source = open_source(loader, PLAIN)
    assert source.rereadable
    assert source.length == 10
    for batch_size in (3, 4, 16):
        ids, pixels = everything(source, batch_size)
        assert ids == list(range(10))
        assert (pixels.numpy() == TRUTH).all()
    ids, pixels = everything(source, 3, ids=[8, 1, 5, 0])
    assert ids == [8, 1, 5, 0]
    assert (pixels.numpy() == TRUTH[[8, 1, 5, 0]]).all()
    assert (np.asarray(source.picture(7)[0]) == TRUTH[7]).all()
    source.check(source.record(7))


def test_a_collate_function_is_used_again():
    def collate(items):
        return torch.stack([image.permute(2, 0, 1).float() / 255 for image, _ in items]), None

    source = open_source(DataLoader(Labelled("tensor"), batch_size=4, collate_fn=collate))
    _, pixels = everything(source)
    assert (pixels.permute(0, 2, 3, 1).numpy() == TRUTH.astype(np.float32) / np.float32(255)).all()
    assert (everything(source, ids=[6])[1][0] == pixels[6]).all()
    assert (source.read(6) == pixels[6]).all()


def test_dataloaders_that_would_lose_or_shuffle_are_refused():
    data = TensorDataset(torch.zeros(10, 3, 4, 4))
    order = "draws in an order of its own"
    for loader, message in (
        (
            DataLoader(data, shuffle=True),
            rf"{order} \(RandomSampler\).*shuffle=False and no sampler, or give its dataset",
        ),
        (DataLoader(data, sampler=[3, 1]), rf"{order} \(list\)"),
        (DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 4, False)), rf"{order} \(RandomSampler\)"),
        (DataLoader(data, batch_sampler=[[1, 2], [3]]), rf"{order} \(list\)"),
        (DataLoader(data, batch_size=None, shuffle=True), rf"{order} \(RandomSampler\)"),
        (DataLoader(data, batch_size=4, drop_last=True), "drops its last images; build it with drop_last=False"),
        (DataLoader(Stream([]), batch_size=4, drop_last=True), "drops its last images"),
    ):
        with pytest.raises(UnitvisError, match=message):
            open_source(loader)
    assert everything(open_source(DataLoader(data, batch_size=5, drop_last=True)))[0] == list(range(10))
    assert everything(open_source(DataLoader(Subset(data, [4, 2]), batch_size=2)))[0] == [0, 1]


def test_a_collate_function_that_drops_images_is_refused():
    loader = DataLoader(
        Labelled("tensor"), batch_size=4, collate_fn=lambda items: torch.stack([i for i, n in items if n])
    )
    with pytest.raises(UnitvisError, match=r"gave 3 images where it draws 4, from image 0 on; a collate_fn that drops"):
        everything(open_source(loader, PLAIN))


def test_a_dataset_that_fails_inside_a_dataloader():
    loader = DataLoader(Labelled("tensor", broken=(5,)), batch_size=4)
    with pytest.raises(UnitvisError, match=r"the DataLoader failed after 1 batches: OSError: no bytes of 5 to be had$"):
        everything(open_source(loader, PLAIN))

    def worker():  # how torch passes on what a worker raised
        yield torch.zeros(2, 3, 4, 4)
        raise OSError(
            "Caught OSError in DataLoader worker process 0.\nTraceback (most recent call last):\nOSError: x\n"
        )

    with pytest.raises(UnitvisError, match=r"the stream failed after 1 batches: OSError: x$"):
        everything(open_source(worker()))


# -------------------------------------------------------------------------------------------------------------- streams


class Stream(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def test_streams_of_any_batches_are_made_even():
    floats = torch.randn(13, 3, 4, 4)
    pieces = [floats[:3], floats[3:4], floats[4:4], floats[4:12], floats[12:]]
    labelled = [(piece, torch.zeros(len(piece))) for piece in pieces]
    named = [{"pixel_values": piece, "labels": 0} for piece in pieces]
    loader = DataLoader(Stream(list(floats)), batch_size=5)
    for images in (iter(pieces), Stream(labelled), iter(named), pieces, (p.numpy() for p in pieces), loader):
        source = open_source(images)
        assert not source.rereadable
        assert source.length is None
        ids, pixels = everything(source, 4)
        assert ids == list(range(13))
        assert (pixels == floats).all()
        assert source.length == 13
        assert source.describe()["images"] == 13


def test_a_stream_is_read_once():
    source = open_source(iter([torch.zeros(2, 3, 4, 5)]))
    with pytest.raises(UnitvisError, match="the stream can be read once only"):
        source.batches(2, ids=[1])
    everything(source)
    with pytest.raises(UnitvisError, match="the stream has been read; give a new one"):
        everything(source)
    record = source.record(1)
    assert record == {"id": 1, "name": "image 1", "width": 5, "height": 4, "hash": None}
    for use in (lambda: source.read(1), lambda: source.picture(1), lambda: source.check(record)):
        with pytest.raises(UnitvisError, match="image 1 came from a stream, which is read once; give a folder"):
            use()


def test_what_a_stream_must_not_give():
    def failing():
        yield torch.zeros(2, 3, 4, 4)
        raise ValueError("out of\ndisk")

    for images, message in (
        (iter([torch.zeros(3, 4, 4)]), r"batch 0 of the stream is torch.float32 \[3, 4, 4\], not an image"),
        (iter(["x"]), "batch 0 of the stream is str"),
        (iter([torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 5)]), r"'image 0' gives .*\[3, 4, 4\], 'image 2' gives"),
        (iter([torch.zeros(2, 3, 4, 4), np.zeros((2, 4, 4, 3), np.uint8)]), "'image 0' gives .*, 'image 2' gives"),
        (failing(), "the stream failed after 1 batches: ValueError: out of disk"),
        (iter([]), "no image of the stream could be read"),
    ):
        with pytest.raises(UnitvisError, match=message):
            everything(open_source(images, PLAIN))


def test_uint8_streams_are_resized():
    transform = Transform(resize=(6, 5))
    expected = np.stack([transform(Image.fromarray(image)) for image in TRUTH])
    assert (everything(open_source(iter([TRUTH[:4], TRUTH[4:]]), transform))[1].numpy() == expected).all()


# --------------------------------------------------------------------------------------------------------- photographs


@pytest.mark.photos
@pytest.mark.skipif("UNITVIS_SHARED" not in os.environ, reason="needs the photographs")
def test_photographs():
    photos = Path(os.environ["UNITVIS_SHARED"]) / "data" / "photos"
    source = open_source(photos, Transform(resize=256, crop=224))
    ids = list(range(0, source.length, 25))
    read, pixels = everything(source, 8, ids=ids)
    assert read == ids
    assert pixels.shape == (20, 224, 224, 3)
    assert not source.failures
    for id, seen in zip(ids, pixels, strict=True):
        with Image.open(photos / source.name(id)) as image:
            width, height = image.size
            short = min(width, height)
            size = int(256 * width / short), int(256 * height / short)
            plain = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR))
        top, left = round((size[1] - 224) / 2), round((size[0] - 224) / 2)
        assert (seen.numpy() == plain[top : top + 224, left : left + 224]).all()


def test_files_are_read_but_not_decoded_while_somebody_else_has_the_cores(folder, monkeypatch):
    source = open_source(folder, Transform(crop=8))
    read, decoded, all_read, four_decoded = [], [], threading.Event(), threading.Event()
    contents, pixels = source._contents, source._decoding.pixels

    def reading(id):
        read.append(id)
        if len(read) == 6:
            all_read.set()
        return contents(id)

    def decoding(data, transform):
        decoded.append(len(data))
        if len(decoded) == 4:
            four_decoded.set()
        return pixels(data, transform)

    monkeypatch.setattr(source, "_contents", reading)
    monkeypatch.setattr(type(source._decoding), "pixels", lambda self, data, transform: decoding(data, transform))
    batches = source.batches(4, workers=6)
    with ThreadPoolExecutor(1) as pool:
        with source.pause_decoding():
            first = pool.submit(next, batches)
            assert all_read.wait(DEADLINE)
            assert decoded == []
        assert four_decoded.wait(DEADLINE)
        assert first.result(DEADLINE).ids.tolist() == [0, 1, 2, 3]
    batches.close()
    with pytest.raises(ZeroDivisionError), source.pause_decoding():  # what goes wrong gives the cores back too
        raise ZeroDivisionError
    assert source._may_decode.is_set()
