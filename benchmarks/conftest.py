"""Fixtures of the benchmarks: device, sizes and timer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import sizes
from benchmarks.timing import Timer


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sizes", choices=sorted(sizes.ALL), default=sizes.here(), help="how large (by the device)")


@pytest.fixture
def form(request: pytest.FixtureRequest) -> sizes.Sizes:
    return sizes.ALL[request.config.getoption("--sizes")]


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.config.getoption("--sizes") != "gpu":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def timer(benchmark: Any, form: sizes.Sizes, device: torch.device) -> Timer:
    return Timer(benchmark, device, form.rounds, form.flushed)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise `case` with what the module's CASES lists for the benchmark's name."""
    if "case" not in metafunc.fixturenames:
        return
    name = metafunc.config.getoption("--sizes")
    cases = metafunc.module.CASES[metafunc.function.__name__](sizes.ALL[name], "cuda" if name == "gpu" else "cpu")
    metafunc.parametrize("case", cases, ids=lambda case: " ".join(map(str, case)).replace("torch.", ""))
