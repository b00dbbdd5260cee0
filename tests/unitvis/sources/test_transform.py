import json

import numpy as np
import pytest
import torch
from PIL import Image

from unitvis.errors import ImageError, UnitvisError
from unitvis.sources.transform import Transform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def addressed(width, height):
    """A picture whose red is the column and whose green is the row."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.dstack([columns, rows, 0 * rows]).astype(np.uint8))


# (width, height), resize, crop -> (width, height) after the resize, (left, top) of the crop, (height, width) seen;
# worked out by hand from torchvision's rules: int(size * long / short), then int(round((side - crop) / 2.0))
SIZES = [
    ((500, 375), None, None, (500, 375), (0, 0), (375, 500)),
    ((500, 375), 256, 224, (341, 256), (58, 16), (224, 224)),
    ((375, 500), 256, 224, (256, 341), (16, 58), (224, 224)),
    ((227, 227), 256, (224, 225), (256, 256), (16, 16), (224, 225)),
    ((500, 375), (32, 48), None, (48, 32), (0, 0), (32, 48)),
    ((500, 375), (33, 48), 32, (48, 33), (8, 0), (32, 32)),
    ((500, 375), (35, 48), 32, (48, 35), (8, 2), (32, 32)),
    ((100, 90), None, (80, 60), (100, 90), (20, 5), (80, 60)),
    ((3, 1000), 4, (4, 4), (4, 1333), (0, 664), (4, 4)),
]


@pytest.mark.parametrize(("size", "resize", "crop", "resized", "corner", "seen"), SIZES)
def test_sizes_and_corners(size, resize, crop, resized, corner, seen):
    transform = Transform(resize=resize, crop=crop)
    assert transform.input_size(*size) == seen
    image = addressed(*size)
    pixels = transform(image)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (*seen, 3)
    left, top = corner
    whole = np.asarray(image.resize(resized, Image.Resampling.BILINEAR))
    assert (pixels == whole[top : top + seen[0], left : left + seen[1]]).all()


@pytest.mark.parametrize(("size", "resize", "crop", "resized", "corner", "seen"), SIZES)
def test_boxes_go_back_to_the_original(size, resize, crop, resized, corner, seen):
    """The original pixel that nearest-neighbour resizing shows lies in the box of the model's pixel."""
    size = (min(size[0], 250), min(size[1], 250))  # an address is one byte
    transform = Transform(resize=resize, crop=crop, interpolation="nearest")
    pixels = transform(addressed(*size)).astype(int)
    height, width = pixels.shape[:2]
    for row, column in {(0, 0), (0, width - 1), (height - 1, 0), (height // 2, width // 3), (height - 1, width - 1)}:
        left, top, right, bottom = transform.to_source((column, row, column + 1, row + 1), *size)
        x, y = pixels[row, column, :2]
        assert left < x + 1
        assert right > x
        assert top < y + 1
        assert bottom > y


def test_a_box_may_leave_the_image():
    transform = Transform(resize=50, crop=40)
    assert transform.to_source((-10, -5, 50, 45), 200, 100) == (40, 0, 160, 100)
    left, top, right, bottom = transform.to_source((0, 0, 40, 40), 200, 100)
    assert (left, top, right, bottom) == (60, 10, 140, 90)


def test_normalize_is_divide_subtract_divide_in_float32():
    batch = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(2, 1, 1, 3)
    pixels = Transform(mean=MEAN, std=STD).normalize(batch)
    assert pixels.dtype == torch.float32
    assert pixels.shape == (2, 3, 16, 16)
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    values = batch.numpy().astype(np.float32) / np.float32(255)
    expected = (values - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    assert (pixels.numpy() == expected.transpose(0, 3, 1, 2)).all()
    plain = Transform().normalize(batch)
    assert (plain.numpy() == values.transpose(0, 3, 1, 2)).all()
    assert (batch[0, :, :, 0].flatten() == torch.arange(256)).all()


def test_normalize_in_and_after_inference_mode():
    batch = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    transform = Transform(mean=(0.1, 0.2, 0.3), std=(1, 2, 3))
    with torch.inference_mode():
        first = transform.normalize(batch)
    weight = torch.ones(1, requires_grad=True)
    (transform.normalize(batch) * weight).sum().backward()
    assert (first.clone() == transform.normalize(batch)).all()


@pytest.mark.parametrize(
    "transform", [Transform(), Transform(mean=MEAN, std=STD), Transform(mean=MEAN), Transform(std=STD)]
)
def test_denormalize_undoes_normalize(transform):
    batch = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(1, 1, 1, 3)
    picture = transform.denormalize(transform.normalize(batch)[0])
    assert picture.dtype == np.uint8
    assert (picture == batch[0].numpy()).all()


def test_denormalize_clips_and_rounds():
    values = torch.tensor([-0.1, 0.0, 0.4999, 127.5 / 255 + 1e-6, 1.2, float("nan"), float("inf"), float("-inf")])
    picture = Transform().denormalize(values.reshape(1, 1, -1).repeat(3, 1, 1))
    assert picture[0, :, 0].tolist() == [0, 0, 127, 128, 255, 0, 255, 0]


def test_any_mode_goes_in():
    for image in (Image.new("L", (8, 8), 90), Image.new("P", (8, 8)), Image.new("LA", (8, 8), (90, 255))):
        assert Transform(resize=(4, 5))(image).shape == (4, 5, 3)


def test_interpolation_is_pillow_s():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    for name in ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"):
        expected = np.asarray(image.resize((20, 10), getattr(Image.Resampling, name.upper())))
        assert (Transform(resize=(10, 20), interpolation=name)(image) == expected).all()


def test_an_image_smaller_than_the_crop():
    with pytest.raises(ImageError, match=r"the crop of 64 x 64 is larger than the image, 60 x 80 when resized"):
        Transform(crop=64)(Image.new("RGB", (60, 80)))
    with pytest.raises(ImageError, match="is larger than the image"):
        Transform(resize=32, crop=(10, 33)).input_size(50, 50)


def test_a_resize_into_a_bomb():
    with pytest.raises(ImageError, match=r"1 x 60000 would be resized to 224 x 13440000 pixels"):
        Transform(resize=224, crop=224)(Image.new("RGB", (1, 60_000)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resize": 0}, "resize=0; it must be a positive number"),
        ({"resize": 2.5}, "resize=2.5"),
        ({"resize": True}, "resize=True"),
        ({"resize": 10**400}, r"resize=10+; it must be a positive number of pixels \(to 1,000,000\)"),
        ({"mean": 10**400}, "mean=10+; every value must be a finite number"),
        ({"interpolation": []}, r"interpolation=\[\]; it must be one of"),
        ({"resize": (224,)}, r"resize=\(224,\); a pair \(height, width\)"),
        ({"crop": (3, -1)}, r"crop=\(3, -1\)"),
        ({"crop": "224"}, "crop='224'"),
        ({"mean": (0.5, 0.5)}, r"mean=\(0.5, 0.5\); three numbers"),
        ({"mean": "abc"}, "mean='abc'"),
        ({"mean": (0, 0, float("nan"))}, "mean="),
        ({"std": (1, 1, 0)}, r"std=\(1, 1, 0\); every value must be above 0"),
        ({"interpolation": "area"}, "interpolation='area'; it must be one of nearest, bilinear"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(UnitvisError, match=message):
        Transform(**arguments)


def test_wrong_pixels():
    for batch in (torch.zeros(1, 4, 4, 3), torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(4, 4, 3).byte()):
        with pytest.raises(UnitvisError, match=r"pixels are uint8 \[N, H, W, 3\]"):
            Transform().normalize(batch)


def test_json_there_and_back():
    lists = Transform(resize=[224, 200], crop=np.int64(180), mean=list(MEAN), std=torch.tensor(STD).double().numpy())
    for transform in (Transform(), Transform(256, 224, MEAN, STD, "bicubic"), lists):
        again = Transform.from_json(json.loads(json.dumps(transform.to_json())))
        assert again == transform
        assert hash(again) == hash(transform)
    assert lists.resize == (224, 200)
    with pytest.raises(UnitvisError, match="a transform has no 'flip'"):
        Transform.from_json({"resize": 3, "flip": True})
