"""Training the demo's network: augmentation, and BatchNorm folded into convolutions."""

from __future__ import annotations

import torch

from unitvis.demo import network, pictures
from unitvis.demo.train import augment, fold, prepare


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
