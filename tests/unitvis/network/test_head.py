"""The layer whose units are a network's outputs, by a rule that the documents state."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from support.scans import scan
from unitvis.network.network import Network


class Returning(nn.Module):
    """Two convolutions and a Linear of as many units as the last of them; returns what it is told of their outputs."""

    def __init__(self, what: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.first, self.second, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.Linear(6, 6)
        self.what = what

    def forward(self, x: Tensor) -> object:
        maps = self.second(self.first(x).relu())
        return self.what(maps, self.fc(maps.mean((2, 3))))


class Again(nn.Module):
    """Its last layer runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.fc(self.conv(x).mean((2, 3))))


POOLED = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
HEADS: dict[str, tuple[nn.Module, str | None]] = {
    "a Linear": (nn.Sequential(nn.Conv2d(3, 6, 3), *POOLED, nn.Linear(6, 6)), "3"),
    "behind a hidden one of as many units": (
        nn.Sequential(nn.Conv2d(3, 5, 3), *POOLED, nn.Linear(5, 6), nn.Linear(6, 6)),
        "4",
    ),
    "before softmax": (nn.Sequential(nn.Conv2d(3, 6, 3), *POOLED, nn.Linear(6, 4), nn.Softmax(1)), "3"),
    "SqueezeNet's convolution": (nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 6, 1), nn.ReLU(), *POOLED), "1"),
    "a convolution that is not flattened": (nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1)), "0"),
    "in a dict": (Returning(lambda maps, scores: {"maps": maps, "scores": scores}), "fc"),
    "maps": (nn.Sequential(nn.Conv2d(3, 6, 3)), None),
    "maps, beside a head whose scores are dropped": (Returning(lambda maps, scores: maps), None),
    "two numbers for each unit": (nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveMaxPool2d((1, 2)), nn.Flatten()), None),
    "the last layer twice": (Again(), None),
}


@pytest.mark.parametrize("what", HEADS)
def test_the_head_is_the_last_layer_with_weights_whose_units_are_the_outputs(what: str) -> None:
    model, head = HEADS[what]
    network = Network(model.eval())
    network.examine((3, 9, 9))
    assert network.head == head


def test_the_manifest_names_the_head_alone() -> None:
    model = HEADS["behind a hidden one of as many units"][0].eval()
    run = scan(model, torch.randn(5, 3, 9, 9), ["0", "3", "4"], k=2)
    assert [run[layer].info.get("head") for layer in run] == [None, None, True]
