"""Real weights on real photographs: every unit of every convolution against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import unitvis
from support import brute, photos
from unitvis.reranking import rerank
from unitvis.results.arrays import UNSEPARATED
from unitvis.scanning.verify import verify
from unitvis.sources import open_source

pytestmark = photos.needed


@pytest.fixture(params=photos.NETWORKS)
def network(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_unit_equals_brute_force_bit_for_bit(network: str) -> None:
    run, model, images = photos.run(network), photos.model(network), photos.images()
    convolutions = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(run.layers) == len(convolutions) == {"small": 28, "large": 25}[network]
    found = brute.responses(model, run.layers, images, brute.canonical_batches(images))
    brute.check(run, found)
    for name, (values, _) in found.items():
        ordered = -np.sort(-values, axis=0)
        tied = ordered[8] == ordered[9]
        assert (run[name].status == np.where(tied, "tied", "separated")).all()
    assert sum((run[name].status == "tied").sum() for name in run if name.startswith("dw")) > 0


@pytest.mark.parametrize("network", ["small", pytest.param("large", marks=pytest.mark.slow)], indirect=True)
def test_a_plain_forward_ranks_the_same_but_for_near_ties(network: str) -> None:
    run, model, images = photos.run(network), photos.model(network), photos.images()
    plain = brute.responses(model, run.layers, images, brute.plain_batches(images, 50))
    differing: dict[int, list[tuple[str, int, int]]] = {}  # image -> (layer, unit, the other image)
    ranks = 0
    for name, (values, _) in plain.items():
        ids, _ = brute.top(values, 9)
        ranks += ids.size
        for unit, rank in np.argwhere(ids != run[name].images):
            ours, theirs = int(run[name].images[unit, rank]), int(ids[unit, rank])
            differing.setdefault(ours, []).append((name, unit, theirs))
            differing.setdefault(theirs, [])
    count = sum(len(places) for places in differing.values())
    assert count <= ranks / 1000, f"{count} of {ranks} ranks differ"
    exact = {}
    judge = photos.models.load(photos.spec(network)).model.double()
    for image in differing:
        out = brute.outputs(judge, run.layers, images[image : image + 1].double())
        exact[image] = {name: value[0].flatten(1).amax(1) for name, value in out.items()}
    for ours, places in differing.items():
        for name, unit, theirs in places:
            largest = abs(float(run[name].values[unit, 0]))
            assert abs(exact[ours][name][unit] - exact[theirs][name][unit]) <= 1e-5 * largest, (name, unit)


@pytest.mark.usefixtures("emulated_half")
def test_by_way_of_half_precision_decided_units_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rerank, "MAX_RECOMPUTED_SHARE", math.inf)  # nothing but the bound decides
    layers, source = ["conv1.2", "dw3.1", "pw6.1"], open_source(photos.images(), None)
    with unitvis.Recorder(photos.model("small"), layers, precision="fp16") as recorder:
        for batch in source.batches(64):
            recorder(batch.pixels, batch.ids)
    run, want = recorder.result(source), photos.run("small")
    decided = 0
    for name in layers:
        sure = run[name].status != UNSEPARATED
        decided += int(sure.sum())
        for key in ("values", "images", "positions", "boxes", "status"):
            assert (getattr(run[name], key) == getattr(want[name], key))[sure].all(), (name, key)
    assert decided >= 150  # of 168


@pytest.mark.parametrize("how", ["batch size 7", "one thread", "one worker", "shuffled"])
def test_how_it_was_scanned_does_not_show(how: str) -> None:
    count, model, layers = 60, photos.model("small"), ["conv1.2", "dw6.2", "pw9.1", "preds"]
    pixels = photos.images()[:count]
    want = unitvis.scan(model, pixels, layers, progress=False)
    threads = torch.get_num_threads()
    try:
        if how == "shuffled":
            with unitvis.Recorder(model, layers) as recorder:
                for part in np.random.default_rng(1).permutation(count).reshape(12, 5):
                    recorder(pixels[part], part)
            got = recorder.result()
        else:
            if how == "one thread":
                torch.set_num_threads(1)
            options = {"batch size 7": {"batch_size": 7}, "one worker": {"workers": 1}}.get(how, {})
            got = unitvis.scan(
                model, photos.files(count), layers, transform=photos.TRANSFORM, progress=False, **options
            )
    finally:
        torch.set_num_threads(threads)
    for name in layers:
        for key in ("values", "images", "positions", "boxes", "status"):
            assert getattr(got[name], key).tobytes() == getattr(want[name], key).tobytes(), (name, key)


def test_winners_come_out_again() -> None:
    run = photos.run("small")
    found = verify(run, photos.model("small"))
    assert found["winners"] == found["equal"] == sum(top.images.size for top in run.tops.values())
    assert found["wrong"] == 0


def test_effective_boxes_are_smaller_than_deep_receptive_fields(network: str) -> None:
    run = photos.run(network)
    sides = [run[name].info["effective_box"] for name in run if name != "preds"]
    fields = [run[name].info["receptive_field"]["size"][0] for name in run if name != "preds"]
    assert fields[-1] == {"small": 315, "large": 251}[network]
    assert all(0 < side <= field for side, field in zip(sides, fields, strict=True))
    assert sides[-1] < 224
