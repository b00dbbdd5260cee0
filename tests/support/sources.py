"""Pictures of noise, and sources read to their end."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from unitvis.sources.transform import Transform

PLAIN = Transform()
SMALL = Transform(resize=(8, 8))


def noise(seed, height=8, width=8):
    """uint8 [height, width, 3]"""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def write(path, seed, height=8, width=8):
    """Write a picture of noise, and its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(seed, height, width)).save(path)
    return path


def everything(source, batch_size=4, **options):
    """(ids, pixels) of all batches of a source; fails unless all but the last are full."""
    batches = list(source.batches(batch_size, **options))
    sizes = [len(batch.ids) for batch in batches]
    assert all(size == batch_size for size in sizes[:-1])
    assert all(batch.ids.dtype == torch.int64 and len(batch.pixels) == len(batch.ids) for batch in batches)
    ids = torch.cat([batch.ids for batch in batches]) if batches else torch.empty(0, dtype=torch.int64)
    return ids.tolist(), torch.cat([batch.pixels for batch in batches]) if batches else None
