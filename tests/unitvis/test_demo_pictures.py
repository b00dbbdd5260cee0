"""The demo's pictures depend on seed and index alone, say nothing of their class in colour, and feed a network that
does what its record says."""

import numpy as np
import pytest
import torch

from unitvis.demo import network, pictures
from unitvis.demo.train import accuracy, augment, fold, prepare
from unitvis.errors import UnitvisError

COUNT = 300


@pytest.fixture(scope="module")
def drawn():
    return pictures.pictures(COUNT, seed=77, workers=2)


def test_a_picture_depends_on_seed_and_index_alone(drawn):
    images, labels = drawn
    assert images.shape == (COUNT, pictures.SIZE, pictures.SIZE, 3)
    assert images.dtype == np.uint8
    for i in (299, 3, 200):
        assert np.array_equal(pictures.draw(77, i), images[i])
        assert pictures.label(77, i) == labels[i]
    alone, _ = pictures.pictures(5, seed=77, workers=1)
    assert np.array_equal(alone, images[:5])
    assert not np.array_equal(pictures.draw(78, 3), images[3])


def test_no_picture_comes_twice(drawn):
    assert len({image.tobytes() for image in drawn[0]}) == COUNT


def test_classes_are_many_and_balanced(drawn):
    assert len(pictures.CLASSES) == len(set(pictures.CLASSES)) >= 12
    assert set(np.bincount(drawn[1], minlength=len(pictures.CLASSES))) == {COUNT // len(pictures.CLASSES)}
    assert len({tuple(pictures.label(seed, i) for i in range(15)) for seed in range(5)}) > 1  # the order is drawn


def test_colour_and_background_do_not_tell_the_class(drawn):
    """What a straight line through colours can tell: the nearest class mean, in halves, is right by chance only."""
    images, labels = drawn
    small = images.reshape(COUNT, -1, 3).astype(np.float64)
    corners = images[:, [0, 0, -1, -1], [0, -1, 0, -1]].reshape(COUNT, -1).astype(np.float64)
    for features in (small.mean(1), corners):
        scaled = (features - features.mean(0)) / features.std(0)
        first, second = np.arange(COUNT) % 2 == 0, np.arange(COUNT) % 2 == 1
        means = np.stack([scaled[first & (labels == c)].mean(0) for c in range(len(pictures.CLASSES))])
        nearest = ((scaled[second, None] - means) ** 2).sum(-1).argmin(1)
        # 150 guesses at 1/15: 10 right, deviation 3.1; four deviations are allowed.
        assert (nearest == labels[second]).sum() < 23


def test_pictures_are_rich(drawn):
    """Many colours and no flat areas: the median picture changes at nearly every pixel."""
    images = drawn[0].astype(np.int16)
    assert np.median([len(np.unique(image.reshape(-1, 3), axis=0)) for image in images[:50]]) > 3000
    assert np.median((np.abs(np.diff(images, axis=2)).sum(-1) > 0).mean((1, 2))) > 0.8


def test_the_network_is_as_good_as_its_record(drawn):
    net, record = network.load(), network.record()
    assert network.WEIGHTS.stat().st_size <= 4_000_000
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())
    assert [name for name, part in net.named_modules() if isinstance(part, torch.nn.Conv2d)] == list(network.LAYERS)
    assert min(dict(net.named_parameters())["classify.weight"].flatten()) >= 0  # a unit speaks against no class
    images, labels = (torch.from_numpy(array) for array in drawn)
    spread = (record["accuracy"] * (1 - record["accuracy"]) / COUNT) ** 0.5
    assert accuracy(net, images, labels) > record["accuracy"] - 4 * spread - 0.01  # 0.01: the record's own sample


def test_folding_keeps_the_function():
    torch.manual_seed(0)
    trained = network.build(normalise=True)
    inputs = torch.randn(4, 3, pictures.SIZE, pictures.SIZE)
    trained.train()
    trained(inputs)  # moves the running statistics away from their defaults
    with torch.inference_mode():
        torch.testing.assert_close(fold(trained)(inputs), trained.eval()(inputs), rtol=1e-4, atol=1e-5)


def test_augmenting_moves_pixels_and_makes_none_up(drawn):
    images = torch.from_numpy(drawn[0][:8])
    moved = augment(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    assert not torch.equal(moved, images)
    for before, after in zip(images, moved, strict=True):
        assert set(after.unique().tolist()) <= set(before.unique().tolist())
    assert prepare(images).shape == (8, 3, pictures.SIZE, pictures.SIZE)


@pytest.mark.parametrize(
    ("content", "said"), [(None, "missing"), (b"not weights", "cannot be used"), (b"", "cannot be used")]
)
def test_absent_or_damaged_weights_say_how_to_make_them(tmp_path, content, said):
    path = tmp_path / "network.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnitvisError, match=f"(?s){said}.*python -m unitvis.demo.train"):
        network.load(path)
