"""Effective boxes where a layer has no gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from support.scans import images, scan


def test_a_layer_without_gradients_is_scanned_and_has_no_effective_box() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.sigmoid(self.a(x))
            y *= 2
            return self.b(y)

    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="layer 'b' has no effective box, for want of gradients .*inplace"):
        run = scan(Overwrites(), images(20), ["a", "b"])
    assert (run["b"].images >= 0).all()
