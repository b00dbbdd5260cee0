"""Arrays and tensors as sources."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from support.sources import PLAIN, everything, noise
from unitvis.errors import UnitvisError
from unitvis.sources import open_source
from unitvis.sources.transform import Transform


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


def test_grey_uint8_arrays_are_pictures():
    grey = stack(3)[..., :1]
    source = open_source(grey, PLAIN)
    assert (everything(source, 2)[1].numpy() == np.repeat(grey, 3, axis=3)).all()
    assert (np.asarray(source.picture(1)[0]) == grey[1]).all()
