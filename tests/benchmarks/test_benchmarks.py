"""The benchmarks run, in their smallest form; what they write down is whole, and the documents show it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import unitvis
import unitvis_kernels as uk
from benchmarks import convolutions, crp, drawing, long, machine, reading, results, stream
from benchmarks.__main__ import MODULES
from unitvis.models import Loaded
from unitvis.sources import open_source
from unitvis_kernels import choice

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The suite at its smallest, timed."""
    raw = tmp_path_factory.mktemp("benchmarks") / "raw.json"
    files = [f"benchmarks/{name}" for name in MODULES]
    options = ["--sizes", "tiny", "--benchmark-enable", f"--benchmark-json={raw}", "-p", "no:cacheprovider"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # not as one of two
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *files, *options, "-W", "default"],
        cwd=ROOT,
        env=alone,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return json.loads(raw.read_text())["benchmarks"]


def test_what_the_suite_times_becomes_rows(timed: list[dict]) -> None:
    found = results.rows(timed)
    assert {row["kind"] for row in found} == {"ceiling", "operator", "step", "scan"}
    operators = {row["name"] for row in found if row["kind"] == "operator"}
    assert operators == {"spatial_argmax", "epilogue", "topk_merge_", "normalize", "conv_argmax"}
    for row in found:
        assert 0 < row["seconds"]["p20"] <= row["seconds"]["p50"] <= row["seconds"]["p80"]
        assert len({"gb_s", "tflop_s", "images_s"} & set(row)) == 1
    lines = results.headline(found)
    assert [line["what"] for line in lines] == [
        "AlexNet, float32, a step of 2",
        "AlexNet, float32, a scan from host memory, 64 at once, the scan alone",
    ]


def test_rows_and_ratios_are_computed_right(tmp_path: Path) -> None:
    def one(seconds: list[float], **extra: object) -> dict:
        return {"extra_info": {"calls": 2, **extra}, "stats": {"data": seconds}}

    shape = {"kind": "step", "network": "vgg16", "precision": "fp16", "images": 100}
    found = results.rows(
        [
            one([1.0, 3.0, 2.0], kind="ceiling", name="copy", bytes=10**10),
            one([4.0], kind="operator", name="spatial_argmax", contender="unitvis", bytes=10**10),
            one([0.5], contender="unitvis", **shape),
            one([0.7, 0.1], contender="unitvis", **shape),
            one([1.0], contender="bare forward", **shape),
            one([0.25], contender="bare forward, captured", **shape),
            one([1.0], contender="amax + topk hook", **shape),
            one([50.0], contender="naive host hook", **shape),
        ]
    )
    assert found[0]["seconds"] == {"p20": 0.7, "p50": 1.0, "p80": 1.3}
    assert found[0]["gb_s"] == 10.0
    assert found[1]["of_ceiling"] == 0.5
    device = {"name": "Some GPU", "kind": "cuda", "driver": "1.2", "cores": 4, "load": 0.1, "versions": {"torch": "9"}}
    device |= {"commit": "abc", "date": "2030-01-02"}
    path = tmp_path / "x.json"
    results.write(path, machine=device, rows=found)
    results.write(path, memory=[1])
    assert set(json.loads(path.read_text())) == {"format", "machine", "rows", "memory"}
    text = results.render([path])
    assert "**Some GPU**, driver 1.2, torch 9, commit abc, 2030-01-02" in text
    assert "| VGG16, float16, a step of 100 | 400 | 800 (0.50x) | 200 (2.00x) | 4 (100.00x) |" in text
    assert "not been run on a GPU" not in text


def test_the_documents_show_what_is_committed() -> None:
    files = results.files()
    assert files
    for name, parts in results.tables().items():
        document = (results.DOCS / name).read_text(encoding="utf-8")
        for start, table in parts.items():
            assert table.count("|") > 20
            assert results.block(document, start) == table
    for path in files:
        found = json.loads(path.read_text())
        assert found["format"] == results.FORMAT
        assert path.name == machine.file_name(found["machine"]["name"])
        assert {"name", "driver", "kind", "cores", "versions", "commit", "date"} <= set(found["machine"])
        assert re.fullmatch(r"[0-9a-f]{12}\+?", found["machine"]["commit"])
        assert results.headline(found["rows"])
        for line in results.headline(found["rows"]):  # never a ratio to the naive hook without one to amax + topk
            assert {"unitvis", "bare forward", "amax + topk hook", "naive host hook"} <= set(line)


def test_measurements_on_a_gpu_become_tables() -> None:
    times = {"unitvis": 2.0, "bare forward, captured": 4.0, "bare forward, torch.compile": 1.0}
    times["amax + topk hook, captured"] = 8.0
    step = {"network": "vgg16", "precision": "fp16", "images": 100, "images_s": 50000}
    rows = [step | {"contender": who, "ms_median": ms} for who, ms in times.items()]
    line = "| VGG16, float16, 100 images | 2 ms (50,000 images/s) | 4 ms | 0.50 | 1 ms | 2.00 | 8 ms | 0.25 |"
    assert results.render_steps({"rows": rows}).splitlines()[2] == line
    operator = {"kind": "operator", "name": "epilogue", "shape": [1, 2, 3, 3], "layout": "NCHW", "pool": [3, 2]}
    shares = {"unitvis": 0.756, "eager": 0.2, "another": 0.8}
    all_three = [operator | {"contender": who, "of_ceiling": share} for who, share in shares.items()]
    line = "| `epilogue` | [1, 2, 3, 3], layout NCHW, pool [3, 2] | 76% | 80% (another) |"
    assert results.render_operators({"rows": [{"kind": "ceiling"}, *all_three]}).splitlines()[2] == line


def test_a_device_s_name_makes_a_file_s() -> None:
    assert machine.file_name("NVIDIA H200") == "nvidia-h200.json"
    assert (
        machine.file_name("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz")
        == "intel-xeon-platinum-8481c-cpu-2.70ghz.json"
    )
    assert machine.file_name("a/../b:\0c") == "a-..-b-c.json"


def test_the_steady_state_lets_in_as_many_as_a_long_stream() -> None:
    keys = uk.pack(torch.randn(64, 5000, generator=torch.Generator().manual_seed(0)), torch.zeros(64, 5000).long())
    state = uk.topk_state(5000, 32)
    share = stream.fill(state, keys)
    uk.topk_merge_(state, keys, torch.arange(64))
    entered = (uk.topk_read(state)[1] < 64).sum(dim=1)
    assert entered.max() == 1
    assert abs(float(entered.float().mean()) - share) < 0.005
    # 1.28 million images, 9 places: 9 (1 + ln(1.28e6 / 9)) entries in all
    assert stream.entries(9, 64) * stream.IMAGES / 64 == pytest.approx(115.8, abs=0.1)


def test_convolutions_are_the_ones_that_a_scan_chooses_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    chain = [torch.nn.Conv2d(3, 8, 3, 2), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Conv2d(8, 8, 3, padding=1)]
    model = torch.nn.Sequential(*chain, torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, padding=1))
    found = convolutions.layers(model.eval(), 21)
    assert list(found) == ["8-8 k3x3 s1x1 g1 5x5 float16"]  # the first is pooled; the last is the second again
    one = next(iter(found.values()))
    times = convolutions.measure(one, 2, torch.float32, torch.device("cpu"), 2)
    assert set(times) == {"fused_us", "separate_us"}
    assert min(times.values()) > 0
    table = tmp_path / "measured.json"
    table.write_text(convolutions.TABLE.read_text())
    convolutions.fill(table, "sm_75", {one.key(torch.float16): times | {"rival_us": 3.0}})
    assert json.loads(table.read_text())["layers"]["sm_75"] == {"8-8 k3x3 s1x1 g1 5x5 float16": times}
    assert set(choice.measured()) <= set(json.loads(table.read_text())["layers"])


def test_a_wrong_convolution_is_not_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = torch.nn.Conv2d(3, 4, 3)
    right = uk.conv_argmax
    monkeypatch.setattr(uk, "conv_argmax", lambda x, *args, **options: right(x * 1.01, *args, **options))
    with pytest.raises(SystemExit, match="fused_us is wrong"):
        convolutions.measure(convolutions.Layer(conv, (8, 8)), 2, torch.float32, torch.device("cpu"), 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_convolutions_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["convolutions"])
    assert convolutions.main() == 2
    assert "a GPU is needed" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_is_measured_for_both_precisions() -> None:
    found = long.memory([320])
    assert [(one["precision"], one["images"]) for one in found] == [("exact", 320), ("fp16", 320)]
    assert all(0 <= one["beyond_a_batch_mib"] < 500 for one in found)
    assert found[1]["rescored"] > 0


def test_a_scan_of_files_is_measured_against_its_parts() -> None:
    found = long.folder(66)
    assert set(found["images_s"]) == {"decoding alone", "computing alone", "naive loop", "scan"}
    assert all(value > 0 for value in found["images_s"].values())
    assert found["share_of_what_decoding_and_computing_allow"] > 0


def test_the_naive_loop_reads_what_the_scan_reads(tmp_path: Path) -> None:
    long.jpegs(tmp_path, 66)
    transform = unitvis.Transform(resize=256, crop=224, mean=(0.5,) * 3, std=(0.25,) * 3)
    naive = torch.cat(list(long.naive_batches(tmp_path, transform)))
    ours = torch.cat([transform.normalize(b.pixels) for b in open_source(str(tmp_path), transform).batches(64)])
    torch.testing.assert_close(naive, ours, rtol=1e-5, atol=1e-5)


def test_without_zennit_crp_the_comparison_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "crp", None)
    monkeypatch.setattr(sys, "argv", ["crp"])
    assert crp.main() == 2
    assert "pip install zennit-crp" in capsys.readouterr().err


def test_exact_says_where_half_precision_is_not_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.long.fastest_half", lambda device: None)
    assert set(long.exact(10)) == {"not measured", "times_as_fast_as_float32"}


def test_reading_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"PHOTOGRAPHS": 4, "LONG": 12, "SMALL": 8, "TURNS": 1, "WAITING_IMAGES": 260, "WAITING_WORKERS": 2}
    for name, value in (sizes | {"MEMORY_FROM": 64, "MEMORY_TO": 300}).items():
        monkeypatch.setattr(reading, name, value)
    written = {}
    monkeypatch.setattr(reading, "record", lambda name, figures: written.update({name: figures}))
    monkeypatch.setattr(sys, "argv", ["reading", "--memory"])
    reading.main()
    found = written["reading"]
    assert found["own_microseconds"] > 0
    assert found["small_images_s"] > 0
    for stages in found["microseconds_of_a_worker"].values():
        assert set(stages) == set(found["microseconds_of_the_plain_loop"])
    assert found["images_decoded_as_by_pillow"]["pillow"] == 4
    assert ("simplejpeg" in found["microseconds_of_a_worker"]) == bool(importlib.util.find_spec("simplejpeg"))
    assert "memory_growth_megabytes" in capsys.readouterr().out


def test_drawing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long.jpegs(tmp_path, 4)
    small = nn.Sequential(nn.Conv2d(3, 5, 7, stride=4), nn.ReLU()).eval()
    monkeypatch.setattr(drawing, "alexnet", lambda: Loaded("folder/small", small, None))
    monkeypatch.setattr(drawing, "TURNS", 2)
    written = {}
    monkeypatch.setattr(drawing, "record", lambda name, figures: written.update({name: figures}))
    monkeypatch.setattr(sys, "argv", ["drawing", str(tmp_path)])
    drawing.main()
    (row,) = written["drawing"]["rows"]
    assert (row["network"], row["units"], row["images"]) == ("small", 5, 4)
    first, second = row["turns"]
    assert first["files"] == second["files"] > 6
    assert min(first["seconds"], first["processor_seconds"]) > 0
