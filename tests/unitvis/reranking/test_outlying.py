"""Rare images whose rounding errors no image of the sample shows: found by how large their numbers are."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.brute import wrong
from support.scans import by_half, two_convolutions
from unitvis import Recorder
from unitvis.reranking.outlying import outlying_inputs, outlying_responses
from unitvis.reranking.rerank import rerank
from unitvis.results.arrays import UNSEPARATED
from unitvis.run import Run
from unitvis.sources import open_source
from unitvis.state import magnitudes
from unitvis.state.sampling import sample
from unitvis.state.topk import Ranked

COUNT = 3000


def unseen(count: int, images: int = COUNT) -> list[int]:
    """Ids, far apart, of images that neither the first batch nor the sample holds."""
    ids = np.setdiff1d(np.arange(64, images), sample(np.array([[0, images]])))
    return ids[:: len(ids) // count][:count].tolist()


def decided(run: Run) -> int:
    return sum(int((top.status != UNSEPARATED).sum()) for top in run.tops.values())


def bright(count: int) -> tuple[nn.Module, Tensor, list[int]]:
    """One convolution that sees no brightness; images, of which some are nine times as bright, with a faint pattern."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 12, 3, bias=False)).eval()
    weight = model[0].weight.data
    weight -= weight.mean((1, 2, 3), keepdim=True)
    images = 0.004 * torch.randn(COUNT, 3, 3, 3) + (2 * torch.rand(COUNT, 1, 1, 1) - 1)
    rare = unseen(count)
    images[rare] = 9 + 0.0038 * torch.sign(weight)[torch.arange(count) % 12]
    return model, images, rare


def test_a_faint_pattern_on_rare_bright_images() -> None:
    model, images, rare = bright(12)
    run = by_half(model, images)
    assert run.manifest["scan"]["precision"] == "fp16"
    assert wrong(run, model, images) == 0
    assert decided(run) >= 10
    assert run["0"].images[:, 0].tolist() == rare  # each is the strongest of a unit
    assert 12 <= run.manifest["rescored"]["outlying"] < 150
    assert run.manifest["rescored"]["images"] < COUNT / 2  # not because all were computed


def test_more_bright_images_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(magnitudes, "KEPT", 4)
    model, images, _ = bright(12)
    run = by_half(model, images)
    assert run.manifest["rescored"]["outlying"] < 12
    assert wrong(run, model, images) == 0


def test_responses_that_are_large_in_rare_images_alone() -> None:
    """The inputs have one magnitude; the first layer, a mean, gives 18 times as much where their signs are equal."""
    torch.manual_seed(5)
    board = torch.ones(10, 10)
    board[::2, ::2] = board[1::2, 1::2] = -1
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.ReLU(), nn.Conv2d(4, 12, 3, bias=False)).eval().requires_grad_(False)
    model[0].weight[:] = (torch.rand(4, 1, 1, 1) + 0.5) / 192
    model[0].bias[:] = 0.05
    model[2].weight -= model[2].weight.mean((2, 3), keepdim=True)
    images = 0.9 * board + 0.01 * torch.randn(COUNT, 3, 10, 10)
    # Of many, those that the second layer ranks among its first nine, and half precision behind all candidates.
    drawn = (0.9 + 0.01 * torch.randn(20000, 3, 10, 10)).clamp(max=0.92)
    ranked = model(images).flatten(1).sort(0, descending=True).values
    full, half = model(drawn).flatten(1), model.half()(drawn.half()).float().flatten(1)
    model = model.float()
    lost = ((full > ranked[8]) & (half < ranked[63]).all(1, keepdim=True)).any(1).nonzero()[:12, 0]
    assert len(lost) >= 6
    images[unseen(12)[: len(lost)]] = drawn[lost]
    run = by_half(model, images)
    assert run.manifest["scan"]["precision"] == "fp16"
    assert wrong(run, model, images) == 0
    assert decided(run) >= 6
    assert run.manifest["rescored"]["images"] < COUNT / 2


def test_a_channel_that_rare_images_alone_open() -> None:
    """By less than the rounding of its large weights: half precision leaves it closed."""
    torch.manual_seed(3)
    images = torch.randn(6000, 3, 3, 3)
    model = nn.Sequential(nn.Conv2d(3, 13, 3), nn.ReLU(), nn.Conv2d(13, 12, 1, bias=False)).eval().requires_grad_(False)
    first, last = model[0], model[2]
    first.weight[0] *= 60
    first.weight[0, 2] = 0
    first.weight[1:, :2] = 0
    first.bias[0] = -6 * first.weight[0].norm()
    first.bias[1:] = 1
    last.weight[:] = 0
    last.weight[:, 0] = 1
    last.weight[range(12), range(1, 13)] = 0.15
    # Inputs that open the channel by 0.02 to 0.07, of which those where half precision gives least.
    drawn, weight = torch.randn(40000, 3, 3, 3), first.weight[0]
    missing = 0.02 + 0.05 * torch.rand(40000) - first.bias[0] - (drawn * weight).sum((1, 2, 3))
    drawn += (missing / weight.square().sum())[:, None, None, None] * weight
    half = F.relu((drawn.half().float() * weight.half().float()).sum((1, 2, 3)) + first.bias[0].half().float())
    full = F.relu((drawn * weight).sum((1, 2, 3)) + first.bias[0])
    responses, rare = model(images).flatten(1), unseen(24, 6000)
    images[rare] = drawn[(full - half).topk(24).indices]
    like = responses.argsort(0, descending=True)[80]  # what the other channels give: as images far behind the first
    images[rare, 2] = images[like[torch.arange(24) % 12], 2]
    run = by_half(model, images)
    assert run.manifest["scan"]["precision"] == "fp16"
    assert wrong(run, model, images) == 0
    assert run.manifest["rescored"]["outlying"] >= 24
    assert run.manifest["rescored"]["images"] < 3000


def ranked(values: list[list[float]]) -> Ranked:
    """Images 0, 1, ... in each row's places; NaN: blank."""
    table = np.array(values, np.float32)
    images = np.where(np.isnan(table), -1, np.arange(table.shape[1]))
    return Ranked(table, images, np.zeros(table.shape, np.int64), np.zeros((len(table), 2), np.int64))


@pytest.mark.parametrize(
    ("kept", "outside", "times"),
    [
        ([[5.0, 2.0, np.nan]], [[True, False, False]], 1.0),
        ([[5.0, 4.0, 3.0]], [[True, True, True]], 1.5),  # a fourth image may be as large as the third
        ([[2.01, 2.0, 1.0]], [[False, False, False]], 1.005),
        ([[np.inf, 1.0, 1.0]], [[True, False, False]], 1.0),
    ],
)
def test_inputs_beyond_the_sample(kept: list[list[float]], outside: list[list[bool]], times: float) -> None:
    found, left = outlying_inputs(ranked(kept), np.array([[2.0], [1.0], [np.inf]]))
    assert found.tolist() == outside
    assert left == pytest.approx(times, rel=1e-6)


def test_responses_beyond_the_sample() -> None:
    candidates = ranked([[9.0, 7.0, 5.0], [2.5, 1.5, 1.0], [-0.1, -0.3, -1.0], [np.inf, 12.0, 11.0]])
    sampled = np.array([[8.0, 1.0, -2.0, 10.0], [3.0, 0.5, -1.0, 4.0]])
    closed, margins = np.array([False, False, True, False]), np.array([1.0, 1.0, 0.2, 1.0])
    columns = [slice(0, 3), slice(3, 4)]
    outside, times = outlying_responses(candidates, sampled, columns, closed, margins)
    assert outside.tolist() == [
        [True, False, False],  # above 8, the layer's largest
        [True, False, False],  # above twice 1, the unit's largest
        [True, False, False],  # may be open: it lies less than 0.2 below 0
        [False, True, True],  # infinite: a candidate in the later layers too
    ]
    assert times == pytest.approx([1.0, 1.1])


def test_what_no_batch_size_of_the_scan_spans(emulated_half: None) -> None:
    """An image may have been computed in any: the one in which the sample spans least counts."""
    images = torch.randn(300, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with Recorder(two_convolutions(), k=2, precision="fp16", batch_size=16) as recorder:
        recorder(images, range(300))
    scanned, source = recorder.scanned, open_source(images, None)

    def outlying(**changes: object) -> int:
        with recorder.network.evaluating():
            return rerank(recorder.network, replace(scanned, **changes), source).outlying

    usual = outlying()
    for what, weak in itertools.product(("responses", "magnitudes"), (8, 16)):
        computed = getattr(scanned, what)

        def weaker(images: Tensor, size: int, computed: Any = computed, weak: int = weak) -> np.ndarray:
            return computed(images, size) * (0.5 if size == weak else 1)

        assert outlying(batch_sizes=[8, 16], **{what: weaker}) > usual + 100
