"""Specs are taken wherever a model is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import unitvis
from support.commands import TWO_CONVOLUTIONS, model_file
from unitvis import models
from unitvis.attribution.filters import first_filters
from unitvis.scanning.verify import verify


@pytest.mark.parametrize("loaded", [False, True], ids=["spec", "loaded"])
def test_specs_are_taken_by_every_function_that_takes_a_model(tmp_path: Path, loaded: bool) -> None:
    spec = model_file(tmp_path, TWO_CONVOLUTIONS)
    module = models.load(spec).model
    model = models.load(spec) if loaded else spec
    images = torch.randn(20, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    run = unitvis.scan(model, images, progress=False)

    with unitvis.Recorder(model) as recorder:
        recorder(images)
    recorded = recorder.result()
    assert recorded["2"].values.tobytes() == run["2"].values.tobytes()
    assert recorded.manifest["model"]["spec"] == spec
    shards = [unitvis.scan(model, images, shard=(i, 2), precision="fp32", progress=False) for i in (1, 2)]
    assert unitvis.merge(shards, model, images=images)["2"].values.tobytes() == run["2"].values.tobytes()

    assert unitvis.receptive_field(model, "2", 12).size == unitvis.receptive_field(module, "2", 12).size == (5, 5)
    for what in (run, images[:3]):
        ours, theirs = (
            sorted(unitvis.project(one, what, ["2"], [1]), key=lambda one: one.image) for one in (model, module)
        )
        assert len(ours) == len(theirs) > 0
        assert all((a.signal == b.signal).all() for a, b in zip(ours, theirs, strict=True))
    assert (
        unitvis.response_map(model, images[0], "2", 1).map == unitvis.response_map(module, images[0], "2", 1).map
    ).all()
    assert (first_filters(model, run)["0"] == first_filters(module, run)["0"]).all()
    assert verify(run, model)["wrong"] == 0
    assert unitvis.gallery(run, tmp_path / "gallery", model).exists()


def test_a_model_by_name_brings_its_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    own = unitvis.Transform(12, 12, (0.5,) * 3, (0.25,) * 3)
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)).eval()
    monkeypatch.setattr(models, "load", lambda spec: models.Loaded(spec, module, own))
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 12, 3), np.uint8)
    with unitvis.Recorder("timm:net") as recorder:
        recorder(torch.from_numpy(pixels))
    run = unitvis.scan(module, pixels, transform=own, progress=False)
    assert recorder.result()["0"].values.tobytes() == run["0"].values.tobytes()
    (ours,), (theirs,) = (
        unitvis.project(model, [Image.fromarray(pixels[0])], "0", 1, transform=transform)
        for model, transform in (("timm:net", None), (module, own))
    )
    assert (ours.signal == theirs.signal).all()
