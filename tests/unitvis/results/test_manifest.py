"""Warnings about layers whose ranking says little."""

from __future__ import annotations

import warnings

import pytest
from torch import nn

from support.scans import images, scan


def test_saturating_layer_is_named_with_the_one_to_use() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 2, 1)).eval()
    model[1].weight.data.fill_(40)
    with pytest.warns(UserWarning, match=r"layer '2' saturates: in 100% .* \(up to 6\); rank .* layer '1'"):
        run = scan(model, images(30, 12), "2")
    assert (run["2"].status == "tied").all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scan(model, images(30, 12))
