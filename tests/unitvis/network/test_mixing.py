"""Images of one compute batch that reach one another's responses, in batches after the first."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import unitvis
from support import brute
from support.scans import images, scan, two_convolutions
from unitvis import Recorder, UnitvisError
from unitvis.network.bits import examine_bits


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


class ScaledUnlessItFails(TwoLayers):
    """As `ScaledByBatch`, in code that goes on where values cannot be told, as while it is traced."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        with suppress(Exception):
            if float(x.max()) > 30:
                y = y / x.max()
        return self.b(y.relu())


class ScaledByNumPy(ScaledUnlessItFails):
    """The same through an array of NumPy."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        with suppress(Exception):
            if x.amax().numpy() > 30:
                y = y / x.max()
        return self.b(y.relu())


class ScaledByCount(ScaledUnlessItFails):
    """The same by a number of pixels, which a trace takes for unknown and tells when it is compared."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        with suppress(Exception):
            if len((x > 30).nonzero()) > 0:
                y = y / x.max()
        return self.b(y.relu())


class ScaledUnlessTraced(TwoLayers):
    """As `ScaledByBatch`, in code that asks whether it is traced."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if not torch.fx._symbolic_trace.is_fx_tracing() and x.max() > 30:
            y = y / x.max()
        return self.b(y.relu())


class ReversedBesideAnOutlier(TwoLayers):
    """Reverses all images but those with a huge pixel, beside one of these."""

    def forward(self, x: Tensor) -> Tensor:
        y, huge = self.a(x).relu(), x.abs().amax((1, 2, 3)) > 1e4
        if huge.any():
            order = torch.arange(len(x))
            order[~huge] = order[~huge].flip(0)
            y = y[order]
        return self.b(y)


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


@pytest.mark.parametrize(
    ("model", "places"),
    [
        (model, places)
        for model in (ScaledByBatch, Routed, RoutedByMask)
        for places in [(20, 21, 29), (39,), (35, 37, 39)]
    ]
    + [(model, (39,)) for model in (ScaledUnlessItFails, ScaledByNumPy, ScaledByCount, ScaledUnlessTraced)],
)
@pytest.mark.filterwarnings("ignore")
def test_images_that_mix_only_in_a_later_batch_are_refused(model: type[nn.Module], places: tuple[int, ...]) -> None:
    said = r"layer 'b' gives other responses when an image is computed alone than beside others: the model's code mixes"
    for precision in ("fp32", "exact"):
        with pytest.raises(UnitvisError, match=said):
            scan(model().eval(), marked(*places), ["a", "b"], precision=precision)
    with Recorder(model().eval(), ["a", "b"], precision="bf16") as recorder, pytest.raises(UnitvisError, match=said):
        recorder(torch.cat([marked(*places), images(8, 12)]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("outliers", [(20,), (16, 17, 18, 20, 21, 22, 23, 24, 25, 26)], ids=["one", "most"])
def test_outliers_do_not_hide_that_the_other_images_mix(outliers: tuple[int, ...]) -> None:
    pixels = images(40, 12)
    pixels[list(outliers)] *= 1e6
    with pytest.raises(UnitvisError, match=r"layer 'b' gives other responses when an image is computed alone"):
        scan(ReversedBesideAnOutlier().eval(), pixels, ["a", "b"], precision="fp32")


def test_images_that_mix_in_the_first_batch_are_refused_beside_an_outlier() -> None:
    model, pixels = TwoLayers().eval(), images(16, 12)
    pixels[3] *= 1e8

    def run(batch: Tensor, read: Callable[[int, Tensor], None]) -> None:
        maps = model.a(batch)
        read(0, maps)
        read(1, torch.cat([maps[:4], maps[4:] + 0.01 * maps[4:].roll(1, 0)]))  # the outlier, or another image, apart

    with torch.no_grad():
        assert examine_bits(["a", "b"], run, pixels).mixed == "b"


class AgainIfLarge(TwoLayers):
    """Runs its last layer again where its responses are large; asks for that before or after the layer's first run."""

    def __init__(self, *, ask_first: bool) -> None:
        super().__init__()
        self.b, self.ask_first = nn.Conv2d(6, 6, 3, padding=1), ask_first

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        large = self.ask_first and bool(y.max() > 30)
        y = self.b(y)
        while large or (not self.ask_first and y.abs().max() > 30):
            large, y = False, self.b(y.relu() / 60)
        return y


class AgainUnlessItFails(AgainIfLarge):
    """The same, in code that catches what is raised in a layer."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu())
        with suppress(Exception):
            if y.abs().max() > 30:
                y = self.b(y.relu() / 60)
        return y


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["fp32", "exact", "bf16"])
@pytest.mark.parametrize(
    "build",
    [lambda: AgainIfLarge(ask_first=False), lambda: AgainIfLarge(ask_first=True),
     lambda: AgainUnlessItFails(ask_first=False)],
    ids=["asked after", "asked before", "caught"],
)  # fmt: skip
def test_a_layer_that_runs_again_for_some_images_is_refused(build: Callable[[], nn.Module], precision: str) -> None:
    pixels = images(40, 12)
    small = scan(build().eval(), pixels, ["a", "b"], precision=precision)
    want = brute.outputs(build(), ["b"], pixels)["b"].amax((2, 3)).sort(0, descending=True).values.T[:, :9]
    np.testing.assert_allclose(small["b"].values, want.numpy(), rtol=1e-4 if precision != "bf16" else 0.05)
    pixels[35] *= 400
    with pytest.raises(UnitvisError, match=r"layer 'b' ran twice in one forward pass; only layers that run once"):
        scan(build().eval(), pixels, ["a", "b"], precision=precision)


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
