"""Capturing a step as a CUDA graph, or saying why it is not captured."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import unitvis
from unitvis.half_precision.capture import ForbidHostSync, Replay
from unitvis.network.memory import may_fit_in_parts


class Nothing:
    """Stands for what CUDA makes: does nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Buffers are made of ordinary memory, and capturing fails as CUDA's does; not empty while a step is captured."""
    now: list[bool] = []

    class Refuses(Nothing):
        def __enter__(self) -> None:
            now.append(True)

        def __exit__(self, *_: object) -> None:
            now.clear()
            raise RuntimeError("operation failed due to a previous error during capture")

    for name in ("Event", "Stream", "CUDAGraph", "device", "stream"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    monkeypatch.setattr(torch.cuda, "current_stream", Nothing)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", Nothing)
    monkeypatch.setattr(torch.cuda, "graph", Refuses)
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, functools.partial(_plain, getattr(torch, name)))
    return now


def test_a_step_that_cannot_be_captured_says_why(capturing: list[bool]) -> None:
    def one_step(x: Tensor, ids: Tensor) -> None:
        seen.append((x.clone(), ids.clone()))
        if capturing:
            raise unitvis.UnitvisError("not permitted while capturing")

    seen: list[tuple[Tensor, Tensor]] = []
    images = torch.arange(10.0)[:, None].expand(10, 4)
    replay = Replay(one_step, 4, images, torch.device("cpu"))
    assert replay.capture_error == "UnitvisError: not permitted while capturing"
    assert all((ids == -1).all() for _, ids in seen)  # warming up changes no state
    seen.clear()
    for start in (0, 4, 8):
        replay(images[start : start + 4], torch.arange(10)[start : start + 4])
    assert [ids.tolist() for _, ids in seen] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1]]
    assert [x[:, 0].tolist()[: 2 if n == 2 else 4] for n, (x, _) in enumerate(seen)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]


@pytest.mark.parametrize("failing", ["warm-up", "capture"])
def test_a_lack_of_memory_is_no_reason_to_run_eagerly(failing: str, capturing: list[bool]) -> None:
    """A smaller batch may be captured."""

    def one_step(x: Tensor, ids: Tensor) -> None:
        if failing == "warm-up" or capturing:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(RuntimeError) as caught:
        Replay(one_step, 4, torch.zeros(4, 4), torch.device("cpu"))
    assert may_fit_in_parts(caught.value)


ITEM = r"aten\.(item|_local_scalar_dense)\.default"  # in inference mode `item` is seen whole, elsewhere its part


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    ("named", "looking"),
    {
        ITEM: lambda x, ids: x.sum().item(),
        r"aten\.nonzero\.default": lambda x, ids: x.nonzero(),
        r"aten\.index\.Tensor": lambda x, ids: x[x > 0],
        "": lambda x, ids: x[ids].relu_().amax(1),
    }.items(),
)
def test_a_step_that_looks_at_values_is_not_captured(
    named: str, looking: Callable[..., object], inference: bool
) -> None:
    x, ids = torch.randn(4, 5), torch.arange(4)
    with torch.inference_mode(inference):
        if not named:
            with ForbidHostSync():
                looking(x, ids)
            return
        with pytest.raises(RuntimeError, match=f"{named} makes the host wait for the device"), ForbidHostSync():
            looking(x, ids)


def _plain(empty: Callable[..., Tensor], *args: Any, pin_memory: bool = False, **options: Any) -> Tensor:
    return empty(*args, **options)
