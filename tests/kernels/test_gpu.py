"""The compiled kernels on a real GPU against the reference on the CPU: the same bits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import unitvis_kernels as uk
from unitvis_kernels import reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMATS = [torch.contiguous_format, torch.channels_last]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def maps(*shape: int, ties: bool = False) -> Tensor:
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, shape, generator=g).float() if ties else torch.randn(shape, generator=g) * 4
    rows = x.flatten(0, 1).flatten(1)
    for row, value in enumerate((math.nan, -math.nan, math.inf, -math.inf, -0.0, 1e-40, -1e-40, 6.5)[: len(rows)]):
        rows[row] = -math.inf if row == 3 else -rows[row].abs()
        rows[row, rows.shape[1] // 2] = value
    return x


def same(a: Tensor, b: Tensor) -> bool:
    a = a.cpu()
    bits = [t.nan_to_num(7.0).flatten().view(torch.uint8) for t in (a, b)]
    return a.stride() == b.stride() and torch.equal(a.isnan(), b.isnan()) and torch.equal(*bits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_spatial_argmax(layout: torch.memory_format, dtype: torch.dtype) -> None:
    for shape in ((3, 5, 4, 7), (1, 64, 224, 224), (32, 96, 55, 55), (2, 512, 7, 7), (1, 3, 1, 1), (4, 100, 1, 9)):
        for ties in (False, True):
            x = maps(*shape, ties=ties).to(dtype).contiguous(memory_format=layout)
            torch.full(shape[:2], 0x55).cuda()  # what a fresh allocation finds is not zero
            assert torch.equal(uk.spatial_argmax(x.cuda()).cpu(), reference.spatial_argmax(x))
    x = maps(4, 9, 14, 14).to(dtype)
    for view in (x[1:, 1:], x[..., 1:], x.transpose(2, 3), x[:1].expand(3, -1, -1, -1)):
        assert torch.equal(uk.spatial_argmax(view.cuda()).cpu(), reference.spatial_argmax(view))
    odd = maps(2, 5, 4, 7).to(dtype).flatten()
    odd = torch.cat([odd[:3], odd]).cuda()[3:].view(2, 5, 4, 7)
    assert torch.equal(uk.spatial_argmax(odd).cpu(), reference.spatial_argmax(odd.cpu()))


@pytest.mark.parametrize("k", [1, 9, 10, 40, 64, 300])
@pytest.mark.parametrize(
    "kind", ["random", "ties and duplicates", "ascending, large ids", "nan and padding", "ids [N, C]"]
)
def test_topk_merge(kind: str, k: int) -> None:
    g = torch.Generator().manual_seed(2)
    N, C = 600, 37
    values, ids = torch.randn(N, C, generator=g), torch.randperm(N, generator=g)
    if kind == "ties and duplicates":
        values, ids = torch.randint(0, 4, (N, C), generator=g).float(), torch.randint(0, 300, (N,), generator=g)
    elif kind == "ascending, large ids":
        values, ids = values.sort(dim=0).values, ids + 2**40
    elif kind == "nan and padding":
        values[torch.rand(N, C, generator=g) < 0.1] = math.nan
        ids[::5] = -1
    keys = uk.pack(values, torch.randint(0, 3000, (N, C), generator=g))
    if kind == "ids [N, C]":
        ids = torch.stack([torch.randperm(N, generator=g) - 3 for _ in range(C)], dim=1)
    want, got = uk.topk_state(C, k), uk.topk_state(C, k, device="cuda")
    for part in (slice(0, 1), slice(1, 17), slice(17, 273), slice(273, 600), slice(100, 300)):
        uk.topk_merge_(want, keys[part], ids[part])
        uk.topk_merge_(got, keys[part].cuda(), ids[part].cuda())
        assert torch.equal(got.cpu(), want)
    uk.topk_merge_states_(want, want.clone())
    uk.topk_merge_states_(got, got.clone())
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_epilogue(layout: torch.memory_format, dtype: torch.dtype) -> None:
    pools = (None, (2, 2), (3, 2), (3, 2, 1), (1, 2), (2, 3))
    for shape in ((2, 10, 13, 13), (8, 64, 55, 55), (3, 70, 9, 40), (1, 24, 112, 112)):
        x = maps(*shape).to(dtype).contiguous(memory_format=layout)
        bias = torch.linspace(-1.3, 1.7, shape[1])
        for pool, activation, b, after in itertools.product(
            pools, (None, "relu", "relu6"), (None, bias, bias.to(dtype)), (False, True)
        ):
            want = uk.epilogue(x, b, activation, pool, key_after=after)
            got = uk.epilogue(x.cuda(), b if b is None else b.cuda(), activation, pool, key_after=after)
            assert torch.equal(got[0].cpu(), want[0])
            assert same(got[1], want[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalize(dtype: torch.dtype) -> None:
    x = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 3).reshape(1, 16, 16, 3).repeat(5, 7, 11, 1)
    for pixels in (x, x[:, 3:50, 1:77], x.flip(1).contiguous()):
        assert same(uk.normalize(pixels.cuda(), MEAN, STD, dtype), uk.normalize(pixels, MEAN, STD, dtype))


def step(x: Tensor, state: Tensor, ids: Tensor) -> Tensor:
    keys, y = uk.epilogue(x, None, "relu", (2, 2))
    uk.topk_merge_(state, keys, ids)
    return y


def test_other_streams_graphs_and_torch_compile() -> None:
    x = maps(16, 64, 28, 28).half().contiguous(memory_format=torch.channels_last).cuda()
    ids = torch.arange(16, device="cuda")
    want = uk.topk_state(64, 9, device="cuda")
    y = step(x, want, ids)

    side, state = torch.cuda.Stream(), uk.topk_state(64, 9, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert torch.equal(step(x, state, ids).nan_to_num(9), y.nan_to_num(9))
    side.synchronize()
    assert torch.equal(state, want)

    state, graph = uk.topk_state(64, 9, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # fails on a synchronisation
        step(x, state, ids)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(state, want)

    state = uk.topk_state(64, 9, device="cuda")
    with torch.inference_mode():
        assert torch.equal(torch.compile(step, fullgraph=True)(x, state, ids).nan_to_num(9), y.nan_to_num(9))
    assert torch.equal(state, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_on_the_second_gpu_while_the_first_is_current() -> None:
    x = maps(4, 64, 28, 28).half().contiguous(memory_format=torch.channels_last)
    want, got = uk.topk_state(64, 9), uk.topk_state(64, 9, device="cuda:1")
    uk.topk_merge_(want, uk.spatial_argmax(x), torch.arange(4))
    uk.topk_merge_(got, uk.spatial_argmax(x.to("cuda:1")), torch.arange(4, device="cuda:1"))
    assert torch.cuda.current_device() == 0
    assert torch.equal(got.cpu(), want)
