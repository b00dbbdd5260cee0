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
argmax, topk, epilogue, residual, normalize, magnitudes = (
    sys.modules[f"unitvis_kernels.{name}"]
    for name in ("spatial_argmax", "topk_merge", "epilogue", "residual", "normalize", "magnitudes")
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
    argmax.launch(x, None, None, keys)
    assert torch.equal(keys, naive.spatial_argmax(x))


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=["nchw", "channels_last"])
def test_argmax_split(layout: torch.memory_format) -> None:
    x = special(1, 9, 61, 67).half().contiguous(memory_format=layout)
    x[0, 6, 50:, 50:] = 9.0  # ties in the last split
    keys = torch.full((1, 9), POISON)
    if layout == CONTIGUOUS:
        x = torch.cat([x, x.flip(1)], dim=1).repeat(1, 1, 2, 2)  # long enough for two programs a row
        keys = torch.full((1, 18), POISON)
    assert argmax.plan(x, keys.fill_(uk.BLANK)).options["SPLITS"] > 1
    argmax.launch(x, None, None, keys)
    assert torch.equal(keys, naive.spatial_argmax(x))


@pytest.mark.parametrize("inside", [(0, 1, 0, 1), (2, 5, 3, 4), (1, 37, 2, 28), (36, 37, 0, 29)], ids=str)
def test_argmax_inside_a_rectangle(inside: tuple[int, int, int, int]) -> None:
    x = special(2, 9, 37, 29).half().contiguous(memory_format=CHANNELS_LAST)
    top, bottom, left, right = inside
    x[0, 3, top:bottom, left:right] = -float("inf")
    keys = torch.full((2, 9), POISON)
    assert argmax.plan(x, keys, inside) is not None
    argmax.launch(x, None, inside, keys.fill_(uk.BLANK))
    assert torch.equal(keys, naive.spatial_argmax(x, inside))


def test_argmax_inside_a_rectangle_split() -> None:
    x = special(1, 9, 81, 90).half().contiguous(memory_format=CHANNELS_LAST)
    x[0, 6, 50:, 50:] = 9.0  # ties in the last split
    keys, inside = torch.full((1, 9), POISON), (3, 80, 1, 88)
    assert argmax.plan(x, keys, inside).options["SPLITS"] > 1
    argmax.launch(x, None, inside, keys.fill_(uk.BLANK))
    assert torch.equal(keys, naive.spatial_argmax(x, inside))


def test_argmax_of_a_map_that_starts_between_vectors() -> None:
    x = special(2, 5, 4, 7).half().flatten()
    x = torch.cat([x[:3], x])[3:].view(2, 5, 4, 7)
    assert x.data_ptr() % 16
    keys = torch.full((2, 5), POISON)
    argmax.launch(x, None, None, keys)
    assert torch.equal(keys, naive.spatial_argmax(x))


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


@pytest.mark.parametrize("images", [16, 70])
def test_topk_takes_overflows_for_infinity_and_clears_the_keys(images: int) -> None:
    keys, ids = stream("nan, -inf and padding", images, 19)
    want, got = uk.topk_state(19, 3), uk.topk_state(19, 3)
    values, positions = uk.unpack(keys)
    lost = values.isnan() | (values == -INF)
    naive.topk_merge_(want, naive.pack(values.masked_fill(lost, INF), positions.masked_fill(lost, 0)), ids)
    buffer = torch.full((images, 25), POISON)
    part = buffer[:, 2:21].copy_(keys)
    topk.launch(got, part, ids, overflows=True, clear=True)
    assert torch.equal(got, want)
    assert (part == uk.BLANK).all()
    assert (buffer[:, :2] == POISON).all()
    assert (buffer[:, 21:] == POISON).all()


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
    "pool 2 1": (torch.float16, torch.float16, "relu", (2, 1, 0), False),
    "pool 3 1 1": (torch.bfloat16, None, "relu", (3, 1, 1), True),
    "pool 4 2": (torch.float16, torch.float16, None, (4, 2, 1), False),  # common rows are read again from 4 on
    "pool 4 1": (torch.float16, None, "relu6", (4, 1, 2), False),
}


def written(shape: tuple[int, ...]) -> Tensor:
    """Keys to be written, between other columns: blank, in rows of a wider buffer."""
    buffer = torch.full((shape[0], shape[1] + 5), POISON)
    keys = buffer[:, 2:-3]
    return keys.fill_(uk.BLANK)


def check_around(keys: Tensor) -> None:
    buffer = keys._base
    assert (buffer[:, :2] == POISON).all()
    assert (buffer[:, -3:] == POISON).all()


def check_positions(keys: Tensor, want: Tensor, floor: Tensor) -> None:
    """The same values, and positions unless the value lies below the floor."""
    assert torch.equal(keys >> 32, want >> 32)
    below = uk.unpack(want)[0] < floor
    assert torch.equal(keys[~below], want[~below])
    assert ((keys == want) | (uk.unpack(keys)[1] == 2**31 - 1))[below].all()


FLOORS = {"none": NAN, "infinite": INF, "below all": -INF, "a value": 2.0}


@pytest.mark.parametrize("shape", [(2, 10, 13, 12), (1, 3, 5, 70), (1, 66, 4, 4)], ids=str)
@pytest.mark.parametrize("case", EPILOGUES)
def test_epilogue(case: str, shape: tuple[int, ...]) -> None:
    dtype, bias_dtype, activation, pool, key_after = EPILOGUES[case]
    x = in_dtype(special(*shape), dtype).contiguous(memory_format=CHANNELS_LAST)
    bias = None
    if bias_dtype is not None:
        bias = torch.linspace(-1.3, 1.7, shape[1]).to(bias_dtype)
        bias[2] = INF
    want = naive.epilogue(x, bias, activation, pool, key_after)
    for floor in (None, torch.tensor(list(FLOORS.values())).repeat(shape[1])[: shape[1]]):
        keys, y = written(shape), epilogue.new_map(x, pool).fill_(NAN)
        assert epilogue.launch(x, bias, activation, pool, key_after, floor, keys, y) is y  # no fallback
        check_around(keys)
        check_positions(keys, want[0], torch.full(shape[1:2], NAN) if floor is None else floor)
        assert same(y, want[1])


def test_epilogue_looks_for_no_position_below_the_floor() -> None:
    x = special(2, 10, 13, 12).nan_to_num(1.0).clamp(-9, 9).half().contiguous(memory_format=CHANNELS_LAST)
    for pool in ((), (3, 2, 0)):
        keys = written((2, 10))
        epilogue.launch(x, None, "relu", pool, False, torch.full((10,), INF), keys)
        assert (uk.unpack(keys)[1] == 2**31 - 1).all()


@pytest.mark.parametrize("pool", [(3, 2, 0), (3, 2, 1), (2, 2, 0), (3, 1, 1), (2, 3, 0), ()], ids=str)
def test_epilogue_split(pool: tuple[int, ...]) -> None:
    x = special(1, 9, 70, 37).half().contiguous(memory_format=CHANNELS_LAST)
    x[0, 6, 50:, 30:] = 9.0  # ties in the last split
    for key_after in (False, True):
        keys, y = written((1, 9)), epilogue.new_map(x, pool).fill_(NAN)
        planned = epilogue.plan(x, None, "relu", pool, key_after, None, keys, y)
        assert planned is not None
        splits = planned.options["SPLITS"]
        planned.options.update(
            {"SPLITS": 6} | ({"SHARED": True} if pool else {})
        )  # six: of 35 rows 6 are left for the last
        planned._replace(grid=(planned.grid[0] // splits * 6,)).run()
        want = naive.epilogue(x, None, "relu", pool, key_after)
        check_around(keys)
        assert torch.equal(keys, want[0])
        assert same(y, want[1])


@pytest.mark.parametrize("shape", [(2, 10, 13, 12), (1, 66, 4, 4), (1, 3, 30, 41)], ids=str)
@pytest.mark.parametrize("biases", ["both", "one", "none"])
def test_epilogue_residual(biases: str, shape: tuple[int, ...]) -> None:
    dtype = torch.float32 if biases == "none" else torch.float16
    x, shortcut = (in_dtype(part, dtype) for part in (special(*shape), special(*shape).flip(1, 2) * 0.75))
    x, shortcut = (part.contiguous(memory_format=CHANNELS_LAST) for part in (x, shortcut))
    bias = None if biases == "none" else torch.linspace(-1.3, 1.7, shape[1]).half()
    shortcut_bias = torch.linspace(2.1, -0.7, shape[1]) if biases == "both" else None
    turns = ("relu", "1111"), (None, "1010"), ("relu6", "0001"), ("relu", "0000"), ("relu", "0110")
    for turn, (activation, taps) in enumerate(turns):
        floor = None if turn % 2 else torch.tensor(list(FLOORS.values())).repeat(shape[1])[: shape[1]]
        floors = [floor] * 4
        buffer = torch.full((shape[0], 4 * shape[1] + 1), POISON)
        parts = [buffer[:, i * shape[1] : (i + 1) * shape[1]] for i in range(4)]
        keys = [part.fill_(uk.BLANK) if tap == "1" else None for part, tap in zip(parts, taps, strict=True)]
        y = torch.full_like(x, NAN)
        arguments = x, shortcut, bias, shortcut_bias, activation
        assert residual.launch(*arguments, floors, *keys, y=y) is y  # no fallback
        wanted, want = naive.residual(*arguments)
        assert same(y, want)
        assert (buffer[:, -1] == POISON).all()
        for got, part, one in zip(keys, parts, wanted, strict=True):
            if got is None:
                assert (part == POISON).all()
            else:
                check_positions(got, one, torch.full(shape[1:2], NAN) if floor is None else floor)


def test_epilogue_residual_split() -> None:
    x = special(1, 9, 30, 37).half().contiguous(memory_format=CHANNELS_LAST)
    keys, y = [written((1, 9)) for _ in range(4)], torch.full_like(x, NAN)
    planned = residual.plan_pixels(x, x, None, None, "relu", keys, [None] * 4, y)
    planned.options["SPLITS"] = 3  # more than `plan` chooses for a map of this size
    planned._replace(grid=(3,)).run()
    wanted, want = naive.residual(x, x, None, None, "relu")
    assert same(y, want)
    for got, one in zip(keys, wanted, strict=True):
        assert torch.equal(got, one)


def test_epilogue_has_no_kernel_for_another_layout_of_maps_or_keys() -> None:
    x = torch.zeros(2, 8, 6, 6).half().contiguous(memory_format=CHANNELS_LAST)
    keys = written((2, 8))
    for pool in ((), (2, 2, 0)):
        y = epilogue.new_map(x, pool)
        assert epilogue.plan(x, None, None, pool, False, None, keys, y) is not None
        assert epilogue.plan(x.contiguous(), None, None, pool, False, None, keys, y) is None
        assert epilogue.plan(x, None, None, pool, False, None, torch.zeros(8, 2, dtype=torch.int64).T, y) is None
    for shortcut, taps in ((x.contiguous(), [keys, None]), (x, [keys, torch.zeros(2, 8, dtype=torch.int64)])):
        assert residual.plan_pixels(x, shortcut, None, None, None, [*taps, None, None], [None] * 4, x) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_normalize(dtype: torch.dtype) -> None:
    x = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 3).reshape(1, 16, 16, 3)  # each byte, each channel
    x = torch.cat([x, x.flip(1)]).repeat(1, 3, 9, 1)[:, :, :141].contiguous()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for pixels, channels in ((x, 3), (x[..., :1].contiguous(), 1)):
        y = torch.full(pixels.shape, NAN, dtype=dtype)
        want = naive.normalize(pixels, mean[:channels], std[:channels], dtype)
        assert same(normalize.launch(pixels, mean[:channels], std[:channels], dtype, (), y), want)


# channels, size, kernel, stride, padding of a first convolution
FIRST = {
    "as AlexNet": (3, (23, 30), (11, 11), (4, 4), (2, 2)),
    "as ResNet-50": (3, (9, 8), (7, 7), (2, 2), (3, 3)),
    "patches, pixels left over": (3, (19, 17), (4, 4), (4, 4), (0, 0)),
    "grey, other strides": (1, (17, 20), (5, 4), (3, 5), (1, 2)),
    "large patches": (3, (32, 33), (16, 16), (16, 16), (0, 0)),
}


@pytest.mark.parametrize("name", FIRST)
def test_normalize_into_blocks(name: str) -> None:
    C, size, kernel, stride, padding = FIRST[name]
    blocks = uk.Blocks.of(C, size, kernel, uk.ConvGeometry(stride, padding))
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, *size, C), dtype=torch.uint8, generator=g)
    mean, std = (0.485, 0.456, 0.406)[:C], (0.229, 0.224, 0.225)[:C]
    x = naive.normalize(pixels, mean, std, torch.float32)
    x[1, 0, 3, 4], x[2, 0, 0, 0] = NAN, -INF
    for dtype in (torch.float32, torch.float16):
        y = torch.full((3, *blocks.size, blocks.channels), NAN, dtype=dtype)
        want = naive.arrange(naive.normalize(pixels, mean, std, dtype), blocks, dtype)
        assert same(normalize.launch(pixels, mean, std, dtype, blocks.as_ints(), y), want)
        strided = pixels.flip(2)[:, :, ::1].transpose(1, 2).contiguous().transpose(1, 2)
        got = normalize.launch(strided, mean, std, dtype, blocks.as_ints())
        assert same(got, naive.arrange(naive.normalize(strided, mean, std, dtype), blocks, dtype))
        for layout in (CONTIGUOUS, CHANNELS_LAST):
            y.fill_(NAN)
            got = normalize.launch_arrange(x.contiguous(memory_format=layout), blocks.as_ints(), dtype, y)
            assert got.data_ptr() == y.data_ptr()  # no fallback
            assert same(got, naive.arrange(x, blocks, dtype))


def kernel_magnitudes(x: Tensor, *constants: tuple[float, ...]) -> Tensor:
    """float32 [N, C, 5] by the kernel, never in PyTorch."""
    y = magnitudes.new_magnitudes(x, constants[0]).fill_(NAN)
    magnitudes.plan(x, *constants, y).run()
    return y


@pytest.mark.parametrize(("C", "size"), [(1, (1, 1)), (4, (6, 9)), (3, (9, 20)), (1, (65, 132))], ids=str)
def test_magnitudes(C: int, size: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, C, *size, generator=g) * torch.tensor([1, 4000])[:, None, None, None]
    for dtype, layout in ((torch.float32, CONTIGUOUS), (torch.float16, CHANNELS_LAST)):
        maps = x.to(dtype).contiguous(memory_format=layout)
        found = kernel_magnitudes(maps, (), ())
        assert same(found, naive.magnitudes(maps, (), ()))
    one = maps[1:].transpose(2, 3).contiguous().transpose(2, 3)
    assert same(kernel_magnitudes(one, (), ()), found[1:])  # another batch, address and layout: the same bits
    if C == 4:
        return
    mean, std = (0.485, 0.456, 0.406)[:C], (-0.229, 0.224, 0.225)[:C]
    pixels = torch.randint(0, 256, (2, *size, C), dtype=torch.uint8, generator=g)
    found = kernel_magnitudes(pixels, mean, std)
    assert same(found, naive.magnitudes(pixels, mean, std))
    assert same(kernel_magnitudes(naive.normalize(pixels, mean, std, torch.float32), (), ()), found)
    strided = pixels[:1].transpose(1, 2).contiguous().transpose(1, 2)
    assert same(kernel_magnitudes(strided, mean, std), found[:1])


@pytest.mark.parametrize("value", [-NAN, -INF], ids=str)
def test_magnitudes_of_what_is_not_finite(value: float) -> None:
    for dtype in (torch.float32, torch.float16):
        x = torch.zeros(3, 2, 9, 11, dtype=dtype)
        x[0, 1, 0, 0], x[2, 0, 8, 10] = value, value
        found = kernel_magnitudes(x, (), ())
        assert same(found, naive.magnitudes(x, (), ()))
        assert found.tolist() == [[[0.0] * 5, [INF] * 5], [[0.0] * 5] * 2, [[INF] * 5, [0.0] * 5]]
