"""The forward pass: where it ends, and how the outputs of layers are read as maps."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support import brute
from support.scans import images, scan, small_net
from unitvis import Recorder, UnitvisError


def test_in_place_activation_does_not_spoil_the_layer_before_it() -> None:
    model, pixels = small_net(), images(20)
    run = scan(model, pixels, ["0", "1"])
    assert run["0"].info["feeds_relu"]
    before = brute.outputs(model, ["0"], next(iter(brute.canonical_batches(pixels)))[1])["0"]
    assert (before < 0).any()
    brute.check(run, brute.responses(model, ["0", "1"], pixels, brute.canonical_batches(pixels)))


class Counting(nn.Module):
    second_runs = 0  # of the class, as attributes of a model are put back

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.first(x))
        Counting.second_runs += 1
        return self.second(x)


def test_forward_stops_after_the_last_tapped_layer() -> None:
    model = Counting().eval()
    Counting.second_runs = 0
    scan(model, iter([images(20, 9)]), "first")
    assert Counting.second_runs <= 3  # the examination, the receptive fields; never in the scan
    runs = Counting.second_runs
    with Recorder(model, "second") as recorder:
        recorder(images(48, 9))
    assert Counting.second_runs > runs + 3


def test_tokens_and_channels_last_layers_are_taken_as_such() -> None:
    torch.manual_seed(0)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.mix = nn.Conv2d(3, 6, 4, 4), nn.LayerNorm(6), nn.Linear(6, 9)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(self.norm(self.embed(x).flatten(2).transpose(1, 2)))

    model, pixels = Tokens().eval(), images(10, 16)
    run = scan(model, pixels, ["norm", "mix"], 3)
    assert (run["mix"].info["channels"], run["mix"].info["height"], run["mix"].info["width"]) == (9, 1, 16)
    out = brute.outputs(model, ["mix"], next(iter(brute.canonical_batches(pixels)))[1])["mix"][:10].numpy()
    assert (run["mix"].images[:, 0] == out.max(axis=1).argmax(axis=0)).all()
    assert (run["mix"].positions[:, 0, 1] == out[run["mix"].images[:, 0], :, np.arange(9)].argmax(axis=1)).all()


def test_channels_that_come_last_are_found_after_any_kind_of_module() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.grow, self.act = nn.Conv2d(3, 6, 3), nn.Linear(6, 24), nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.grow(self.conv(x).permute(0, 2, 3, 1)))

    model, pixels = Block().eval(), images(5, 12)
    run = scan(model, pixels, ["grow", "act"], 3)
    for name, out in brute.outputs(model, ["grow", "act"], next(iter(brute.canonical_batches(pixels)))[1]).items():
        assert (run[name].info["channels"], run[name].info["height"], run[name].info["width"]) == (24, 10, 10)
        strongest = out[:5].amax((1, 2)).sort(0, descending=True).values.T[:, :3].numpy()
        np.testing.assert_array_equal(run[name].values, strongest)


@pytest.mark.filterwarnings("ignore:the model's code could not be followed", "ignore:the receptive fields of")
def test_a_model_that_differentiates_inside_its_forward_pass_is_ranked() -> None:
    class Gradient(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.energy, self.conv = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.detach().clone().requires_grad_()
                (gradient,) = torch.autograd.grad(self.energy(x).square().sum(), x)
            return self.conv(gradient)

    torch.manual_seed(0)
    model, pixels = Gradient().eval(), images(20, 9)
    for layers in (["energy"], ["energy", "conv"]):
        run = scan(model, pixels, layers, precision="fp32")
        found = brute.responses(model, layers, pixels, brute.canonical_batches(pixels))
        brute.check(run, found)


class Catching(nn.Module):
    """Catches whatever ends a layer, and then computes in another way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.b(self.a(x))
        except:  # noqa: E722
            return self.b(self.a(x / 2))


def test_code_that_catches_the_end_of_a_pass_is_ranked() -> None:
    model, pixels = Catching().eval(), images(20, 9)
    run = scan(model, pixels, precision="fp32")
    brute.check(run, brute.responses(model, ["a", "b"], pixels, brute.canonical_batches(pixels)))


def test_responses_in_float64_are_rounded_to_float32() -> None:
    class Double(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.tap = nn.Conv2d(3, 4, 3), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.tap(self.conv(x).double() / 3)

    model, pixels = Double().eval(), images(20, 9)
    run = scan(model, pixels, ["tap"], precision="fp32")
    found = brute.responses(model, ["tap"], pixels, brute.canonical_batches(pixels))
    brute.check(run, {"tap": (found["tap"][0].astype(np.float32), found["tap"][1])})


class Elsewhere(nn.Module):
    """Computes its layers by a function of them."""

    def __init__(self, compute: Callable[[Elsewhere, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.compute = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 4, 3), compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def in_a_thread(model: Elsewhere, x: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: model.b(model.a(x))).result()


def of_gradients(model: Elsewhere, x: Tensor) -> Tensor:
    pixels = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.a(pixels).square().sum(), pixels)
    return model.b(gradient)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("compute", "reason"),
    [
        (
            in_a_thread,
            "layer 'a' is computed in a thread that the model starts, where its operators cannot be followed",
        ),
        (lambda model, x: torch.vmap(model.a)(x), "layer 'a' is computed within torch.vmap or another transform"),
        (of_gradients, "the model differentiates within its forward pass, which runs without autograd here"),
    ],
    ids=["a thread", "vmap", "gradients"],
)
def test_a_refusal_names_its_reason(compute: Callable[[Elsewhere, Tensor], Tensor], reason: str) -> None:
    with pytest.raises(UnitvisError, match=reason):
        scan(Elsewhere(compute).eval(), images(20, 9), precision="fp32")
