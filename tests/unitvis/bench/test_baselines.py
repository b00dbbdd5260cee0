"""The baselines of `unitvis bench` against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from support import brute
from unitvis.bench.baselines import DeviceHook, HostHook

LAYERS = ["0", "2"]


@pytest.mark.parametrize("count", [5, 40])
def test_baselines_find_what_brute_force_finds(count: int) -> None:
    images = torch.randint(-2, 3, (count, 3, 14, 17), generator=torch.Generator().manual_seed(1)).float()
    images[count // 2] = images[0]  # a tie: the earlier image is first
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 6, 5, stride=2), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3)).eval()
    batches = list(brute.plain_batches(images, 8))
    with HostHook(model, LAYERS) as host, DeviceHook(model, LAYERS) as strong:
        for place, batch in batches:
            padded = torch.cat([batch, torch.full((8 - len(batch), 3, 14, 17), 9.0)])
            host(padded, torch.arange(place.start, place.stop))
            strong(padded, torch.arange(place.start, place.stop))
    padded = [(p, torch.cat([b, torch.zeros(8 - len(b), 3, 14, 17)])) for p, b in batches]
    for index, (values, positions) in enumerate(brute.responses(model, LAYERS, images, padded).values()):
        ids, rows = brute.top(values, 9)
        live, units = ids >= 0, np.arange(values.shape[1])[:, None]
        own, own_ids, own_positions = (part.numpy() for part in host.tops[index])
        np.testing.assert_array_equal(own_ids, ids)
        np.testing.assert_array_equal(own[live], values[rows, units][live])
        np.testing.assert_array_equal(own_positions[live], positions[rows, units][live])
        np.testing.assert_array_equal(strong.tops[index][0].numpy()[live], own[live])
        found = strong.tops[index][1].numpy()
        assert ((found >= 0) == live).all()
        np.testing.assert_array_equal(np.where(live, values[found, units], 0), np.where(live, own, 0))
