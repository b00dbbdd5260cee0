"""Receptive fields of models of all kinds: what is followed, what is probed, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.judges import all_boxes, inside, places
from support.zoo import LOCAL, AtrousPyramid, SqueezeExcite, alexnet, mobilenet_v1
from unitvis.errors import UnitvisError
from unitvis.network.receptive_fields.fields import receptive_field, receptive_fields
from unitvis.network.receptive_fields.probe import probe_receptive_fields


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
    for fields in (receptive_fields, probe_receptive_fields):
        with pytest.raises(UnitvisError, match=message):
            fields(Reused(), [layer], 9)


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
    with pytest.raises(UnitvisError, match=r"images of (a|its) batch"):
        probe_receptive_fields(model, ["2"], 16)
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


def test_an_operator_without_a_rule_is_probed_and_said() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 2, 3, padding=1), Lambda(lambda x: x.cumsum(3)), Lambda(lambda x: x.logcumsumexp(2))
    )
    field = receptive_fields(model, ["0", "1", "2"], (10, 12))["1"]
    assert field.method == "probed"
    assert "cumsum" in field.note
    assert field.boxes(0, 5, [0, 4]).tolist() == [[0, 4, 2, 7], [0, 4, 6, 7]]
    assert field.size == (3, 12)


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
    probed = probe_receptive_fields(model, [""], 16)[""]
    np.testing.assert_array_equal(inside(all_boxes(field), (16, 16)), inside(all_boxes(probed), (16, 16)))


def test_a_model_that_cannot_be_traced_is_probed_and_said() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), Lambda(lambda x: x if x.sum() > -1e9 else -x), nn.Conv2d(2, 2, 3))
    field = receptive_field(model, "2", 10)
    assert field.method == "probed"
    assert "cannot be traced" in field.note
    assert field.size == (5, 5)


def test_probing_agrees_with_the_closed_form() -> None:
    model, size = LOCAL[5].model(), LOCAL[5].size
    names = places(model, size)
    traced, probed = receptive_fields(model, names, size), probe_receptive_fields(model, names, size)
    for name in names:
        assert probed[name].method == "probed"
        assert probed[name].map_size == traced[name].map_size
        assert probed[name].whole_image == traced[name].whole_image
        np.testing.assert_array_equal(all_boxes(probed[name]), inside(all_boxes(traced[name]), size))


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), SqueezeExcite(4)).train()
    model[1].eval()
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("mine"))
    flags = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    attributes = [sorted(vars(module)) for module in model.modules()]
    for fields in (receptive_fields, probe_receptive_fields):
        fields(model, ["0", "1", "3"], 12)
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
