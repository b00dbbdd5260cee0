"""The demo's pictures depend on seed and index alone, and colours say nothing of their class."""

from __future__ import annotations

import numpy as np

from unitvis.demo import pictures

COUNT = 300  # of the pictures that `drawn` holds


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
