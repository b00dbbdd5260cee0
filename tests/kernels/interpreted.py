"""The Triton kernels, interpreted on CPU tensors, give the same bits as `naive`.

Run by `test_interpreted.py` in a process of its own, because TRITON_INTERPRET must be set when kernels are defined.
"""

from __future__ import annotations

import math
import os
import sys

import pytest
import torch
from torch import Tensor

import unitvis_kernels as uk
from unitvis_kernels import naive

assert os.environ.get("TRITON_INTERPRET") == "1"
argmax, topk, epilogue, normalize = (
    sys.modules[f"unitvis_kernels.{name}"] for name in ("spatial_argmax", "topk_merge", "epilogue", "normalize")
)
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, about NaN and infinity
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # caused by Triton 3.6
]
INF, NAN = math.inf, math.nan
CHANNELS_LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format
POISON = 0x5555_5555_5555_5555


# (what fills the rest of a map, None for small integers with many ties; the values in its middle)
SPECIAL = (
    (None, [NAN]),
    (None, [-NAN, INF]),
    (None, [INF]),
    (-1.0, [-0.0, 0.0]),
    (-1.0, [1e-40, -1e-40]),
    (-INF, [-INF]),
    (None, [6.5, 7.0]),
    (-1.0, [-1.0]),
    (-2.0, [0.0, -0.0]),
)


def special(*shape: int) -> Tensor:
    """Maps [N, C, H, W] of `SPECIAL`, as many as there is room for, and then of small integers."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, shape, generator=g).float()
    for row, (rest, values) in zip(x.flatten(0, 1).flatten(1), SPECIAL, strict=False):
        if rest is not None:
            row[:] = rest
        for at, value in enumerate(values):
            row[(len(row) // 2 + at) % len(row)] = value
    return x


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.bfloat16:  # the interpreter reads its subnormal numbers wrongly
        x = x.masked_fill(x.abs() == x.new_tensor(1e-40), 1e-30)
    return x.to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether a and b hold the same bits, where every NaN is the same."""
    bits = [t.nan_to_num(7.0).flatten().view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(*bits)


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        *[(3, 5, 4, 7), (1, 70, 13, 13), (2, 6, 1, 9), (1, 3, 1, 1)],
        *[(2, 9, 1, 1), (1, 11, 7, 7), (1, 3, 37, 29), (2, 1, 6, 2)],
    ],
    ids=str,
)
def test_argmax(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = in_dtype(special(*shape), dtype).contiguous(memory_format=layout)
    keys = torch.full(shape[:2], POISON)
    assert argmax.plan(x, keys) is not None
    assert torch.equal(argmax.launch(x, keys), naive.spatial_argmax(x))


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=["nchw", "channels_last"])
def test_argmax_split(layout: torch.memory_format) -> None:
    x = special(1, 9, 61, 67).half().contiguous(memory_format=layout)
    x[0, 6, 50:, 50:] = 9.0  # ties in the last split
    keys = torch.full((1, 9), POISON)
    if layout == CONTIGUOUS:
        x = torch.cat([x, x.flip(1)], dim=1).repeat(1, 1, 2, 2)  # long enough for two programs a row
        keys = torch.full((1, 18), POISON)
    assert argmax.plan(x, keys).options["SPLITS"] > 1
    assert torch.equal(argmax.launch(x, keys), naive.spatial_argmax(x))


@pytest.mark.parametrize("inside", [(0, 1, 0, 1), (2, 5, 3, 4), (1, 37, 2, 28), (36, 37, 0, 29)], ids=str)
def test_argmax_inside_a_rectangle(inside: tuple[int, int, int, int]) -> None:
    x = special(2, 9, 37, 29).half().contiguous(memory_format=CHANNELS_LAST)
    top, bottom, left, right = inside
    x[0, 3, top:bottom, left:right] = -float("inf")
    keys = torch.full((2, 9), POISON)
    assert argmax.plan(x, keys, inside) is not None
    assert torch.equal(argmax.launch(x, keys, inside), naive.spatial_argmax(x, inside))


def test_argmax_inside_a_rectangle_split() -> None:
    x = special(1, 9, 81, 90).half().contiguous(memory_format=CHANNELS_LAST)
    x[0, 6, 50:, 50:] = 9.0  # ties in the last split
    keys, inside = torch.full((1, 9), POISON), (3, 80, 1, 88)
    assert argmax.plan(x, keys, inside).options["SPLITS"] > 1
    assert torch.equal(argmax.launch(x, keys, inside), naive.spatial_argmax(x, inside))


def test_argmax_of_a_map_that_starts_between_vectors() -> None:
    x = special(2, 5, 4, 7).half().flatten()
    x = torch.cat([x[:3], x])[3:].view(2, 5, 4, 7)
    assert x.data_ptr() % 16
    assert torch.equal(argmax.launch(x, torch.full((2, 5), POISON)), naive.spatial_argmax(x))


def stream(kind: str, images: int, channels: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    values, ids = torch.randn(images, channels, generator=g), torch.arange(images)
    if kind == "ties and duplicates":
        values = torch.randint(0, 3, values.shape, generator=g).float()
        ids = torch.randint(0, images // 2 + 1, (images,), generator=g)
    elif kind == "all equal, ids descend":
        values, ids = values * 0, ids.flip(0)
    elif kind == "ascending, large ids":
        values, ids = values.sort(dim=0).values, torch.randperm(images, generator=g) + 2**40
    elif kind == "nan, -inf and padding":
        values[torch.rand(values.shape, generator=g) < 0.3] = NAN
        values[torch.rand(values.shape, generator=g) < 0.4] = -INF
        values[:, 0], values[:, 2] = NAN, -INF
        ids[::3] = -1 - ids[::3]
    keys = uk.pack(values, torch.randint(0, 50, values.shape, generator=g))
    if kind == "an id a channel":
        ids = torch.stack([torch.randperm(images, generator=g) - 2 for _ in range(channels)], dim=1)
    return keys, ids


STREAMS = [
    "random", "ties and duplicates", "all equal, ids descend", "ascending, large ids", "nan, -inf and padding",
    "an id a channel",
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "k"), [*((kind, k) for kind in STREAMS for k in (1, 9)), ("random", 10), (STREAMS[1], 40)]
)
def test_topk(kind: str, k: int) -> None:
    keys, ids = stream(kind, 37, 6)
    want, got = uk.topk_state(6, k), uk.topk_state(6, k)
    for part in (slice(0, 1), slice(1, 17), slice(17, 37), slice(10, 20)):  # some images once more
        naive.topk_merge_(want, keys[part], ids[part])
        topk.launch(got, keys[part], ids[part])
        assert torch.equal(got, want)


def test_topk_of_a_long_batch_and_more_channels_than_a_block() -> None:
    keys, ids = stream("random", 70, 19)
    want, got = uk.topk_state(19, 3), uk.topk_state(19, 3)
    naive.topk_merge_(want, keys, ids)
    topk.launch(got, keys, ids)
    assert torch.equal(got, want)


def test_topk_of_the_last_image_at_another_position() -> None:
    state = uk.topk_state(1, 2)
    naive.topk_merge_(state, uk.pack(torch.tensor([[2.0], [1.0]]), torch.tensor([[5], [5]])), torch.arange(2))
    for position, id in ((3, 1), (9, 1), (1, 7)):  # lower: taken; higher: not; a later image: not
        keys = uk.pack(torch.ones(1, 1), torch.full((1, 1), position))
        want = state.clone()
        naive.topk_merge_(want, keys, torch.tensor([id]))
        topk.launch(state, keys, torch.tensor([id]))
        assert torch.equal(state, want)
    assert uk.topk_read(state)[2].tolist() == [[5, 3]]


@pytest.mark.parametrize("kind", ["ties and duplicates", "nan, -inf and padding"])
def test_topk_of_a_state(kind: str) -> None:
    keys, ids = stream(kind, 30, 5)
    one, other = uk.topk_state(5, 9), uk.topk_state(5, 4)
    naive.topk_merge_(one, keys[:18], ids[:18])
    naive.topk_merge_(other, keys[12:], ids[12:])
    want, got = one.clone(), one.clone()
    naive.topk_merge_(want, other[:, :4].T, other[:, 4:8].T)
    topk.launch(got, other[:, :4].T, other[:, 4:8].T)
    assert torch.equal(got, want)


# name: (dtype of x, dtype of the bias, activation, pool, key_after). The interpreter truncates float32 to bfloat16, so
# only the compiled kernel is tested with a bfloat16 x and a bias.
EPILOGUES = {
    "nothing": (torch.float32, None, None, (), False),
    "bias": (torch.float16, torch.float16, None, (), False),
    "bias in float32, relu": (torch.float16, torch.float32, "relu", (), False),
    "relu, key after": (torch.bfloat16, None, "relu", (), True),
    "relu6, key after": (torch.float16, torch.float16, "relu6", (), True),
    "pool 2 2": (torch.float16, torch.float16, "relu", (2, 2, 0), False),
    "pool 3 2": (torch.float16, torch.float16, "relu", (3, 2, 0), False),
    "pool 3 2 1": (torch.float32, torch.float32, "relu6", (3, 2, 1), True),
    "pool 3 2 1, no activation": (torch.bfloat16, None, None, (3, 2, 1), False),
    "pool 1 2": (torch.float16, None, None, (1, 2, 0), False),
    "pool 2 3": (torch.float16, torch.float16, "relu", (2, 3, 0), True),
}


@pytest.mark.parametrize("shape", [(2, 10, 13, 12), (1, 3, 5, 70), (1, 66, 4, 4)], ids=str)
@pytest.mark.parametrize("case", EPILOGUES)
def test_epilogue(case: str, shape: tuple[int, ...]) -> None:
    dtype, bias_dtype, activation, pool, key_after = EPILOGUES[case]
    x = in_dtype(special(*shape), dtype).contiguous(memory_format=CHANNELS_LAST)
    bias = None
    if bias_dtype is not None:
        bias = torch.linspace(-1.3, 1.7, shape[1]).to(bias_dtype)
        bias[2] = INF
    keys, y = epilogue.outputs(x, pool)
    keys.fill_(POISON)
    y.fill_(NAN)
    want = naive.epilogue(x, bias, activation, pool, key_after)
    got = epilogue.launch(x, bias, activation, pool, key_after, (keys, y))
    assert got[1] is y  # no fallback
    assert torch.equal(got[0], want[0])
    assert same(got[1], want[1])


def test_epilogue_split() -> None:
    x = special(1, 3, 70, 300).half().contiguous(memory_format=CHANNELS_LAST)
    keys, y = epilogue.outputs(x, (3, 2, 0))
    planned = epilogue.plan(x, None, "relu", (3, 2, 0), False, keys.fill_(uk.BLANK), y.fill_(NAN))
    assert planned is not None
    assert planned.options["SPLITS"] == 1
    planned.options["SPLITS"] = 3  # more than `plan` chooses for a map of this size
    planned._replace(grid=(3,)).run()
    want = naive.epilogue(x, None, "relu", (3, 2, 0), False)
    assert torch.equal(keys, want[0])
    assert same(y, want[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_normalize(dtype: torch.dtype) -> None:
    x = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 3).reshape(1, 16, 16, 3)  # each byte, each channel
    x = torch.cat([x, x.flip(1)]).repeat(1, 3, 9, 1)[:, :, :141].contiguous()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for pixels, channels in ((x, 3), (x[..., :1].contiguous(), 1)):
        y = torch.full(pixels.shape, NAN, dtype=dtype)
        want = naive.normalize(pixels, mean[:channels], std[:channels], dtype)
        assert same(normalize.launch(pixels, mean[:channels], std[:channels], dtype, y), want)
