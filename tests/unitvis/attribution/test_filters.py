"""The filters of a first layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import unitvis
from support.zoo import NormAct
from unitvis.attribution.filters import first_filters


@pytest.mark.parametrize(
    ("model", "layer", "sign"),
    [
        (nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU()), "0", 1),
        (nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2)), "2", -1),
        (nn.Sequential(nn.Conv2d(3, 2, 3), NormAct(2, nn.ReLU())), "1.drop", -1),
        (nn.Sequential(nn.Conv2d(3, 2, 1)), None, 0),  # 1x1: there is nothing to see
        (nn.Sequential(nn.Conv2d(3, 3, 3, groups=3)), None, 0),
    ],
)
def test_filters_of_the_first_layer_are_its_weights(model: nn.Module, layer: str | None, sign: int) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, -0.5)  # turns the response, and so what the filter looks for
    run = unitvis.scan(model.eval(), torch.rand(3, 3, 8, 8), progress=False)
    found = first_filters(model, run)
    assert list(found) == ([layer] if layer else [])
    if layer:
        weights = next(m for m in model if isinstance(m, nn.Conv2d)).weight.detach().numpy()
        np.testing.assert_array_equal(found[layer], sign * weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_filters_of_a_model_in_another_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3)).eval().to(dtype)
    run = unitvis.scan(model, torch.rand(3, 3, 8, 8), layers=["1", "3"], progress=False)
    np.testing.assert_array_equal(first_filters(model, run)["1"], model[0].weight.detach().float().numpy())
    unitvis.gallery(run, tmp_path / "gallery", model, project=True)
    assert list((tmp_path / "gallery").rglob("filters-0.png"))
    assert {p.dtype for p in model.parameters()} == {dtype}
