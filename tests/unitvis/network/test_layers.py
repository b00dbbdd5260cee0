"""The layers that a scan ranks: by default, by name, by pattern."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from support import brute
from support.scans import images, scan, small_net
from unitvis import UnitvisError
from unitvis.attribution.filters import first_filters


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


class OtherDimensions(nn.Module):
    """Convolutions over rows of pixels and over volumes."""

    def __init__(self) -> None:
        super().__init__()
        self.row, self.volume = nn.Conv1d(3, 4, 5), nn.Conv3d(3, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.row(x.flatten(2)).mean() + self.volume(x[:, :, None].expand(-1, -1, 3, -1, -1)).mean()


def test_convolutions_of_one_dimension_are_default_layers_and_those_of_three_are_named() -> None:
    model, pixels = OtherDimensions().eval(), images(20, 12)
    with pytest.warns(UserWarning, match=r"left out: layer 'volume' returns a tensor of shape \[1, 2, 1, 10, 10\]"):
        run = scan(model, pixels)
    assert run.layers == ["row"]
    with torch.no_grad():
        strongest = torch.stack([model.row(image.flatten(1)[None])[0].amax(1) for image in pixels])
    ranked = strongest.sort(dim=0, descending=True, stable=True)
    assert run["row"].images.tolist() == ranked.indices[:9].T.tolist()
    assert np.allclose(run["row"].values, ranked.values[:9].T, rtol=1e-5)
    del model.row
    model.row = nn.Identity()
    with (
        pytest.warns(UserWarning, match="left out: layer 'volume'"),
        pytest.raises(UnitvisError, match=r"no convolution that can be ranked \(layer 'volume' returns"),
    ):
        scan(model, pixels)


class ImageByImage(nn.Module):
    """Computes all images together, then each by one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return torch.stack([self.b(i[None])[0] if i.mean() > 0 else self.c(i[None])[0] for i in x])


class OneByOne(ImageByImage):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.c(self.b(self.a(i[None])))[0] for i in x])


class SharedNorm(nn.Module):
    """One BatchNorm directly behind two convolutions, and one of its own behind a third."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
        self.bn, self.own = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.c(self.bn(self.b(self.bn(self.a(x)).relu())).relu()))


@pytest.mark.filterwarnings("ignore:left out, because they do not run")
def test_default_layers_that_are_computed_image_by_image_are_left_out() -> None:
    model, pixels = ImageByImage().eval(), images(40, 12)
    with pytest.warns(UserWarning, match=r"left out: layer '[bc]' is not computed for all images of a batch at once"):
        run = scan(model, pixels, precision="fp32")
    assert run.layers == ["a"]
    brute.check(run, brute.responses(model, ["a"], pixels, brute.canonical_batches(pixels)))
    with (
        pytest.warns(UserWarning, match="left out: layer"),
        pytest.raises(
            UnitvisError, match=r"no convolution that can be ranked \(layer 'a' is not computed for all images"
        ),
    ):
        scan(OneByOne().eval(), pixels)


def test_convolutions_that_share_a_batch_norm_are_left_out_with_the_true_reason() -> None:
    model, pixels = SharedNorm().eval(), images(40, 12)
    with pytest.warns(UserWarning, match=r"BatchNorm behind them \(bn\) runs more than once in .*: a, b; name them to"):
        run = scan(model, pixels)
    assert run.layers == ["own"]
    named = scan(model, pixels, ["a", "b"])
    brute.check(named, brute.responses(model, ["a", "b"], pixels, brute.canonical_batches(pixels)))


class NormInside(nn.BatchNorm2d):
    """A BatchNorm that another one computes."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.inner = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).relu()


class TwoNorms(nn.Module):
    """A convolution with three BatchNorms behind it, whose sum goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)
        self.n, self.n2, self.n3 = nn.BatchNorm2d(6), nn.BatchNorm2d(6), NormInside(6)
        nn.init.normal_(self.n.weight)
        nn.init.normal_(self.n2.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(self.n(y) + self.n2(y) + self.n3(y))


def test_every_batch_norm_behind_a_convolution_is_a_default_layer() -> None:
    torch.manual_seed(0)
    model, pixels = TwoNorms().eval(), images(40, 12)
    run = scan(model, pixels)
    assert run.layers == ["n", "n2", "n3.inner", "b"]
    brute.check(run, brute.responses(model, run.layers, pixels, brute.canonical_batches(pixels)))
    assert (run["n"].images != run["n2"].images).any()
    filters = first_filters(model, run)
    for name in ("n", "n2"):
        signs = model.get_submodule(name).weight.sign()[:, None, None, None]
        assert (torch.from_numpy(filters[name]) == signs * model.a.weight).all()


def test_a_model_without_layers_inside_is_told_apart() -> None:
    with pytest.raises(UnitvisError, match=r"the model itself is the convolution.*give torch\.nn\.Sequential\(model\)"):
        scan(nn.Conv2d(3, 4, 3), images(3))
    with pytest.raises(UnitvisError, match=r"'0\.weight' has no shape yet.*run the model once"):
        scan(nn.Sequential(nn.LazyConv2d(8, 3)), images(3))
