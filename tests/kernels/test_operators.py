"""spatial_argmax and the top-k operators on the CPU against `naive`: values and positions bit for bit."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

import unitvis_kernels as uk
from unitvis_kernels import naive

INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def maps() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    ramp = torch.randn(3, 5, 4, 7, generator=g)
    ties = torch.randint(-2, 3, (4, 6, 5, 3), generator=g).float()
    zeros = torch.zeros(2, 3, 2, 2)
    zeros[0] = torch.tensor([[-0.0, 0.0], [-0.0, 0.0]])
    special = torch.randn(6, 2, 3, 3, generator=g)
    special[0, 0, 1, 2] = NAN
    special[1, 1] = NAN
    special[2, 0] = -INF
    special[3, 1, 2, 2] = INF
    special[4, 0, 0, 1], special[4, 0, 2, 0] = NAN, INF
    special[5, 0] = torch.tensor([[-INF, -INF, -1e30], [-1e-40, -INF, 0], [1e-40, 3e38, 3e38]])
    return {
        "random": ramp,
        "ties": ties,
        "signed zeros": zeros,
        "all equal": torch.full((2, 4, 3, 3), -1.5),
        "nan and infinities": special,
        "one image, one neuron": torch.randn(1, 3, 1, 1, generator=g),
        "one row": torch.randn(2, 3, 1, 9, generator=g),
        "one channel": torch.randn(3, 1, 6, 2, generator=g),
        "negative nan": -torch.full((1, 1, 2, 2), NAN),
    }


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.stack([x, x * 0], dim=-1)[..., 0],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x: x[:1].expand(3, *x.shape[1:]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", maps())
def test_spatial_argmax_equals_naive(case: str, layout: str, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout](maps()[case].to(dtype))
    keys = uk.spatial_argmax(x)
    assert torch.equal(keys, naive.spatial_argmax(x))
    assert torch.equal(keys, naive.pack(*uk.unpack(keys)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", maps())
def test_below_a_floor_only_the_position_may_be_missing(case: str, layout: str) -> None:
    x = LAYOUTS[layout](maps()[case])
    keys = uk.spatial_argmax(x)
    values = uk.unpack(keys)[0]
    for floor in (values[0], values.nan_to_num(nan=-INF).amax(0), values.nan_to_num(nan=INF).amin(0), values[0] * NAN):
        got = uk.spatial_argmax(x, floor)
        kept = ~(values < floor)
        assert torch.equal(got[kept], keys[kept])
        assert torch.equal(got >> 32, keys >> 32)
        found, missing = uk.unpack(got)[1], 2**31 - 1
        assert ((got == keys) | (found == missing))[~kept].all()
    few = torch.randn(8, 6, 4, 4).contiguous(memory_format=torch.channels_last)
    highest = few.amax((0, 2, 3))
    assert (uk.unpack(uk.spatial_argmax(few, highest))[1] != missing).sum() == 6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", maps())
def test_spatial_argmax_inside_a_rectangle(case: str, layout: str) -> None:
    x = LAYOUTS[layout](maps()[case])
    height, width = x.shape[2:]
    for inside in ((0, 1, 0, 1), (0, height, width // 2, width), (height // 2, height, width - 1, width)):
        keys = uk.spatial_argmax(x, inside=inside)
        assert torch.equal(keys, naive.spatial_argmax(x, inside))
        floor = uk.unpack(keys)[0].nan_to_num(nan=INF).amax(0)
        got = uk.spatial_argmax(x, floor, inside)
        assert torch.equal(got >> 32, keys >> 32)
        assert ((got == keys) | (uk.unpack(keys)[0] < floor)).all()


@pytest.mark.parametrize("inside", [(0, 0, 0, 4), (0, 5, 0, 4), (-1, 2, 0, 4), (0, 4, 3, 2)], ids=str)
def test_spatial_argmax_refuses_what_is_no_rectangle(inside: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="no rectangle of a map of 4 x 4"):
        uk.spatial_argmax(torch.zeros(2, 3, 4, 4), inside=inside)


def test_keys_order_as_values_then_lower_positions() -> None:
    values = torch.tensor([-INF, -3e38, -1.0, -1e-40, -0.0, 0.0, 1e-45, 1.0, INF])
    keys = uk.pack(values, torch.zeros(9, dtype=torch.int64))
    assert keys[4] == keys[5]
    assert sorted(set(keys.tolist())) == list(dict.fromkeys(keys.tolist()))
    assert uk.BLANK < keys[0] < keys[-1] < uk.NAN_KEY
    later = uk.pack(torch.ones(3), torch.tensor([0, 7, 2**31 - 1]))
    assert later.tolist() == sorted(later.tolist(), reverse=True)
    assert uk.unpack(later)[1].tolist() == [0, 7, 2**31 - 1]
    assert uk.unpack(torch.tensor([uk.BLANK, uk.NAN_KEY]))[1].tolist() == [-1, 0]


@pytest.mark.parametrize(
    ("x", "value"),
    [
        (torch.zeros(2, 3, 4), r"\(2, 3, 4\)"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.float64), "float64"),
        (torch.zeros(2, 3, 0, 4), "0 x 4"),
    ],
)
def test_spatial_argmax_refuses(x: Tensor, value: str) -> None:
    with pytest.raises(ValueError, match=value):
        uk.spatial_argmax(x)


def stream(kind: str, images: int, channels: int) -> tuple[Tensor, Tensor]:
    """Keys [images, channels] and ids in the order of arrival."""
    g = torch.Generator().manual_seed(3)
    values = torch.randn(images, channels, generator=g)
    ids = torch.arange(images)
    if kind == "heavy ties":
        values = torch.randint(0, 3, values.shape, generator=g).float()
    elif kind == "all equal":
        values = torch.zeros_like(values)
    elif kind == "ascending":
        values = values.sort(dim=0).values
    elif kind == "ids descend":
        ids = ids.flip(0)
    elif kind == "large ids at random":
        ids = torch.randperm(images, generator=g) + 2**40
    elif kind == "nan and -inf":
        values[torch.rand(values.shape, generator=g) < 0.3] = NAN
        values[torch.rand(values.shape, generator=g) < 0.5] = -INF
        values[:, 0] = NAN
    positions = torch.randint(0, 50, values.shape, generator=g)
    return uk.pack(values, positions), ids


KINDS = ["random", "heavy ties", "all equal", "ascending", "ids descend", "large ids at random", "nan and -inf"]


@pytest.mark.parametrize("k", [1, 9, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_topk_merge_equals_naive(kind: str, k: int) -> None:
    keys, ids = stream(kind, 37, 6)  # fewer than 40: some places stay blank
    want, at_once, one_by_one = (uk.topk_state(6, k) for _ in range(3))
    naive.topk_merge_(want, keys, ids)
    uk.topk_merge_(at_once, keys, ids)
    for n in range(37):
        uk.topk_merge_(one_by_one, keys[n : n + 1], ids[n : n + 1])
    assert torch.equal(at_once, want)
    assert torch.equal(one_by_one, want)
    values, found, positions = uk.topk_read(want)
    assert torch.equal(torch.where(found < 0, uk.BLANK, naive.pack(values, positions)), want[:, :k])


def test_topk_merge_takes_an_id_for_each_channel() -> None:
    keys, _ = stream("heavy ties", 37, 6)
    g = torch.Generator().manual_seed(6)
    ids = torch.stack([torch.randperm(37, generator=g) - 2 for _ in range(6)], dim=1)
    want, got = uk.topk_state(6, 9), uk.topk_state(6, 9)
    naive.topk_merge_(want, keys, ids)
    uk.topk_merge_(got, keys, ids)
    assert torch.equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_state_merged_with_state_is_the_whole(kind: str) -> None:
    keys, ids = stream(kind, 50, 5)
    whole = uk.topk_state(5, 9)
    naive.topk_merge_(whole, keys, ids)
    order = list(range(50))
    random.Random(1).shuffle(order)
    shards = []
    for part in (order[:7], order[7:8], order[8:30], order[30:], []):
        shards.append(uk.topk_state(5, 9))
        uk.topk_merge_(shards[-1], keys[part], ids[part])
    left, right = uk.topk_state(5, 9), shards[4]
    for shard in shards[:4]:
        uk.topk_merge_states_(left, shard)
        uk.topk_merge_states_(right, shard)
    assert torch.equal(left, whole)
    assert torch.equal(right, whole)


def test_a_repeated_batch_changes_no_place_and_padding_is_ignored() -> None:
    keys, ids = stream("heavy ties", 20, 4)
    state = uk.topk_state(4, 9)
    uk.topk_merge_(state, keys, ids)
    before = state.clone()
    uk.topk_merge_(state, keys, ids)
    assert torch.equal(state, before)
    uk.topk_merge_(state, torch.full((3, 4), uk.NAN_KEY), torch.full((3,), -1))
    assert torch.equal(state, before)
    better = uk.pack(torch.full((1, 4), 9.0), torch.full((1, 4), 3))
    uk.topk_merge_(state, better, ids[:1])  # the same image again, with a larger key: replaces its own entry
    values, found, _ = uk.topk_read(state)
    assert (found[:, 0] == ids[0]).all()
    assert (values[:, 0] == 9).all()
    assert all((row == ids[0]).sum() == 1 for row in found)


def test_topk_merge_takes_overflows_for_infinity_and_clears_the_keys() -> None:
    keys, ids = stream("nan and -inf", 37, 6)
    values, positions = uk.unpack(keys)
    lost = values.isnan() | (values == -INF)
    want, got = uk.topk_state(6, 9), uk.topk_state(6, 9)
    naive.topk_merge_(want, naive.pack(values.masked_fill(lost, INF), positions.masked_fill(lost, 0)), ids)
    uk.topk_merge_(got, keys, ids, overflows=True, clear=True)
    assert torch.equal(got, want)
    assert (keys == uk.BLANK).all()


def test_topk_merge_refuses_what_does_not_fit() -> None:
    state, keys, ids = uk.topk_state(4, 9), torch.zeros(2, 4, dtype=torch.int64), torch.arange(2)
    for bad, value in (
        ((state, keys.int(), ids), "int32"),
        ((state, keys, ids[:1]), r"\(1,\)"),
        ((state, keys[:, :3], ids), r"\(2, 3\)"),
        ((state[:, :3], keys, ids), r"\(4, 3\)"),
    ):
        with pytest.raises(ValueError, match=value):
            uk.topk_merge_(*bad)
    with pytest.raises(ValueError, match=r"k .*0"):
        uk.topk_state(4, 0)


def test_operators_are_registered_right() -> None:
    x = torch.randn(2, 3, 4, 4)
    keys = uk.spatial_argmax(x)
    for maps, inside in (
        (x, None),
        (x.contiguous(memory_format=torch.channels_last), None),
        (x, (1, 3, 0, 2)),
    ):
        arguments = maps, None, inside, torch.full((2, 3), uk.BLANK)
        torch.library.opcheck(torch.ops.unitvis.spatial_argmax.default, arguments)
    for flags in ((False, False), (True, True)):
        arguments = uk.topk_state(3, 2), keys, torch.arange(2), *flags
        torch.library.opcheck(torch.ops.unitvis.topk_merge_.default, arguments)


def test_operators_compile_and_keep_to_fake_tensors() -> None:
    def step(x: Tensor, state: Tensor) -> Tensor:
        uk.topk_merge_(state, uk.spatial_argmax(x * 2), torch.arange(2))
        return state

    x, eager = torch.randn(2, 3, 4, 4), uk.topk_state(3, 2)
    step(x, eager)
    compiled = uk.topk_state(3, 2)
    torch.compile(step, fullgraph=True, backend="aot_eager")(x, compiled)
    assert torch.equal(eager, compiled)
    assert uk.spatial_argmax(x.to("meta")).shape == (2, 3)


def test_what_is_no_tensor_is_named() -> None:
    x, ids = torch.zeros(2, 3, 4, 4), torch.arange(2)
    keys, state = uk.spatial_argmax(x), uk.topk_state(3, 2)
    array = np.zeros((2, 3, 4, 4), np.float32)
    for call, message in (
        (lambda: uk.spatial_argmax(array), r"spatial_argmax takes x as a tensor, not ndarray; .*torch.from_numpy\("),
        (lambda: uk.topk_merge_(state, keys, [0, 1]), r"topk_merge_ takes ids as a tensor, not list; .*torch.tensor\("),
        (lambda: uk.topk_merge_(state, keys.numpy(), ids), "takes keys as a tensor, not ndarray"),
        (lambda: uk.epilogue(x, bias=[0.0] * 3), "epilogue takes bias as a tensor, not list"),
        (lambda: uk.conv_argmax(x, array), "conv_argmax takes weight as a tensor, not ndarray"),
        (lambda: uk.normalize(array, [0.5], [0.5]), "normalize takes x as a tensor"),
        (lambda: uk.magnitudes(array), "magnitudes takes x as a tensor"),
        (lambda: uk.unpack(keys.tolist()), "unpack takes keys as a tensor"),
        (lambda: uk.pack(array, ids), "pack takes values as a tensor"),
        (lambda: uk.topk_read(state.tolist()), "topk_read takes state as a tensor"),
        (lambda: uk.topk_merge_states_(state, state.numpy()), "topk_merge_states_ takes other as a tensor"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
