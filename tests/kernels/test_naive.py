"""The definitions in `naive` on inputs small enough to work out by hand; everything else is tested against them."""

from __future__ import annotations

import math

import pytest
import torch

import unitvis_kernels as uk
from unitvis_kernels import naive
from unitvis_kernels.geometry import ConvGeometry

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("value", "position", "key"),
    [
        (0.0, 0, 0x00000000_7FFFFFFF),
        (-0.0, 3, 0x00000000_7FFFFFFC),
        (1.0, 2**31 - 1, 0x3F800000_00000000),
        (-1.0, 1, -0x3F800001_00000000 + 0x7FFFFFFE),  # ~0x3f800000 is -0x3f800001
        (INF, 0, 0x7F800000_7FFFFFFF),
        (-INF, 0, -0x7F800001_00000000 + 0x7FFFFFFF),
        (NAN, 7, 0x7FFFFFFF_7FFFFFFF),
        (-NAN, 7, 0x7FFFFFFF_7FFFFFFF),
        (1e-45, 0, 0x00000001_7FFFFFFF),
    ],
)
def test_pack(value: float, position: int, key: int) -> None:
    for pack in (naive.pack, uk.pack):
        assert pack(torch.tensor([value]), torch.tensor([position])).tolist() == [key]


@pytest.mark.parametrize(
    ("flat", "value", "position"),
    [
        ([1.0, 3.0, 2.0, 3.0], 3.0, 1),
        ([-2.0, -1.0, -3.0, -1.0], -1.0, 1),
        ([-1.0, -0.0, 0.0, -1.0], 0.0, 1),
        ([0.0, 0.0, INF, INF], INF, 2),
        ([-INF, -INF, -INF, -INF], -INF, 0),
        ([-INF, -INF, -1.0, -INF], -1.0, 2),
        ([0.0, INF, NAN, 1.0], NAN, 0),
        ([0.0, INF, 1.0, -NAN], NAN, 0),
    ],
    ids=str,
)
def test_spatial_argmax(flat: list[float], value: float, position: int) -> None:
    keys = naive.spatial_argmax(torch.tensor(flat).view(1, 1, 2, 2))
    values, positions = uk.unpack(keys)
    torch.testing.assert_close(values, torch.tensor([[value]]), rtol=0, atol=0, equal_nan=True)
    assert positions.tolist() == [[position]]


def test_topk_merge() -> None:
    state = uk.topk_state(1, 3)
    values = torch.tensor([[1.0], [5.0], [5.0], [NAN], [9.0], [5.0], [NAN], [-INF]])
    positions = torch.tensor([[0], [8], [2], [0], [0], [1], [0], [0]])
    naive.topk_merge_(state, uk.pack(values, positions), torch.tensor([4, 7, 6, 20, -1, 7, 10, 5]))
    values, ids, positions = uk.topk_read(state)
    assert values.tolist() == [[5.0, 5.0, 1.0]]
    assert ids.tolist() == [[6, 7, 4]]  # of equal values the smaller id, whatever the position; id -1 is padding
    assert positions.tolist() == [[2, 1, 0]]  # of image 7's two keys the larger, at the lower position
    assert state[0, 6:].tolist() == [2, 10]
    naive.topk_merge_(state, uk.pack(torch.tensor([[2.0], [5.0]]), torch.zeros(2, 1, dtype=torch.int64)), ids[0, :2])
    assert uk.topk_read(state)[2].tolist() == [[2, 0, 0]]


def test_topk_merge_leaves_places_blank() -> None:
    state = uk.topk_state(2, 2)
    naive.topk_merge_(state, torch.tensor([[uk.BLANK, 5]]), torch.tensor([[3, 4]]))
    assert state.tolist() == [[uk.BLANK, uk.BLANK, -1, -1, 0, 2**63 - 1], [5, uk.BLANK, 4, -1, 0, 2**63 - 1]]


def test_epilogue() -> None:
    x = torch.tensor([[-3.0, 1.0, 2.0], [8.0, -5.0, 0.0]]).view(1, 1, 2, 3)
    keys, y = naive.epilogue(x, torch.tensor([-1.0]), "relu6", (2, 1, 0), key_after=False)
    assert y.tolist() == [[[[6.0, 1.0]]]]
    assert [part.item() for part in uk.unpack(keys)] == [7.0, 3]
    keys, y = naive.epilogue(-x, None, "relu6", (), key_after=True)
    assert y.tolist() == [[[[3.0, 0.0, 0.0], [0.0, 5.0, 0.0]]]]
    assert not y.signbit().any()
    assert [part.item() for part in uk.unpack(keys)] == [5.0, 4]


def test_conv_argmax() -> None:
    x = torch.arange(1.0, 13.0).view(1, 2, 2, 3)  # channels [[1 2 3] [4 5 6]] and [[7 8 9] [10 11 12]]
    weight = torch.tensor([[1.0, 10.0], [100.0, 0.0]]).view(2, 1, 1, 2)
    geometry = ConvGeometry(stride=(1, 2), padding=(0, 1), dilation=(1, 2), groups=2)
    keys, y = naive.conv_argmax(x, weight, torch.tensor([0.5, 0.0]), geometry)
    assert geometry.output_size((2, 3), (1, 2)) == (2, 2)
    # Padded by a column of zeros on either side, every window takes columns 2 j and 2 j + 2 of the five.
    assert y.tolist() == [[[[20.5, 2.5], [50.5, 5.5]], [[0.0, 800.0], [0.0, 1100.0]]]]
    assert [part.tolist() for part in uk.unpack(keys)] == [[[50.5, 1100.0]], [[2, 3]]]


def test_normalize() -> None:
    x = torch.tensor([[0, 51, 255], [255, 102, 0]], dtype=torch.uint8).view(1, 1, 2, 3)
    y = naive.normalize(x, (0.0, 0.5, 1.0), (0.5, 1.0, 2.0), torch.float64)
    assert y.shape == (1, 3, 1, 2)
    torch.testing.assert_close(y.flatten(), torch.tensor([0.0, 2.0, -0.3, -0.1, 0.0, -0.5]).double(), rtol=0, atol=1e-7)


def test_magnitudes() -> None:
    x = torch.zeros(2, 2, 5, 17)
    x[0, 0, 4, 16], x[0, 1, 1, :8] = -8.0, 2.0
    x[1, 1, 0, 0] = NAN
    # The corner is a block of one pixel, in a block of 2 x 1 blocks, one of two.
    first = [[8.0, 8.0, 4.0, 2.0, 2.0], [2.0, 0.5, 0.125, 0.0625, 0.0625]]
    assert naive.magnitudes(x, [], []).tolist() == [first, [[0.0] * 5, [INF] * 5]]
    pixels = torch.tensor([[[[0], [255]]]], dtype=torch.uint8)
    assert naive.magnitudes(pixels, [0.5], [0.25]).tolist() == [[[2.0] * 5]]
    assert naive.magnitudes(torch.tensor([[[[3.0, -1.0]], [[0.0, -2.5]]]]), [], []).tolist() == [
        [[3.0, 2.0, 2.0, 2.0, 2.0], [2.5, 1.25, 1.25, 1.25, 1.25]]
    ]
