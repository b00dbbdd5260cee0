"""Opening a source by what it is given, and again by its description."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from support.clock import in_time
from support.sources import PLAIN, SMALL, everything, noise, write
from unitvis.errors import UnitvisError
from unitvis.sources import open_source, reopen_source


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


def test_pixels_need_a_transform(tmp_path):
    write(tmp_path / "x.png", 1)
    np.save(tmp_path / "x.npy", noise(1)[None])
    for images in (tmp_path, tmp_path / "x.npy", noise(1)[None], torch.from_numpy(noise(1)[None])):
        with pytest.raises(UnitvisError, match=r"Transform\(resize=, crop=, mean=, std=\) .*--resize.* divides by 255"):
            open_source(images)
    for images in ([Image.new("RGB", (8, 8))], [noise(1)], iter([noise(1)[None]])):
        with pytest.raises(UnitvisError, match="need a transform"):
            everything(open_source(images))


def test_wrong_batch_size(folder):
    with pytest.raises(UnitvisError, match="batch_size must be a whole number of at least 1, not 0"):
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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("name", ["list.txt", "array.npy"])
def test_a_pipe_is_not_waited_for(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UnitvisError, match=f"{name}' is not a regular file; give a folder"):
        open_source(tmp_path / name, PLAIN)


@pytest.mark.parametrize("shape", [(-8, 8, 8, 3), (10**30, 8, 8, 3), (10**12, 8, 8, 3), (True, 8, 8, 3)])
def test_arrays_of_impossible_shapes_are_refused(shape, tmp_path):
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(1536))
    with pytest.raises(UnitvisError, match=r"cannot read '.*x.npy'"):
        open_source(tmp_path / "x.npy", PLAIN)


def test_a_list_without_lines_is_refused_before_it_is_read_whole(tmp_path):
    (tmp_path / "x.txt").write_text("a.png\n")
    os.truncate(tmp_path / "x.txt", 20 << 30)
    with in_time(), pytest.raises(UnitvisError, match=r"line 2 of the list '.*x.txt' has 65,536 bytes or more"):
        open_source(tmp_path / "x.txt", PLAIN)
