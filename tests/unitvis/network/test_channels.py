"""Which axis of a layer's output holds channels: units counted and values judged by a hook on the axis named here."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from support import zoos
from support.scans import images, scan
from unitvis import UnitvisError
from unitvis.network.channels import channel_axes


class Net(nn.Module):
    """A convolution to 6 channels on maps of 6 x 6, then `use(self, maps)`, which calls `tap` on what is looked at."""

    def __init__(self, use: Callable[[Net, Tensor], object], tap: nn.Module, **modules: nn.Module) -> None:
        super().__init__()
        self.conv, self.tap, self.use = nn.Conv2d(3, 6, 3), tap, use
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> object:
        return self.use(self, self.conv(x))


class MyLinear(nn.Linear):
    pass


class MyLayerNorm(nn.LayerNorm):
    pass


class ByHand(nn.Module):
    """LayerNorm over the channels of [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        return (x - mean) / ((x - mean).pow(2).mean(1, keepdim=True) + 1e-6).sqrt()


def last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def seen_whole(x: Tensor) -> Tensor:
    """Maps [N, H, W, C] each of whose elements depends on the whole image."""
    return last(x + x.mean((2, 3), keepdim=True))


def shuffled(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def excited(net: Net, x: Tensor) -> object:
    return net.tap(x * net.gate(x.mean((2, 3))).sigmoid()[:, :, None, None])


def excited_last(net: Net, x: Tensor) -> object:
    x = last(x)
    return net.tap(x * net.gate(x.mean((1, 2), keepdim=True)).sigmoid())


def heads(x: Tensor) -> Tensor:
    """[N, C, H, W] as [N, 2 heads, H * W, C / 2]."""
    return x.flatten(2).transpose(1, 2).unflatten(2, (2, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def probabilities(x: Tensor) -> Tensor:
    return (heads(x) @ heads(x).transpose(2, 3)).softmax(3)


def fused_attention(net: Net, x: Tensor) -> object:
    qkv = net.qkv(x.flatten(2).transpose(1, 2))
    q, k, v = qkv.reshape(len(x), -1, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
    return net.tap(joined(F.scaled_dot_product_attention(q, k, v)))


def split_attention(net: Net, x: Tensor) -> object:
    """Two halves of the channels, weighed against each other and summed."""
    halves = x.unflatten(1, (2, 3))
    weights = halves.mean((3, 4), keepdim=True).softmax(1)
    return net.tap((halves * weights).sum(1))


def selected_kernels(net: Net, x: Tensor) -> object:
    paths = torch.stack([x, x.relu()], dim=1)
    weights = x.mean((2, 3)).repeat(1, 2).view(-1, 2, 6, 1, 1).softmax(1)
    return net.tap((paths * weights).sum(1))


def preallocated(net: Net, x: Tensor) -> object:
    out = torch.zeros(len(x), 6, 8, 7)
    out[:, :, 1:-1, :6] = x
    return net.tap(out)


def windows(net: Net, x: Tensor) -> object:
    x = seen_whole(x)
    parts = x.view(len(x), 2, 3, 2, 3, 6).permute(0, 1, 3, 2, 4, 5).reshape(-1, 9, 6)
    parts = net.mix(parts).reshape(len(x), 2, 2, 3, 3, 5).permute(0, 1, 3, 2, 4, 5)
    return net.tap(parts.reshape(len(x), 6, 6, 5))


def grid(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Index tensors of all images, of rows 1 to 4 and of columns 0 to 2, which broadcast to [N, 4, 3]."""
    return torch.arange(len(x))[:, None, None], torch.arange(1, 5)[:, None], torch.arange(3)


def picked(x: Tensor) -> Tensor:
    """[N, 4, 3, C]: axes without an index tensor between others come last."""
    images, rows, columns = grid(x)
    return x[images, :, rows, columns]


def written(x: Tensor) -> Tensor:
    """[N, C, 6, 6], whose memory was written to at index tensors."""
    out, (images, rows, columns) = torch.zeros(x.shape), grid(x)
    out[images, :, rows, columns] = picked(x)
    return out


def tapped(function: Callable[[Tensor], Tensor]) -> Callable[[], Net]:
    return lambda: Net(lambda net, x: net.tap(function(x)), nn.Identity())


KNOWN: list[tuple[str, Callable[[], Net], int]] = [
    ("permuted", lambda: Net(lambda net, x: net.tap(seen_whole(x)), nn.GELU()), 3),
    ("permuted back", lambda: Net(lambda net, x: net.tap(seen_whole(x).permute(0, 3, 1, 2)), nn.GELU()), 1),
    ("transposed", lambda: Net(lambda net, x: net.tap(seen_whole(x).transpose(1, 3)), nn.GELU()), 1),
    ("linear", lambda: Net(lambda net, x: net.tap(seen_whole(x)), nn.Linear(6, 9)), 3),
    ("linear to one", lambda: Net(lambda net, x: net.tap(seen_whole(x)), nn.Linear(6, 1)), 3),
    ("after linear", lambda: Net(lambda net, x: net.tap(net.mix(seen_whole(x))), nn.GELU(), mix=nn.Linear(6, 9)), 3),
    (
        "weight-normed linear",
        lambda: Net(lambda net, x: net.tap(seen_whole(x)), parametrizations.weight_norm(nn.Linear(6, 9))),
        3,
    ),
    (
        "orthogonal linear",
        lambda: Net(lambda net, x: net.tap(seen_whole(x)), parametrizations.orthogonal(nn.Linear(6, 9))),
        3,
    ),
    ("subclassed linear", lambda: Net(lambda net, x: net.tap(seen_whole(x)), MyLinear(6, 9, bias=False)), 3),
    ("subclassed layer norm", lambda: Net(lambda net, x: net.tap(seen_whole(x)), MyLayerNorm(6)), 3),
    ("layer norm of maps", lambda: Net(lambda net, x: net.tap(x), nn.LayerNorm([6, 6, 6])), 1),
    ("layer norm by hand", lambda: Net(lambda net, x: net.tap(x), ByHand()), 1),
    ("batch norm", lambda: Net(lambda net, x: net.tap(x), nn.BatchNorm2d(6)), 1),
    ("group norm", lambda: Net(lambda net, x: net.tap(x), nn.GroupNorm(2, 6)), 1),
    ("channel shuffle", lambda: Net(lambda net, x: net.tap(shuffled(x)), nn.ReLU()), 1),
    ("excited", lambda: Net(excited, nn.Identity(), gate=nn.Linear(6, 6)), 1),
    ("excited, channels last", lambda: Net(excited_last, nn.Identity(), gate=nn.Linear(6, 6)), 3),
    ("concatenated", lambda: Net(lambda net, x: net.tap(torch.cat([x, x.relu()], 1)), nn.Identity()), 1),
    ("concatenated last", lambda: Net(lambda net, x: net.tap(torch.cat([seen_whole(x)] * 2, 3)), nn.Identity()), 3),
    ("sequence", lambda: Net(lambda net, x: net.tap(x.flatten(2)), nn.Conv1d(6, 5, 3)), 1),
    ("after a sequence", lambda: Net(lambda net, x: net.tap(net.mix(x.flatten(2))), nn.ReLU(), mix=nn.Conv1d(6, 5, 3)),
     1),
    ("attention", lambda: Net(lambda net, x: net.tap(joined(probabilities(x) @ heads(x))), nn.Identity()), 2),
    ("fused attention", lambda: Net(fused_attention, nn.Identity(), qkv=nn.Linear(6, 18)), 2),
    ("split attention", lambda: Net(split_attention, nn.Identity()), 1),
    ("selected kernels", lambda: Net(selected_kernels, nn.Identity()), 1),
    ("windows", lambda: Net(windows, nn.Identity(), mix=nn.Linear(6, 5)), 3),
    ("pixel shuffle", lambda: Net(lambda net, x: net.tap(net.grow(x)), nn.PixelShuffle(2), grow=nn.Conv2d(6, 8, 1)), 1),
    ("preallocated", lambda: Net(preallocated, nn.Identity()), 1),
    ("summed", lambda: Net(lambda net, x: net.tap(seen_whole(x) + net.mix(last(x))), nn.ReLU(), mix=nn.Linear(6, 6)),
     3),
    ("indexed by three tensors", tapped(picked), 3),
    ("indexed by neighbours", tapped(lambda x: x[:, :, grid(x)[1], grid(x)[2]]), 1),
    ("indexed before the channels", tapped(lambda x: last(x)[grid(x)[0], grid(x)[1], grid(x)[2]]), 3),
    ("channels in another order", tapped(lambda x: seen_whole(x)[..., torch.tensor([5, 1, 0, 3])]), 3),
    ("written to at index tensors", tapped(written), 1),
    ("rotated in space", tapped(lambda x: x.rot90(1, (2, 3))), 1),
    ("rotated, channels too", tapped(lambda x: last(x).rot90(1, (2, 3))), 2),
    ("rotated by half a turn", tapped(lambda x: last(x).rot90(2, (2, 3))), 3),
    ("permuted in a copy", tapped(lambda x: torch.permute_copy(x, (0, 2, 3, 1))), 3),
    ("through torch.vmap", lambda: Net(lambda net, x: net.tap(torch.vmap(net.mix)(x)), nn.Conv2d(5, 7, 1),
                                       mix=nn.Conv2d(6, 5, 1)), 1),
]  # fmt: skip

UNKNOWN: list[tuple[str, Callable[[], Net]]] = [
    ("operands that disagree", lambda: Net(lambda net, x: net.tap(x + last(x)), nn.Identity())),
    ("probabilities", lambda: Net(lambda net, x: net.tap(probabilities(x)), nn.Identity())),
    ("channels in two axes", lambda: Net(lambda net, x: net.tap(heads(x)), nn.Identity())),
    ("channels among rows", lambda: Net(lambda net, x: net.tap(x.flatten(1, 2)), nn.Identity())),
    ("channels and positions by index", tapped(lambda x: x[:, torch.arange(3)[:, None], torch.arange(3)])),
    ("distances", tapped(lambda x: torch.cdist(x, x.flip(2)))),
    ("a pseudo-inverse", tapped(lambda x: torch.linalg.pinv(last(x)))),
    ("channels reduced", lambda: Net(lambda net, x: net.tap(x.mean(1, keepdim=True)), nn.Identity())),
]


@pytest.mark.parametrize(("build", "axis"), [case[1:] for case in KNOWN], ids=[case[0] for case in KNOWN])
def test_units_are_the_channels_and_have_the_values_of_a_hook(build: Callable[[], Net], axis: int) -> None:
    torch.manual_seed(0)
    model, pixels = build().eval(), images(5, 8)
    kept: list[Tensor] = []
    handle = model.tap.register_forward_hook(lambda module, _, out: kept.append(out.clone()))
    with torch.no_grad():
        model(pixels)
    handle.remove()
    (out,) = kept
    run = scan(model, pixels, "tap", 3)
    assert len(run["tap"]) == run["tap"].info["channels"] == out.shape[axis]
    strongest = out.movedim(axis, 1).flatten(2).amax(2).sort(0, descending=True).values.T[:, :3]
    np.testing.assert_allclose(run["tap"].values, strongest.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("build", [case[1] for case in UNKNOWN], ids=[case[0] for case in UNKNOWN])
def test_a_layer_whose_channels_are_unknown_is_refused_by_name(build: Callable[[], Net]) -> None:
    model = build().eval()
    with pytest.raises(UnitvisError, match=r"^layer 'tap' returns .*nothing tells which axis holds its channels.*$"):
        scan(model, images(5, 8), "tap")
    assert channel_axes(model, ["tap"], torch.zeros(1, 3, 8, 8)) == {"tap": None}
    assert len(scan(model, images(5, 8), "conv")["conv"]) == 6


def test_axes_are_known_up_to_where_the_model_fails() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(7, 2), nn.ReLU()).eval()
    axes = channel_axes(model, ["0", "2", "3", "no such layer"], torch.zeros(1, 3, 8, 8))
    assert axes == {"0": 1, "2": None, "3": None, "no such layer": None}
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_model_with_a_part_in_torchscript_is_scanned_around_it() -> None:
    scripted = torch.jit.script(nn.ReLU())
    model = nn.Sequential(nn.Conv2d(3, 4, 3), scripted, nn.Conv2d(4, 5, 3)).eval()
    pixels = images(5, 8)
    run = scan(model, pixels)
    assert run.layers == ["0", "2"]
    np.testing.assert_allclose(run["2"].values[:, 0], model(pixels).detach().amax((0, 2, 3)).numpy(), rtol=1e-5)
    assert not run["0"].info["feeds_relu"]  # unknown: the scripted part shows no functions
    with pytest.raises(UnitvisError, match=r"^layer '1' is TorchScript, .*give the eager module$"):
        scan(model, pixels, "1")


@pytest.mark.parametrize(
    ("name", "units"),
    [("swin_t", {"features.5.5": 384, "features.7": 768}), ("convnext_tiny", {"features.5.4.block.4": 1536})],
)
def test_stages_of_torchvision_with_channels_last(name: str, units: dict[str, int]) -> None:
    zoos.importable()
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    pixels = images(2, 224)
    run = scan(model, pixels, list(units), 2)
    kept: dict[str, Tensor] = {}
    for layer in units:
        model.get_submodule(layer).register_forward_hook(lambda m, _, out, layer=layer: kept.__setitem__(layer, out))
    with torch.no_grad():
        model(pixels)
    for layer, count in units.items():
        strongest = kept[layer].amax((1, 2)).sort(0, descending=True).values.T  # [units, 2]
        assert len(run[layer]) == len(strongest) == count
        np.testing.assert_allclose(run[layer].values, strongest.numpy(), rtol=1e-4, atol=1e-5)
