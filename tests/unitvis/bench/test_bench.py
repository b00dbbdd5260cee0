"""`unitvis bench`: its check sees a forged run, and the command from end to end."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from support.commands import call, model_file
from unitvis import UnitvisError, cli
from unitvis.bench.baselines import DeviceHook, HostHook
from unitvis.bench.bench import (
    DEVICE_HOOK,
    NAIVE_HOOK,
    SCAN_FLOAT32,
    Bench,
    bench,
    differing_units,
    interleaved,
    synthetic_images,
    table,
)
from unitvis.network.network import Network
from unitvis.sources.transform import Transform

LAYERS = ["0", "2"]
CPU = torch.device("cpu")


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 6, 5, stride=2), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3)).eval()


def judged(count: int = 40) -> tuple[Bench, np.ndarray]:
    network = Network(net(), transform=Transform(crop=16, mean=(0.4,) * 3))
    network.examine((3, 16, 16))
    return Bench(network), synthetic_images(count, (16, 16))


def test_the_judge_sees_one_wrong_winner() -> None:
    one, images = judged()
    run = one.scan(images)
    host = one.baseline(HostHook, images, canonical=True)
    assert [len(differing_units(run, name, host.tops[i])) for i, name in enumerate(LAYERS)] == [0, 0]
    run["0"].positions[2, 4, 1] += 1
    run["2"].images[3, :2] = run["2"].images[3, 1::-1]
    assert [differing_units(run, name, host.tops[i]).tolist() for i, name in enumerate(LAYERS)] == [[2], [3]]


def test_nothing_is_timed_where_a_contender_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    one, images = judged()
    right = DeviceHook._read
    monkeypatch.setattr(DeviceHook, "_read", lambda self, layer, maps, ids: right(self, layer, maps[:, :, 1:], ids))
    with pytest.raises(UnitvisError, match="layer '0': a baseline has other values"):
        one.check(images)
    monkeypatch.setattr(DeviceHook, "_read", right)
    monkeypatch.setattr(HostHook, "_read", lambda self, i, maps, ids, read=HostHook._read: read(self, i, -maps, ids))
    with pytest.raises(UnitvisError, match="the scan and the naive hook disagree"):
        one.check(images)


def test_exact_by_half_precision_is_checked_and_timed_where_it_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unitvis.bench.bench.speed", lambda device, precision: 2.0)
    said = bench(net(), Transform(resize=20, crop=16), "cpu", 70)  # of the images' size, so that nothing is cut
    assert re.search(r"by way of fp16 10 units are decided and equal, \d+ images are computed again", said)
    assert "\nunitvis, exact by fp16 " in said
    one, images = judged(70)
    monkeypatch.setattr(
        Bench, "scan", lambda self, images, precision="fp32", scan=Bench.scan: forged(scan, self, images, precision)
    )
    with pytest.raises(UnitvisError, match="by way of fp16 has other winners"):
        one.check(images)


def forged(scan, one: Bench, images: np.ndarray, precision: str):
    run = scan(one, images, precision)
    if precision == "fp16":
        run["2"].values[0, 0] += 1
    return run


def test_contenders_take_turns_and_ratios_are_of_medians() -> None:
    turns: list[str] = []

    def contender(name: str):
        return lambda: (turns.append("prepare " + name), lambda: turns.append(name))[1]

    interleaved({"a": contender("a"), "b": contender("b")}, 2, CPU)
    assert turns == ["prepare a", "a", "prepare b", "b"] * 2
    lines = table({NAIVE_HOOK: 8.0, DEVICE_HOOK: 4.0, "bare forward": 1.0, SCAN_FLOAT32: 2.0}, 80)
    assert lines[-1].split()[-4:] == ["40", "4.00", "2.00", "0.50"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = model_file(tmp_path)
    code, printed, _ = call(capsys, "bench", spec, "--crop", "31", "--count", "40")
    assert code == cli.DONE
    assert f"{spec}: 40 images of 31 x 31 in memory, 10 units of 2 layers, cpu; equal: scan and naive" in printed
    assert re.search(r"^unitvis, float32 +[\d,]+ +[\d.]+ +[\d.]+ +[\d.]+$", printed, re.MULTILINE)
    assert "what scan does with these images: float32" in printed
    code, _, error = call(capsys, "bench", spec, "--count", "0")
    assert (code, error) == (cli.USAGE, "unitvis: the number of images must be a whole number of at least 1, not 0")


def test_without_a_model_it_is_the_demos(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Bench, "affordable_images", lambda self, few: len(few))
    code, printed, _ = call(capsys, "bench")
    assert code == cli.DONE
    assert "the demo's network: 32 images of 96 x 96 in memory, 464 units of 5 layers" in printed
    assert "medians of 1 rounds" in printed


def test_few_images_where_the_model_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    one, images = judged(32)
    now = iter([0.0, 3.2])
    monkeypatch.setattr("unitvis.bench.bench.time", SimpleNamespace(perf_counter=lambda: next(now)))
    assert one.affordable_images(images) == 32  # 0.1 s an image
    now = iter([0.0, 1e-9])
    assert one.affordable_images(images) == 2048


def test_pictures_are_the_same_every_time() -> None:
    first, again = synthetic_images(70, (9, 12)), synthetic_images(70, (9, 12))
    assert (first.shape, first.dtype) == ((70, 9, 12, 3), np.uint8)
    assert np.array_equal(first, again)
    assert len(np.unique(first.reshape(70, -1), axis=0)) == 70
    assert first.std() > 20
