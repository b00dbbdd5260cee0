"""The settings of PyTorch under which responses are computed, and their return to what they were."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from support.scans import images, scan, small_net
from unitvis import UnitvisError
from unitvis.network.canonical import canonical_settings


def test_model_and_settings_are_left_as_they_were() -> None:
    model = small_net().train()
    model[4].eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    before = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled()
    scan(model, images(5))
    with pytest.raises(UnitvisError):
        scan(model, torch.zeros(2, 3, 2, 2))
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert (
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(),
    ) == before


def precisions() -> dict[str, object]:
    """Both of PyTorch's ways of saying how float32 is computed; the older one raises where they disagree."""
    backends = torch.backends
    return {
        "products": torch.get_float32_matmul_precision(),
        "older": [backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32],
        "newer": [b.fp32_precision for b in (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul)],
    }


@pytest.mark.parametrize("products", ["highest", "high", "medium"])
def test_how_float32_is_computed_is_said_once_and_taken_back(products: str) -> None:
    start = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(products)
    try:
        before = precisions()
        with canonical_settings(torch.device("cpu")):
            assert precisions() == {"products": "highest", "older": [False, False], "newer": ["ieee"] * 3}
        assert precisions() == before
    finally:
        torch.set_float32_matmul_precision(start)


def test_scans_in_threads_leave_the_settings_as_they_were() -> None:
    def settings() -> tuple[object, ...]:
        return precisions(), torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic

    before = settings()
    computing, enough = threading.Event(), threading.Event()

    def compute() -> None:
        with canonical_settings(torch.device("cpu")):
            computing.set()
            assert enough.wait(300)  # seconds: a test that hangs ends

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(compute)
        assert computing.wait(300)
        with canonical_settings(torch.device("cpu")):
            both = settings()
            enough.set()
            other.result()
            assert settings() == both != before  # the first to begin is not the last to end
    assert settings() == before
