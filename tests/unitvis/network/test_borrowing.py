"""A model is left as it came, whatever its forward pass and its `eval` do to it."""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from typing import Self

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import unitvis
from support import brute
from support.scans import arrays, images, scan
from unitvis import Recorder, UnitvisError
from unitvis.network.borrowing import evaluating


def memory(model: nn.Module) -> dict[str, tuple[int, int, bytes]]:
    """Each tensor's identity, address and bytes."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: (id(t), t.data_ptr(), t.detach().numpy().tobytes()) for name, t in tensors}


class Recording(nn.Module):
    """Counts its passes, observes ranges as fake quantisation does, and clips its weights, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.register_buffer("passes", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("largest", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("cache", None)

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.largest.data.copy_(torch.maximum(self.largest, x.abs().max()))
        self.replaced = self.replaced + 1
        self.cache = torch.ones(3)
        self.conv.weight.data = torch.renorm(self.conv.weight.data, 2, 0, 0.3)
        return self.conv(x) + self.passes  # what ran before would show


@pytest.mark.filterwarnings("ignore:the model's code could not be followed")
@pytest.mark.filterwarnings("ignore:the receptive fields of conv are unknown")  # writes to .data cannot be traced
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_a_forward_pass_changes_is_put_back(precision: str) -> None:
    torch.manual_seed(0)
    model = Recording().train()
    before = memory(model)
    pixels = images(40, 9)
    run = scan(model, pixels, precision=precision)
    assert memory(model) == before
    assert model.cache is None
    if precision == "fp32":  # each compute batch begins from the same state
        backwards = [scan(model, pixels[start : start + 16], k=1, precision=precision) for start in (32, 16, 0)]
        best = np.max([part["conv"].values[:, 0] for part in backwards], axis=0)
        np.testing.assert_array_equal(best, run["conv"].values[:, 0])
    unitvis.response_map(model, pixels[0], "conv", 2)
    list(unitvis.project(model, pixels[:2], "conv", 0))
    assert memory(model) == before
    model(pixels[:2]).sum().backward()  # no tensor of inference mode was left behind


@pytest.mark.filterwarnings("ignore:the model's code could not be followed")
def test_a_tensor_that_changes_in_a_later_pass_alone_is_refused() -> None:
    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3)
            self.register_buffer("passes", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            if x.max() > 100:
                self.passes += 1
            return self.conv(x)

    pixels = torch.cat([images(32, 9), 1000 * images(16, 9)])
    with pytest.raises(UnitvisError, match="'passes' changed in this forward pass, though not in the first ones"):
        scan(Later(), pixels)


class WritesEqual(nn.Conv2d):
    """Writes to its buffer, as fused fake quantisation does in inference mode, what it holds; or, if odd, more."""

    def __init__(self, later: float) -> None:
        super().__init__(3, 6, 3)
        self.later = later
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        if (x[:, 0, 0, 0] > 30).any():
            self.scale.copy_(self.scale * self.later)
        return super().forward(x) * self.scale[0]


@pytest.mark.filterwarnings("ignore")
def test_writing_what_a_buffer_holds_is_no_change() -> None:
    torch.manual_seed(0)
    pixels = images(64, 9)
    pixels[20:, 0, 0, 0] = 60
    model = nn.Sequential(WritesEqual(1.0))
    brute.check(
        scan(model, pixels, "0", precision="fp32"),
        brute.responses(model, ["0"], pixels, brute.canonical_batches(pixels)),
    )
    with pytest.raises(UnitvisError, match=r"'0\.scale' changed in this forward pass"):
        scan(nn.Sequential(WritesEqual(2.0)), pixels, "0", precision="fp32")


@pytest.mark.filterwarnings("ignore")
def test_quantisation_aware_training_with_observers_off_is_scanned() -> None:
    quantisation = torch.ao.quantization
    torch.manual_seed(0)
    layers = [quantisation.QuantStub(), nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), quantisation.DeQuantStub()]
    model = nn.Sequential(*layers).train()
    model.qconfig = quantisation.get_default_qat_qconfig("x86")
    model = quantisation.prepare_qat(model)
    model(images(8, 9))
    model.apply(quantisation.disable_observer).eval()
    before, pixels = memory(model), images(40, 9)
    run = scan(model, pixels, ["1", "3"], precision="fp32")
    assert memory(model) == before
    brute.check(run, brute.responses(model, ["1", "3"], pixels, brute.canonical_batches(pixels)))


class LowRank(nn.Conv2d):
    """A convolution whose weights have a low-rank part, added to them in eval mode and taken away in training mode."""

    def __init__(self) -> None:
        super().__init__(3, 6, 3)
        self.weight.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 27)), nn.Parameter(torch.randn(6, 2))
        self.merged = False

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if mode == self.merged:
            part = (self.up @ self.down).view_as(self.weight)
            self.weight.data += -part if mode else part
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.merged else y + nn.functional.conv2d(x, (self.up @ self.down).view_as(self.weight))


def test_weights_that_eval_merges_are_separate_again_to_the_bit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(LowRank(), nn.ReLU(), LowRank().eval(), nn.Conv2d(6, 4, 1)).train()
    model[2] = nn.Sequential(nn.Conv2d(6, 3, 1), LowRank()).eval()
    before, flags = memory(model), [module.training for module in model.modules()]
    run = scan(model, images(20, 9), "0")
    assert memory(model) == before
    assert [module.training for module in model.modules()] == flags
    assert (model[0].merged, model[2][1].merged) == (False, True)
    merged = copy.deepcopy(model).eval()
    assert arrays(scan(merged, images(20, 9), "0")) == arrays(run)
    model[0](images(2, 9)).sum().backward()
    assert model[0].down.grad is not None


def test_weights_that_a_loop_trains_meanwhile_stay_trained() -> None:
    model = nn.Sequential(LowRank()).train()
    with Recorder(model, "0") as recorder:
        recorder(images(16, 9))
        model.train()
        with torch.no_grad():
            model[0].weight.fill_(2.0)
            model[0].down.zero_()
        model.eval()
        recorder(images(16, 9))
    assert (model[0].weight == 2).all()
    assert not model[0].down.any()
    assert model[0].merged  # as the loop left it
    model.train()
    assert not model[0].merged
    assert (model[0].weight == 2).all()


def test_an_eval_that_cannot_be_taken_back_is_refused() -> None:
    class Folding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch: nn.Module = nn.Conv2d(3, 4, 3)

        def train(self, mode: bool = True) -> Self:
            if not mode:
                self.branch = nn.Identity()
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            return self.branch(x)

    with (
        pytest.raises(UnitvisError, match=r"eval\(\) replaces 'branch\.\w+' for good.*deepcopy"),
        evaluating(Folding()),
    ):
        pass


class Depth(nn.Module):
    """Counts how deep it is; a pass that is cut short does not count back."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.depth = nn.Conv2d(3, 5, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        x = x * (1 + self.depth)
        self.depth += 1
        y = self.conv(x)
        self.depth -= 1
        return y


class Collected(nn.Module):
    """Collects features, and forgets them at the end of a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.second, self.third = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 1)
        self.features: dict[str, list[Tensor]] = {"all": []}

    def forward(self, x: Tensor) -> Tensor:
        features = self.features["all"]
        features.append(self.conv(x).relu())
        features.append(self.second(features[0]))
        y = self.third(features[0][:, :, 1:-1, 1:-1] + features[1])
        features.clear()
        return y


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("kind", "layers"), [(Depth, ["conv"]), (Collected, ["conv", "second"]), (Collected, None)])
def test_attributes_are_put_back_after_each_pass(
    kind: type[nn.Module], layers: list[str] | None, precision: str
) -> None:
    torch.manual_seed(0)
    model, pixels = kind().eval(), images(40, 9)
    with torch.no_grad():
        before = model(pixels)
    with Recorder(model, layers, precision=precision) as recorder:
        for part in pixels.split(10):
            recorder(part)
        with torch.no_grad():
            assert torch.equal(model(pixels), before)
    run = recorder.result(pixels)
    names = list(run.layers)
    found = brute.responses(model, names, pixels, brute.canonical_batches(pixels))
    brute.check(run, found)
    unitvis.receptive_field(model, names[0], 9)
    unitvis.response_map(model, pixels[0], names[0], 0)
    with torch.no_grad():
        assert torch.equal(model(pixels), before)


class Cached(nn.Module):
    """Keeps a constant for each shape and type, in an attribute or, as a cached function does, elsewhere."""

    def __init__(self, shared: dict[object, Tensor] | None = None) -> None:
        super().__init__()
        self.conv, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1)
        self.constants: dict[object, Tensor] = {}
        self.shared = None if shared is None else lambda: shared

    def forward(self, x: Tensor) -> Tensor:
        y, constants = self.conv(x), self.constants if self.shared is None else self.shared()
        kind = y.shape, y.dtype
        if kind not in constants:
            constants[kind] = torch.linspace(0, 1, y.shape[3], dtype=y.dtype)
        return self.second(y * constants[kind])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("precision", "weights"), [("fp32", "moving"), ("fp32", "fixed"), ("bf16", "fixed")])
@pytest.mark.parametrize("inference", [False, True])
def test_a_model_that_keeps_tensors_can_be_trained_meanwhile(
    shared: bool, precision: str, weights: str, inference: bool
) -> None:
    torch.manual_seed(0)
    model, pixels = Cached({} if shared else None).train(), images(48, 9)
    with Recorder(model, precision=precision, weights=weights, batch_size=16) as recorder:
        for batch in pixels.split(16):
            with torch.inference_mode(inference):
                recorder(batch.clone())
            model(batch).mean().backward()
    assert recorder.result().manifest["images"] == 48
    assert model.conv.weight.grad is not None


class ActNorm(nn.Module):
    """Subtracts the mean of the first batch that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.second = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 5, 3)
        self.mean, self.ready = nn.Parameter(torch.zeros(1, 5, 1, 1)), False

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if not self.ready:
            self.mean.data.copy_(y.mean((0, 2, 3), keepdim=True))
            self.ready = True
        return self.second(y - self.mean)


@pytest.mark.filterwarnings("ignore:the model's code could not be followed", "ignore:the receptive fields of")
def test_a_flag_goes_back_with_the_parameter_that_it_stands_for() -> None:
    torch.manual_seed(0)
    model, pixels = ActNorm().eval(), images(40, 9)
    with pytest.raises(UnitvisError, match="layer 'second' gives other responses"):
        scan(model, pixels, precision="fp32")
    assert not model.ready
    assert not model.mean.any()
    unitvis.receptive_field(model, "second", 9)
    unitvis.response_map(model, pixels[0], "second", 0)
    assert not model.ready
    assert not model.mean.any()
    model(pixels)
    run = scan(model, pixels, precision="fp32")
    brute.check(run, brute.responses(model, ["conv", "second"], pixels, brute.canonical_batches(pixels)))
    assert model.ready


class Wild(nn.Module):
    """Changes its attributes in many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 4, 3)
        self.loose = [nn.Conv2d(4, 4, 1)]  # no submodule, as it is in a list
        self.flag, self.name, self.gone, self.built = False, "new", 3, None
        self.order, self.last = OrderedDict(a=1, b=2), deque([1, 2], maxlen=2)
        self.nested = {"lists": [[1], (2, [3])], "seen": {1, 2}}
        self.nested["itself"] = self.nested

    def forward(self, x: Tensor) -> Tensor:
        y = self.loose[0](self.inner(x))
        self.flag, self.name, self.more = True, self.name + "er", y
        if self.built is None:
            self.built = nn.Identity()
        if hasattr(self, "gone"):
            del self.gone
        self.order.move_to_end("a")
        self.last.append(3)
        self.nested["lists"][0].append(y)
        self.nested["lists"][1][1][0] = y
        self.nested["seen"] |= {3}
        self.nested[len(self.nested)] = y
        self.loose[0].calls = 1 + getattr(self.loose[0], "calls", 0)
        self.inner.eval() if self.inner.training else self.inner.train()
        self.register_buffer("late", torch.zeros(1), persistent=False)
        return self.built(y)


def test_attributes_of_every_kind_are_put_back() -> None:
    def told(model: Wild) -> str:
        nested = {key: value for key, value in model.nested.items() if key != "itself"}
        held = {name: value for name, value in sorted(vars(model).items()) if name != "nested"}
        return f"{held} {nested} {vars(model.loose[0])} {model.inner.training} {[*model.named_modules()]}"

    torch.manual_seed(0)
    model, pixels = Wild().train(), images(20, 9)
    before, nested = told(model), model.nested
    run = scan(model, pixels, precision="fp32")
    assert told(model) == before
    assert model.nested is nested
    assert model.nested["itself"] is nested
    brute.check(run, brute.responses(model, ["inner"], pixels, brute.canonical_batches(pixels)))
