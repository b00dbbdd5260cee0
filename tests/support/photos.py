"""The photographs and trained networks that UNITVIS_SHARED names, and one scan of each for all tests of a session."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import unitvis
from unitvis import models

SHARED = Path(os.environ.get("UNITVIS_SHARED", "/nonexistent"))
PHOTOS = SHARED / "data" / "photos"
NETWORKS = ("small", "large")
TRANSFORM = unitvis.Transform(resize=(224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

needed = [
    pytest.mark.photos,
    pytest.mark.skipif(not PHOTOS.is_dir(), reason="UNITVIS_SHARED names no folder with data/photos"),
]


def spec(network: str) -> str:
    return f"{SHARED / 'models' / 'mobilenet_v1.py'}:{network}"


@functools.cache
def model(network: str) -> nn.Module:
    return models.load(spec(network)).model


def files(count: int = 500) -> list[Path]:
    return sorted(PHOTOS.iterdir())[:count]


@functools.cache
def images() -> Tensor:
    """float32 [500, 3, 224, 224], decoded and normalised without the code under test."""
    pixels = [
        np.asarray(Image.open(path).convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)) for path in files()
    ]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5)


@functools.cache
def run(network: str) -> unitvis.Run:
    return unitvis.scan(model(network), PHOTOS, transform=TRANSFORM, progress=sys.stderr.isatty())
