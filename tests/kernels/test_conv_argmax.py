"""conv_argmax on the CPU against `naive`, its registration, and the choice between it and a convolution."""

from __future__ import annotations

import itertools
import math
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import Tensor

import unitvis_kernels as uk
from support.conv_cases import CASES, operands
from unitvis_kernels import choice, naive
from unitvis_kernels.geometry import ConvGeometry

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_naive(name: str, dtype: torch.dtype) -> None:
    """Sums that float32 holds exactly, then one rounding: every bit is determined."""
    geometry = CASES[name].geometry
    x, weight, bias = operands(CASES[name], dtype, exact=True)
    x[0, 0, 0, 0], x[-1, -1, -1, -1] = math.inf, math.nan
    x = x.contiguous(memory_format=LAYOUTS["nchw" if dtype == torch.bfloat16 else "channels_last"])
    for given in (None, bias, bias.to(dtype)):
        want, v = naive.conv_argmax(x, weight, given, geometry)
        keys, y = uk.conv_argmax(x, weight, given, **geometry._asdict())
        assert torch.equal(keys, want)
        assert torch.equal(y.nan_to_num(99), v.nan_to_num(99))
        assert torch.equal(y.isnan(), v.isnan())
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
    for activation, after in itertools.product((None, "relu", "relu6"), (False, True)):
        options = {"activation": activation, "key_after": after}
        want, z = naive.conv_argmax(x, weight, bias.to(dtype), geometry, **options)
        keys, y = uk.conv_argmax(x, weight, bias.to(dtype), *geometry, **options)
        assert torch.equal(y.nan_to_num(99), z.nan_to_num(99))
        assert torch.equal(keys, want)
        alone, nothing = uk.conv_argmax(x, weight, bias.to(dtype), *geometry, **options, store=False)
        assert nothing is None
        assert torch.equal(alone, keys)


def test_the_sum_is_rounded_once_and_in_float32() -> None:
    # 2048 + 1 + 1 is 2050 in float32, 2048 where each sum is rounded to float16.
    x = torch.tensor([2048.0, 1.0, 1.0], dtype=torch.float16).view(1, 3, 1, 1)
    _, y = uk.conv_argmax(x, torch.ones(1, 3, 1, 1, dtype=torch.float16))
    assert y.item() == 2050
    x[0, 2] = 0.0
    _, y = uk.conv_argmax(x, torch.ones(1, 3, 1, 1, dtype=torch.float16), torch.ones(1))
    assert y.item() == 2050  # 2049, rounded before the bias is added, would come to 2048
    g = torch.Generator().manual_seed(4)
    x, weight = torch.randn(1, 70, 6, 6, generator=g).half(), torch.randn(3, 70, 3, 3, generator=g).half()
    _, y = uk.conv_argmax(x, weight)
    _, want = naive.conv_argmax(x.double(), weight.double(), None, ConvGeometry())
    torch.testing.assert_close(y.double(), want, rtol=2**-11, atol=1e-4)  # half a unit in float16's last place


def test_numbers_stand_for_pairs() -> None:
    x, weight, bias = operands(CASES["dilation"], torch.float32)
    keys, y = uk.conv_argmax(x, weight, bias, 1, 2, 2)
    want = uk.conv_argmax(x, weight, bias, (1, 1), (2, 2), (2, 2), 1)
    assert torch.equal(keys, want[0])
    assert torch.equal(y, want[1])


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ({"x": torch.zeros(2, 8, 5)}, r"\(2, 8, 5\)"),
        ({"x": torch.zeros(2, 8, 5, 5, dtype=torch.float64)}, "float64"),
        ({"weight": torch.zeros(4, 8, 3)}, r"\(4, 8, 3\)"),
        ({"weight": torch.zeros(4, 8, 3, 3).half()}, "torch.float16"),
        ({"weight": torch.zeros(4, 8, 0, 3)}, r"\(4, 8, 0, 3\)"),
        ({"weight": torch.zeros(4, 7, 3, 3)}, r"\(4, 7, 3, 3\)"),
        ({"weight": torch.zeros(5, 4, 3, 3), "groups": 2}, r"\(5, 4, 3, 3\)"),
        ({"groups": 0}, "0"),
        ({"bias": torch.zeros(8)}, r"bias .*\(8,\)"),
        ({"bias": torch.zeros(4, dtype=torch.int64)}, "int64"),
        ({"activation": "gelu"}, "'gelu'"),
        ({"stride": 0}, "stride .*0"),
        ({"dilation": (1, 0)}, r"dilation .*\(1, 0\)"),
        ({"padding": -1}, "padding .*-1"),
        ({"padding": (1, 1, 1)}, r"padding .*\(1, 1, 1\)"),
        ({"padding": "same"}, "padding .*'same'"),
        ({"dilation": 3}, "-1 x -1"),
        ({"x": torch.zeros(2, 8, 2, 5)}, "0 x 3"),
    ],
)
def test_refuses(change: dict[str, object], value: str) -> None:
    right = {"x": torch.zeros(2, 8, 5, 5), "weight": torch.zeros(4, 8, 3, 3)}
    uk.conv_argmax(**right)
    with pytest.raises(ValueError, match=value):
        uk.conv_argmax(**(right | change))


def test_geometry_to_integers_and_back() -> None:
    geometry = ConvGeometry((1, 2), (3, 4), (5, 6), 7)
    assert geometry.as_ints() == [1, 2, 3, 4, 5, 6, 7]
    assert ConvGeometry.from_ints(geometry.as_ints()) == geometry


def test_operator_is_registered_right() -> None:
    for name in ("padding", "groups", "one pixel, odd channels"):
        case = CASES[name]
        x, weight, bias = operands(case, torch.float32)
        for b, *rest in ((None, None, True, False), (bias, "relu", True, True), (bias, "relu6", False, False)):
            keys = torch.full((x.shape[0], weight.shape[0]), uk.BLANK)
            arguments = (x, weight, b, case.geometry.as_ints(), *rest, keys)
            torch.library.opcheck(torch.ops.unitvis.conv_argmax.default, arguments)


def step(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Tensor:
    keys, y = uk.conv_argmax(x, weight, bias, 2, 1, activation="relu")
    last, _ = uk.conv_argmax(y, weight[:, :, :1, :1], None, store=False)
    uk.topk_merge_(state, keys + last * 0, torch.arange(2))
    return y


def test_a_step_compiles_whole_and_keeps_to_fake_tensors() -> None:
    case = CASES["3x3"]._replace(out=8)
    x, weight, bias = operands(case, torch.float32)
    eager, compiled = uk.topk_state(8, 2), uk.topk_state(8, 2)
    want = step(x, weight, bias, eager)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(x, weight, bias, compiled)
    assert torch.equal(want, got)
    assert want.stride() == got.stride()
    assert torch.equal(eager, compiled)
    meta = [t.to("meta") for t in (x, weight, bias, eager)]
    assert step(*meta).shape == want.shape
    assert step(*meta).stride() == want.stride()


def test_under_autocast_and_inference_mode() -> None:
    x, weight, bias = operands(CASES["padding"], torch.float32)
    want = uk.conv_argmax(x, weight, bias, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = uk.conv_argmax(x, weight, bias, padding=1)
    with torch.inference_mode():
        frozen = uk.conv_argmax(x, weight, bias, padding=1)
    for keys, y in (inside, frozen):
        assert y.dtype == torch.float32
        assert torch.equal(keys, want[0])
        assert torch.equal(y, want[1])


def preferred(in_channels: int, out_channels: int, kernel: int, **change: object) -> tuple[bool, str]:
    layer = {
        "in_channels": in_channels, "out_channels": out_channels, "kernel": (kernel, kernel), "stride": (1, 1),
        "groups": 1, "map_size": (56, 56), "dtype": torch.float16, "architecture": "sm_90",
    }  # fmt: skip
    return choice.prefer(**(layer | change))


@pytest.mark.parametrize(
    ("in_channels", "out_channels", "kernel", "wins"),
    [
        (3, 64, 11, True),  # AlexNet's first layer
        (3, 64, 7, True),  # ResNet's
        (3, 64, 3, True),  # VGG's
        *[(c, 4 * c, 1, True) for c in (64, 128, 256)],  # ResNet's expansions
        (1024, 256, 1, True),
        (2048, 512, 1, False),
        *[(c, c, 3, False) for c in (64, 128, 512)],
        (64, 192, 5, False),
    ],
)
def test_estimate(
    in_channels: int, out_channels: int, kernel: int, wins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "measured", dict)  # nothing
    assert preferred(in_channels, out_channels, kernel) == (wins, "estimated")
    assert preferred(in_channels, out_channels, kernel, dtype=torch.float32) == (False, "estimated")
    assert preferred(in_channels, out_channels, kernel, groups=in_channels) == (False, "estimated")
    assert preferred(in_channels, out_channels, kernel, pooled=True) == (False, "estimated")


def test_a_measurement_overrides_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = "64-64 k3x3 s1x1 g1 56x56 float16"
    table = {
        "sm_90": {layer: {"fused_us": 9.0, "separate_us": 10.0}},
        "sm_80": {layer: {"fused_us": 9.0, "separate_us": 8.0}},
    }
    monkeypatch.setattr(choice, "measured", lambda: table)
    assert preferred(64, 64, 3) == (True, "measured")
    assert preferred(64, 64, 3, architecture="sm_80") == (False, "measured")
    assert preferred(64, 64, 3, architecture="sm_100") == (False, "estimated")
    assert preferred(64, 64, 3, map_size=(28, 28)) == (False, "estimated")
    assert preferred(64, 64, 3, dtype=torch.bfloat16) == (False, "estimated")
    assert preferred(64, 64, 3, pooled=True) == (False, "estimated")


def test_the_table_of_measurements_is_in_the_package() -> None:
    assert files("unitvis_kernels").joinpath("measured.json").is_file()
    for layers in choice.measured().values():
        for times in layers.values():
            assert set(times) == {"fused_us", "separate_us"}
            assert min(times.values()) > 0


@pytest.mark.slow
def test_the_wheel_holds_the_table(tmp_path: Path) -> None:
    from zipfile import ZipFile

    from hatchling.builders.wheel import WheelBuilder

    wheel = next(WheelBuilder(str(Path(__file__).parents[2])).build(directory=str(tmp_path), versions=["standard"]))
    assert "unitvis_kernels/measured.json" in ZipFile(wheel).namelist()
