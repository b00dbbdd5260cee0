"""Receptive fields of models of all kinds: what is followed, what is unknown, what is refused."""

from __future__ import annotations

import functools
import io
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.judges import all_boxes, check_by_perturbation, inside
from support.scans import images, scan
from support.zoo import AtrousPyramid, SqueezeExcite, alexnet, mobilenet_v1
from unitvis.errors import UnitvisError
from unitvis.network.copies import copied
from unitvis.network.receptive_fields.fields import receptive_field, receptive_fields
from unitvis.ranking.recorder import Recorder


def test_input_sizes() -> None:
    square = receptive_field(alexnet(), "0", 65)
    assert square.input_size == (65, 65)
    assert square.map_size == (15, 15)
    assert square.channels == 4
    assert receptive_field(alexnet(), "0", (3, 65, 75)).input_size == (65, 75)
    grey = nn.Sequential(nn.Conv2d(1, 2, 3))
    assert receptive_field(grey, "0", (1, 9, 9)).size == (3, 3)
    with pytest.raises(UnitvisError, match=r"cannot run on an input of 3x9x9.*channels, height, width"):
        receptive_field(grey, "0", 9)
    with pytest.raises(UnitvisError, match="input size"):
        receptive_field(grey, "0", (1, 2, 3, 4))


def test_what_fails_after_the_last_layer_does_not_matter() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(7, 1))
    assert receptive_field(model, "0", 9).size == (3, 3)
    with pytest.raises(UnitvisError, match="cannot run"):
        receptive_field(model, "2", 9)


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.idle = nn.Conv2d(3, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(self.relu(self.conv(x))))


@pytest.mark.parametrize(
    ("layer", "message"), [("conv", "more than once"), ("idle", "does not run"), ("conv1", "no layer 'conv1'")]
)
def test_layers_that_do_not_run_exactly_once_are_refused(layer: str, message: str) -> None:
    with pytest.raises(UnitvisError, match=message):
        receptive_fields(Reused(), [layer], 9)


def test_a_layer_whose_batch_axis_is_not_the_images_is_refused() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(-1, 4, 12))

    with pytest.raises(UnitvisError, match="gives 8 maps for 2 images"):
        receptive_field(Windows(), "linear", 8)


def test_in_place_activations_do_not_reach_back() -> None:
    class InPlace(nn.Module):
        """The tapped map is overwritten by its own neighbourhood."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 5, padding=2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            y[:, :2] += self.second(y)[:, :2]
            y.relu_()
            return self.last(y) if hasattr(self, "last") else y

    model = InPlace()
    fields = receptive_fields(model, ["first", "second", ""], 16)
    assert [fields[name].size for name in ("first", "second", "")] == [(3, 3), (7, 7), (7, 7)]
    assert fields[""].boxes([0, 2], 8, 8).tolist() == [[5, 5, 12, 12], [7, 7, 10, 10]]


RANDOM = [
    ("functional dropout", lambda: Lambda(lambda x: F.dropout(x, 0.5, training=True)), "bernoulli|dropout"),
    ("noise", lambda: Lambda(lambda x: x + torch.randn_like(x)), "randn"),
    ("dropout kept on", lambda: AlwaysTraining(nn.Dropout(0.5)), "in training mode.*: 1"),
    ("batch statistics", lambda: nn.BatchNorm2d(3, track_running_stats=False), "images of a batch.*statistics: 1"),
    ("batch norm kept on", lambda: AlwaysTraining(nn.BatchNorm2d(3)), "images of a batch.*in training mode.*: 1"),
    (
        "functional batch norm",
        lambda: Lambda(lambda x: F.batch_norm(x, None, None, training=True)),
        "images of a batch",
    ),
    ("centred batch", lambda: Lambda(lambda x: x - x.mean(0)), "images of a batch"),
]


class Lambda(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class AlwaysTraining(nn.Sequential):
    def train(self, mode: bool = True) -> AlwaysTraining:
        return super().train(True)


@pytest.mark.parametrize(("build", "message"), [r[1:] for r in RANDOM], ids=[r[0] for r in RANDOM])
def test_chance_and_batch_statistics_are_refused(build: object, message: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), build(), nn.Conv2d(3, 2, 3))
    with pytest.raises(UnitvisError, match=message):
        receptive_field(model, "2", 16)
    assert receptive_field(model, "0", 16).size == (3, 3)


def test_ordinary_dropout_and_batch_norm_are_set_to_eval() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Conv2d(3, 2, 3)).train()
    assert receptive_field(model, "3", 16).size == (5, 5)


ACTIVATIONS = [nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish]
ACTIVATIONS += [
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Hardtanh,
    nn.Hardshrink,
    nn.Sigmoid,
    nn.LogSigmoid,
    nn.Tanh,
    nn.Softplus,
]
ACTIVATIONS += [nn.Softsign, nn.Softshrink, nn.Tanhshrink, nn.Softmax2d, nn.Dropout2d, nn.Identity]


def test_every_activation_is_followed() -> None:
    layers = [layer for activation in ACTIVATIONS for layer in (nn.Conv2d(2, 2, 3), activation())]
    field = receptive_field(nn.Sequential(nn.Conv2d(3, 2, 1), *layers), str(len(layers)), 64)
    assert (field.method, field.note) == ("traced", "")
    assert field.size == (1 + 2 * len(ACTIVATIONS),) * 2


def test_after_an_operator_without_a_rule_boxes_are_unknown_and_it_is_said() -> None:
    operator = Lambda(lambda x: torch.cdist(x, x.flip(2)))
    model = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), operator, nn.Conv2d(2, 2, 1))
    before, after = receptive_fields(model, ["0", "2"], (10, 12)).values()
    assert (before.method, before.size, before.note) == ("traced", (3, 3), "")
    assert (after.method, after.whole_image, after.size, after.stride) == ("unknown", False, (10, 12), None)
    assert "no closed form for aten._cdist_forward" in after.note
    assert set(map(tuple, all_boxes(after).reshape(-1, 4))) == {(0, 0, 12, 10)}


def test_writing_to_views_and_counters_is_followed() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3, padding=1)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            x[:, :, :4].mul_(2)
            out = torch.zeros(len(x), 2, 20, 16)
            out[:, :, 2:-2] = self.conv(x)
            out[:, :, :2].copy_(out[:, :, 4:6])
            return out

    model = Writing()
    field = receptive_field(model, "", 16)
    assert (field.method, model.calls.item()) == ("traced", 0)
    assert field.boxes(0, [0, 8, 19], 8).tolist() == [[7, 1, 10, 4], [7, 5, 10, 8], [8, 8, 8, 8]]
    assert inside(field.boxes(0, [0, 1, 8], 0), (16, 16)).tolist() == [[0, 1, 2, 4], [0, 2, 2, 5], [0, 5, 2, 8]]


def test_where_values_choose_what_is_read_every_neuron_sees_the_whole_image() -> None:
    class Deformable(nn.Module):
        """Samples the map where a convolution of it says, as deformable convolutions do."""

        def __init__(self) -> None:
            super().__init__()
            self.offsets = nn.Conv2d(4, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return F.grid_sample(x, self.offsets(x).permute(0, 2, 3, 1).tanh(), align_corners=False)

    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Deformable(), nn.Conv2d(4, 2, 1))
    before, after = receptive_fields(model, ["1.offsets", "2"], (10, 12)).values()
    assert (before.size, before.whole_image) == ((5, 5), False)
    assert (after.method, after.whole_image, after.size) == ("traced", True, (10, 12))


@pytest.mark.parametrize("width", [9, 16])
def test_resizing_inside_a_model_is_followed(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchvision's v2.Resize calls."""

    def resize(x: Tensor) -> Tensor:
        return F.interpolate(x, size=(5, 7), mode="bilinear", antialias=True, align_corners=False)

    model = nn.Sequential(Lambda(resize), nn.Conv2d(3, 2, 3, padding=1))
    check_by_perturbation(model, ["1"], (12, width), monkeypatch)


class Picky(nn.Module):
    """Refuses NaN, float64 and other images than those of 10 x 10."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.isnan(x).any() or x.dtype != torch.float32 or x.shape[2:] != (8, 8):
            raise ValueError("not such images")
        return x


class Holding(nn.Module):
    """Holds what cannot be copied, beside a cache that a trace must not leave anything in."""

    def __init__(self, log: io.TextIOBase) -> None:
        super().__init__()
        self.state = types.SimpleNamespace(lock=threading.Lock(), cache={}, log=log)
        self.conv = nn.Conv2d(3, 3, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.convs = [self.conv, self.state.lock]

    def __deepcopy__(self, memo: object) -> Holding:
        raise RuntimeError("no copies")

    def forward(self, x: Tensor) -> Tensor:
        with self.state.lock:
            self.calls += 1
            self.state.cache[len(x)] = x.mean()
            return self.convs[0](x)


def fixed_grid(x: Tensor) -> Tensor:
    """A spatial transformer with constant parameters in float32."""
    theta = torch.tensor([[1.0, 0, 0.1], [0, 1, 0]]).expand(len(x), 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


UNTRACEABLE = [
    ("a branch on values", lambda: Lambda(lambda x: x if x.sum() > -1e9 else -x), "values that are computed from"),
    ("a refusal of NaN and float64", Picky, "values that are computed from"),
    ("a constant grid", lambda: Lambda(fixed_grid), "constant grid"),
    (
        "numbers out of tensors",
        lambda: Lambda(lambda x: torch.stack([image * image.max().item() for image in x])),
        "values that are computed from",
    ),
]


@pytest.mark.filterwarnings("ignore:the model.s code could not be followed")
@pytest.mark.parametrize(("build", "note"), [u[1:] for u in UNTRACEABLE], ids=[u[0] for u in UNTRACEABLE])
def test_models_that_run_but_cannot_be_followed_are_scanned_with_unknown_boxes(build: object, note: str) -> None:
    model, pixels = nn.Sequential(nn.Conv2d(3, 2, 3), build(), nn.Conv2d(2, 2, 3)), images(5, size=10)
    with pytest.warns(UserWarning, match=f"the receptive fields of 2 are unknown.*{note}"):
        run = scan(model, pixels)
    known, unknown = (run[name].info["receptive_field"] for name in ("0", "2"))
    assert (known["method"], known["size"]) == ("traced", [3, 3])
    assert (unknown["method"], unknown["whole_image"], unknown["size"]) == ("unknown", False, [10, 10])
    assert note in unknown["note"]
    assert (run["2"].boxes[:, :5] == [0, 0, 10, 10]).all()
    with torch.no_grad():
        want = torch.cat([model(one[None]) for one in pixels]).amax((2, 3)).sort(0, descending=True).values.T
    np.testing.assert_allclose(run["2"].values[:, :5], want, rtol=1e-4)


def test_what_cannot_be_copied_is_shared_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        model = nn.Sequential(Holding(log), nn.Conv2d(3, 2, 3))
        fields = receptive_fields(model, {"0.conv": 1, "1": 1}, 16)
        assert [field.size for field in fields.values()] == [(3, 3), (5, 5)]
        assert model[0].state.cache == {}
        assert model[0].calls == 0
        elsewhere = copied(model)
        assert elsewhere[0].convs[0] is elsewhere[0].conv is not model[0].conv
        assert elsewhere[0].state.lock is model[0].state.lock
        assert torch.equal(elsewhere[0].conv.weight, model[0].conv.weight)
        for precision in ("exact", "fp16"):
            run = scan(copied(model).double(), images(5), device="cpu", precision=precision)
            assert run["1"].info["receptive_field"]["size"] == [5, 5]


@pytest.mark.filterwarnings("ignore:on this device the last bits")
def test_threads_may_scan_a_model_each() -> None:
    """Tracing replaces methods of nn.Module: it must be undone, and no thread may see another's graph."""
    call, get = nn.Module.__call__, nn.Module.__getattr__

    def size(kernel: int) -> list[int]:
        model = nn.Sequential(nn.Conv2d(3, 3, kernel), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, kernel))
        with Recorder(model, precision=("fp32", "bf16")[kernel % 2], device="cpu") as recorder:
            recorder(images(16, size=24))
        return recorder.result()["3"].info["receptive_field"]["size"]

    kernels = [1, 3, 5, 7, 9, 2, 4, 6]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(size, kernels)) == [[2 * kernel - 1] * 2 for kernel in kernels]
    assert (nn.Module.__call__, nn.Module.__getattr__) == (call, get)


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), SqueezeExcite(4)).train()
    model[1].eval()
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("mine"))
    flags = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    attributes = [sorted(vars(module)) for module in model.modules()]
    receptive_fields(model, ["0", "1", "3"], 12)
    assert [module.training for module in model.modules()] == flags
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in model.parameters())


def test_tensors_that_a_forward_keeps_do_not_come_from_the_tracer() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.seen = nn.Conv2d(3, 2, 3), None

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.conv(x)
            return self.seen

    model = Caching()
    receptive_field(model, "conv", 9)
    assert model.seen is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_of_weights(dtype: torch.dtype) -> None:
    model = mobilenet_v1(blocks=(1, 2)).to(dtype)
    fields = receptive_fields(model, ["0", "4"], 32)
    assert fields["4"].size == (11, 11)
    assert all(parameter.dtype == dtype for parameter in model.parameters())


def test_layers_whose_output_is_no_map_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Unflatten(1, (1, 2)))
    with pytest.raises(UnitvisError, match="layer '1' returns a tensor of shape"):
        receptive_field(model, "1", 9)


def test_stride_is_none_where_there_is_none() -> None:
    assert receptive_field(nn.Sequential(nn.Conv2d(3, 2, 9)), "0", 9).stride is None
    up = nn.Sequential(nn.Conv2d(3, 2, 3, 2), nn.Upsample(scale_factor=2))
    assert receptive_field(up, "0", 9).stride == (2, 2)
    assert receptive_field(up, "1", 9).stride is None
    assert receptive_field(nn.Sequential(AtrousPyramid(3)), "0", (20, 30)).stride == (1, 1)


def test_a_model_on_another_device_and_whatever_the_defaults() -> None:
    model = mobilenet_v1(blocks=(1, 2)).to("meta")
    with torch.device("meta"), torch.inference_mode():
        assert receptive_field(model, "4", 32).boxes(0, 3, 4).tolist() == [[11, 7, 22, 18]]


def test_a_layer_may_be_named_twice() -> None:
    assert list(receptive_fields(alexnet(), ["0", "3", "0"], 64)) == ["0", "3"]


class OldSwish(torch.autograd.Function):
    """An activation as networks write it to save memory, without `setup_context`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise NotImplementedError


class NewSwish(OldSwish):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x.sigmoid()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)


@pytest.mark.parametrize("function", [OldSwish, NewSwish])
def test_functions_with_a_derivative_of_their_own_are_followed(function: type[torch.autograd.Function]) -> None:
    class Swish(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function.apply(x)

    apply = torch.autograd.Function.__dict__["apply"]
    field = receptive_field(nn.Sequential(nn.Conv2d(3, 4, 3), Swish(), nn.Conv2d(4, 2, 3)).eval(), "2", 12)
    assert (field.method, field.size) == ("traced", (5, 5))
    assert torch.autograd.Function.__dict__["apply"] is apply


@functools.lru_cache
def kept_ramp(width: int) -> Tensor:
    return torch.arange(width) * 0.1


def asking(x: Tensor) -> Tensor:
    """Adds the map's mean where that can be told."""
    try:
        return x + x.mean((2, 3), keepdim=True) if x.mean() > -1e9 else x
    except Exception:
        return x


def asking_if_traced(x: Tensor) -> Tensor:
    return x if torch.fx._symbolic_trace.is_fx_tracing() else x + x.mean((2, 3), keepdim=True)


def failing(x: Tensor) -> Tensor:
    """Tries what fails for any images."""
    try:
        return x.view(len(x), 7, -1)
    except RuntimeError:
        return x * 2


@pytest.mark.parametrize(
    ("function", "note"),
    [
        (asking, "asks for values that are computed from the image"),
        (asking_if_traced, "does something else when it is traced"),
        (failing, ""),
        (lambda x: x + kept_ramp(x.shape[3]), ""),
    ],
    ids=["catches the tracer", "asks whether it is traced", "catches its own", "kept by a function"],
)
def test_boxes_are_those_of_a_run_and_not_of_a_trace_that_goes_another_way(function: object, note: str) -> None:
    kept_ramp.cache_clear()
    model = nn.Sequential(nn.Conv2d(3, 2, 3), Lambda(function), nn.Conv2d(2, 2, 3)).eval()
    before, after = receptive_fields(model, ["0", "2"], 12).values()
    assert (before.method, before.size) == ("traced", (3, 3))
    assert note in after.note
    assert (after.method, after.size) == (("unknown", (12, 12)) if note else ("traced", (5, 5)))
