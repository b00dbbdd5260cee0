"""Time callables until the device is done, with the cache emptied before each round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unitvis.bench.bench import synchronise


class Timer:
    """Passes callables to pytest-benchmark, with the parameters of their rows of the results."""

    def __init__(self, benchmark: Any, device: torch.device, rounds: int, flushed: int) -> None:
        self.benchmark, self.device, self.rounds = benchmark, device, rounds
        self._flush = torch.empty(flushed, dtype=torch.uint8, device=device)

    def __call__(
        self,
        run: Callable[[], object],
        *,
        calls: int = 1,
        setup: Callable[[], object] | None = None,
        warm: bool = False,
        **row: Any,
    ) -> None:
        """Time `run`, which makes `calls` calls of what is measured.

        setup: called before each round, untimed. warm: no warm-up round is needed. row: parameters of the row.
        """

        def prepare() -> None:
            if setup is not None:
                setup()
            self._flush.zero_()
            synchronise(self.device)

        def timed() -> None:
            run()
            synchronise(self.device)

        self.benchmark.extra_info.update(row, calls=calls)
        self.benchmark.pedantic(timed, setup=prepare, rounds=self.rounds, warmup_rounds=0 if warm else 1)


def rotating(
    call: Callable[..., object], operands: Sequence[tuple[Any, ...]], device: torch.device
) -> tuple[Callable[[], object], int]:
    """Make a callable that calls with each of the operands in turn; returns it with the number of its calls.

    On a GPU it replays a CUDA graph, so that the time of launches from Python does not count.
    """

    def run() -> None:
        for one in operands:
            call(*one)

    return (captured(run, device) if device.type == "cuda" else run), len(operands)


def captured(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Capture `run` in a CUDA graph, after three warm-up calls; returns a callable that replays it."""
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside), torch.inference_mode():
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.inference_mode():
        run()
    return lambda _kept=run: graph.replay()  # keeps the tensors that the graph reads and writes


def copies(tensors: Sequence[Tensor], count: int) -> list[tuple[Tensor, ...]]:
    """Make `count` tuples: the tensors themselves, and copies of them in the same layout."""
    return [tuple(tensors), *(tuple(t.clone() for t in tensors) for _ in range(count - 1))]
