"""The sample of a run: which images it has, what is usual for a unit, and the same bytes whatever the scan was like."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import unitvis
from support import brute
from support.half import Rounded
from support.mutations import read, without_hashes, write
from support.scans import arrays, images, scan, two_convolutions
from unitvis import UnitvisError
from unitvis.ranking.recorder import Recorder
from unitvis.results.sample import Sample
from unitvis.scanning.verify import verify

COUNT = 300
LAYERS = ["0", "2"]


def whole_numbers(count: int = COUNT) -> tuple[nn.Module, torch.Tensor]:
    """A network and images whose responses are whole numbers, so that no library rounds and many are equal."""
    model, g = two_convolutions(), torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data = torch.randint(-1, 2, parameter.shape, generator=g).float()
    return model, torch.randint(0, 2, (count, 3, 9, 9), generator=g).float()


def splitmix(number: int) -> int:
    """The finaliser of splitmix64 in Python's integers."""
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) % 2**64
    return number ^ (number >> 31)


@pytest.fixture(scope="module")
def run() -> unitvis.Run:
    model, pixels = whole_numbers()
    return scan(model, pixels, LAYERS)


def test_it_has_the_responses_of_the_images_whose_ids_have_the_smallest_hashes(run: unitvis.Run) -> None:
    model, pixels = whole_numbers()
    ids = sorted(sorted(range(COUNT), key=splitmix)[:256])
    assert run.sample.images.tolist() == ids
    want = brute.responses(model, LAYERS, pixels[ids], brute.plain_batches(pixels[ids], 7))
    for layer in LAYERS:
        held = run.sample.responses[layer]
        assert held.dtype == np.float32
        assert held.tobytes() == want[layer][0].tobytes()


@pytest.mark.parametrize("count", [1, 8, 9, 10, 300])
def test_typical_images_and_histogram_are_those_of_brute_force(count: int) -> None:
    model, pixels = whole_numbers(count)
    run = scan(model, pixels, LAYERS)
    ids = run.sample.images.tolist()
    values = brute.responses(model, ["2"], pixels[ids], brute.plain_batches(pixels[ids], 7))["2"][0]
    quantiles = (0, 0.1, 0.25, 0.5, 0.75, 1)
    for unit in range(5):
        weakest_first = sorted(zip(values[:, unit].tolist(), ids, strict=True), key=lambda one: (one[0], -one[1]))
        found = run["2"].typical(unit, quantiles)
        assert found.values.tolist() == np.quantile(values[:, unit], quantiles, method="inverted_cdf").tolist()
        held = list(zip(found.values.tolist(), found.images.tolist(), strict=True))
        for quantile, one in zip(quantiles, held, strict=True):
            below = weakest_first.index(one)  # how many come before it
            assert below / len(ids) < max(quantile, 1e-9) <= (below + 1) / len(ids) or (quantile, below) == (0, 0)
        middle = list(zip(found.middle_values.tolist(), found.middle_images.tolist(), strict=True))[::-1]
        first = weakest_first.index(middle[0])
        assert middle == weakest_first[first : first + 9]
        assert len(middle) == min(9, len(ids))
        median = held[3]
        assert median in middle
        if len(ids) > 16:
            assert middle[4] == median
        counts, edges, left_out = run["2"].histogram(unit, 10)
        assert left_out == 0
        assert len(counts) == 10
        half = 0.5 * (count == 1)  # about a single value
        assert edges[0] == values[:, unit].min() - half
        assert edges[-1] == run["2"].values[unit, 0] + half
        for n in range(10):
            inside = [v for v in values[:, unit] if edges[n] <= v < edges[n + 1] or (n == 9 and v == edges[10])]
            assert counts[n] == len(inside)


def bytes_of(run: unitvis.Run) -> dict[str, bytes]:
    assert run.sample is not None
    held = {name: responses.tobytes() for name, responses in run.sample.responses.items()}
    return arrays(run) | held | {"ids": run.sample.images.tobytes(), "hashes": run.sample.hashes.tobytes()}


def shuffled() -> unitvis.Run:
    pixels, ids = images(COUNT, 12), torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    with unitvis.Recorder(two_convolutions(), LAYERS) as recorder:
        for part in torch.split(ids, 41):
            recorder(pixels[part], part)
    return recorder.result(pixels)


def merged() -> unitvis.Run:
    shards = [scan(two_convolutions(), images(COUNT, 12), LAYERS, shard=(n, 3)) for n in (1, 2, 3)]
    return unitvis.merge(shards[::-1], two_convolutions(), images=images(COUNT, 12))


def in_half_precision() -> unitvis.Run:
    with Recorder(two_convolutions(), LAYERS, precision="fp16", batch_size=24) as recorder:
        recorder(images(COUNT, 12))
    return recorder.result(images(COUNT, 12))


WAYS: dict[str, Callable[[], unitvis.Run]] = {
    "in another order": shuffled,
    "in shards": merged,
    "in half precision, decided by float32": in_half_precision,
    "in batches of 5": lambda: scan(two_convolutions(), images(COUNT, 12), LAYERS, batch_size=5),
}


@pytest.mark.parametrize("way", WAYS)
def test_its_bytes_are_the_same_however_the_images_came(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "make_step", Rounded.of)
    assert bytes_of(WAYS[way]()) == bytes_of(scan(two_convolutions(), images(COUNT, 12), LAYERS, precision="fp32"))


def test_it_is_read_as_it_was_written(run: unitvis.Run, tmp_path: Path) -> None:
    loaded = unitvis.load(run.save(tmp_path / "run"))
    assert bytes_of(loaded) == bytes_of(run)
    assert loaded["2"].typical(1).middle_images.tolist() == run["2"].typical(1).middle_images.tolist()
    assert loaded.strongest(3)["2"].typical(1).values.tolist() == run["2"].typical(1).values.tolist()


def test_responses_that_are_no_numbers_are_counted_apart() -> None:
    values = np.array([[3, np.nan, np.inf, 1, -np.inf, 2, np.nan]], np.float32).T
    sample = Sample(np.arange(10, 17), np.full(7, ""), {"x": np.hstack([values, np.full_like(values, np.nan)])})
    counts, edges, left_out = sample.histogram("x", 0, 2, 5.0)
    assert (counts.tolist(), edges.tolist(), left_out) == ([2, 1], [1, 3, 5], 4)
    assert sample.typical("x", 0).images.tolist() == [13, 15, 10]  # of -inf 1 2 3 inf
    assert sample.typical("x", 0).middle_images.tolist() == [12, 10, 15, 13, 14]
    assert sample.histogram("x", 1, 2, np.nan).left_out == 7
    with pytest.raises(UnitvisError, match="unit 1 of layer 'x' gives NaN for all 7 images of the sample"):
        sample.typical("x", 1)


def moving() -> unitvis.Run:
    with unitvis.Recorder(two_convolutions(), LAYERS, weights="moving") as recorder:
        recorder(images(5, 12))
    return recorder.result(images(5, 12))


def without_images() -> unitvis.Run:
    with unitvis.Recorder(two_convolutions(), LAYERS) as recorder:
        recorder(images(5, 12))
    return recorder.result()


def large(monkeypatch: pytest.MonkeyPatch) -> unitvis.Run:
    monkeypatch.setattr("unitvis.results.sample.MAX_BYTES", 4 * 256 * 10)
    return scan(two_convolutions(), images(5, 12), LAYERS)


NONE: dict[str, tuple[Callable[[pytest.MonkeyPatch], unitvis.Run], str]] = {
    "neurons": (lambda _: scan(two_convolutions(), images(5, 12), LAYERS, unit="neuron"), "its units are neurons"),
    "weights that moved": (lambda _: moving(), "its network's weights moved"),
    "a stream": (lambda _: scan(two_convolutions(), iter([images(5, 12)]), LAYERS), "could not be read again"),
    "a loop": (lambda _: without_images(), "could not be read again"),
    "many units": (large, "it has 11 units, for which that of 256 images would take more than 0 MiB"),
}


@pytest.mark.parametrize("case", NONE)
def test_a_run_without_one_says_why(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, why = NONE[case]
    run = make(monkeypatch)
    assert run.sample is None
    folder = run.save(tmp_path / "run")
    assert not (folder / "sample.npz").exists()
    for one in (run, unitvis.load(folder)):
        for ask in (one["2"].typical, one["2"].histogram):
            with pytest.raises(UnitvisError, match=f"the run keeps no sample of its images, because .*{why}"):
                ask(0)


def test_what_is_asked_for_wrongly_is_refused(run: unitvis.Run) -> None:
    with pytest.raises(UnitvisError, match="layer '2' has no unit 5; it has 5, from 0"):
        run["2"].typical(5)
    with pytest.raises(UnitvisError, match=r"a quantile must lie from 0 to 1, and 1\.5 was given"):
        run["2"].typical(0, [1.5])
    with pytest.raises(UnitvisError, match="bins must be"):
        run["2"].histogram(0, 0)


def test_runs_of_earlier_versions_and_files_of_other_runs(run: unitvis.Run, tmp_path: Path) -> None:
    folder = run.save(tmp_path / "run")
    manifest = read(folder / "manifest.json")
    del manifest["files"]["sample.npz"]
    write(folder / "manifest.json", manifest)
    with pytest.raises(UnitvisError, match=r"sample\.npz is not the one that was written with manifest\.json"):
        unitvis.load(folder)
    (folder / "sample.npz").unlink()
    with pytest.raises(UnitvisError, match="an earlier version of unitvis made it"):
        unitvis.load(folder)["2"].typical(0)
    neurons = scan(two_convolutions(), images(5, 12), ["2"], unit="neuron").save(tmp_path / "neurons")
    scan(two_convolutions(), images(5, 12), ["2"]).save(tmp_path / "channels")
    (tmp_path / "channels" / "sample.npz").rename(neurons / "sample.npz")
    without_hashes(neurons)
    with pytest.raises(UnitvisError, match=re.escape("sample.npz: a run keeps none where its units are neurons")):
        unitvis.load(neurons)


def test_an_array_that_does_not_belong_there_is_refused(run: unitvis.Run, tmp_path: Path) -> None:
    folder = without_hashes(run.save(tmp_path / "run"))
    held = dict(np.load(folder / "sample.npz"))
    np.savez(folder / "sample.npz", **held, more=np.zeros(3))
    with pytest.raises(UnitvisError, match=r"sample\.npz has an array 'more', which does not belong there"):
        unitvis.load(folder)
    np.savez(folder / "sample.npz", **(held | {"images": np.array([{}], object)}))
    with pytest.raises(UnitvisError, match="is not a whole run"):
        unitvis.load(folder)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_image_that_is_gone_after_the_scan_costs_the_sample_alone(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no winner is on it; with k=1 and an image that is black, none is."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)
        Image.fromarray(pixels * (number > 0)).save(photos / f"{number:02}.png")
    monkeypatch.setattr(Recorder, "make_step", Rounded.of)
    ranked = Recorder.ranked

    def then_gone(self: Recorder, source: object) -> unitvis.Run:
        run = ranked(self, source)
        (photos / "00.png").unlink(missing_ok=True)
        return run

    monkeypatch.setattr(Recorder, "ranked", then_gone)
    options = {"transform": unitvis.Transform(), "out": tmp_path / "run", "precision": precision}
    with pytest.warns(UserWarning, match="the run keeps no sample of its images, so .*: '00.png' is no longer") as told:
        scan(two_convolutions(), photos, ["0"], 1, **options)
    assert len(told) == 1
    run = unitvis.load(tmp_path / "run")
    assert 0 not in run.winners
    assert any("keeps no sample" in sentence for sentence in run.manifest["warnings"])
    with pytest.raises(UnitvisError, match="its images could not be read again when it was made"):
        run["0"].typical(0)


def test_a_sample_of_a_coverage_that_is_not_there_is_told() -> None:
    model, pixels = two_convolutions(), images(40, 12)
    run = scan(model, pixels, LAYERS)
    run.manifest["coverage"] = [[0, 10**17]]
    assert "the sample is of a coverage with images that are not there: 40 to 9" in " ".join(
        verify(run, model)["differing"]
    )
    run.manifest["coverage"] = [[0, 40]]
    run.sample.images[:] = np.roll(run.sample.images, 1)
    assert any("whose ids have the smallest hashes" in said for said in verify(run, model)["differing"])
    run = scan(model, pixels, LAYERS)
    run.manifest["fingerprint"] = run.manifest["fingerprint"] | {"hardware": "another"}
    run.sample.responses["2"][7, 3] *= np.float32(1 + 1e-6)  # rounding
    assert verify(run, model)["differing"] == []
    run.sample.responses["2"][7, 3] += 1e-3
    [said] = verify(run, model)["differing"]
    assert said.startswith(f"image {run.sample.images[7]} gives unit 3 of layer '2' ")
