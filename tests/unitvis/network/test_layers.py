"""The layers that a scan ranks: by default, by name, by pattern."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from support.scans import images, scan, small_net
from unitvis import UnitvisError


def test_default_layers_are_convolutions_or_the_batchnorm_behind_them() -> None:
    assert scan(small_net(), images(3)).layers == ["0", "4", "6"]


class Branching(nn.Module):
    """One of its layers never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.never = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.other = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.conv(self.conv(x)))


def test_layers_are_chosen_by_name_or_pattern() -> None:
    model, pixels = small_net(), images(2)
    assert scan(model, pixels, ["6", "[04]"]).layers == ["0", "4", "6"]
    with pytest.raises(UnitvisError, match="no layer is named '10'; the closest are"):
        scan(model, pixels, ["10"])
    with pytest.raises(UnitvisError, match="no layer is named 'conv9'; there are 0, 1, 2"):
        scan(model, pixels, "conv9")
    with pytest.raises(UnitvisError, match="no layer was named"):
        scan(model, pixels, [])
    with pytest.raises(UnitvisError, match="layer 'never' never ran"):
        scan(Branching(), pixels, "never")
    with pytest.raises(UnitvisError, match="layer 'conv' runs 2 times"):
        scan(Twice(), pixels, "conv")
    with pytest.warns(UserWarning, match="left out.* conv"):
        assert scan(Twice(), pixels).layers == ["other"]
    with pytest.raises(UnitvisError, match="no convolution that can be ranked; name layers"):
        scan(nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 2)), pixels)
