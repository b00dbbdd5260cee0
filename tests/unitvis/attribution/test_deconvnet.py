"""Projections against both methods written out by hand, whatever way the network's ReLUs are written."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import unitvis
from support import brute
from unitvis import UnitvisError
from unitvis.attribution import deconvnet
from unitvis.drawing import colours, patches

SIZE = 33


def images(n: int) -> Tensor:
    return torch.randn(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


class Net(nn.Module):
    """Overlapping pools, strides, groups, a BatchNorm; `relu` is called for both activations."""

    def __init__(self, relu: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 6, 5, stride=2, padding=2)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 10, 3, padding=1, dilation=1)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(self.norm.weight)  # of both signs
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.relu(self.conv1(x)), 3, 2, 1)
        x = F.max_pool2d(self.relu(self.norm(self.conv2(x))), 3, 2)
        return self.relu(self.conv3(x)).mean((2, 3))


def unpool(signal: Tensor, switches: Tensor, size: torch.Size) -> Tensor:
    """Each value to the place its maximum came from; where windows overlap, values add up."""
    out = torch.zeros(*size[:2], size[2] * size[3], dtype=signal.dtype)
    return out.scatter_add_(2, switches.flatten(2), signal.flatten(2)).view(size)


def by_hand(net: Net, image: Tensor, neuron: tuple[int, int, int], *, guided: bool = False) -> Tensor:
    """Zeiler & Fergus, section 2.1, in float64: unpool, rectify, transposed filters; no bias.

    guided: Springenberg et al., figure 1c: the signal is also dropped where the forward pass had nothing positive.
    """
    x = image[None].double()
    w1, w2, w3 = (conv.weight.detach().double() for conv in (net.conv1, net.conv2, net.conv3))
    a1 = F.conv2d(x, w1, net.conv1.bias.detach().double(), 2, 2).clamp(min=0)
    p1, s1 = F.max_pool2d(a1, 3, 2, 1, return_indices=True)
    scale = (net.norm.weight.detach() / (net.norm.running_var + net.norm.eps).sqrt()).double().view(1, -1, 1, 1)
    a2 = F.conv2d(p1, w2, net.conv2.bias.detach().double(), 1, 1, 1, 2)
    a2 = (a2 - net.norm.running_mean.double().view(1, -1, 1, 1)) * scale + net.norm.bias.detach().double().view(
        1, -1, 1, 1
    )
    p2, s2 = F.max_pool2d(a2.clamp(min=0), 3, 2, return_indices=True)
    top = torch.zeros_like(F.conv2d(p2, w3, None, 1, 1))
    top[0][neuron] = 1
    mask1, mask2 = ((a > 0).double() if guided else 1 for a in (a1, a2))
    signal = unpool(F.conv_transpose2d(top, w3, None, 1, 1), s2, a2.shape).clamp(min=0) * mask2
    signal = unpool(F.conv_transpose2d(signal * scale, w2, None, 1, 1, 0, 2), s1, a1.shape).clamp(min=0) * mask1
    return F.conv_transpose2d(signal, w1, None, 2, 2)[0]


def test_winners_are_projected_as_by_hand() -> None:
    """Tolerance: float32 sums of up to 150 products against float64, relative to the picture's largest value."""
    net, pixels = Net().eval(), images(40)
    run = unitvis.scan(net, pixels, ["conv2", "conv3"], k=4, progress=False)
    found = list(unitvis.project(net, run, "conv3"))
    assert sorted((p.unit, p.rank) for p in found) == [(u, r) for u, r in np.argwhere(run["conv3"].fired).tolist()]
    assert len(found) >= 30
    for one in found:
        assert one.image == run["conv3"].images[one.unit, one.rank]
        assert one.neuron == (one.unit, *run["conv3"].positions[one.unit, one.rank])
        want = by_hand(net, pixels[one.image], one.neuron).numpy()
        np.testing.assert_allclose(one.signal, want, rtol=0, atol=2e-5 * np.abs(want).max())
        left, upper, right, lower = run["conv3"].boxes[one.unit, one.rank].clip(0, SIZE)
        outside = one.signal.copy()
        outside[:, upper:lower, left:right] = 0
        assert not outside.any()
        assert one.method == "deconvnet"
    assert {p.layer for p in unitvis.project(net, run)} == {"conv2", "conv3"}
    assert {p.unit for p in unitvis.project(net, run, "conv3", [2, 5])} <= {2, 5}


@pytest.mark.parametrize("way", ["F.relu", "one module, reused", "in place, reused", "clamp", "threshold"])
def test_guided_backpropagation_is_as_by_hand(way: str) -> None:
    """Tolerance as above."""
    net, pixels = Net(WAYS[way]() if way in WAYS else F.relu).eval(), images(20)
    run = unitvis.scan(net, pixels, ["conv3"], k=2, progress=False)
    plain = {(p.unit, p.rank): p.signal for p in unitvis.project(net, run)}
    found = list(unitvis.project(net, run, method="guided"))
    differ = 0
    for one in found:
        want = by_hand(net, pixels[one.image], one.neuron, guided=True).numpy()
        np.testing.assert_allclose(one.signal, want, rtol=0, atol=2e-5 * np.abs(want).max())
        assert one.method == "guided backpropagation"
        differ += not np.allclose(one.signal, plain[one.unit, one.rank], atol=0.05 * np.abs(want).max())
    assert differ >= len(found) - 2 > 10


def test_projections_come_in_order_and_only_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    net, pixels = Net().eval(), images(30)
    run = unitvis.scan(net, pixels, ["conv2", "conv3"], k=4, progress=False)
    fired = {layer: np.argwhere(run[layer].fired).tolist() for layer in run}
    whole = list(unitvis.project(net, run))
    assert [[p.layer, p.unit, p.rank] for p in whole] == [[name, *one] for name in run for one in fired[name]]
    seeds = []
    passes = deconvnet._ForwardPass.signals
    monkeypatch.setattr(deconvnet._ForwardPass, "signals", lambda *a, **k: seeds.extend(a[1]) or passes(*a, **k))
    monkeypatch.setattr(deconvnet, "_WINNERS_TOGETHER", 5)
    some = list(unitvis.project(net, run, units={"conv3": [7, 2, 7], "conv2": [1]}))
    assert [p.unit for p in some] == [7] * 4 + [2] * 4 + [1] * 4
    assert len(seeds) == 12
    known = {(p.layer, p.unit, p.rank): p for p in whole}
    for one in some:
        np.testing.assert_array_equal(one.signal, known[one.layer, one.unit, one.rank].signal)
    for units, message in (({"conv3": [10]}, "'conv3' has no unit 10; it has 10"), ({"c": [0]}, "no layer 'c'")):
        with pytest.raises(UnitvisError, match=message):
            list(unitvis.project(net, run, units=units))
    with pytest.raises(UnitvisError, match="leave out layers="):
        unitvis.project(net, run, "conv3", {"conv3": [1]})
    with pytest.raises(UnitvisError, match="one of deconvnet, guided, not 'gradient'"):
        unitvis.project(net, run, method="gradient")


def test_images_that_changed_since_are_not_projected() -> None:
    net, pixels = Net().eval(), images(6)
    run = unitvis.scan(net, pixels, ["conv3"], k=1, progress=False)
    pixels[int(run["conv3"].images[3, 0])] += 1
    with pytest.raises(UnitvisError, match="its content has changed"):
        list(unitvis.project(net, run, "conv3", 3))


def test_winners_of_one_image_go_back_together_and_do_not_mix() -> None:
    net, pixels = Net().eval(), images(2)
    run = unitvis.scan(net, pixels, ["conv1"], k=2, progress=False)
    found = list(unitvis.project(net, run))
    assert len(found) == 12  # six an image, whose boxes are 5 pixels wide
    for one in found:
        top = torch.zeros(1, 6, 17, 17)
        top[0][one.neuron] = 1
        want = F.conv_transpose2d(top, net.conv1.weight, None, 2, 2)[0].detach()
        np.testing.assert_allclose(one.signal, want, rtol=0, atol=1e-6)


def test_the_rule_is_neither_the_gradient_nor_guided_back_propagation() -> None:
    net, pixels = Net().eval(), images(20)
    run = unitvis.scan(net, pixels, "conv3", k=1, progress=False)
    differs = 0
    for one in unitvis.project(net, run):
        leaf = pixels[one.image : one.image + 1].clone().requires_grad_()
        x = F.max_pool2d(F.relu(net.conv1(leaf)), 3, 2, 1)
        x = net.conv3(F.max_pool2d(F.relu(net.norm(net.conv2(x))), 3, 2))
        (gradient,) = torch.autograd.grad(x[0][one.neuron], leaf)
        differs += not np.allclose(gradient[0], one.signal, atol=0.05 * np.abs(one.signal).max())
    assert differs >= 8


def inplace(x: Tensor) -> Tensor:
    x.relu_()
    return x


WAYS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "one module, reused": nn.ReLU,
    "in place, reused": lambda: nn.ReLU(inplace=True),
    "torch.relu": lambda: torch.relu,
    "Tensor.relu_": lambda: inplace,
    "clamp_min": lambda: lambda x: x.clamp_min(0),
    "clamp": lambda: lambda x: torch.clamp(x, min=0.0),
    "threshold": lambda: lambda x: F.threshold(x, 0, 0),
    "TorchScript": lambda: torch.jit.script(nn.ReLU()),
    "operator": lambda: torch.ops.aten.relu,
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("way", WAYS)
def test_relus_are_found_however_they_are_written(way: str) -> None:
    pixels = images(3)
    plain = list(unitvis.project(Net().eval(), pixels, "conv3"))
    other = list(unitvis.project(Net(WAYS[way]()).eval(), pixels, "conv3"))
    assert len(plain) == len(other) == 30
    for a, b in zip(plain, other, strict=True):
        assert (a.image, a.neuron, a.method) == (b.image, b.neuron, b.method)
        np.testing.assert_array_equal(a.signal, b.signal)


def test_given_images_each_strongest_response_is_projected() -> None:
    net, pixels = Net().eval(), images(18)  # more than one batch
    maps = brute.outputs(net, ["conv3"], pixels)["conv3"]
    for one in unitvis.project(net, pixels, "conv3", 7):
        assert one.rank is None
        assert one.unit == 7
        flat = int(maps[one.image, 7].argmax())
        assert one.neuron[1:] == divmod(flat, maps.shape[3])
        want = by_hand(net, pixels[one.image], one.neuron).numpy()
        np.testing.assert_allclose(one.signal, want, rtol=0, atol=2e-5 * np.abs(want).max())


def straight(activation: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 5, 3), activation, nn.Conv2d(5, 4, 3)).eval()


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(0, 0.1)])
def test_a_bound_above_changes_nothing(activation: nn.Module) -> None:
    """Without pooling the deconvnet's picture does not depend on the image, nor on what saturates in it."""
    net = straight(activation)
    (one,) = unitvis.project(net, 20 * images(1), "2", 3)
    top = torch.zeros(1, 4, SIZE - 4, SIZE - 4)
    top[0][one.neuron] = 1
    signal = F.conv_transpose2d(F.conv_transpose2d(top, net[2].weight).clamp(min=0), net[0].weight)
    np.testing.assert_allclose(one.signal, signal[0].detach(), rtol=0, atol=1e-6)
    assert one.method == "deconvnet (no max-pooling lies below, so the same for every image)"


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.ReLU6(), nn.ReLU6(inplace=True), nn.Hardtanh(0, 0.1), nn.Threshold(0, 0, inplace=True)],
)
def test_guided_signals_depend_on_the_image_where_nothing_is_pooled(activation: nn.Module) -> None:
    net, pixels = straight(activation), 20 * images(2)
    signals = []
    for one in unitvis.project(net, pixels, "2", 3, method="guided"):
        top = torch.zeros(1, 4, SIZE - 4, SIZE - 4, dtype=torch.float64)
        top[0][one.neuron] = 1
        first, second = (net[number].weight.detach().double() for number in (0, 2))
        fires = F.conv2d(pixels[one.image : one.image + 1].double(), first, net[0].bias.detach().double()) > 0
        signal = F.conv_transpose2d(F.conv_transpose2d(top, second).clamp(min=0) * fires, first)
        np.testing.assert_allclose(one.signal, signal[0], rtol=0, atol=1e-6)
        assert one.method == "guided backpropagation"
        left, upper = one.neuron[2], one.neuron[1]
        signals.append(one.signal[:, upper : upper + 5, left : left + 5])
    assert not np.allclose(*signals, atol=1e-3)


@pytest.mark.parametrize(
    ("activation", "said"),
    [
        (nn.Sigmoid(), "the ordinary gradient through Sigmoid"),
        (nn.Tanh(), "the ordinary gradient through Tanh"),
        (nn.SiLU(), "the ordinary gradient through Silu"),
        (nn.GELU(), "the ordinary gradient through Gelu"),
        (nn.LeakyReLU(), "the ordinary gradient through LeakyRelu"),
        (nn.Hardtanh(), "the ordinary gradient through Hardtanh"),
        (nn.Sequential(nn.ReLU(), nn.Tanh()), "deconvnet, but the ordinary gradient through Tanh"),
        (nn.Identity(), "deconvnet (no ReLU lies below)"),
    ],
)
def test_other_activations_have_their_gradient_and_it_is_said(activation: nn.Module, said: str) -> None:
    net, pixels = straight(activation), images(1)
    (one,) = unitvis.project(net, pixels, "2", 0)
    assert one.method == said
    (guided,) = unitvis.project(net, pixels, "2", 0, method="guided")
    assert guided.method == said.replace("deconvnet", "guided backpropagation")
    if "deconvnet, but" in said:
        return
    np.testing.assert_array_equal(guided.signal, one.signal)
    leaf = pixels.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(leaf)[0][one.neuron], leaf)
    np.testing.assert_allclose(one.signal, gradient[0], rtol=0, atol=1e-6)


def test_a_residual_sum_copies_the_signal_to_both_branches() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu_(self.a(x))
            x = F.relu(self.b(x) + x, inplace=True)
            return self.c(x)

    net = Residual().eval()
    (one,) = unitvis.project(net, images(1), "c", 1)
    top = torch.zeros(1, 3, SIZE, SIZE)
    top[0][one.neuron] = 1
    down = F.conv_transpose2d(top, net.c.weight, padding=1).clamp(min=0)
    down = (down + F.conv_transpose2d(down, net.b.weight, padding=1)).clamp(min=0)
    want = F.conv_transpose2d(down, net.a.weight, padding=1)[0].detach()
    np.testing.assert_allclose(one.signal, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_neurons_of_a_run_that_ranks_neurons() -> None:
    net, pixels = straight(nn.ReLU()), images(6)
    run = unitvis.scan(net, pixels, "2", k=2, unit="neuron", progress=False)
    width = SIZE - 4
    (first, _) = unitvis.project(net, run, "2", 2 * width * width + 3 * width + 4)
    assert first.neuron == (2, 3, 4)


def test_the_model_is_left_as_it_was() -> None:
    net = Net().train()
    pixels = images(2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    list(unitvis.project(net, pixels, "conv3", 0))
    assert net.training
    assert net.norm.training
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert not any(m._forward_hooks for m in net.modules())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_what_cannot_be_projected_says_why() -> None:
    class Detached(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x).detach())

    class Overwritten(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self[0](x))
            x.add_(1)
            return self[1](x)

    def pair(kind: type[nn.Sequential]) -> nn.Module:
        return kind(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 2, 3)).requires_grad_(False).eval()

    pixels = images(1)
    for net, layer, unit, message in (
        (pair(Detached), "1", 0, "no gradient leads from layer '1' to the image"),
        (pair(Overwritten), "1", 0, "cannot be carried back from layer '1': .*modified by an inplace operation"),
        (pair(nn.Sequential), "1", 2, "layer '1' has no unit 2; it has 2"),
        (pair(nn.Sequential), None, 0, "name the layer to project from"),
    ):
        with pytest.raises(UnitvisError, match=message):
            list(unitvis.project(net, pixels, layer, unit))


def test_pictures_have_grey_at_zero_and_one_scale_for_all_colours() -> None:
    signal = np.zeros((3, 6, 6), np.float32)
    signal[0, 1, 1], signal[1, 1, 1], signal[2, 4, 4] = 2.0, -1.0, -0.5
    one = deconvnet.Projection("conv", 0, 0, 0, (0, 0, 0), (0, 0, 6, 6), signal, "deconvnet")
    picture = np.asarray(one.picture(size=6))
    assert picture[1, 1].tolist() == [255, 64, 128]
    assert picture[4, 4].tolist() == [128, 128, 96]
    assert (picture[0] == colours.GREY).all()
    beside = np.asarray(one.picture((3, 3, 9, 9), size=6))  # of a box that leaves the image
    assert beside[1, 1].tolist() == [128, 128, 0]  # the largest in the box is black
    assert (beside[3:] == colours.GREY).all()
    np.testing.assert_array_equal(np.asarray(one.picture((0, 0, 6, 6), 6)), picture)


def test_the_strongest_hundredth_of_a_signal_is_black_or_white() -> None:
    """The percentile written out: the smallest magnitude that at least 99% of those in the box do not exceed."""
    signal = np.random.default_rng(0).normal(size=(3, 20, 20)).astype(np.float32)
    signal[1, 2, 2], signal[:, :, 10:] = 1000, 0
    one = deconvnet.Projection("conv", 0, 0, 0, (0, 0, 0), (0, 0, 20, 20), signal, "deconvnet")
    magnitudes = np.sort(np.abs(signal[signal != 0]))
    scale = magnitudes[int(np.ceil(0.99 * (len(magnitudes) - 1)))]
    assert scale < 10
    want = np.clip(np.rint(127.5 + 127.5 * (signal / scale)), 0, 255).transpose(1, 2, 0)
    want[(signal == 0).all(axis=0)] = 128
    np.testing.assert_array_equal(np.asarray(one.picture(size=20)), want)
    largest = np.array(one.picture(size=20, percentile=100))
    assert largest[2, 2, 1] == 255
    largest[2, 2, 1] = 128
    assert abs(largest.astype(int) - 128).max() <= 1  # one pixel took all the contrast
    with pytest.raises(UnitvisError, match="percentile=0; it must be above 0"):
        one.picture(percentile=0)


@pytest.mark.parametrize("layer", ["conv1", "conv3"])
def test_a_projection_s_own_picture_lies_beside_its_patch(layer: str) -> None:
    """Of a box that is smaller than half of the image, and of an effective one."""
    net, pixels = Net().eval(), images(12)
    run = unitvis.scan(net, pixels, ["conv1", "conv3"], k=2, progress=False)
    crop = patches.crop_of(run, layer, None)
    assert crop == {"conv1": "rf", "conv3": "effective"}[layer]
    for one in unitvis.project(net, run, layer, [1, 2]):
        assert one.box == patches.drawn_box(run[layer], one.unit, one.rank, crop, (SIZE, SIZE))
        assert np.array_equal(np.asarray(one.picture()), np.asarray(one.picture(one.box)))
        shown = Image.open(io.BytesIO(one._repr_png_()))
        assert shown.size == (224, 224)
        assert np.array_equal(np.asarray(shown), np.asarray(one.picture(size=224)))
        assert len(repr(one)) < 300
    field = unitvis.receptive_field(net, layer, SIZE)
    for one in unitvis.project(net, pixels[:1], layer, 1):  # without a run nothing tells an effective box
        assert one.box == (tuple(field.boxes(*one.neuron)[0]) if layer == "conv1" else (0, 0, SIZE, SIZE))
