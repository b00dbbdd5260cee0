"""Layers inside modules that go on to an activation, judged by the normalisation computed again from its input."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.scans import images, scan
from support.zoo import NormAct
from unitvis import UnitvisError


class ConvAct(nn.Conv2d):
    """A convolution that applies an activation and has no module for it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(super().forward(x))


class PaddingConv(nn.Conv2d):
    """A convolution that pads what it is given and scales what it returns, as weight-standardised ones do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 0, 1, 0))) * 0.5


class ConvNormAct(nn.Conv2d):
    """A convolution that owns its normalisation and its activation."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3)
        self.norm, self.act = nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(super().forward(x)))


def negative_scales(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """A normalisation whose largest outputs are no largest outputs of the convolution before it."""
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 1, len(norm.weight)))
        norm.bias.fill_(-2.5)  # so that most images saturate a ReLU
        norm.running_var.fill_(0.1)
    return norm


def normed(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    shape = (1, -1, 1, 1)
    scaled = (x - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt()
    return scaled * norm.weight.view(shape) + norm.bias.view(shape)


ACTIVATIONS: list[Callable[[], nn.Module]] = [
    lambda: nn.ReLU(inplace=True),
    lambda: nn.ReLU6(),
    lambda: nn.Hardswish(inplace=True),
    lambda: nn.SiLU(),
]


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_a_norm_that_activates_is_read_before_it_does(act: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), NormAct(6, act()), nn.Conv2d(6, 4, 3)).eval()
    negative_scales(model[1])
    pixels = images(30, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = scan(model, pixels, k=3)
    assert run.layers == ["1.drop", "2"]
    with torch.no_grad():
        peaks = normed(model[1], model[0](pixels)).flatten(2).amax(2)
    best = peaks.sort(dim=0, descending=True, stable=True)
    assert np.array_equal(run["1.drop"].images, best.indices[:3].T)
    torch.testing.assert_close(torch.from_numpy(run["1.drop"].values), best.values[:3].T.contiguous())


def test_a_saturated_norm_with_activation_names_the_module_before_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), NormAct(6, nn.Hardtanh(-1, 0.01))).eval()
    with pytest.warns(UserWarning, match="saturates: .* rank what goes into it: layer '1.drop'"):
        assert scan(model, images(30, 12), "1")["1"].info["fed_by"] == "1.drop"


def test_a_convolution_that_owns_its_norm_is_read_after_the_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(ConvNormAct(3, 6), nn.Conv2d(6, 4, 3)).eval()
    negative_scales(model[0].norm)
    pixels = images(30, 12)
    run = scan(model, pixels, k=3)
    assert run.layers == ["0.norm", "1"]
    with torch.no_grad():
        peaks = normed(model[0].norm, F.conv2d(pixels, model[0].weight, model[0].bias)).flatten(2).amax(2)
    assert np.array_equal(run["0.norm"].images, peaks.sort(dim=0, descending=True, stable=True).indices[:3].T)


def test_a_convolution_with_a_hidden_activation_is_left_out_with_what_to_name() -> None:
    model = nn.Sequential(ConvAct(3, 6, 3), nn.Conv2d(6, 4, 3)).eval()
    with pytest.warns(UserWarning, match=r"left out: layer '0' \(ConvAct\) goes on to compute relu_.*name '0' to rank"):
        assert scan(model, images(3)).layers == ["1"]
    assert (scan(model, images(3), "0", k=3)["0"].values >= 0).all()


def test_padding_and_scaling_are_no_activation() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scan(nn.Sequential(PaddingConv(3, 6, 3)).eval(), images(3)).layers == ["0"]


class Awkward(nn.Module):
    """A convolution of windows in the batch, one of a constant, one that does not run, and one to rank."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.windows, self.positions = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(2, 4, 1)
        self.exit = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, c, h, w = x.shape
        x = x + self.positions(torch.ones(1, 2, h, w))
        folded = x.view(n, c, 2, h // 2, w).transpose(1, 2).reshape(2 * n, c, h // 2, w)
        return self.windows(folded)


def test_default_layers_that_cannot_be_ranked_are_left_out_and_said() -> None:
    with pytest.warns(UserWarning, match="left out") as caught:
        run = scan(Awkward().eval(), images(5))
    assert run.layers == ["stem"]
    said = "\n".join(str(warning.message) for warning in caught)
    assert "left out, because they do not run in a forward pass: exit" in said
    assert "left out: layer 'windows' returns 2 maps for one image" in said
    assert "left out too, for such a reason: positions" in said
    with pytest.raises(UnitvisError, match="layer 'windows' returns 2 maps for one image"):
        scan(Awkward().eval(), images(5), "windows")
    with pytest.raises(UnitvisError, match=r"layer 'positions' returns a tensor .* does not depend on the image"):
        scan(Awkward().eval(), images(5), "positions")


def test_layers_are_excluded_by_name_or_pattern() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)).eval()
    assert scan(model, images(3), exclude="0").layers == ["2", "3"]
    assert scan(model, images(3), exclude=["[23]"]).layers == ["0"]
    assert scan(model, images(3), ["0", "1"], exclude="1").layers == ["0"]
    with pytest.raises(UnitvisError, match="no layer is named 'head'"):
        scan(model, images(3), exclude="head")
    with pytest.raises(UnitvisError, match="no convolution that can be ranked"):
        scan(model, images(3), exclude="*")


class Tokens(nn.Module):
    """Patches as tokens [N, L, C], through subclasses of LayerNorm and Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.norm1 = type("MyLayerNorm", (nn.LayerNorm,), {})(8)
        self.fc = type("MyLinear", (nn.Linear,), {})(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm1(self.patches(x).flatten(2).transpose(1, 2)))


def test_subclasses_on_tokens_are_ranked_as_their_parents_are() -> None:
    torch.manual_seed(0)
    model, pixels = Tokens().eval(), images(20, 16)
    run = scan(model, pixels, ["norm1", "fc"], k=3)
    with torch.no_grad():
        tokens = model.patches(pixels).flatten(2).transpose(1, 2)
        centred = tokens - tokens.mean(2, keepdim=True)
        norm = centred / (centred.pow(2).mean(2, keepdim=True) + 1e-5).sqrt()
        fc = norm @ model.fc.weight.T + model.fc.bias
    for name, maps in (("norm1", norm), ("fc", fc)):
        best = maps.amax(1).sort(dim=0, descending=True, stable=True)
        assert np.array_equal(run[name].images, best.indices[:3].T)
        torch.testing.assert_close(torch.from_numpy(run[name].values), best.values[:3].T.contiguous())
