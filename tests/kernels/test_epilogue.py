"""epilogue and normalize on the CPU against `naive` and PyTorch's own layers, and their registration."""

from __future__ import annotations

import itertools
import math
import struct

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import unitvis_kernels as uk
from unitvis_kernels import naive

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def conv_output(dtype: torch.dtype = torch.float32, layout: str = "nchw") -> Tensor:
    x = torch.randn(2, 4, 7, 6, generator=torch.Generator().manual_seed(0)) * 4
    x[0, 1] = -x[0, 1].abs()
    x[1, 0] = 0.0
    x[1, 2, 3, 4] = math.nan
    return x.to(dtype).contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_epilogue_is_the_chain_of_layers(dtype: torch.dtype, layout: str) -> None:
    x = conv_output(dtype, layout)
    layers = {None: lambda t: t, "relu": F.relu, "relu6": F.relu6}
    biases = (None, torch.tensor([0.3, -2.0, 1e-3, 0.0]).to(dtype))
    pools = (None, (2, 2), (3, 2), (3, 2, 1), (1, 2), (2, 3))
    for activation, bias, pool, key_after in itertools.product(layers, biases, pools, (False, True)):
        keys, y = uk.epilogue(x, bias, activation, pool, key_after=key_after)
        v = x if bias is None else x + bias[:, None, None]
        a = layers[activation](v)
        want = a if pool is None else F.max_pool2d(a, *pool)
        assert torch.equal(y.nan_to_num(99), want.nan_to_num(99))
        assert torch.equal(keys, naive.spatial_argmax(a if key_after else v))
        own_keys, own_y = naive.epilogue(x, bias, activation, () if pool is None else (*pool, 0)[:3], key_after)
        assert torch.equal(keys, own_keys)
        assert torch.equal(y.nan_to_num(99), own_y.nan_to_num(99))
        assert torch.equal(y.signbit(), own_y.signbit())
        assert y.is_contiguous(memory_format=LAYOUTS[layout])
        assert y.data_ptr() != x.data_ptr()
        assert activation is None or not (y == 0).logical_and(y.signbit()).any()


def test_the_key_is_of_the_stored_value() -> None:
    x = torch.tensor([[[[2048.0, 2050.0]]]], dtype=torch.float16)  # 2 apart: odd numbers from 2048 on have no float16
    keys, y = uk.epilogue(x, torch.tensor([-1.0]))  # 2047 and 2049, which rounds to 2048
    values, positions = uk.unpack(keys)
    assert values.item() == y.max().item() == 2048
    assert positions.item() == 1
    tie, _ = uk.epilogue(torch.tensor([[[[4096.0, 4100.0]]]], dtype=torch.float16), torch.tensor([2.0**15]))
    assert uk.unpack(tie)[1].item() == 0  # 36864 and 36868 are one number in float16


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"activation": "gelu"}, "'gelu'"),
        ({"bias": torch.zeros(3)}, r"bias .*\(3,\)"),
        ({"bias": torch.zeros(4, dtype=torch.int64)}, "int64"),
        ({"pool": (9, 2)}, r"\(9, 2, 0\)"),
        ({"pool": (2, 2, 2)}, r"\(2, 2, 2\)"),
        ({"pool": (2, 0)}, r"\(2, 0, 0\)"),
    ],
)
def test_epilogue_refuses(options: dict[str, object], value: str) -> None:
    with pytest.raises(ValueError, match=value):
        uk.epilogue(conv_output(), **options)
    with pytest.raises(ValueError, match="float64"):
        uk.epilogue(conv_output().double())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_residual_is_the_chain_of_layers(dtype: torch.dtype, layout: str) -> None:
    x, shortcut = conv_output(dtype, layout), conv_output(dtype, layout).flip(0, 2) * 0.75
    bias, none = torch.tensor([0.3, -2.0, 1e-3, 0.0]).to(dtype), torch.zeros(4, dtype=dtype)
    for activation, one, other in itertools.product((None, "relu", "relu6"), (None, bias), (None, bias.flip(0))):
        v, s = (t if b is None else t + b[:, None, None] for t, b in ((x, one), (shortcut, other)))
        u = v + s
        want = {None: lambda t: t, "relu": F.relu, "relu6": F.relu6}[activation](u)
        keys = [torch.full((2, 4), uk.BLANK) for _ in range(4)]
        y = uk.residual(x, shortcut, one, other, activation, keys=keys)
        assert torch.equal(y.nan_to_num(99), want.nan_to_num(99))
        assert y.is_contiguous(memory_format=LAYOUTS[layout])
        wanted, own = naive.residual(x, shortcut, one, other, activation)
        assert torch.equal(y.nan_to_num(99), own.nan_to_num(99))
        for found, own_keys, values in zip(keys, wanted, (v, s, u, want), strict=True):
            assert torch.equal(found, naive.spatial_argmax(values))
            assert torch.equal(found, own_keys)
    assert torch.equal(uk.residual(x, shortcut, none).nan_to_num(99), (x + shortcut).nan_to_num(99))


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"shortcut": torch.zeros(2, 4, 7, 1)}, r"\(2, 4, 7, 1\)"),
        ({"shortcut": conv_output().half()}, "float16"),
        ({"shortcut_bias": torch.zeros(3)}, r"shortcut_bias .*\(3,\)"),
        ({"activation": "gelu"}, "'gelu'"),
        ({"keys": [None]}, "1 and 4"),
        ({"keys": [torch.zeros(2, 5, dtype=torch.int64), None, None, None]}, r"\[2, 5\]"),
        ({"floors": [None, torch.zeros(4).double(), None, None]}, "float64"),
    ],
)
def test_residual_refuses(options: dict[str, object], value: str) -> None:
    with pytest.raises(ValueError, match=value):
        uk.residual(**({"x": conv_output(), "shortcut": conv_output()} | options))


def test_keys_go_where_they_are_wanted() -> None:
    x, weight, bias = conv_output().nan_to_num(1.0), torch.randn(5, 4, 3, 3), torch.ones(4)
    for call, channels in (
        (lambda **given: uk.spatial_argmax(x, **given), 4),
        (lambda **given: uk.epilogue(x, bias, "relu", (2, 2), **given)[0], 4),
        (lambda **given: uk.conv_argmax(x, weight, **given)[0], 5),
    ):
        buffer = torch.full((2, 9), uk.BLANK)
        out = buffer[:, 2 : 2 + channels]
        assert call(out=out) is out
        assert torch.equal(out, call())
        assert (buffer[:, :2] == uk.BLANK).all()
        assert (buffer[:, 2 + channels :] == uk.BLANK).all()
        for bad, value in ((out[:1], r"\[1, "), (out.int(), "int32")):
            with pytest.raises(ValueError, match=rf"keys must be int64 .*{value}"):
                call(out=bad)


def test_a_convolution_of_blocks_is_the_convolution() -> None:
    g = torch.Generator().manual_seed(2)
    for C, size, kernel, stride, padding in (
        (3, (23, 30), (11, 11), (4, 4), (2, 2)), (3, (9, 8), (7, 7), (2, 2), (3, 3)),
        (1, (17, 20), (5, 4), (3, 5), (1, 2)),
        (3, (19, 17), (4, 4), (4, 4), (0, 0)), (2, (13, 13), (2, 3), (3, 3), (0, 2)),
    ):  # fmt: skip
        geometry = uk.ConvGeometry(stride, padding)
        x = torch.randint(-9, 10, (2, C, *size), generator=g).float()
        weight = torch.randint(-9, 10, (4, C, *kernel), generator=g).float()
        blocks = uk.Blocks.of(C, size, kernel, geometry)
        inside = uk.arrange(x, blocks, torch.float32)
        assert inside.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(inside, naive.arrange(x, blocks, torch.float32))
        split, simple = uk.Blocks.of_weight(weight, geometry)
        assert inside.shape[1] == split.shape[1]
        assert torch.equal(F.conv2d(inside, split, None, *simple), F.conv2d(x, weight, None, *geometry))
        assert uk.Blocks.from_ints(blocks.as_ints()) == blocks


def test_blocks_that_do_not_fit_are_refused() -> None:
    x, blocks = torch.zeros(1, 3, 9, 9), uk.Blocks.of(3, (9, 9), (3, 3), uk.ConvGeometry((3, 3)))
    for bad in (blocks._replace(channels=26), blocks._replace(used=(10, 9)), blocks._replace(size=(2, 3))):
        with pytest.raises(ValueError, match="do not fit images of 3 x 9 x 9"):
            uk.arrange(x, bad, torch.float32)
    for bad_x, value in ((x.to(torch.uint8), "uint8"), (x[0], r"\(3, 9, 9\)")):
        with pytest.raises(ValueError, match=value):
            uk.arrange(bad_x, blocks, torch.float32)
    with pytest.raises(ValueError, match="float64"):
        uk.arrange(x, blocks, torch.float64)


def float32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def test_normalize_rounds_as_float32_does() -> None:
    x = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 3).reshape(4, 8, 8, 3)
    y = uk.normalize(x, MEAN, STD)
    assert y.shape == (4, 3, 8, 8)
    assert y.is_contiguous(memory_format=torch.channels_last)
    for c, value in itertools.product(range(3), range(256)):  # a double, rounded after each step
        want = float32(float32(float32(value / 255) - float32(MEAN[c])) / float32(STD[c]))
        assert y.permute(0, 2, 3, 1).reshape(256, 3)[value, c].item() == want
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(uk.normalize(x, MEAN, STD, dtype), naive.normalize(x, MEAN, STD, dtype))
        assert torch.equal(uk.normalize(x.flip(2)[:, 1:], MEAN, STD, dtype), y.to(dtype).flip(3)[:, :, 1:])


def test_normalize_of_grey_images() -> None:
    x = torch.arange(256, dtype=torch.uint8).reshape(2, 8, 16, 1)
    for dtype in (torch.float32, torch.float16):
        y = uk.normalize(x, MEAN[:1], STD[:1], dtype)
        assert torch.equal(y, naive.normalize(x, MEAN[:1], STD[:1], dtype))
        assert torch.equal(y[:, 0], uk.normalize(x.expand(-1, -1, -1, 3), MEAN, STD, dtype)[:, 0])


def test_normalize_refuses() -> None:
    x = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    for bad, value in (
        ((x.float(), MEAN, STD), "float32"),
        ((x[..., :2], MEAN, STD), r"\(1, 2, 2, 2\)"),
        ((x, MEAN[:2], STD), r"\[0.485, 0.456\]"),
        ((x, MEAN[:1], STD[:1]), "needs 3 means"),
        ((x[..., :1], MEAN, STD), "needs 1 means"),
        ((x, MEAN, (1, 0, 1)), r"\[1, 0, 1\]"),
        ((x, MEAN, STD, torch.float64), "float64"),
    ):
        with pytest.raises(ValueError, match=value):
            uk.normalize(*bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_magnitudes(layout: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(2)
    format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    for C, size in ((3, (1, 1)), (1, (5, 7)), (4, (33, 70)), (3, (66, 130))):
        x = torch.randn(5, C, *size, generator=g).to(dtype).contiguous(memory_format=format)
        x[3, 0, 0, 0], x[4, -1, -1, -1] = float("nan"), -float("inf")
        found = uk.magnitudes(x)
        torch.testing.assert_close(found, naive.magnitudes(x, [], []), rtol=1e-6, atol=0)
        assert torch.stack([found[3, 0], found[4, -1]]).isposinf().all()
        for n in range(5):
            assert torch.equal(uk.magnitudes(x[n : n + 1]), found[n : n + 1])
        if C < 4:
            pixels = torch.randint(0, 256, (5, *size, C), dtype=torch.uint8, generator=g)
            found = uk.magnitudes(pixels, MEAN[:C], STD[:C])
            torch.testing.assert_close(found, naive.magnitudes(pixels, MEAN[:C], STD[:C]), rtol=1e-6, atol=0)
            assert torch.equal(uk.magnitudes(pixels[2:], MEAN[:C], STD[:C]), found[2:])
            assert torch.equal(uk.magnitudes(uk.normalize(pixels, MEAN[:C], STD[:C])), found)


def test_magnitudes_refuses() -> None:
    x = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    for bad, value in (
        ((x,), "uint8 pixels with mean and std, not torch.uint8"),
        ((x.float(), MEAN, STD), "float32"),
        ((x, MEAN), "together"),
        ((x, MEAN[:1], STD[:1]), "magnitudes needs 3 means"),
        ((x.float()[0],), r"\(2, 2, 3\)"),
        ((x[:, :0], MEAN, STD), "at least one pixel"),
    ):
        with pytest.raises(ValueError, match=value):
            uk.magnitudes(*bad)
    assert uk.magnitudes(x[:0], MEAN, STD).shape == (0, 3, 5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_are_registered_right(layout: str) -> None:
    x, bias = conv_output(torch.float32, layout).nan_to_num(1.0), torch.ones(4)
    for pool in ((), (3, 2, 1)):
        for b, activation in ((None, None), (bias, "relu")):
            arguments = x, b, activation, pool, False, None, torch.full((2, 4), uk.BLANK)
            torch.library.opcheck(torch.ops.unitvis.epilogue.default, arguments)
    keys = [torch.full((2, 4), uk.BLANK) for _ in range(3)]
    arguments = x, x.flip(0), bias, None, "relu", [None, torch.zeros(4), None, None], keys[0], None, *keys[1:]
    torch.library.opcheck(torch.ops.unitvis.residual.default, arguments)
    pixels = torch.randint(0, 256, (2, 5, 4, 3), dtype=torch.uint8)
    blocks = uk.Blocks.of(3, (5, 4), (3, 3), uk.ConvGeometry((3, 3), (1, 1))).as_ints()
    for layout_of_input in ([], blocks):
        arguments = pixels, MEAN, STD, torch.float16, layout_of_input
        torch.library.opcheck(torch.ops.unitvis.normalize.default, arguments)
    for arguments in ((pixels, MEAN, STD), (x, [], [])):
        torch.library.opcheck(torch.ops.unitvis.magnitudes.default, arguments)
    torch.library.opcheck(torch.ops.unitvis.arrange.default, (x[:, :3, :5, :4], blocks, torch.float16))


def step(pixels: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Tensor:
    x = F.conv2d(uk.normalize(pixels, MEAN, STD), weight)
    keys, y = uk.epilogue(x, bias, "relu", (2, 2))
    uk.topk_merge_(state, keys, torch.arange(2))
    return y


def test_a_step_compiles_whole_and_keeps_to_fake_tensors() -> None:
    g = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (2, 9, 8, 3), dtype=torch.uint8, generator=g)
    weight, bias = torch.randn(4, 3, 3, 3, generator=g), torch.randn(4, generator=g)
    eager, compiled = uk.topk_state(4, 2), uk.topk_state(4, 2)
    want = step(pixels, weight, bias, eager)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(pixels, weight, bias, compiled)
    assert torch.equal(want, got)
    assert want.stride() == got.stride()
    assert torch.equal(eager, compiled)
    meta = [t.to("meta") for t in (pixels, weight, bias, eager)]
    assert step(*meta).shape == want.shape
    assert uk.normalize(meta[0], MEAN, STD).stride() == uk.normalize(pixels, MEAN, STD).stride()


def test_operators_under_autocast_and_inference_mode() -> None:
    x = conv_output(torch.float32, "channels_last")
    want = uk.epilogue(x, torch.ones(4), "relu", (2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        inside = uk.epilogue(x, torch.ones(4), "relu", (2, 2))
    with torch.inference_mode():
        frozen = uk.epilogue(x, torch.ones(4), "relu", (2, 2))
        state = uk.topk_state(4, 2)
        uk.topk_merge_(state, uk.spatial_argmax(x), torch.arange(2))
    assert inside[1].dtype == torch.float32
    for keys, y in (inside, frozen):
        assert torch.equal(keys, want[0])
        assert torch.equal(y.nan_to_num(9), want[1].nan_to_num(9))
    assert (uk.topk_read(state)[1][0] >= 0).all()
