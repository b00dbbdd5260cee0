"""Images of one compute batch that reach one another's responses, in batches after the first."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import unitvis
from support import brute
from support.scans import images, scan, two_convolutions
from unitvis import Recorder, UnitvisError


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3)


class ScaledByBatch(TwoLayers):
    """Divides a batch by its largest pixel where that is large."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if x.max() > 30:
            y = y / x.max()
        return self.b(y.relu())


class Routed(TwoLayers):
    """Sorts the images of a batch by their route before a layer, and puts them back after it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        marked = x[:, 0, 0, 0] > 30
        order = torch.cat([marked.nonzero()[:, 0], (~marked).nonzero()[:, 0]])
        return self.b(y[order])[order.argsort()]


class RoutedByMask(TwoLayers):
    """Computes marked images first, through a boolean mask."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        marked = x[:, 0, 0, 0] > 30
        return self.b(torch.cat([y[marked], y[~marked]]))


class ScaledAlone(TwoLayers):
    """Asks each image for its largest pixel; no image depends on another."""

    def __init__(self) -> None:
        super().__init__()
        self.images = 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        return self.b(torch.stack([one / one.max() if one.max() > 30 else one for one in self.a(x)]))


def marked(*places: int) -> Tensor:
    pixels = images(40, 12)
    pixels[list(places), 0, 0, 0] = 60
    return pixels


@pytest.mark.parametrize("model", [ScaledByBatch, Routed, RoutedByMask])
@pytest.mark.parametrize("places", [(20, 21, 29), (39,), (35, 36, 37, 39)], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_images_that_mix_only_in_a_later_batch_are_refused(model: type[nn.Module], places: tuple[int, ...]) -> None:
    said = r"layer 'b' gives other responses when an image is computed alone than beside others: the model's code mixes"
    for precision in ("fp32", "exact"):
        with pytest.raises(UnitvisError, match=said):
            scan(model().eval(), marked(*places), ["a", "b"], precision=precision)
    with Recorder(model().eval(), ["a", "b"], precision="bf16") as recorder, pytest.raises(UnitvisError, match=said):
        recorder(torch.cat([marked(*places), images(8, 12)]))


def test_layers_before_the_mixing_are_ranked() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = scan(Routed().eval(), marked(20, 21), "a")
    brute.check(run, brute.responses(Routed(), ["a"], marked(20, 21), brute.canonical_batches(marked(20, 21))))


@pytest.mark.filterwarnings("ignore:the receptive fields of b are unknown")
def test_code_that_asks_each_image_for_values_is_ranked_and_said_to_take_longer() -> None:
    model, pixels = ScaledAlone().eval(), marked(3, 20)
    with pytest.warns(UserWarning, match=r"followed as far as layer 'b' .* so each image is computed alone as well"):
        run = scan(model, pixels, ["a", "b"], precision="fp32")
    brute.check(run, brute.responses(model, ["a", "b"], pixels, brute.canonical_batches(pixels)))
    assert run["b"].status.tolist() == ["separated"] * 5


def test_a_network_that_was_followed_computes_no_image_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = two_convolutions(), []
    with Recorder(model, ["0", "2"]) as recorder:
        recorder(images(16, 12))
        handle = model[0].register_forward_hook(lambda module, args, output: sizes.append(len(output)))
        recorder(images(64, 12))
        handle.remove()
    assert sizes == [16] * 4
    assert isinstance(recorder.result(), unitvis.Run)
