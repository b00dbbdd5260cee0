"""Benchmark each operator against the device's ceilings (a copy, a matrix product) and the fastest plain PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import unitvis_kernels as uk
from benchmarks import stream
from benchmarks.naive import fold
from benchmarks.sizes import Sizes
from benchmarks.timing import Timer, copies, rotating

UNITVIS, EAGER, COMPILED, VALUES = "unitvis", "eager", "torch.compile", "amax, no positions"
CUDNN, CUDNN_RELU = "convolution + unitvis epilogue", "cudnn_convolution_relu + unitvis spatial_argmax"
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLACES = 32  # of a unit in the top-k


def _plain(form: Sizes) -> list[str]:
    """Names of unitvis and of plain PyTorch, eager and compiled."""
    return [UNITVIS, EAGER, *([COMPILED] if form.compiled else [])]


def _half(kind: str) -> torch.dtype:
    """Dtype of the operands: float16 on a GPU, float32 on a CPU."""
    return torch.float16 if kind == "cuda" else torch.float32


CASES: dict[str, Callable[[Sizes, str], list[tuple[Any, ...]]]] = {
    "test_spatial_argmax": lambda form, kind: [
        (contender, _half(kind), layout, *shape)
        for shape, layout, contender in itertools.product(form.maps, FORMATS, [*_plain(form), VALUES])
    ],
    "test_epilogue": lambda form, kind: [
        (contender, _half(kind), pool, *shape)
        for shape, pool, contender in itertools.product(form.maps, ("no pool", "pool 3, 2"), _plain(form))
    ],
    "test_topk_merge": lambda form, kind: list(itertools.product((UNITVIS, EAGER), form.merged)),
    "test_normalize": lambda form, kind: [
        (contender, _half(kind), form.batches[-1], form.side) for contender in _plain(form)
    ],
    "test_conv_argmax": lambda form, kind: [
        (contender, _half(kind), *shape)
        for shape in form.convolutions
        for contender in ((UNITVIS, CUDNN, CUDNN_RELU, EAGER) if kind == "cuda" else (UNITVIS, CUDNN, EAGER))
    ],
}  # fmt: skip


def largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum of each map [N, C, H, W] in plain PyTorch, in the order of memory: (values, positions), each [N, C]."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).flatten(1, 2).max(dim=1)
    return x.flatten(2).max(dim=2)


def after(x: Tensor, bias: Tensor, pool: tuple[int, int] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Epilogue in plain PyTorch: add the bias, take the maximum, ReLU, max-pool; (values, positions, output)."""
    v = x + bias[:, None, None]
    y = F.relu(v)
    return *largest(v), y if pool is None else F.max_pool2d(y, *pool)


def compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function afresh: after eight shapes torch.compile would run the others eagerly."""
    torch.compiler.reset()
    return torch.compile(call, dynamic=False)


def check_keys(keys: Tensor, maps: Tensor) -> None:
    """Assert that the keys hold the maxima of the maps, at the right positions."""
    values, positions = uk.unpack(keys)
    assert torch.equal(values, maps.amax((2, 3)).float())
    assert torch.equal(maps.flatten(2).gather(2, positions[..., None])[..., 0].float(), values)


def random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, layout: str = "channels_last") -> Tensor:
    """Normal random values, the same every time."""
    g = torch.Generator(device).manual_seed(0)
    x = torch.empty(shape, dtype=dtype, device=device, memory_format=FORMATS[layout])
    return x.normal_(generator=g)


def test_copy(timer: Timer, form: Sizes, device: torch.device) -> None:
    source = torch.randint(0, 256, (form.copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timer(lambda: target.copy_(source), kind="ceiling", name="copy", bytes=2 * form.copied)
    assert torch.equal(source, target)


def test_product(timer: Timer, form: Sizes, device: torch.device) -> None:
    a, b = (torch.randn(form.product, form.product, device=device).to(_half(device.type)) for _ in range(2))
    timer(lambda: a @ b, kind="ceiling", name="product", dtype=str(a.dtype), flops=2 * form.product**3)


def test_spatial_argmax(case: tuple[Any, ...], timer: Timer, form: Sizes, device: torch.device) -> None:
    contender, dtype, layout, *shape = case
    x = random(tuple(shape), dtype, device, layout)
    calls = {UNITVIS: uk.spatial_argmax, EAGER: largest, VALUES: lambda x: x.amax((2, 3))}
    call = compiled(largest) if contender == COMPILED else calls[contender]
    check_keys(uk.spatial_argmax(x), x)
    if contender in (EAGER, COMPILED):
        check_keys(uk.pack(*call(x)), x)
    run, times = rotating(call, copies([x], form.calls), device)
    row = {"dtype": str(dtype), "layout": layout, "shape": shape, "bytes": x.nbytes}
    timer(run, calls=times, kind="operator", name="spatial_argmax", contender=contender, **row)


def test_epilogue(case: tuple[Any, ...], timer: Timer, form: Sizes, device: torch.device) -> None:
    contender, dtype, pooled, *shape = case
    pool = (3, 2) if pooled != "no pool" else None
    x, bias = random(tuple(shape), dtype, device), random((shape[1],), dtype, device, "NCHW")
    calls = {UNITVIS: lambda x, bias: uk.epilogue(x, bias, "relu", pool), EAGER: lambda x, bias: after(x, bias, pool)}
    call = compiled(calls[EAGER]) if contender == COMPILED else calls[contender]
    keys, y = uk.epilogue(x, bias, "relu", pool)
    check_keys(keys, x + bias[:, None, None])
    if contender != UNITVIS:
        *found, plain = call(x, bias)
        check_keys(uk.pack(*found), x + bias[:, None, None])
        assert torch.equal(y, plain)
    run, times = rotating(call, copies([x, bias], form.calls), device)
    row = {"dtype": str(dtype), "layout": "channels_last", "pool": pool, "shape": shape, "bytes": x.nbytes + y.nbytes}
    timer(run, calls=times, kind="operator", name="epilogue", contender=contender, **row)


def test_topk_merge(case: tuple[Any, ...], timer: Timer, form: Sizes, device: torch.device) -> None:
    contender, (images, units) = case
    g = torch.Generator().manual_seed(0)
    keys = uk.pack(torch.randn(images, units, generator=g), torch.zeros(images, units, dtype=torch.int64)).to(device)
    ids = torch.arange(images, device=device)
    state = uk.topk_state(units, PLACES, device)
    share = stream.fill(state, keys)
    values, places = uk.unpack(keys)[0], [part.contiguous() for part in uk.topk_read(state)[:2]]
    merged, plain = state.clone(), [part.clone() for part in places]
    uk.topk_merge_(merged, keys, ids)
    fold(*plain, values, ids)
    assert torch.equal(uk.topk_read(merged)[0], plain[0])
    new = [torch.where(found < 2**40, found, -1).amax(1) for found in (uk.topk_read(merged)[1], plain[1])]
    assert torch.equal(*new)  # any of the equal values that filled the state may be the one that was replaced

    operands = copies([state, keys, ids] if contender == UNITVIS else [*places, values, ids], form.calls)
    fresh = state.clone() if contender == UNITVIS else [part.clone() for part in places]

    def restore() -> None:
        for one in operands:
            for part, saved in zip(one, [fresh] if contender == UNITVIS else fresh, strict=False):
                part.copy_(saved)

    run, times = rotating(uk.topk_merge_ if contender == UNITVIS else fold, operands, device)
    row = {"shape": [images, units], "places": PLACES, "entered": share, "bytes": keys.nbytes}
    timer(run, calls=times, setup=restore, kind="operator", name="topk_merge_", contender=contender, **row)


def test_normalize(case: tuple[Any, ...], timer: Timer, form: Sizes, device: torch.device) -> None:
    contender, dtype, images, side = case
    x = torch.randint(0, 256, (images, side, side, 3), dtype=torch.uint8).to(device)
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (MEAN, STD))

    def plain(x: Tensor) -> Tensor:
        return ((x.permute(0, 3, 1, 2).float() / 255 - mean) / std).to(dtype)

    calls = {UNITVIS: lambda x: uk.normalize(x, MEAN, STD, dtype), EAGER: plain}
    call = compiled(plain) if contender == COMPILED else calls[contender]
    torch.testing.assert_close(call(x), plain(x))  # a GPU divides through the reciprocal, to another last bit
    run, times = rotating(call, copies([x], form.calls), device)
    row = {"dtype": str(dtype), "shape": list(x.shape), "bytes": x.nbytes * (1 + dtype.itemsize)}
    timer(run, calls=times, kind="operator", name="normalize", contender=contender, **row)


def test_conv_argmax(case: tuple[Any, ...], timer: Timer, form: Sizes, device: torch.device) -> None:
    contender, dtype, images, inputs, outputs, kernel, side = case
    x = random((images, inputs, side, side), dtype, device)
    weight = random((outputs, inputs, kernel, kernel), dtype, device) * (inputs * kernel**2) ** -0.5
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias, padding = random((outputs,), dtype, device, "NCHW"), kernel // 2

    def plain(x: Tensor) -> Any:
        v = F.conv2d(x, weight, bias, 1, padding)
        return largest(v), F.relu(v)

    calls: dict[str, Callable[[Tensor], Any]] = {
        UNITVIS: lambda x: uk.conv_argmax(x, weight, bias, 1, padding, activation="relu"),
        CUDNN: lambda x: uk.epilogue(F.conv2d(x, weight, None, 1, padding), bias, "relu"),
        EAGER: plain,
    }
    if device.type == "cuda":

        def rival(x: Tensor) -> Any:
            y = torch.cudnn_convolution_relu(x, weight, bias, (1, 1), (padding, padding), (1, 1), 1)
            return uk.spatial_argmax(y), y

        calls[CUDNN_RELU] = rival
    tolerance = {"rtol": 0.0, "atol": 16 * torch.finfo(dtype).eps}  # values of the maps are about 1
    y = calls[contender](x)[1]
    if contender == CUDNN_RELU and not torch.allclose(y.float(), plain(x)[1].float(), **tolerance):
        pytest.skip(f"{contender} computes something else here")
    torch.testing.assert_close(y.float(), plain(x)[1].float(), **tolerance)
    keys, own = calls[UNITVIS](x)
    values, positions = uk.unpack(keys)
    assert torch.equal(own.flatten(2).gather(2, positions[..., None])[..., 0].float(), values.clamp_min(0))
    run, times = rotating(calls[contender], copies([x], form.calls), device)
    flops = 2 * y.numel() * inputs * kernel**2
    row = {"dtype": str(dtype), "shape": list(x.shape), "weight": list(weight.shape), "flops": flops}
    timer(run, calls=times, kind="operator", name="conv_argmax", contender=contender, **row)
