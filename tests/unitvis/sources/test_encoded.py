"""Images from encoded files: their records, their originals, files that change, decoding held back."""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.sources import PLAIN, SMALL, everything, write
from unitvis.errors import UnitvisError
from unitvis.sources import open_source
from unitvis.sources.transform import Transform

DEADLINE = 300  # seconds after which what a test waits for is taken to never happen


def test_the_reason_of_a_jpeg_that_ends_early(tmp_path):
    write(tmp_path / "a.png", 0, 64, 64)
    whole = write(tmp_path / "b.jpg", 1, 64, 64).read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole[: len(whole) // 2])
    source = open_source(tmp_path, PLAIN)
    assert everything(source)[0] == [0]
    (failure,) = source.failures
    assert failure.reason.startswith("broken JPEG: image file is truncated (")
    assert everything(open_source(tmp_path, PLAIN, allow_truncated=True))[0] == [0, 1]


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
    contents, pixels = source._contents.read, source._decoding.pixels

    def reading(place):
        read.append(place)
        if len(read) == 6:
            all_read.set()
        return contents(place)

    def decoding(data, transform):
        decoded.append(len(data))
        if len(decoded) == 4:
            four_decoded.set()
        return pixels(data, transform)

    monkeypatch.setattr(source._contents, "read", reading)
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
