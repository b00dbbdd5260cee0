"""Shards scanned apart and merged equal one scan, in whatever order and however often."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import unitvis
from support.commands import TWO_CONVOLUTIONS, model_file
from unitvis import UnitvisError, cli, models
from unitvis.sources import FileSource

COUNT = 53


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU6(), nn.Conv2d(6, 5, 3)).eval()


@functools.cache
def images() -> Tensor:
    """With ties across shards, and NaN in three of them."""
    pixels = torch.randn(COUNT, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    pixels[40] = pixels[7]
    pixels[41] = pixels[3]
    for id in (5, 22, 23, 52):
        pixels[id, 0, 3, 4] = math.nan
    return pixels


def scan(shard: object = None, **options: object) -> unitvis.Run:
    return unitvis.scan(net(), images(), ["0", "2"], 9, shard=shard, progress=False, **options)


@functools.cache
def shards(count: int) -> list[unitvis.Run]:
    return [scan((number, count)) for number in range(1, count + 1)]


@functools.cache
def whole() -> unitvis.Run:
    return scan()


def merge(runs: object, **options: object) -> unitvis.Run:
    return unitvis.merge(runs, net(), **{"images": images(), **options})


def same(one: unitvis.Run, other: unitvis.Run) -> None:
    assert one.layers == other.layers
    for name in one:
        for key in ("values", "images", "positions", "boxes", "status"):
            assert getattr(one[name], key).tobytes() == getattr(other[name], key).tobytes(), (name, key)
    for key in ("images", "coverage", "failures", "layers", "input", "k", "fingerprint", "source", "records"):
        assert one.manifest.get(key) == other.manifest.get(key), key
    assert one.records == other.records


@pytest.mark.parametrize("count", [1, 3, 8, COUNT])
def test_merged_shards_are_the_whole(count: int) -> None:
    same(merge(shards(count)), whole())


def test_order_repetition_and_grouping_do_not_matter() -> None:
    a, b, c = shards(3)
    for order in itertools.permutations([a, b, c]):
        same(merge(order), whole())
    same(merge([a, b, c, b, a]), whole())
    ab, bc = merge([a, b], partial=True), merge([c, b], partial=True)
    for runs in ([ab, c], [c, ab], [a, ab, c, c], [a, bc], [merge([ab, c], partial=True)], [merge([a, b, c]), b]):
        same(merge(runs), whole())
    assert merge([a, b], partial=True).partial.coverage.ranges.tolist() == [[0, 35]]


def test_a_shard_s_run_holds_what_merges_and_no_winners(tmp_path: Path) -> None:
    run = shards(3)[1]
    assert repr(run) == "<Run: a shard, 18 images, to be merged>"
    assert (run.manifest["shard"], run.manifest["images"], run.manifest["coverage"]) == ("2/3", 18, [[17, 35]])
    with pytest.raises(UnitvisError, match="run of a shard, which has no winners yet; merge it"):
        run["0"]
    run.save(tmp_path / "shard")
    assert sorted(path.name for path in (tmp_path / "shard").iterdir()) == [
        "images.jsonl",
        "manifest.json",
        "state.npz",
    ]
    again = unitvis.load(tmp_path / "shard").partial
    assert torch.equal(again.topk.tensor, run.partial.topk.tensor)
    assert (again.identity, again.coverage, again.failures) == (
        run.partial.identity,
        run.partial.coverage,
        run.partial.failures,
    )
    (tmp_path / "shard" / "state.npz").unlink()
    with pytest.raises(UnitvisError, match=r"not a whole run \(there is no state.npz\); scan that shard again"):
        unitvis.load(tmp_path / "shard")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda run: (run / "manifest.json").write_text("[]"),
            r"manifest.json is damaged \(it holds no object\); scan",
        ),
        (lambda run: (run / "manifest.json").write_text('{"for'), r"manifest.json is damaged \(.*\); scan again"),
        (lambda run: (run / "state.npz").write_bytes(b"half"), r"state.npz is damaged \(.*\); scan that shard again"),
        (lambda run: (run / "images.jsonl").write_text('{"id": 3'), r"is not a whole run \(.*\); scan again"),
    ],
    ids=["manifest", "half a manifest", "state", "records"],
)
def test_a_damaged_shard_is_named(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    run = shards(3)[1].save(tmp_path / "shard")
    damage(run)
    with pytest.raises(UnitvisError, match=message):
        merge([shards(3)[0], run, shards(3)[2]])
    with pytest.raises(UnitvisError, match=r"manifest.json is not a run: there is no manifest.json in it"):
        merge([run / "manifest.json"])


def test_what_the_shards_noted_of_their_images_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    options = {"transform": unitvis.Transform(), "progress": False}
    runs = [unitvis.scan(net(), tmp_path, shard=(number, 2), **options) for number in (1, 2)]
    want = unitvis.scan(net(), tmp_path, **options)
    monkeypatch.setattr(FileSource, "record", None)
    # All images of the sample are read again, whose hashes are in their records.
    monkeypatch.setattr(importlib.import_module("unitvis.scanning.scan"), "keep_sample", lambda *_: None)
    assert unitvis.merge(runs, net(), images=tmp_path).records == want.records


def test_gaps_are_named() -> None:
    a, _, c = shards(3)
    with pytest.raises(UnitvisError, match=r"18 of 53 images are in none of the runs: 17 to 34; scan the shards"):
        merge([a, c])
    partial = merge([a, c], partial=True)
    assert (partial.manifest["coverage"], partial.manifest["partial"]) == ([[0, 17], [35, 53]], True)


def test_overlaps_count_nothing_twice_or_are_named() -> None:
    halves, thirds = shards(2), shards(3)
    with pytest.raises(UnitvisError, match="has images 17 to 25 in common with the others, and both count NaN"):
        merge([halves[0], thirds[1], thirds[2]])
    a, b, c, d, e = shards(5)  # there is no NaN in b and d
    same(merge([a, merge([b, d], partial=True), merge([c, d], partial=True), e]), whole())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 8}, "k is 9 and 8"),
        ({"unit": "neuron"}, "unit is channel and neuron"),
        ({"layers": ["0"]}, r"layers.2 is \[5, 8, 8\] and nothing"),
        ({"model": net(1)}, "model.weights is "),
        ({"pixels": torch.zeros(COUNT, 3, 12, 13)}, r"input is \[3, 12, 12\] and \[3, 12, 13\]"),
        ({"pixels": torch.zeros(50, 3, 12, 12)}, "source.images is 53 and 50"),
    ],
    ids=["k", "unit", "layers", "weights", "size", "images"],
)
def test_runs_of_other_scans_are_refused(options: dict[str, object], message: str) -> None:
    given = {"model": net(), "pixels": images(), "layers": ["0", "2"], "k": 9, "unit": "channel", **options}
    other = unitvis.scan(
        given["model"], given["pixels"], given["layers"], given["k"], unit=given["unit"], shard="3/3", progress=False
    )
    with pytest.raises(UnitvisError, match=rf"run 2 and run 3 cannot be merged: .*{message}"):
        merge([*shards(3)[:2], other])


def drawn(folder: Path, seed: int) -> Path:
    """Forty pictures, whose names do not depend on the seed."""
    folder.mkdir()
    for number in range(40):
        pixels = np.random.default_rng([seed, number]).integers(0, 256, (12, 12, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


def test_shards_of_other_pixels_under_the_same_names_are_refused(tmp_path: Path) -> None:
    options = {"transform": unitvis.Transform(), "progress": False}
    mine, others = drawn(tmp_path / "mine", 0), drawn(tmp_path / "others", 1)
    one, two = (unitvis.scan(net(), mine, shard=(number, 2), **options) for number in (1, 2))
    foreign = unitvis.scan(net(), others, shard="2/2", **options)
    assert unitvis.merge([one, two], net()).manifest["witness"]["images"] == 32
    with pytest.raises(UnitvisError, match=r"run 2 was not made of the images in '.*mine': '20.png' is no longer"):
        unitvis.merge([one, foreign], net())
    with pytest.raises(UnitvisError, match=r"run 1 was not made of the images in .*others"):
        unitvis.merge([one, foreign], net(), images=others)
    with pytest.raises(UnitvisError, match=r"cannot be merged: image \d+ had another content in each"):
        unitvis.merge([one, two, foreign], net(), partial=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"k": 4}, "k is 9 and 4"),
        (lambda m: m | {"k": 2}, "k is 9 and 2"),
        (lambda m: m | {"unit": "neuron"}, "unit is channel and neuron"),
        (lambda m: m | {"layers": {"0": m["layers"]["0"]}}, r"layers.2 is \[5, 8, 8\] and nothing"),
    ],
)
def test_a_manifest_that_is_not_that_of_the_state_is_refused(
    change: Callable[[dict[str, object]], dict[str, object]], message: str, tmp_path: Path
) -> None:
    one = scan((1, 2)).save(tmp_path / "one")
    merged = merge(shards(2)).save(tmp_path / "merged")
    assert unitvis.load(merged).layers == ["0", "2"]
    path = one / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    said = rf"one: state.npz does not belong to manifest.json \(there and here\): {message}; scan that shard again"
    with pytest.raises(UnitvisError, match=said):
        unitvis.load(one)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_shards_of_another_array_are_refused(precision: str) -> None:
    other = images().flip(0)
    parts = [
        unitvis.scan(net(), pixels, ["0", "2"], shard=(number, 2), precision=precision, progress=False)
        for number, pixels in ((1, images()), (2, other))
    ]
    with pytest.raises(UnitvisError, match=r"run 2 was not made of the images in 'array': 'image \d+' is no longer"):
        merge(parts)


def test_one_winner_of_an_array_that_changed_is_refused() -> None:
    pixels = torch.randn(60, 3, 12, 12, generator=torch.Generator().manual_seed(3))
    parts = [unitvis.scan(net(), pixels, ["2"], 9, shard=(number, 2), progress=False) for number in (1, 2)]
    winners = unitvis.merge(parts, net(), images=pixels).winners.tolist()
    assert len(winners) > 16
    for id in winners:
        other = pixels.clone()
        other[id] = other[id].flip(-1)
        with pytest.raises(UnitvisError, match=rf"'image {id}' is no longer the image .*: its pixels differ; restore"):
            unitvis.merge(parts, net(), images=other)


def test_files_that_were_added_or_removed_since_are_said(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "images", 0)
    options = {"transform": unitvis.Transform(), "progress": False}
    parts = [unitvis.scan(net(), folder, shard=(number, 2), **options) for number in (1, 2)]
    (folder / "40.png").write_bytes((folder / "00.png").read_bytes())
    with pytest.raises(
        UnitvisError, match="the folder has 41 images now, and 40 were scanned; restore it, or scan again"
    ):
        unitvis.merge(parts, net())
    (folder / "40.png").unlink()
    (folder / "07.png").rename(folder / "77.png")
    with pytest.raises(UnitvisError, match=r"not those of the runs \(then and now\): names is"):
        unitvis.merge(parts, net())
    (folder / "77.png").unlink()
    with pytest.raises(
        UnitvisError, match="the folder has 39 images now, and 40 were scanned; restore it, or scan again"
    ):
        unitvis.merge(parts, net())


def test_images_beyond_those_that_are_there_are_said() -> None:
    with unitvis.Recorder(net(), ["0", "2"]) as recorder:
        recorder(images())
    with pytest.raises(UnitvisError, match="the runs have images that are not there: 50 to 52, of 50; give the images"):
        merge([recorder.partial()], images=images()[:50])


class Scaled(nn.Module):
    """Two convolutions whose responses a factor changes by less than the numbers of the network's identity tell."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.net, self.scaled = net(), lambda x: x * factor

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.scaled(x))


def test_other_responses_of_the_same_images_are_not_called_other_images() -> None:
    pixels = torch.randn(60, 3, 12, 12, generator=torch.Generator().manual_seed(3))
    parts = [unitvis.scan(Scaled(1.0), pixels, ["net.2"], shard=(number, 2), progress=False) for number in (1, 2)]
    said = r"images of run 1 are those that were scanned and give other responses here: 'image \d+' gave .*; merge with"
    with pytest.raises(UnitvisError, match=said):
        unitvis.merge(parts, Scaled(1.000001), images=pixels)


def test_what_a_merge_needs() -> None:
    with pytest.raises(UnitvisError, match="nothing to merge"):
        merge([])
    with pytest.raises(UnitvisError, match="run 1 has no state to merge"):
        merge([whole()])
    with pytest.raises(UnitvisError, match="do not say where their model is; give model="):
        unitvis.merge(shards(3), images=images())
    with pytest.raises(UnitvisError, match=r"the model is not that of the runs .*: model.weights is"):
        unitvis.merge(shards(3), net(1), images=images())
    with pytest.raises(UnitvisError, match="the images came from a array, which has no path"):
        unitvis.merge(shards(3), net())
    with pytest.raises(
        UnitvisError, match="those of the runs: the array has 50 images now, and 53 were scanned; restore it"
    ):
        merge(shards(3), images=images()[:50])


def test_recorders_of_other_loops_merge() -> None:
    runs = []
    for part in np.array_split(np.random.default_rng(0).permutation(COUNT), 3):
        with unitvis.Recorder(net(), ["0", "2"]) as recorder:
            for some in np.array_split(part, 4):
                recorder(images()[some], some)
        runs.append(recorder.partial())
    merged = merge(runs)
    for name in whole():
        assert merged[name].images.tobytes() == whole()[name].images.tobytes()
        assert merged[name].values.tobytes() == whole()[name].values.tobytes()
    with unitvis.Recorder(net(), ["0", "2"]) as recorder:
        recorder(images()[:3], [1, 2, 1])
    with pytest.raises(UnitvisError, match="3 images were recorded under 2 known ids"):
        recorder.partial()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "change", [lambda pixels: pixels * 2, lambda pixels: pixels / 2, lambda pixels: pixels.flip(0)]
)
def test_loops_that_used_the_same_ids_for_other_images_are_not_merged(
    change: Callable[[Tensor], Tensor], precision: str
) -> None:
    pixels = torch.randn(96, 3, 12, 12, generator=torch.Generator().manual_seed(3))

    def part(images: Tensor, ids: range) -> unitvis.Run:
        with unitvis.Recorder(net(), ["0", "2"], 3, precision=precision) as recorder:
            recorder(images, list(ids))
        return recorder.partial()

    one, said = (
        part(pixels[:48], range(48)),
        r"run 1 and run 2 cannot be merged: image \d+ gave other responses in each",
    )
    for ids in (range(48), range(16, 32), range(20, 68)):  # as many, contained, overlapping
        with pytest.raises(UnitvisError, match=said):
            unitvis.merge([one, part(change(pixels[: len(ids)]), ids)], partial=True)
        same_images = part(pixels[list(ids)], ids)
        merged = unitvis.merge([one, same_images], partial=True).partial
        assert merged.coverage.ranges.tolist() == [[0, max(48, ids.stop)]]
        want = part(pixels[: max(48, ids.stop)], range(max(48, ids.stop))).partial.topk.read()
        assert merged.topk.read().images[:, :3].tolist() == want.images[:, :3].tolist()


def test_a_shard_is_resumed_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (80, 12, 12, 3), np.uint8))
    options = {"transform": unitvis.Transform(), "progress": False, "batch_size": 16, "every": 1e-9}
    path = tmp_path / "x.npy"
    unitvis.scan(net(), path, "2", shard="2/2", out=tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr("unitvis.sources.arrays.ArraySource._rows", stop_at(70))
        with pytest.raises(KeyError):
            unitvis.scan(net(), path, "2", shard="2/2", out=tmp_path / "run", **options)
    unitvis.scan(net(), path, "2", shard="2/2", out=tmp_path / "run", resume=True, **options)
    one, other = (unitvis.load(tmp_path / name) for name in ("run", "whole"))
    assert torch.equal(one.partial.topk.tensor, other.partial.topk.tensor)
    assert one.manifest["coverage"] == other.manifest["coverage"] == [[40, 80]]


def stop_at(id: int) -> object:
    from unitvis.sources.arrays import ArraySource

    real = ArraySource._rows

    def rows(self: ArraySource, ids: list[int]) -> Tensor:
        if id in ids:
            raise KeyError(id)
        return real(self, ids)

    return rows


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(net().state_dict(), tmp_path / "w.pt")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (40, 12, 12, 3), np.uint8))
    scan = [
        "scan",
        model_file(tmp_path, TWO_CONVOLUTIONS),
        str(tmp_path / "x.npy"),
        "--weights",
        str(tmp_path / "w.pt"),
    ]
    scan += ["--mean", "0", "0", "0", "-o"]
    assert cli.main([*scan, str(tmp_path / "whole")]) == cli.DONE
    for number in (1, 2):
        assert cli.main([*scan, str(tmp_path / f"s{number}"), "--shard", f"{number}/2"]) == cli.DONE
    assert "20 images; `unitvis merge` makes a run of all shards" in capsys.readouterr().out
    merge = ["merge", str(tmp_path / "s2"), str(tmp_path / "s1"), "-o", str(tmp_path / "merged")]
    assert cli.main(merge) == cli.USAGE
    model = ["--model", scan[1], "--weights", str(tmp_path / "w.pt")]
    assert f"with {' '.join(model)}" in capsys.readouterr().err
    merge += [*model, "--overwrite"]
    assert cli.main(merge) == cli.DONE
    assert "2 sheets in" in capsys.readouterr().out
    for name in ("top.npz", "sample.npz"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("merged", "whole")]
    for key in ("layers", "images", "coverage", "model", "source"):
        assert manifests[0][key] == manifests[1][key]
    (tmp_path / "w.pt").unlink()
    assert cli.main(merge) == cli.USAGE
    assert "there is no file" in capsys.readouterr().err
    for command in (["render", str(tmp_path / "s1")], ["verify", str(tmp_path / "s1"), scan[1]]):
        assert cli.main(command) == cli.USAGE
        assert "the run of a shard" in capsys.readouterr().err


def named_in_runs(folder: Path, **origin: object) -> list[Path]:
    """Write shards whose manifests name this model."""
    folders = []
    for number, run in enumerate(shards(2)):
        own = unitvis.Run(run.tops, dict(run.manifest), run.records, partial=run.partial)
        folders.append(own.save(folder / f"shard-{number}"))
        manifest = json.loads((folders[-1] / "manifest.json").read_text())
        manifest["model"] |= {"file": None, "pretrained": False} | origin
        (folders[-1] / "manifest.json").write_text(json.dumps(manifest))
    return folders


@pytest.mark.parametrize(
    "spec",
    [
        "{folder}/evil.py:net",
        "evil:net",
        "evil.net:torchvision:",
        "torchvision:evil:net",
        "timm:evil:net",
        "timm:/evil.py:net",
        "torchvision:../evil.py",
        "timm:hf-hub:evil/net",
        "timm:local-dir:{folder}",
        "",
        7,
    ],
)
def test_code_that_a_run_names_is_not_executed(spec: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = f"open({str(tmp_path / 'executed')!r}, 'w')\n"
    for path in ("evil.py", "torchvision:evil.py", "timm:evil.py", "timm:/evil.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    runs = named_in_runs(tmp_path, spec=spec.format(folder=tmp_path) if isinstance(spec, str) else spec)
    with pytest.raises(UnitvisError, match=r"code that a run names is not executed|model.spec is 7, not text"):
        unitvis.merge(runs, images=images())
    assert not (tmp_path / "executed").exists()


def test_weights_that_a_run_names_are_not_read(tmp_path: Path) -> None:
    weights = tmp_path / "w.pt"
    os.mkfifo(weights)  # whoever opened it would wait
    with pytest.raises(UnitvisError, match=rf"not read; name them .* --model torchvision:alexnet --weights {weights}"):
        unitvis.merge(named_in_runs(tmp_path, spec="torchvision:alexnet", file=str(weights)), images=images())


@pytest.mark.parametrize("origin", [{"pretrained": False}, {}], ids=["random", "of an old version"])
def test_a_model_of_a_library_is_found_by_the_name_in_the_runs(
    origin: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(spec: str, weights: object = None, *, pretrained: bool = True) -> models.Loaded:
        asked.append((spec, weights, pretrained))
        return models.Loaded(spec, net(), None)

    monkeypatch.setattr(models, "load", load)
    runs = named_in_runs(tmp_path, spec="timm:resnet18.a1_in1k")
    for folder in runs:
        manifest = json.loads((folder / "manifest.json").read_text())
        for key in {"file", "pretrained"} - origin.keys():
            del manifest["model"][key]
        (folder / "manifest.json").write_text(json.dumps(manifest))
    same(unitvis.merge(runs, images=images()), whole())
    assert asked == [("timm:resnet18.a1_in1k", None, origin.get("pretrained", True))]


@pytest.mark.parametrize("options", [["--weights", "w.pt"], ["--no-pretrained"]])
def test_options_of_the_model_need_the_model(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["merge", str(tmp_path), "-o", str(tmp_path / "merged"), *options]) == cli.USAGE
    assert "--weights and --no-pretrained need --model" in capsys.readouterr().err
