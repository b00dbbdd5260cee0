"""The choice of precision by measured speed, and scans that follow it."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import unitvis
from support.brute import wrong
from support.scans import pictures, tiny_net
from support.sources import PLAIN, write
from unitvis.errors import Interrupted, UnitvisError
from unitvis.ranking.recorder import Recorder
from unitvis.results.arrays import UNSEPARATED
from unitvis.scanning import precision
from unitvis.scanning.precision import plan, speed
from unitvis.scanning.verify import verify
from unitvis.sources import open_source
from unitvis.state.sampling import SIZE


def test_the_plan_is_by_measurement_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert speed(cpu, "fp16") > 0
    speeds = {"fp16": 6.0, "bf16": 6.1}
    monkeypatch.setattr("unitvis.scanning.precision.speed", lambda device, precision: speeds[precision])
    assert plan(50_000, 1152, 9, cpu, rereadable=True).precision == "fp16"
    assert "of 50,000 images" in plan(50_000, 1152, 9, cpu, rereadable=True).line
    assert plan(500, 1152, 9, cpu, rereadable=True).precision == "fp32"
    few = plan(3_000, 11, 9, cpu, rereadable=True)  # seeing whether half precision suits would take most of the gain
    assert few.precision == "fp32"
    assert "takes the time of 2,720 images" in few.line
    assert plan(None, 1152, 9, cpu, rereadable=True).precision == "fp32"
    assert plan(50_000, 1152, 9, cpu, rereadable=False).precision == "fp32"
    speeds = {"fp16": 0.2, "bf16": 5.0}
    monkeypatch.setattr("unitvis.scanning.precision.speed", lambda device, precision: speeds[precision])
    assert plan(50_000, 1152, 9, cpu, rereadable=True).precision == "bf16"
    monkeypatch.setattr("unitvis.scanning.precision.speed", lambda device, precision: 1.05)
    assert "float16 is only 1.1 times" in plan(50_000, 1152, 9, cpu, rereadable=True).line


@pytest.mark.usefixtures("emulated_half")
def test_scan_takes_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "speed", lambda device, name: 6.0)
    monkeypatch.setattr(precision, "OBSERVING_PASSES", 0)  # or few images would be scanned in float32
    images, model = pictures(900), tiny_net(6)
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


@pytest.mark.usefixtures("emulated_half")
@pytest.mark.parametrize("loud", [1, 1e5])
def test_shards_settle_on_one_precision_and_merge_into_an_exact_run(
    loud: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "speed", lambda device, name: pytest.fail("shards measure nothing"))
    monkeypatch.setattr(precision, "has_fast_half", lambda device: True)
    images, model = pictures(900), tiny_net(7)
    images[300:600] *= loud  # the second shard alone overflows float16
    shards = [unitvis.scan(model, images, ["6", "8"], k=3, shard=(i, 3), progress=False) for i in (1, 2, 3)]
    assert {run.manifest["scan"]["precision"] for run in shards} == {"fp16" if loud == 1 else "bf16"}
    assert len({run.manifest["plan"] for run in shards}) == 1
    run = unitvis.merge(shards[::-1], model, images=images)
    assert run.manifest["precision"] == "exact"
    assert run.manifest["images"] == 900
    assert run.manifest["rescored"]["sample"] == SIZE
    assert wrong(run, model, images) == 0
    assert np.mean(np.concatenate([top.status for top in run.tops.values()]) != UNSEPARATED) > 0.9


def test_shards_on_a_cpu_scan_in_float32() -> None:
    run = unitvis.scan(tiny_net(), pictures(900), ["6", "8"], k=3, shard=(1, 3), progress=False)
    assert run.manifest["plan"] == "float32, as every shard on a device of the kind cpu"


def test_images_that_cannot_be_read_judge_nothing(tmp_path: Path) -> None:
    for number in range(20):
        write(tmp_path / f"{number:02}.png", number)
    (tmp_path / "07.png").write_bytes(b"no picture")
    source = open_source(tmp_path, PLAIN)
    images = precision.judged_images(source, torch.zeros(4, 8, 8, 3))
    assert images is not None
    assert images.shape == (15, 8, 8, 3)
    assert source.failures == []  # the scan finds them
    assert precision.judged_images(open_source(iter([torch.zeros(2, 3, 8, 8)]), None), torch.zeros(2, 3, 8, 8)) is None


@pytest.mark.usefixtures("emulated_half")
def test_a_scan_in_half_precision_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(precision, "speed", lambda device, name: 6.0)
    monkeypatch.setattr(precision, "OBSERVING_PASSES", 0)  # or few images would be scanned in float32
    images, model, options = pictures(900), tiny_net(8), {"k": 3, "progress": False, "layers": ["6", "8"]}
    stopped = []

    def stop(recorder: Recorder, *batch: Tensor) -> None:
        if recorder.images >= 320 and not stopped:
            stopped.append(recorder.images)
            signal.raise_signal(signal.SIGTERM)
        called(recorder, *batch)

    called = Recorder.__call__
    monkeypatch.setattr(Recorder, "__call__", stop)
    with pytest.raises(Interrupted, match="resume with"):
        unitvis.scan(model, images, out=tmp_path / "run", **options)
    monkeypatch.setattr("unitvis.scanning.precision.speed", lambda *_: 0.5)  # would now be planned otherwise
    run = unitvis.scan(model, images, out=tmp_path / "run", resume=True, **options)
    assert stopped == [320]
    assert run.manifest["scan"]["precision"] == "fp16"
    assert run.manifest["images"] == 900
    assert wrong(run, model, images) == 0


@pytest.mark.filterwarnings("ignore:.*makes a step")
def test_a_run_is_verified_where_float32_was_used_in_place_of_half_precision() -> None:
    class Stepping(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (x > 0.1)

    images = pictures(40)
    run = unitvis.scan(
        torch.nn.Sequential(Stepping(), *tiny_net(4)).eval(), images, k=2, precision="bf16", progress=False
    )
    assert (run.manifest["precision"], run.manifest["scan"]["precision"]) == ("bf16", "fp32")
    assert verify(run, torch.nn.Sequential(Stepping(), *tiny_net(4)).eval())["wrong"] == 0
    run = unitvis.scan(tiny_net(4), images, k=2, precision="bf16", progress=False)
    with pytest.raises(UnitvisError, match="ranked in bf16, so its values are not canonical"):
        verify(run, tiny_net(4))
