"""The compiled kernels on a real GPU give the same bits as `naive` on the CPU."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import unitvis_kernels as uk
from support.conv_cases import CASES, Case, operands
from unitvis_kernels import naive

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
    """Whether a, on a GPU, and b hold the same bits, where every NaN is the same."""
    a = a.cpu()
    bits = [t.nan_to_num(7.0).flatten().view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(*bits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_spatial_argmax(layout: torch.memory_format, dtype: torch.dtype) -> None:
    for shape in ((3, 5, 4, 7), (1, 64, 224, 224), (32, 96, 55, 55), (2, 512, 7, 7), (1, 3, 1, 1), (4, 100, 1, 9)):
        for ties in (False, True):
            x = maps(*shape, ties=ties).to(dtype).contiguous(memory_format=layout)
            torch.full(shape[:2], 0x55).cuda()  # freed at once, so that the keys are allocated over it
            assert torch.equal(uk.spatial_argmax(x.cuda()).cpu(), naive.spatial_argmax(x))
            inside = (shape[2] // 3, shape[2], 0, -(-shape[3] // 2))
            assert torch.equal(uk.spatial_argmax(x.cuda(), inside=inside).cpu(), naive.spatial_argmax(x, inside))
    x = maps(4, 9, 14, 14).to(dtype)
    for view in (x[1:, 1:], x[..., 1:], x.transpose(2, 3), x[:1].expand(3, -1, -1, -1)):
        assert torch.equal(uk.spatial_argmax(view.cuda()).cpu(), naive.spatial_argmax(view))
    odd = maps(2, 5, 4, 7).to(dtype).flatten()
    odd = torch.cat([odd[:3], odd]).cuda()[3:].view(2, 5, 4, 7)
    assert torch.equal(uk.spatial_argmax(odd).cpu(), naive.spatial_argmax(odd.cpu()))


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
        naive.topk_merge_(want, keys[part], ids[part])
        uk.topk_merge_(got, keys[part].cuda(), ids[part].cuda())
        assert torch.equal(got.cpu(), want)
    uk.topk_merge_states_(want, want.clone())
    uk.topk_merge_states_(got, got.clone())
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_epilogue(layout: torch.memory_format, dtype: torch.dtype) -> None:
    pools = (None, (2, 2), (3, 2), (3, 2, 1), (1, 2), (2, 3))
    options = list(itertools.product((None, "relu", "relu6"), (None, torch.float32, dtype), (False, True)))
    turn = 0  # each combination compiles: every option once with some shape and pool, every shape with every pool
    for shape, pool in itertools.product(((2, 10, 13, 13), (8, 64, 55, 55), (3, 70, 9, 40), (1, 24, 112, 112)), pools):
        x = maps(*shape).to(dtype).contiguous(memory_format=layout)
        bias = torch.linspace(-1.3, 1.7, shape[1])
        for _ in range(3):
            activation, kind, after = options[turn % len(options)]
            b, turn = None if kind is None else bias.to(kind), turn + 5
            want = naive.epilogue(x, b, activation, () if pool is None else (*pool, 0)[:3], after)
            got = uk.epilogue(x.cuda(), b if b is None else b.cuda(), activation, pool, key_after=after)
            assert torch.equal(got[0].cpu(), want[0])
            assert same(got[1], want[1])
            assert got[1].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_epilogue_and_residual_under_floors(dtype: torch.dtype) -> None:
    for turn, shape in enumerate(((2, 10, 13, 13), (8, 64, 55, 55), (3, 70, 9, 40), (1, 24, 112, 112))):
        x, shortcut = (t.to(dtype).contiguous(memory_format=FORMATS[1]) for t in (maps(*shape), maps(*shape).flip(1)))
        bias = torch.linspace(-1.3, 1.7, shape[1])
        floor = torch.tensor([math.nan, math.inf, -math.inf, 6.0]).repeat(shape[1])[: shape[1]]
        on_gpu = x.cuda(), shortcut.cuda(), bias.cuda(), floor.cuda()
        pool, projection = ((3, 2, 1), None, (2, 2), (3, 1, 1))[turn], bias.flip(0) if turn % 2 else None
        keys, y = uk.epilogue(on_gpu[0], on_gpu[2], "relu", pool, floor=on_gpu[3])
        wanted, want = naive.epilogue(x, bias, "relu", () if pool is None else (*pool, 0)[:3], False)
        assert same(y, want)
        found = [keys]
        wanted = [wanted]
        buffer = torch.full((shape[0], 4 * shape[1]), uk.BLANK, device="cuda")
        parts = list(buffer.split(shape[1], dim=1))
        y = uk.residual(
            *on_gpu[:3], None if projection is None else projection.cuda(), "relu", keys=parts, floors=[on_gpu[3]] * 4
        )
        more, want = naive.residual(x, shortcut, bias, projection, "relu")
        assert same(y, want)
        for own, one in zip([*found, *parts], [*wanted, *more], strict=True):
            own, below = own.cpu(), uk.unpack(one)[0] < floor
            assert torch.equal(own >> 32, one >> 32)
            assert torch.equal(own[~below], one[~below])


LARGE = {
    "AlexNet 1": Case((3, 3, 224, 224), 64, (11, 11), (4, 4), (2, 2)),
    "ResNet 1x1": Case((4, 64, 56, 56), 256, (1, 1)),
    "ResNet 3x3": Case((2, 128, 28, 28), 128, padding=(1, 1)),
    "7x7": Case((2, 512, 7, 7), 512, padding=(1, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", {**CASES, **LARGE})
def test_conv_argmax(name: str, dtype: torch.dtype) -> None:
    case = {**CASES, **LARGE}[name]
    x, weight, bias = operands(case, dtype)
    geometry = case.geometry
    _, want = naive.conv_argmax(x.double(), weight.double(), bias, geometry)
    on_gpu = [t.cuda() for t in (x, weight, bias)]
    torch.full_like(want, math.nan, device="cuda")  # freed at once, so that y is allocated over it
    keys, y = uk.conv_argmax(*on_gpu, *geometry)
    ulp = 2.0**-11 if dtype == torch.float16 else 2.0**-8  # half a unit in the last place
    torch.testing.assert_close(y.cpu().double(), want, rtol=ulp, atol=2e-3)  # the sum's own error, where terms cancel
    assert torch.equal(keys.cpu(), naive.spatial_argmax(y.cpu()))
    options = list(itertools.product((None, "relu", "relu6"), (False, True)))
    turn = list({**CASES, **LARGE}).index(name)
    for activation, after in (options[turn % 6], options[(turn + 3) % 6]):  # each compiles, so two of six a case
        got = uk.conv_argmax(*on_gpu, *geometry, activation=activation, key_after=after)
        assert torch.equal(got[1].cpu(), naive.activate(y.cpu(), activation))
        assert torch.equal(got[0], uk.spatial_argmax(got[1] if after else y))
        assert torch.equal(
            uk.conv_argmax(*on_gpu, *geometry, activation=activation, key_after=after, store=False)[0], got[0]
        )
    x[0, 0, 0, 0], x[-1, -1, -1, -1] = math.nan, -math.inf
    bias[0], bias[1], bias[2] = math.inf, -math.inf, -math.nan
    keys, y = uk.conv_argmax(x.cuda(), weight.cuda(), bias.cuda(), *geometry)
    assert torch.equal(keys.cpu(), naive.spatial_argmax(y.cpu()))
    assert (keys[:, 2] == uk.NAN_KEY).all()


def test_conv_argmax_where_sums_are_exact_and_where_it_has_no_kernel() -> None:
    case = LARGE["ResNet 3x3"]
    x, weight, bias = operands(case, torch.float16, exact=True)
    want = naive.conv_argmax(x, weight, bias, case.geometry)
    for layout in FORMATS:
        got = uk.conv_argmax(x.contiguous(memory_format=layout).cuda(), weight.cuda(), bias.cuda(), padding=1)
        assert torch.equal(got[0].cpu(), want[0])
        assert same(got[1], want[1])
        assert got[1].is_contiguous(memory_format=torch.channels_last)
    got = uk.conv_argmax(x.float().cuda(), weight.float().cuda(), bias.cuda(), padding=1)
    assert torch.equal(got[0].cpu(), naive.conv_argmax(x.float(), weight.float(), bias, case.geometry)[0])


def test_conv_argmax_never_holds_the_map_it_does_not_store() -> None:
    x, weight, bias = (t.cuda() for t in operands(Case((64, 64, 56, 56), 256, (1, 1)), torch.float16))
    uk.conv_argmax(x, weight, bias, store=False)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    keys, _ = uk.conv_argmax(x, weight, bias, store=False)
    assert torch.cuda.max_memory_allocated() - before < 2 * keys.nbytes + 4096  # the map would take 100 MB


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalize(dtype: torch.dtype) -> None:
    x = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 3).reshape(1, 16, 16, 3).repeat(5, 7, 11, 1)
    for pixels in (x, x[:, 3:50, 1:77], x.flip(1).contiguous()):
        got = uk.normalize(pixels.cuda(), MEAN, STD, dtype)
        assert same(got, naive.normalize(pixels, MEAN, STD, dtype))
        assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_input_in_blocks(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    for C, kernel, stride, padding in ((3, 11, 4, 2), (3, 7, 2, 3), (1, 3, 1, 1), (3, 16, 16, 0)):
        pixels = torch.randint(0, 256, (5, 65, 71, C), dtype=torch.uint8, generator=g)
        geometry = uk.ConvGeometry((stride, stride), (padding, padding))
        blocks = uk.Blocks.of(C, (65, 71), (kernel, kernel), geometry)
        x = naive.normalize(pixels, MEAN[:C], STD[:C], torch.float32)
        want = naive.arrange(naive.normalize(pixels, MEAN[:C], STD[:C], dtype), blocks, dtype)
        got = uk.normalize(pixels.cuda(), MEAN[:C], STD[:C], dtype, blocks)
        assert same(got, want)
        for layout in FORMATS:
            got = uk.arrange(x.contiguous(memory_format=layout).cuda(), blocks, dtype)
            assert same(got, naive.arrange(x, blocks, dtype))
            assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_magnitudes(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(2)
    for C, size in ((3, (224, 224)), (1, (1, 1)), (4, (33, 70)), (3, (130, 600))):
        x = torch.randn(5, C, *size, generator=g).to(dtype)
        x[3, 0, 0, 0], x[4, -1, -1, -1] = math.nan, -math.inf
        want = naive.magnitudes(x, [], [])
        for layout in FORMATS:
            on_gpu = x.contiguous(memory_format=layout).cuda()
            assert same(uk.magnitudes(on_gpu), want)
            assert same(uk.magnitudes(on_gpu[1:2]), want[1:2])
        if C < 4:
            pixels = torch.randint(0, 256, (5, *size, C), dtype=torch.uint8, generator=g)
            want = naive.magnitudes(pixels, MEAN[:C], STD[:C])
            assert same(uk.magnitudes(pixels.cuda(), MEAN[:C], STD[:C]), want)
            assert same(uk.magnitudes(pixels[2:].cuda(), MEAN[:C], STD[:C]), want[2:])


def step(x: Tensor, state: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    keys, y = uk.epilogue(x, None, "relu", (2, 2))
    uk.topk_merge_(state, keys, ids)
    keys, y = uk.conv_argmax(y, weight, padding=1, activation="relu")
    uk.topk_merge_(state, keys, ids + 16)
    return y


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # that the compiler itself causes when it is imported
def test_other_streams_graphs_and_torch_compile() -> None:
    x = maps(16, 64, 28, 28).half().contiguous(memory_format=torch.channels_last).cuda()
    ids = torch.arange(16, device="cuda")
    weight = torch.linspace(-1, 1, 64 * 64 * 9).half().view(64, 64, 3, 3).cuda()
    want = uk.topk_state(64, 9, device="cuda")
    y = step(x, want, ids, weight)

    side, state = torch.cuda.Stream(), uk.topk_state(64, 9, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert torch.equal(step(x, state, ids, weight).nan_to_num(9), y.nan_to_num(9))
    side.synchronize()
    assert torch.equal(state, want)

    state, graph = uk.topk_state(64, 9, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # fails on a synchronisation
        step(x, state, ids, weight)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(state, want)

    state = uk.topk_state(64, 9, device="cuda")
    with torch.inference_mode():
        assert torch.equal(torch.compile(step, fullgraph=True)(x, state, ids, weight).nan_to_num(9), y.nan_to_num(9))
    assert torch.equal(state, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_on_the_second_gpu_while_the_first_is_current() -> None:
    x = maps(4, 64, 28, 28).half().contiguous(memory_format=torch.channels_last)
    want, got = uk.topk_state(64, 9), uk.topk_state(64, 9, device="cuda:1")
    uk.topk_merge_(want, uk.spatial_argmax(x), torch.arange(4))
    uk.topk_merge_(got, uk.spatial_argmax(x.to("cuda:1")), torch.arange(4, device="cuda:1"))
    assert torch.cuda.current_device() == 0
    assert torch.equal(got.cpu(), want)
