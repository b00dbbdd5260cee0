"""Re-ranking: every unit called separated or tied after a scan in half precision is float32's, bit for bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import unitvis
from support import brute
from support.brute import wrong
from support.scans import by_half, pictures, tiny_net
from unitvis.errors import UnitvisError
from unitvis.ranking import recording
from unitvis.reranking import rerank
from unitvis.results.arrays import SEPARATED, UNSEPARATED
from unitvis.scanning.verify import verify


@pytest.mark.usefixtures("emulated_half")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_decided_units_equal_brute_force(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rerank, "MAX_RECOMPUTED_SHARE", math.inf)  # nothing but the bound decides
    images, model = pictures(1600), tiny_net()
    run = by_half(model, images, precision)
    assert run.manifest["scan"]["rewritten"].startswith("3 chains")
    assert run.manifest["precision"] == "exact"
    assert run.manifest["images"] == 1600
    assert wrong(run, model, images) == 0
    separated = sum((top.status == SEPARATED).sum() for top in run.tops.values())
    assert separated >= (50 if precision == "fp16" else 30)  # of 52
    assert run.manifest["rescored"]["images"] < 1500


@pytest.mark.usefixtures("emulated_half")
def test_where_the_bound_decides_nothing_all_images_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rerank, "upper_bound", lambda errors, draws: math.inf)
    images, model = pictures(600), tiny_net(1)
    run = by_half(model, images, "bf16")
    assert run.manifest["rescored"]["images"] == 600
    brute.check(run, brute.responses(model, run.layers, images, brute.canonical_batches(images)))
    want = unitvis.scan(model, images, precision="fp32", progress=False)
    for name in run.layers:  # to the byte, which types are part of
        for key in ("values", "images", "positions", "boxes", "status"):
            one, other = getattr(run[name], key), getattr(want[name], key)
            assert one.dtype == other.dtype
            assert one.tobytes() == other.tobytes()


def test_half_precision_as_this_machine_computes_it() -> None:
    images, model = pictures(300), tiny_net(2)
    run = by_half(model, images)
    assert wrong(run, model, images) == 0
    alone = unitvis.scan(model, images, precision="fp16", progress=False)
    assert all((top.status == UNSEPARATED).all() for top in alone.tops.values())
    with pytest.raises(UnitvisError, match="ranked in fp16"):
        verify(alone, model)


class Adversary(nn.Module):
    """Channels that half precision gets wrong in every way it can."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 1, bias=False)
        weight = torch.zeros(12, 3)
        weight[0] = torch.tensor([1.0, 0, 0])
        weight[1] = torch.tensor([1e5, 0, 0])  # overflows for half of the images
        weight[2] = torch.tensor([6e4, -6e4, 0])  # the difference of what overflows
        weight[3] = torch.tensor([1e-9, 0, 0])  # below the smallest number
        weight[4] = torch.tensor([-1e5, 0, 0])
        weight[5] = torch.tensor([1e38, 1e38, 1e38])
        weight[6] = torch.tensor([1e38, 1e38, -1e38]) * 3
        weight[7] = torch.tensor([1.0, 1e-4, 0])  # decided below half precision's resolution
        weight[8] = torch.tensor([0, 0, 1.0])  # a plateau
        weight[9] = torch.tensor([0, 1.0, 1.0])
        weight[10] = torch.tensor([0, 0, 0.0])  # constant
        weight[11] = torch.tensor([0, 3.0, 0])
        self.conv.weight.data = weight[:, :, None, None]
        self.clip, self.next = nn.ReLU6(), nn.Conv2d(12, 6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.next(self.clip(self.conv(x)))


def hostile(count: int) -> Tensor:
    g = torch.Generator().manual_seed(5)
    images = torch.rand(count, 3, 6, 6, generator=g)
    images[:, 0] = (1 + torch.randint(0, 3, (count, 6, 6), generator=g) * 1e-5) * (
        torch.rand(count, 1, 1, generator=g) < 0.5
    )
    images[:, 2] = images[:, 2].clamp_max(0.5)
    return images


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.filterwarnings("ignore:layer .* saturates")
def test_adversarial_units_come_out_right_or_undecided(
    precision: str, emulated: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if emulated:
        request.getfixturevalue("emulated_half")
    monkeypatch.setattr(rerank, "MAX_RECOMPUTED_SHARE", math.inf)
    # As if neither the first batch nor the sample showed anything.
    monkeypatch.setattr(recording, "suitable_precision", lambda network, images, precision: (precision, None))
    monkeypatch.setattr(rerank, "unsuitable_layers", lambda network, images, precision: {})
    images, model = hostile(600), Adversary().eval()
    run = by_half(model, images, precision)
    assert wrong(run, model, images) == 0
    assert (run["conv"].status != UNSEPARATED).all()  # it overflows, so every image is computed again
    model.conv.weight.data[[1, 2, 4, 5, 6]] = 0.5
    run = by_half(model, images, precision)
    assert wrong(run, model, images) == 0
    assert run["conv"].status[8] == UNSEPARATED  # more images on its plateau than there are candidates


def test_overflow_is_said_once_and_scanned_in_bfloat16() -> None:
    images, model = pictures(300) * 1e6, tiny_net(3)
    with pytest.warns(UserWarning, match="before layer '0' is read, .* the images are scanned in bfloat16") as told:
        run = by_half(model, images)
    assert len([w for w in told if "float16" in str(w.message)]) == 1
    assert run.manifest["scan"]["precision"] == "bf16"
    assert wrong(run, model, images) == 0


def test_nan_of_float32_holds_no_place() -> None:
    images, model = pictures(400), tiny_net(4)
    images[[7, 123]] = math.nan
    images[200, 0, 3, 3] = math.inf
    run = by_half(model, images)
    assert wrong(run, model, images) == 0
    nan = run[run.layers[0]].info["nan"]
    assert nan["first_image"] == 7
    assert not any(np.isin([7, 123], top.images).any() for top in run.tops.values())
