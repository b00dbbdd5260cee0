from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from support.judges import all_boxes, check_by_perturbation, inside, nan_boxes, places, responses
from support.zoo import LOCAL, WHOLE, Case, alexnet, densenet, mobilenet_v1, resnet, vgg
from unitvis.errors import UnitvisError
from unitvis.network.receptive_fields.fields import receptive_field, receptive_fields

EVERY = LOCAL + WHOLE


@pytest.mark.parametrize("case", [case for case in EVERY if not case.interpolates], ids=lambda case: case.name)
def test_boxes_of_every_neuron_are_those_of_the_nan_oracle(case: Case) -> None:
    model = case.model()
    expected = nan_boxes(model, case.size)
    fields = receptive_fields(model, list(expected), case.size)
    for name, boxes in expected.items():
        assert fields[name].method == "traced", fields[name].note
        np.testing.assert_array_equal(inside(all_boxes(fields[name]), case.size), boxes, err_msg=name)


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_pixels_outside_never_change_a_neuron_and_every_border_line_can(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = case.model()
    names = places(model, case.size)
    check_by_perturbation(model, {names[-1], *np.random.default_rng(0).choice(names, 2)}, case.size, monkeypatch)


def test_boxes_of_winners_hold_all_that_excites_them() -> None:
    """The strongest neuron of each channel keeps its value when everything outside its box is blacked out."""
    model, size = LOCAL[0].model().double(), (127, 140)
    image = torch.randn(1, 3, *size, dtype=torch.float64)
    for name, field in receptive_fields(model, ["0", "3", "6"], size).items():
        found = responses(model, image)[name][0]
        for channel, position in enumerate(found.flatten(1).argmax(1).tolist()):
            row, column = divmod(position, field.map_size[1])
            left, top, right, bottom = inside(field.boxes(channel, row, column), size)[0]
            patch = torch.zeros_like(image)
            patch[..., top:bottom, left:right] = image[..., top:bottom, left:right]
            assert responses(model, patch)[name][0, channel, row, column] == found[channel, row, column]


@pytest.mark.parametrize("case", WHOLE, ids=lambda case: case.name)
def test_what_sees_the_whole_image_says_so(case: Case) -> None:
    model = case.model()
    name = [name for name in places(model, case.size) if "." not in name][-1]
    field = receptive_field(model, name, case.size)
    assert field.whole_image
    assert field.size == case.size
    assert set(map(tuple, all_boxes(field).reshape(-1, 4))) == {(0, 0, case.size[1], case.size[0])}


def test_what_comes_before_a_global_layer_is_local() -> None:
    model = WHOLE[0].model()
    assert not receptive_field(model, "0", WHOLE[0].size).whole_image


# --- numbers from the literature -------------------------------------------------------------------------------------

KNOWN = [
    ("AlexNet conv1", alexnet, "0", 11, 4),
    ("AlexNet conv2", alexnet, "3", 51, 8),
    ("AlexNet conv3", alexnet, "6", 99, 16),
    ("AlexNet conv4", alexnet, "8", 131, 16),
    ("AlexNet conv5", alexnet, "10", 163, 16),
    ("AlexNet pool5", alexnet, "12", 195, 32),
    ("VGG16 conv5_3", vgg, "conv5_3", 196, 16),
    ("VGG16 pool5", vgg, "pool5", 212, 32),
    ("MobileNetV1", mobilenet_v1, "26", 315, 32),
    ("ResNet-50 layer3", lambda: resnet((3, 4, 6, 3), bottleneck=True), "layer3", 267, 16),
    ("ResNet-50 layer4", lambda: resnet((3, 4, 6, 3), bottleneck=True), "layer4", 427, 32),
]


@pytest.mark.parametrize(("build", "layer", "size", "stride"), [k[1:] for k in KNOWN], ids=[k[0] for k in KNOWN])
def test_known_sizes(build: object, layer: str, size: int, stride: int) -> None:
    field = receptive_field(build(), layer, 224)
    assert field.size == (size, size)
    assert field.stride == (stride, stride)
    assert not field.whole_image


def test_size_does_not_depend_on_the_image_even_when_it_is_larger() -> None:
    field = receptive_field(alexnet(), "10", (64, 80))
    assert field.whole_image
    assert field.size == (163, 163)
    assert field.boxes(0, 0, 0).tolist() == [[0, 0, 80, 64]]


# --- boxes -----------------------------------------------------------------------------------------------------------


def test_boxes_leave_the_image_as_if_it_went_on() -> None:
    field = receptive_field(alexnet(), "3", (224, 192))
    rows, columns = np.indices(field.map_size).reshape(2, -1)
    boxes = field.boxes(0, rows, columns)
    np.testing.assert_array_equal(boxes[:, 0], 8 * columns - 18)  # 2 pixels of padding, and 2 of stride 8 in conv2
    np.testing.assert_array_equal(boxes[:, 1], 8 * rows - 18)
    np.testing.assert_array_equal(boxes[:, 2:] - boxes[:, :2], 51)
    assert boxes.dtype == np.int32


def test_boxes_leave_the_image_on_a_map_of_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 4, 4), nn.Conv2d(2, 2, 3, padding=1))
    assert receptive_field(model, "1", (4, 12)).boxes(0, [0], [1, 0]).tolist() == [[0, -4, 12, 8], [-4, -4, 8, 8]]


def test_a_box_ends_at_an_exact_border_that_is_inside_the_image() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1, dilation=2))  # taps at -1, 1, 3: pixel 0 is not read
    assert receptive_field(model, "0", (9, 9)).boxes(0, 0, 3).tolist() == [[2, 1, 7, 4]]


def test_channels_of_a_concatenation_keep_their_own_boxes() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large, self.join = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 5, padding=2), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.join(torch.cat([self.small(x), self.large(x)], 1))

    field = receptive_field(Branches(), "join", 16)
    assert field.size == (5, 5)
    boxes = field.boxes([0, 1, 2, 3], 8, 9)
    assert boxes.tolist() == [[9, 8, 10, 9]] * 2 + [[7, 6, 12, 11]] * 2


def test_a_neuron_that_sees_only_padding_has_an_empty_box() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1, padding=2))
    field = receptive_field(model, "0", 8)
    assert field.boxes(0, [0, 2, 11], [3, 2, 11]).tolist() == [[1, 0, 1, 0], [0, 0, 1, 1], [8, 8, 8, 8]]


def test_neurons_are_broadcast_and_checked() -> None:
    field = receptive_field(alexnet(), "0", 64)
    assert field.boxes(0, 1, 2).shape == (1, 4)
    assert field.boxes([0, 1], 1, [2, 3]).shape == (2, 4)
    assert field.boxes([], [], []).shape == (0, 4)
    with pytest.raises(UnitvisError, match="channels 0 to 3, not 4 to 4"):
        field.boxes(4, 0, 0)
    with pytest.raises(UnitvisError, match="rows 0 to 14"):
        field.boxes(0, [0, -1], 0)


def test_bounds_stay_small_where_all_channels_are_alike() -> None:
    field = receptive_field(densenet((4, 4)), "1", 224)
    assert field._rows.shape == (2, 1, 56, 1)
    assert field._columns.shape == (2, 1, 1, 56)
