"""Recorders in threads: one in several, and several on one model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from support import brute
from support.scans import arrays, images, scan
from unitvis import Recorder

LAYERS = ["0.conv", "2"]


class Slow(nn.Module):
    """Lets other threads run in the middle of its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.dropout = nn.Conv2d(3, 6, 3), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        time.sleep(0.005)
        return self.dropout(y)


def slow_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Slow(), nn.ReLU(), nn.Conv2d(6, 5, 3)).eval()


def in_threads(*tasks: Callable[[], object]) -> None:
    """Run the tasks at the same time; fail with what one of them raises."""
    barrier, errors = threading.Barrier(len(tasks)), []

    def run(task: Callable[[], object]) -> None:
        barrier.wait()
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_threads_that_share_a_recorder_take_turns(precision: str) -> None:
    model, pixels = slow_network(), images(120, 12)

    def feed(part: int) -> None:
        for start in range(part * 40, (part + 1) * 40, 10):
            recorder(pixels[start : start + 10], range(start, start + 10))

    with Recorder(model, LAYERS, precision=precision) as recorder:
        in_threads(*(lambda part=part: feed(part) for part in range(3)))
    run = recorder.result(pixels)
    if precision == "fp32":
        brute.check(run, brute.responses(model, LAYERS, pixels, brute.canonical_batches(pixels)))
    assert brute.wrong(run, model, pixels) == 0


def test_recorders_on_one_model_take_turns_from_the_first_look_at_it() -> None:
    model, pixels, runs = slow_network().train(), images(48, 12), {}
    want = {k: arrays(scan(slow_network(), pixels, k=k)) for k in (3, 4, 5)}

    def record(k: int) -> None:
        with Recorder(model, k=k) as recorder:
            for part in pixels.split(16):
                recorder(part)
        runs[k] = arrays(recorder.result())

    in_threads(*(lambda k=k: record(k) for k in want))
    assert runs == want
    assert all(module.training for module in model.modules())


def test_overlapping_blocks_leave_the_training_flags_alone() -> None:
    model, pixels = slow_network().train(), images(32, 12)
    first, second = Recorder(model, LAYERS), Recorder(model, LAYERS)
    first.__enter__()
    second.__enter__()
    second(pixels)
    first(pixels)
    first.__exit__(None)
    assert all(module.training for module in model.modules())
    second.__exit__(None)
    assert all(module.training for module in model.modules())
    assert arrays(first.result()) == arrays(second.result())
