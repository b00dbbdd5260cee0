"""Settings of the process, of its threads and of its environment that change the bits of float32."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unitvis
from support.scans import arrays, images, scan, small_net
from unitvis import UnitvisError
from unitvis.network import canonical
from unitvis.network.device import fingerprint
from unitvis.network.network import Network

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"])
def test_operands_of_fewer_bits_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "strict")
    scan(small_net(), images(3))
    monkeypatch.setenv(name, "BF16")
    with pytest.raises(UnitvisError, match=rf"rounded to fewer bits here \({name}=BF16\).*; unset {name}") as raised:
        scan(small_net(), images(3))
    assert "\n" not in str(raised.value)
    network = Network(small_net())
    network.examine((3, 28, 28))
    with pytest.raises(UnitvisError, match="rounded to fewer bits"):  # before it is taken for another network
        network.description  # noqa: B018


@pytest.mark.parametrize("name", ["conv2d", "mm"])
def test_rounded_operands_are_noticed_whatever_asked_for_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = canonical._rounds_operands.__wrapped__
    assert not rounds(CPU)
    if name == "conv2d":
        convolve = F.conv2d
        monkeypatch.setattr(F, "conv2d", lambda x, w: convolve(x.bfloat16(), w.bfloat16()).float())
    else:
        product = torch.Tensor.__matmul__
        monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: product(a.bfloat16(), b.bfloat16()).float())
    assert rounds(CPU)


def test_denormal_numbers_are_kept_by_every_thread() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 1, bias=False), nn.ReLU(), nn.Conv2d(64, 2, 1, bias=False))
    nn.init.constant_(model[0].weight, 1e-39)
    pixels = images(20, 32).abs()
    nn.init.constant_(model[2].weight, 1e30)  # normal numbers again
    run = scan(model, pixels, "2")
    want = arrays(run)
    assert (run["2"].values > 1e-10).all()

    def scan_flushing(threads: int) -> tuple[dict[str, bytes], bool]:
        torch.set_flush_denormal(True)  # of this thread, and of those that compute for it from now on
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            torch.zeros(1_000_000).add(1)
            return arrays(scan(model, pixels, "2")), canonical.flushes_denormals(1)
        finally:
            torch.set_num_threads(before)
            torch.set_flush_denormal(False)

    for threads in (1, 3):
        with ThreadPoolExecutor(1) as pool:
            found, flushed = pool.submit(scan_flushing, threads).result()
        assert found == want
        assert flushed  # the caller's setting is back


def switches() -> list[object]:
    backends = torch.backends
    nnpack = backends.nnpack.set_flags(True)
    backends.nnpack.set_flags(*nnpack)
    return [
        backends.mkldnn.enabled,
        backends.opt_einsum.enabled,
        backends.mha.get_fastpath_enabled(),
        backends.cuda.flash_sdp_enabled(),
        backends.cuda.mem_efficient_sdp_enabled(),
        backends.cuda.math_sdp_enabled(),
        backends.cuda.cudnn_sdp_enabled(),
        nnpack[0],
        torch._C._get_graph_executor_optimize(),
    ]


def test_backends_that_the_caller_switched_are_as_canonical_for_a_while() -> None:
    want = arrays(scan(small_net(), images(20)))
    before = switches()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.backends.mkldnn.enabled = False
        torch.backends.nnpack.set_flags(False)
        torch.backends.mha.set_fastpath_enabled(True)
        try:
            switched = switches()
            with canonical.canonical_settings(CPU):
                assert switches() == [True, False, False, True, True, True, True, True, False]
            assert arrays(scan(small_net(), images(20))) == want
            assert switches() == switched
        finally:
            torch.backends.mkldnn.enabled = before[0]
            torch.backends.nnpack.set_flags(before[7])
            torch.backends.mha.set_fastpath_enabled(before[2])
    assert switches() == before


def test_what_cannot_be_set_for_a_while_is_in_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = fingerprint(CPU)
    first = scan(small_net(), images(20), shard=(1, 2))
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert fingerprint(CPU) == usual | {"MKL_CBWR": "COMPATIBLE"}
    second = scan(small_net(), images(20), shard=(2, 2))
    with pytest.raises(UnitvisError, match=r"cannot be merged: fingerprint\.MKL_CBWR is nothing and COMPATIBLE$"):
        unitvis.merge([first, second], small_net(), images=images(20))
    monkeypatch.delenv("MKL_CBWR")
    torch.set_default_dtype(torch.float64)
    try:
        assert fingerprint(CPU) == usual | {"default dtype": "torch.float64"}
    finally:
        torch.set_default_dtype(torch.float32)
