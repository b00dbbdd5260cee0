"""Batches of a source: their order, size and failures, and the threads that read them."""

from __future__ import annotations

import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from support.sources import PLAIN, SMALL, everything, noise, write
from unitvis.decoding.contents import FileContents
from unitvis.errors import UnitvisError
from unitvis.sources import Failure, base, open_source
from unitvis.sources.transform import Transform

DEADLINE = 300  # seconds after which what a test waits for is taken to never happen


def test_batches_are_full_whatever_fails_and_whoever_reads(folder):
    good = [i for i in range(27) if i not in (4, 9, 14, 26)]
    expected = [
        Failure(4, "03b.jpg", "not an image (JPEG, PNG, WebP, AVIF, BMP, GIF, TIFF or PPM)"),
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
    read = FileContents.read
    monkeypatch.setattr(FileContents, "read", lambda self, place: opened.append(place) or read(self, place))
    submit = ThreadPoolExecutor.submit
    monkeypatch.setattr(ThreadPoolExecutor, "submit", lambda *job: submitted.append(submit(*job)) or submitted[-1])
    batches = open_source(folder, PLAIN).batches(3, workers=4)
    next(batches)
    assert not wait(submitted, timeout=DEADLINE).not_done  # the threads have read all that they may
    assert 3 < len(set(opened)) <= 3 + 2 * 3 + 1
    batches.close()
    assert len(opened) <= 10


def test_an_abandoned_pass_leaves_no_thread(folder):
    before = set(threading.enumerate())  # a failure that pytest keeps holds the threads of its pass

    def reading_threads():
        new = set(threading.enumerate()) - before
        return [thread for thread in new if thread.name.startswith("unitvis-read")]

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


def test_no_readable_image(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"" if i else b"words")
    source = open_source(tmp_path, PLAIN)
    with pytest.raises(
        UnitvisError, match=r"no image of the folder could be read: 3 failed, the first is '0.jpg' \(not an"
    ):
        everything(source)
    assert len(source.failures) == 3


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


def test_batches_are_pinned_where_memory_can_be_pinned(tmp_path):
    for seed in range(20):
        write(tmp_path / f"{seed:02}.png", seed)
    plain, pinned = (list(open_source(tmp_path, PLAIN).batches(8, pinned=pinned)) for pinned in (False, True))
    assert [batch.ids.tolist() for batch in plain] == [batch.ids.tolist() for batch in pinned]
    assert all(torch.equal(one.pixels, other.pixels) for one, other in zip(plain, pinned, strict=True))
    assert all(batch.pixels.is_pinned() == torch.cuda.is_available() for batch in pinned)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_pinned_batch_is_given_to_nobody_else_before_it_is_copied(tmp_path):
    for seed in range(64):
        write(tmp_path / f"{seed:02}.png", seed)
    source, copies = open_source(tmp_path, PLAIN), []
    want = torch.cat([batch.pixels for batch in source.batches(8)])
    torch.cuda._sleep(10**9)  # the copies wait while the host reads on
    for batch in source.batches(8, pinned=True):
        copies.append(batch.pixels.cuda(non_blocking=True))
    assert torch.equal(torch.cat(copies).cpu(), want)


def test_a_batch_takes_no_more_memory_than_its_source_fills_and_there_is(monkeypatch):
    monkeypatch.setattr(base, "_LARGE_BATCH", 1000)
    images = [noise(i) for i in range(20)]
    for free, refused in ((20 * 192, False), (20 * 192 - 1, True)):
        monkeypatch.setattr(base, "available_memory", lambda free=free: float(free))
        said = pytest.raises(
            UnitvisError, match="a batch of 20 images takes 0 GiB, which cannot be had; give a smaller"
        )
        with said if refused else nullcontext():
            assert everything(open_source(images, PLAIN), 10**9)[0] == list(range(20))


def test_an_image_that_is_asked_for_again_comes_in_the_same_batch():
    batches = list(open_source([noise(i) for i in range(3)], PLAIN).batches(16, ids=[2, 0, 2, 1, 0, 2]))
    assert [batch.ids.tolist() for batch in batches] == [[2, 0, 2, 1, 0, 2]]
