"""One network that runs its branches in another order each time: its units are told by their layers' names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import unitvis
from support import brute
from support.scans import images
from unitvis.scanning.progress import Progress
from unitvis.scanning.verify import verify

LAYERS = ["left", "right", "last"]


class Branches(nn.Module):
    """Two convolutions that do not depend on each other, run in the order that is given."""

    def __init__(self, *order: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 6, 3, stride=2)
        self.last = nn.Conv2d(4, 5, 3)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        maps = {name: getattr(self, name)(x) for name in self.order}
        return self.last(maps["left"] + maps["right"].mean((1, 2, 3), keepdim=True))


def one() -> nn.Module:
    return Branches("left", "right").eval()


def other() -> nn.Module:
    return Branches("right", "left").eval()


@pytest.fixture(scope="module")
def whole() -> unitvis.Run:
    return scan(one())


def scan(model: nn.Module, **options: object) -> unitvis.Run:
    return unitvis.scan(model, images(40, 12), k=3, precision="fp32", progress=False, batch_size=8, **options)


def check(run: unitvis.Run, whole: unitvis.Run) -> None:
    assert sorted(run.layers) == sorted(LAYERS)
    for name in LAYERS:
        for key in ("values", "images", "positions", "boxes", "status"):
            assert np.array_equal(getattr(run[name], key), getattr(whole[name], key))
    brute.check(run, brute.responses(one(), run.layers, images(40, 12), brute.canonical_batches(images(40, 12))))


@pytest.mark.parametrize("unit", ["channel", "neuron"])
def test_a_scan_goes_on(unit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class StoppedError(Exception):
        pass

    def stop(self: Progress) -> None:
        self.checkpoint()
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "after_batch", stop)
        with pytest.raises(StoppedError):
            scan(one(), out=tmp_path / "run", unit=unit)
    run = scan(other(), out=tmp_path / "run", unit=unit, resume=True)
    assert run.layers == ["right", "left", "last"]
    assert run.manifest["witness"]["equal"] == run.manifest["witness"]["responses"] > 0
    fresh = scan(one(), unit=unit)
    for name in LAYERS:
        assert run[name].values.tobytes() == fresh[name].values.tobytes()
        assert np.array_equal(run[name].images, fresh[name].images)
    found = verify(unitvis.load(tmp_path / "run", images(40, 12)), one())
    assert found["equal"] == found["winners"] > 0


def test_shards_are_merged(whole: unitvis.Run, tmp_path: Path) -> None:
    shards = [scan(model, shard=(n, 3)) for n, model in enumerate((one(), other(), one()), 1)]
    for model in (one(), other()):
        check(unitvis.merge(shards, model, images=images(40, 12)), whole)
    part = unitvis.merge(shards[:2], partial=True, out=tmp_path / "part")
    assert part.partial is not None
    for order in ([tmp_path / "part", shards[2]], [shards[2], tmp_path / "part", shards[1]]):
        check(unitvis.merge(order, other(), images=images(40, 12), out=tmp_path / "all", overwrite=True), whole)
        check(unitvis.load(tmp_path / "all"), whole)
    both = [scan(model, shard=(1, 2)) for model in (one(), other())]  # the same images, which must agree
    assert np.array_equal(unitvis.merge(both, partial=True).manifest["coverage"], both[0].manifest["coverage"])


def test_verify_compares_a_layer_with_itself(whole: unitvis.Run) -> None:
    found = verify(whole, other())
    assert found["equal"] == found["winners"] > 0
    wrong = other()
    wrong.right.bias.data[2] += 1
    found = verify(whole, wrong)
    assert found["first_wrong"].split(":")[0].endswith("in layer 'right'")
