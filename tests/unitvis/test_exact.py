"""Exact by way of half precision: every unit that is called separated or tied is float32's, bit for bit."""

from __future__ import annotations

import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import brute
import unitvis
from half import rounded  # noqa: F401  # a fixture
from unitvis.errors import Interrupted, UnitvisError
from unitvis.ranking.recorder import Recorder
from unitvis.reranking import rerank
from unitvis.reranking.bound import upper_bound
from unitvis.results.arrays import SEPARATED, TIED, UNSEPARATED
from unitvis.run import Run
from unitvis.scanning.precision import plan, speed
from unitvis.scanning.verify import verify
from unitvis.sources import open_source
from unitvis.state.sampling import SIZE, mixed, sample


def pictures(count: int, side: int = 20, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    small = torch.randn(count, 3, side // 4, side // 4, generator=g)
    return torch.nn.functional.interpolate(small, size=(side, side)) * torch.rand(count, 1, 1, 1, generator=g)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 5, 2, 2), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(16, 24, 3, padding=1),
        nn.BatchNorm2d(24), nn.ReLU(inplace=True), nn.Conv2d(24, 12, 3), nn.Flatten(), nn.Linear(108, 7),
    ).eval()  # fmt: skip


def by_half(model: nn.Module, images: Tensor, precision: str = "fp16", k: int = 9, **options: object) -> Run:
    source = open_source(images, None)
    with Recorder(model, k=k, precision=precision, **options) as recorder:
        for batch in source.batches(64):
            recorder(batch.pixels, batch.ids)
    return recorder.result(source)


def wrong(run: Run, model: nn.Module, images: Tensor) -> int:
    """Decided units that are not brute force's; every unit must come with canonical values of real images."""
    found = brute.responses(model, run.layers, images, brute.canonical_batches(images))
    count = 0
    for name, (values, positions) in found.items():
        top, k = run[name], run.manifest["k"]
        ids, rows = brute.top(values, k)
        units = np.arange(len(ids))[:, None]
        flat = top.positions[..., 0].astype(np.int64) * top.info["width"] + top.positions[..., 1]
        live = top.images >= 0
        stated = values[top.images, units][live]
        np.testing.assert_array_equal(stated.view(np.int32), top.values[live].view(np.int32))  # never half's
        np.testing.assert_array_equal(positions[top.images, units][live], flat[live])
        same = (top.images == ids).all(axis=1)
        count += int((~same & (top.status != UNSEPARATED)).sum())
        for column, chosen, status in zip(values.T, rows, top.status, strict=True):
            last = column[chosen[-1]]
            if status != UNSEPARATED:
                assert (status == TIED) == ((column > last).sum() + (column == last).sum() > k)
    return count


@pytest.mark.usefixtures("rounded")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_decided_units_equal_brute_force(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rerank, "MAX_RECOMPUTED_SHARE", math.inf)  # nothing but the bound decides
    images, model = pictures(1600), net()
    run = by_half(model, images, precision)
    assert run.manifest["scan"]["rewritten"].startswith("3 chains")
    assert run.manifest["precision"] == "exact"
    assert run.manifest["images"] == 1600
    assert wrong(run, model, images) == 0
    separated = sum((top.status == SEPARATED).sum() for top in run.tops.values())
    assert separated >= (50 if precision == "fp16" else 30)  # of 52
    assert run.manifest["rescored"]["images"] < 1500


@pytest.mark.usefixtures("rounded")
def test_where_the_bound_decides_nothing_all_images_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rerank, "upper_bound", lambda errors, draws: math.inf)
    images, model = pictures(600), net(1)
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
    images, model = pictures(300), net(2)
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
@pytest.mark.filterwarnings("ignore:layer .* overflows in float16", "ignore:layer .* saturates")
def test_adversarial_units_come_out_right_or_undecided(
    precision: str, emulated: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if emulated:
        request.getfixturevalue("rounded")
    monkeypatch.setattr(rerank, "MAX_RECOMPUTED_SHARE", math.inf)
    images, model = hostile(600), Adversary().eval()
    run = by_half(model, images, precision)
    assert wrong(run, model, images) == 0
    assert (run["conv"].status != UNSEPARATED).all()  # it overflows, so every image is computed again
    model.conv.weight.data[[1, 2, 4, 5, 6]] = 0.5
    run = by_half(model, images, precision)
    assert wrong(run, model, images) == 0
    assert run["conv"].status[8] == UNSEPARATED  # more images on its plateau than there are candidates


def test_overflow_is_said_once_and_scanned_in_bfloat16() -> None:
    images, model = pictures(300) * 1e6, net(3)
    with pytest.warns(UserWarning, match="layer '0' overflows in float16") as told:
        run = by_half(model, images)
    assert len([w for w in told if "overflows" in str(w.message)]) == 1
    assert run.manifest["scan"]["precision"] == "bf16"
    assert wrong(run, model, images) == 0


def test_nan_of_float32_holds_no_place() -> None:
    images, model = pictures(400), net(4)
    images[[7, 123]] = math.nan
    images[200, 0, 3, 3] = math.inf
    run = by_half(model, images)
    assert wrong(run, model, images) == 0
    nan = run[run.layers[0]].info["nan"]
    assert nan["first_image"] == 7
    assert not any(np.isin([7, 123], top.images).any() for top in run.tops.values())


def test_the_bound_holds_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    tails = {
        "normal": lambda n: rng.normal(size=n), "exponential": lambda n: rng.exponential(size=n),
        "t of 6": lambda n: rng.standard_t(6, size=n), "uniform": lambda n: rng.uniform(size=n),
    }  # fmt: skip
    for name, draw in tails.items():
        exceeded = sum(draw(20_000).max() > upper_bound(draw(8_000), 20_000, doubt=0.01) for _ in range(300))
        assert exceeded <= 3, name
    assert upper_bound(rng.normal(size=50), 100) == math.inf
    assert upper_bound(np.zeros(1000), 100) == 0


def test_the_sample_is_of_the_smallest_hashes_however_ids_came() -> None:
    ids = np.arange(2_500_000)
    want = np.sort(ids[np.argsort(mixed(ids))[:SIZE]])
    np.testing.assert_array_equal(sample(np.array([[0, 2_500_000]])), want)
    np.testing.assert_array_equal(sample(np.array([[0, 7], [7, 1_200_000], [1_200_000, 2_500_000]])), want)
    np.testing.assert_array_equal(sample(np.array([[5, 9], [20, 21]])), [5, 6, 7, 8, 20])
    assert len(np.unique(mixed(ids))) == len(ids)


def test_the_plan_is_by_measurement_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert speed(cpu, "fp16") > 0
    speeds = {"fp16": 6.0, "bf16": 6.1}
    monkeypatch.setattr("unitvis.scanning.precision.speed", lambda device, precision: speeds[precision])
    assert plan(50_000, 1152, 9, cpu, rereadable=True).precision == "fp16"
    assert "of 50,000 images" in plan(50_000, 1152, 9, cpu, rereadable=True).line
    assert plan(500, 1152, 9, cpu, rereadable=True).precision == "fp32"
    assert plan(None, 1152, 9, cpu, rereadable=True).precision == "fp32"
    assert plan(50_000, 1152, 9, cpu, rereadable=False).precision == "fp32"
    speeds = {"fp16": 0.2, "bf16": 5.0}
    monkeypatch.setattr("unitvis.scanning.precision.speed", lambda device, precision: speeds[precision])
    assert plan(50_000, 1152, 9, cpu, rereadable=True).precision == "bf16"
    monkeypatch.setattr("unitvis.scanning.precision.speed", lambda device, precision: 1.05)
    assert "float16 is only 1.1 times" in plan(50_000, 1152, 9, cpu, rereadable=True).line


@pytest.mark.usefixtures("rounded")
def test_scan_takes_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unitvis.scanning.precision.speed", lambda device, precision: 6.0)
    images, model = pictures(900), net(6)
    run = unitvis.scan(model, images, ["6", "8"], k=3, progress=False)
    assert run.manifest["scan"]["precision"] == "fp16"
    assert run.manifest["plan"].startswith("float16, 6.0 times as fast")
    assert {"scan", "rescoring", "second_pass", "preparation"} <= run.manifest["seconds"].keys()
    assert wrong(run, model, images) == 0
    want = unitvis.scan(model, images, ["6", "8"], k=3, precision="fp32", progress=False)
    for name, top in run.tops.items():
        decided = top.status != UNSEPARATED
        assert decided.mean() > 0.9
        for part in ("values", "images", "positions", "boxes", "status"):
            np.testing.assert_array_equal(getattr(top, part)[decided], getattr(want[name], part)[decided])


@pytest.mark.usefixtures("rounded")
def test_shards_scanned_in_half_precision_merge_into_an_exact_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unitvis.scanning.precision.speed", lambda device, precision: 6.0)
    images, model = pictures(900), net(7)
    shards = [unitvis.scan(model, images, ["6", "8"], k=3, shard=(i, 3), progress=False) for i in (1, 2, 3)]
    assert all(run.manifest["scan"]["precision"] == "fp16" for run in shards)
    run = unitvis.merge(shards[::-1], model, images=images)
    assert run.manifest["precision"] == "exact"
    assert run.manifest["images"] == 900
    assert run.manifest["rescored"]["sample"] == SIZE
    assert wrong(run, model, images) == 0
    assert np.mean(np.concatenate([top.status for top in run.tops.values()]) != UNSEPARATED) > 0.9


@pytest.mark.usefixtures("rounded")
def test_a_scan_in_half_precision_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("unitvis.scanning.precision.speed", lambda device, precision: 6.0)
    images, model, options = pictures(900), net(8), {"k": 3, "progress": False, "layers": ["6", "8"]}
    stopped = []

    def stop(recorder: Recorder, *batch: Tensor) -> None:
        if recorder.images >= 320 and not stopped:
            stopped.append(recorder.images)
            signal.raise_signal(signal.SIGTERM)
        called(recorder, *batch)

    called = Recorder.__call__
    monkeypatch.setattr(Recorder, "__call__", stop)
    with pytest.raises(Interrupted, match="go on with"):
        unitvis.scan(model, images, out=tmp_path / "run", **options)
    monkeypatch.setattr("unitvis.scanning.precision.speed", lambda *_: 0.5)  # would now be planned otherwise
    run = unitvis.scan(model, images, out=tmp_path / "run", resume=True, **options)
    assert stopped == [320]
    assert run.manifest["scan"]["precision"] == "fp16"
    assert run.manifest["images"] == 900
    assert wrong(run, model, images) == 0
