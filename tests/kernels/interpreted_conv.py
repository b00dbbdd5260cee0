"""The Triton kernel of conv_argmax, interpreted on CPU tensors, against `naive` in float64; see `interpreted.py`."""

from __future__ import annotations

import math
import os
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

import unitvis_kernels as uk
from support.conv_cases import CASES, Case, operands
from unitvis_kernels import naive
from unitvis_kernels.geometry import ConvGeometry

assert os.environ.get("TRITON_INTERPRET") == "1"
conv = sys.modules["unitvis_kernels.conv_argmax"]
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, about NaN and infinity
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # caused by Triton 3.6
]
INF, NAN = math.inf, math.nan
HALF, BF16 = torch.float16, torch.bfloat16
POISON = 0x5555_5555_5555_5555
GUARD = 64
# Half a unit in the last place of float16; a whole one of bfloat16, to which the interpreter truncates.
RTOL = {HALF: 2.0**-11, BF16: 2.0**-7}
multiply = InterpreterBuilder.create_dot


def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    if a.dtype == tl.bfloat16:  # the interpreter would multiply the raw bits, which are the upper half of a float32
        a, b = (TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32) for t in (a, b))
    return multiply(self, a, b, *rest)


@pytest.fixture(autouse=True)
def _bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(autouse=True)
def _reads_inside_the_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, load = conv.plan, InterpreterBuilder.create_masked_load
    spans: list[tuple[int, int]] = []

    def planned(*arguments: Any) -> Any:
        launch = plan(*arguments)
        tensors = [a for a in launch.args if isinstance(a, Tensor)] if launch else []
        spans[:] = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]
        return launch

    def checked(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        read = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        assert np.logical_or.reduce([(first <= read) & (read < end) for first, end in spans]).all()
        return load(self, pointers, mask, *rest)

    monkeypatch.setattr(conv, "plan", planned)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", checked)


def run(case: Case, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """(keys, y) that the kernel writes over poison; checks that it writes nothing before and after them."""
    like_y = conv.new_map(x, weight, case.geometry, store=rest[1])
    shape = x.shape[0], weight.shape[0]
    around_keys = torch.full((math.prod(shape) + 2 * GUARD,), POISON)
    around_y = torch.full((like_y.numel() + 2 * GUARD,), NAN, dtype=x.dtype)
    keys = around_keys[GUARD:-GUARD].view(shape).fill_(uk.BLANK)
    y = around_y[GUARD:-GUARD]
    if like_y.ndim == 4:
        N, D, OH, OW = like_y.shape
        y = y.view(N, OH, OW, D).permute(0, 3, 1, 2)
    assert conv.launch(x, weight, bias, case.geometry, *rest, keys, y) is y  # no fallback
    for around, filler in ((around_keys, POISON), (around_y, NAN)):
        ends = torch.cat([around[:GUARD], around[-GUARD:]])
        assert torch.equal(ends.nan_to_num(7.0), torch.full_like(ends, filler).nan_to_num(7.0))
    return keys, y


def float64(case: Case, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return naive.conv_argmax(x.double(), weight.double(), bias, case.geometry)[1]


def check(case: Case, dtype: torch.dtype, with_bias: bool = True) -> tuple[Tensor, Tensor]:
    x, weight, bias = operands(case, dtype)
    given = bias if with_bias else None
    keys, y = run(case, x, weight, given, None, True, False)
    torch.testing.assert_close(y.double(), float64(case, x, weight, given), rtol=RTOL[dtype], atol=1e-4)
    assert torch.equal(keys, naive.spatial_argmax(y))
    return keys, y


@pytest.mark.parametrize("name", CASES)
def test_conv_equals_float64_and_its_own_map(name: str) -> None:
    case = CASES[name]
    keys, _ = check(case, HALF)
    x, weight, bias = operands(case, HALF)
    assert torch.equal(run(case, x, weight, bias, "relu", False, False)[0], keys)


@pytest.mark.parametrize("name", ["every pair", "groups", "first layer", "a tap a step", "tiles of pixels"])
def test_conv_equals_float64_in_bfloat16(name: str) -> None:
    check(CASES[name], BF16)


@pytest.mark.parametrize(("name", "dtype"), [("tiles of pixels", HALF), ("odd channels", BF16)])
def test_conv_every_option(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    check(case, dtype, with_bias=False)
    keys, y = check(case, dtype)
    x, weight, bias = operands(case, dtype)
    planned = conv.plan(x, weight, bias, case.geometry, None, False, False, torch.full_like(keys, uk.BLANK), y)
    planned.options["SIGNED_NAN"] = False  # as on a GPU that rounds every NaN to a positive one
    planned.run()
    assert torch.equal(planned.args[3], keys)
    for activation in ("relu", "relu6"):
        before, same = run(case, x, weight, bias, activation, True, False)
        after, z = run(case, x, weight, bias.to(dtype).float(), activation, True, True)
        assert torch.equal(before, keys)
        assert torch.equal(same, naive.activate(y, activation))
        assert torch.equal(after, naive.spatial_argmax(z))
    assert torch.equal(run(case, x, weight, bias.to(dtype), "relu6", False, True)[0], after)


@pytest.mark.parametrize("name", ["padding", "1x1", "first layer, 1 channel", "tiles of pixels"])
def test_conv_equals_naive_where_sums_are_exact(name: str) -> None:
    case = CASES[name]
    x, weight, bias = operands(case, HALF, exact=True)
    keys, y = run(case, x, weight, bias, None, True, False)
    want = naive.conv_argmax(x, weight, bias, case.geometry)
    assert torch.equal(y, want[1])
    assert torch.equal(keys, want[0])


@pytest.mark.parametrize(("name", "dtype"), [("padding", HALF), ("odd channels", BF16), ("tiles of pixels", HALF)])
def test_conv_carries_nan_and_infinities(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    x, weight, bias = operands(case, dtype)
    x[0, 0, 1, 2], x[0, 1, 5, 4], x[-1, 2, -1, -1] = NAN, INF, -INF
    bias[0], bias[1], bias[2], bias[3] = INF, -INF, NAN, -NAN
    keys, y = run(case, x, weight, bias, None, True, False)
    want = float64(case, x, weight, bias)
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.isinf(), want.isinf())
    assert torch.equal(keys, naive.spatial_argmax(y))
    assert (keys == uk.NAN_KEY).any()
    after, z = run(case, x, weight, bias, "relu6", True, True)
    assert torch.equal(after, naive.spatial_argmax(z))


def test_conv_ties_take_the_lowest_position_and_both_zeros_are_one() -> None:
    case = CASES["tiles of pixels"]._replace(kernel=(1, 1), padding=(0, 0))
    tiny = 2.0**-14  # the product of two rounds to a zero of their sign
    x = torch.full(case.x, tiny, dtype=HALF)
    x[:, ::2] = 0.0
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.full((case.out, 8, 1, 1), tiny, dtype=HALF)
    weight[::2] = -tiny
    x[:, :, 3:] = -x[:, :, 3:]
    keys, y = run(case, x, weight, None, None, True, False)
    assert y.signbit().any(dim=(2, 3)).all()
    assert not y.signbit().all(dim=(2, 3)).any()
    assert torch.equal(keys, uk.pack(torch.zeros(1, case.out), torch.zeros(1, case.out, dtype=torch.int64)))
    x[:, :, 4:] = 1.0  # the same largest value in several tiles
    keys, y = run(case, x, weight.abs(), None, None, True, False)
    assert torch.equal(keys, naive.spatial_argmax(y))
    assert (uk.unpack(keys)[1] == 4 * 13).all()


def test_conv_what_has_no_kernel() -> None:
    x, weight, _ = operands(CASES["padding"], HALF)
    geometry = CASES["padding"].geometry

    def planned(x: Tensor, weight: Tensor, geometry: ConvGeometry = geometry) -> object:
        y = conv.new_map(x, weight, geometry, store=True)
        keys = x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.int64)
        return conv.plan(x, weight, None, geometry, None, True, False, keys, y)

    assert planned(x, weight) is not None
    assert planned(x.float(), weight.float()) is None
    assert planned(x.contiguous(), weight) is None
    assert planned(x[:0], weight) is None
    large = torch.empty(1, 8, 40, 40, dtype=HALF).contiguous(memory_format=torch.channels_last)
    assert planned(large, weight.new_empty(8, 8, 16, 16)) is None
    assert planned(large, weight.new_empty(8, 8, 16, 16), ConvGeometry(stride=(16, 16))) is not None
