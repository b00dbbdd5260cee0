"""Capturing a step as a CUDA graph, or saying why it is not captured."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import unitvis
from unitvis.half_precision.capture import ForbidHostSync


def test_a_step_that_cannot_be_captured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: the buffers of one are made of ordinary memory, and capturing fails as CUDA's does."""
    from unitvis.half_precision import capture

    class Nothing:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_, **__: None

    class Refuses(Nothing):
        def __enter__(self) -> None:
            capturing.append(True)

        def __exit__(self, *_: object) -> None:
            capturing.clear()
            raise RuntimeError("operation failed due to a previous error during capture")

    def one_step(x: Tensor, ids: Tensor) -> None:
        seen.append((x.clone(), ids.clone()))
        if capturing:
            raise unitvis.UnitvisError("not permitted while capturing")

    for name in ("Event", "Stream", "CUDAGraph", "device", "stream"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    monkeypatch.setattr(torch.cuda, "current_stream", Nothing)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", Nothing)
    monkeypatch.setattr(torch.cuda, "graph", Refuses)
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, functools.partial(_plain, getattr(torch, name)))
    seen: list[tuple[Tensor, Tensor]] = []
    capturing: list[bool] = []
    images = torch.arange(10.0)[:, None].expand(10, 4)
    replay = capture.Replay(one_step, 4, images, torch.device("cpu"))
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
