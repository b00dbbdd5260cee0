"""A Recorder in loops that train, save, copy or hook the model between its calls."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from support import brute
from support.scans import LAYERS, arrays, images, scan, small_net, two_convolutions
from unitvis import Recorder


class Classifier(nn.Module):
    """A network whose BatchNorm and dropout tell its mode, and whose `eval` merges weights if asked to."""

    def __init__(self, *, merging: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.drop = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5)
        self.head = nn.Linear(6, 2)
        self.conv.weight.data = self.conv.weight.data.mul(256).round().div(256)  # so that merging is exact
        self.merging, self.merged = merging, False

    def train(self, mode: bool = True) -> Self:
        if self.merging and self.merged == mode:
            with torch.no_grad():
                self.conv.weight += -0.25 if mode else 0.25
            self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))


def trained(recorder_of: Callable[[nn.Module], AbstractContextManager[Any]], *, merging: bool) -> bytes:
    """The state of a classifier after a loop that calls `train` once, before it, and a recorder in each step."""
    model, pixels = Classifier(merging=merging).train(), images(64, 12)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(1)
    with recorder_of(model) as recorder:
        for part in pixels.split(16):
            recorder(part)
            optimizer.zero_grad()
            model(part).square().sum().backward()
            optimizer.step()
    assert all(module.training for module in model.modules())
    return b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())


@pytest.mark.parametrize("merging", [False, True])
def test_a_loop_trains_inside_the_block_as_without_it(merging: bool) -> None:
    without = trained(lambda model: nullcontext(lambda part: None), merging=merging)
    assert trained(lambda model: Recorder(model, ["norm"], weights="moving"), merging=merging) == without


@pytest.mark.parametrize("merging", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_mode_that_a_loop_chose_is_kept_between_calls(precision: str, merging: bool) -> None:
    model, pixels = Classifier(merging=merging).train(), images(48, 12)
    with Recorder(model, ["norm"], 3, precision=precision) as recorder:
        for part, mode in zip(pixels.split(16), (True, False, True), strict=True):
            model.train(mode)
            model.drop.train()
            recorder(part)
            assert [module.training for module in model.modules()] == [mode, mode, mode, True, mode]
            assert model.merged == (merging and not mode)
    assert brute.wrong(recorder.result(pixels), copy.deepcopy(model).eval(), pixels) == 0


def test_inside_the_block_a_model_is_saved_and_copied_as_outside() -> None:
    model, pixels = small_net(), images(32)
    with Recorder(model, LAYERS) as recorder:
        recorder(pixels[:16])
        pickle.dumps(model)
        torch.save(model, file := io.BytesIO())
        saved = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        for each in (model, copy.deepcopy(model), saved):
            assert not any(module._forward_hooks for module in each.modules())
        recorder(pixels[16:])
    assert arrays(recorder.result()) == arrays(scan(model, pixels, LAYERS))


class Collector:
    """Keeps outputs for the model that holds it."""

    def collect(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.last = output.shape


def record(model: nn.Module, pixels: Tensor) -> None:
    with Recorder(model, ["2"]) as recorder:
        recorder(pixels)


def test_hooks_that_collect_are_told_of_the_passes_that_examine_the_network() -> None:
    model, pixels, seen = two_convolutions(), images(20, 12), list[Tensor]()
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model[2].register_forward_pre_hook(lambda module, args: None)
    hooks = [dict(module._forward_hooks) for module in model]
    with pytest.warns(UserWarning, match=r"hooks that return nothing \(1 on 0, 1 on 2\); if they collect .* get noise"):
        record(model, pixels)
    assert [dict(module._forward_hooks) for module in model] == hooks
    assert sum(map(len, seen)) > len(pixels)


def test_hooks_that_are_a_part_of_the_network_are_not_warned_of() -> None:
    model = two_convolutions()
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    prune.random_unstructured(model[2], "weight", 0.3)
    model.collector = Collector()
    model[2].register_forward_hook(functools.partial(model.collector.collect))
    record(model, images(20, 12))
