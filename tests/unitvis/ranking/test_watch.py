"""Weights that move between the calls of a Recorder, streams that repeat, and models that fail early or not at all."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import unitvis
from support import brute
from support.scans import images, scan, two_convolutions
from unitvis import Recorder, UnitvisError
from unitvis.ranking import recording

LAYERS = ["0", "2"]


def trained(model: nn.Module) -> None:
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.ones(1, 3, 12, 12)).sum().backward()
    optimiser.step()


def in_place(model: nn.Module) -> None:
    model.get_parameter("2.bias").data.add_(1)


def replaced(model: nn.Module) -> None:
    model[2].weight = nn.Parameter(model[2].weight.detach() * 1.001)


def recorded(
    model: nn.Module, between: Callable[[nn.Module], object] | None = None, **options: Any
) -> tuple[Recorder, Tensor]:
    """A Recorder of two batches of 32 images, between which something happens, and the images."""
    pixels = images(64, 12)
    with Recorder(model, LAYERS, **options) as recorder:
        recorder(pixels[:32])
        if between is not None:
            between(model)
        recorder(pixels[32:])
    return recorder, pixels


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("between", "name"), [(trained, "0.bias"), (in_place, "2.bias"), (replaced, "2.weight")], ids=["sgd", "data", "new"]
)
def test_weights_that_move_are_refused(between: Callable[[nn.Module], object], name: str, precision: str) -> None:
    recorder, pixels = recorded(two_convolutions(), between, precision=precision)
    with pytest.raises(UnitvisError, match=rf"the weights moved while images were recorded \('{name}' was written to"):
        recorder.result(images=pixels)
    if between is trained:
        with pytest.raises(UnitvisError, match="the weights moved"):
            recorder.partial()


def swapped(model: nn.Module) -> Callable[[], None]:
    """Exchange the memory of a parameter; returns what takes it back."""
    own = model[2].weight.data
    model[2].weight.data = own * 2
    return lambda: setattr(model[2].weight, "data", own)


def assigned(model: nn.Module) -> Callable[[], None]:
    own = dict(model.named_parameters())
    model.load_state_dict({name: value.detach() * 2 for name, value in own.items()}, assign=True)

    def back() -> None:
        for name, parameter in own.items():
            module, _, key = name.rpartition(".")
            setattr(model.get_submodule(module), key, parameter)

    return back


@pytest.mark.parametrize("change", [swapped, assigned])
def test_weights_that_move_and_come_back_are_refused(change: Callable[[nn.Module], Callable[[], None]]) -> None:
    model, pixels = two_convolutions(), images(64, 12)
    with Recorder(model, LAYERS) as recorder:
        recorder(pixels[:32])
        back = change(model)
        recorder(pixels[32:48])
        back()
        recorder(pixels[48:])
    with pytest.raises(UnitvisError, match="the weights moved while images were recorded"):
        recorder.result()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "between",
    [
        lambda model: model.to(memory_format=torch.channels_last),
        lambda model: model.load_state_dict(model.state_dict()),
        lambda model: model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True),
    ],
    ids=["channels_last", "loaded", "assigned"],
)
def test_weights_with_the_same_values_elsewhere_have_not_moved(
    between: Callable[[nn.Module], object], precision: str
) -> None:
    recorder, pixels = recorded(two_convolutions(), between, precision=precision)
    wanted, _ = recorded(two_convolutions(), precision=precision)
    run, other = recorder.result(images=pixels), wanted.result(images=pixels)
    assert all(np.array_equal(run[name].values, other[name].values) for name in run.layers)
    recorder, _ = recorded(two_convolutions(), lambda model: (between(model), in_place(model)))
    with pytest.raises(UnitvisError, match="the weights moved"):
        recorder.result()


@pytest.mark.parametrize("change", ["half", "double"])
def test_weights_of_another_type_are_named(change: str) -> None:
    model, pixels = two_convolutions(), images(64, 12)
    with Recorder(model, LAYERS) as recorder:
        recorder(pixels[:32])
        getattr(model, change)()
        with pytest.raises(UnitvisError, match=r"'0\.bias' was converted from torch\.float32 to torch\.float"):
            recorder(pixels[32:])
        model.float()


class Attributes(nn.Module):
    """Computes with an attribute that is no tensor, and with a function."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.bn, self.last = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3)
        self.scale, self.act = 2.0, torch.relu

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.bn(self.first(x))) * self.scale)


ATTRIBUTES: dict[str, Callable[[Attributes], object]] = {
    "eps": lambda model: setattr(model.bn, "eps", 1.0),
    "function": lambda model: setattr(model, "act", torch.tanh),
    "number": lambda model: setattr(model, "scale", 3.0),
    "hook": lambda model: model.bn.register_forward_hook(lambda module, args, output: output * 2),
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_model_that_changes_otherwise_is_refused(name: str) -> None:
    model, pixels = Attributes().eval(), images(64, 12)
    with Recorder(model) as recorder:
        recorder(pixels[:32])
        ATTRIBUTES[name](model)
        recorder(pixels[32:])
    with pytest.raises(UnitvisError, match=r"the model changed while images were recorded \(the network computes"):
        recorder.result()


def test_weights_of_which_a_copy_is_ranked_may_not_move_either() -> None:
    model = two_convolutions().bfloat16()
    recorder, _ = recorded(model, lambda model: model[0].weight.data.mul_(2))
    with pytest.raises(UnitvisError, match="the weights moved"):
        recorder.result()
    with pytest.raises(UnitvisError, match=r"weights='moving' ranks the model itself, and this one would be copied"):
        Recorder(model, weights="moving")


def test_statistics_that_a_training_pass_updates_move_responses() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3)).eval()
    recorder, _ = recorded(model, lambda model: model.train()(images(4, 12)))
    with pytest.raises(UnitvisError, match=r"'1\.num_batches_tracked' was written to"):
        recorder.result()


def test_moving_weights_rank_each_image_by_those_it_met() -> None:
    model = two_convolutions()
    before = two_convolutions()
    recorder, pixels = recorded(model, trained, weights="moving")
    run = recorder.result(images=pixels)
    halves = [
        brute.responses(one, LAYERS, part, brute.canonical_batches(part))
        for one, part in ((before, pixels[:32]), (model, pixels[32:]))
    ]
    first, second = halves
    met = {name: tuple(map(np.concatenate, zip(first[name], second[name], strict=True))) for name in LAYERS}
    brute.check(run, met)
    assert all((top.status == "unseparated").all() for top in run.tops.values())
    assert (run.manifest["weights"], run.manifest["witness"]) == ("moving", "not checked: the weights moved")
    with pytest.raises(UnitvisError, match="weights that move cannot be merged"):
        recorder.partial()
    for options, said in (({"weights": "still"}, "'fixed' or 'moving', not 'still'"), ({"precision": "fp16"}, "fp32")):
        with pytest.raises(UnitvisError, match=said):
            Recorder(model, **{"weights": "moving", **options})


class Counting(nn.Conv2d):
    """Counts its calls in a buffer; with a drift its responses depend on them."""

    def __init__(self, drift: float) -> None:
        super().__init__(3, 6, 3)
        self.drift = drift
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1 + self.drift * self.calls)


@pytest.mark.filterwarnings("ignore:on this device the last bits")
def test_what_a_pass_writes_itself_does_not_reach_the_next_pass() -> None:
    pixels = images(64, 12)
    model = nn.Sequential(Counting(0), nn.ReLU(), nn.Conv2d(6, 5, 3)).eval()
    recorder, _ = recorded(model, lambda model: model(pixels[:1]))
    found = brute.responses(model, LAYERS, pixels, brute.canonical_batches(pixels))
    brute.check(recorder.result(images=pixels), found)
    drifting = nn.Sequential(Counting(1e-5), nn.ReLU(), nn.Conv2d(6, 5, 3)).eval()
    run = scan(drifting, images(200, 12), LAYERS)
    assert drifting[0].calls == 0
    with torch.no_grad():
        first_call = torch.cat([copy.deepcopy(drifting)(one) for one in images(200, 12).split(50)])
    assert np.array_equal(run["2"].images[:, 0], first_call.amax((2, 3)).argmax(0).numpy())


@pytest.mark.parametrize(("workers", "k"), [(2, 1), (2, 9), (3, 2), (16, 9)])
def test_a_stream_that_repeats_is_warned_of(workers: int, k: int) -> None:
    """Its batches come as a DataLoader gives those of an IterableDataset that every worker reads whole."""
    batches = [batch for batch in images(24, 12).split(8) for _ in range(workers)]
    with pytest.warns(UserWarning, match=r"in 100% of the units every response comes more than once"):
        run = scan(two_convolutions(), iter(batches), LAYERS, k)
    assert "not split between the workers of its DataLoader" in run.manifest["warnings"][-1]
    if k > 2:
        return
    with Recorder(two_convolutions(), LAYERS, k) as recorder:
        for batch in batches:
            recorder(batch)
    with pytest.warns(UserWarning, match="comes more than once"):
        recorder.result()


@pytest.mark.parametrize("k", [1, 9])
def test_equal_responses_of_different_images_are_no_repetition(k: int) -> None:
    plateaus = nn.Sequential(nn.Conv2d(3, 20, 3), nn.Sigmoid(), nn.AdaptiveMaxPool2d(1)).eval()
    torch.manual_seed(1)
    few = images(40, 12)
    few[7] = few[9]
    alike = torch.randint(0, 2, (40, 3, 12, 12)).float() * 50
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="layer .* saturates")
        scan(two_convolutions(), few, LAYERS, k)
        scan(plateaus, alike, ["2"], k)
        scan(two_convolutions(), torch.zeros(40, 3, 12, 12), LAYERS, k)
        scan(two_convolutions(), few[:2], LAYERS, k)


class Undescribed(nn.Conv2d):
    """A layer whose state cannot be read."""

    def get_extra_state(self) -> object:
        raise RuntimeError("this state is elsewhere")


def test_a_model_that_cannot_be_described_fails_before_the_first_image() -> None:
    model = nn.Sequential(Undescribed(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3)).eval()
    with Recorder(model, LAYERS) as recorder:
        with pytest.raises(
            UnitvisError, match=r"cannot be described .* \(RuntimeError: this state is elsewhere\); give"
        ):
            recorder(images(64, 12))
        assert recorder.images == 0


class NoGradient(torch.autograd.Function):
    """Doubles; its derivative is a programming error."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise TypeError("no derivative here")


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return NoGradient.apply(x)


def test_a_backward_pass_that_fails_costs_no_scan() -> None:
    model = nn.Sequential(Doubling(), nn.Conv2d(3, 6, 3)).eval()
    with pytest.warns(UserWarning, match=r"layer '1' has no effective box, for want of gradients \(no derivative here"):
        run = scan(model, images(40, 12), ["1"])
    assert run["1"].info["effective_box"] is None


class Cropping(nn.Module):
    """Leaves out the last row where the image is bright."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :-1] if bool((x > 50).any()) else x * 1.0


@pytest.mark.filterwarnings("ignore:the model's code could not be followed")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("unit", ["channel", "neuron"])
def test_maps_of_another_size_later_in_the_stream_are_refused(
    unit: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if the comparison showed nowhere: float32 would be scanned.
    monkeypatch.setattr(recording, "suitable_precision", lambda network, images, precision: (precision, None))
    model = nn.Sequential(Cropping(), nn.Conv2d(3, 4, 3)).eval()
    pixels = images(96, 12)
    pixels[70] = 60
    with pytest.raises(UnitvisError, match=r"layer '1' gave maps of \[4, 10, 10\] and now gives \[4, 9, 10\]; only"):
        unitvis.scan(model, pixels, ["1"], unit=unit, precision=precision, progress=False)
