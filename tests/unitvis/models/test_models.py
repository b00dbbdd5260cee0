"""Networks of torchvision and timm by name, with their weights and preprocessing, and scans of their default layers."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import unitvis
from support import zoos
from support.judges import Neuron, check_by_perturbation
from unitvis import UnitvisError, models

zoos.importable()


# name -> (number of default layers, size of the input): as small as the network takes, to be quick
NETWORKS = {
    "torchvision:alexnet": (5, (80, 96)),
    "torchvision:vgg16": (13, (32, 48)),
    "torchvision:resnet50": (53, (48, 64)),
    "torchvision:googlenet": (57, (48, 64)),
    "torchvision:densenet121": (120, (48, 64)),
    "torchvision:mobilenet_v2": (52, (48, 64)),
    "torchvision:efficientnet_b0": (81, (48, 64)),
    "torchvision:convnext_tiny": (22, (48, 64)),
    "timm:resnet18": (20, (48, 64)),
    "timm:mobilenetv3_small_100": (53, (48, 64)),
}


@pytest.mark.parametrize(
    "spec",
    [pytest.param(spec, marks=pytest.mark.slow) if count > 100 else spec for spec, (count, _) in NETWORKS.items()],
)
def test_known_networks_scan_with_their_default_layers(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    count, size = NETWORKS[spec]
    loaded = models.load(spec, pretrained=False)
    for module in loaded.model.modules():
        if isinstance(module, nn.BatchNorm2d) and not module.weight.any():  # a branch that is off
            nn.init.ones_(module.weight)
    pixels = torch.randn(12, 3, *size)
    auxiliary = spec == "torchvision:googlenet"  # has heads that run in training alone
    said = pytest.warns(UserWarning, match="left out, because they do not run") if auxiliary else nullcontext()
    with said:
        run = unitvis.scan(loaded, pixels, progress=False)
    assert len(run.layers) == count
    assert run.manifest["model"]["spec"] == spec
    assert all(run[name].info["receptive_field"]["method"] == "traced" for name in run)
    assert all((run[name].images >= 0).all() for name in run)
    chosen = [run.layers[index] for index in np.random.default_rng(0).choice(count, 2, replace=False)]
    winners = {name: [Neuron(unit, *run[name].positions[unit, 0]) for unit in (0, 7)] for name in chosen}
    check_by_perturbation(loaded.model, chosen, size, monkeypatch, winners, tries=2)


def test_preprocessing_comes_from_the_weights() -> None:
    want = unitvis.Transform(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert models.load("torchvision:alexnet", pretrained=False).transform == want
    transform = models.load("timm:resnet18", pretrained=False).transform
    assert (transform.resize, transform.crop, transform.interpolation) == (235, (224, 224), "bicubic")


def test_preprocessing_equals_torchvisions_own() -> None:
    import torchvision

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (301, 420, 3), dtype=np.uint8))
    weights = torchvision.models.AlexNet_Weights.DEFAULT
    theirs = weights.transforms(antialias=True)(picture)
    transform = models.load("torchvision:alexnet", pretrained=False).transform
    ours = transform.normalize(torch.from_numpy(transform(picture))[None])[0]
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-6


def test_a_checkpoint_with_another_head_is_loaded(tmp_path: Path) -> None:
    import torchvision

    tuned = torchvision.models.vgg16(weights=None)
    tuned.classifier[6] = nn.Linear(4096, 2)
    torch.save(tuned.state_dict(), tmp_path / "cats_and_dogs.pt")
    loaded = models.load("torchvision:vgg16", tmp_path / "cats_and_dogs.pt")
    assert loaded.model.classifier[6].out_features == 2
    assert torch.equal(loaded.model.classifier[6].weight, tuned.classifier[6].weight)
    assert torch.equal(loaded.model.features[0].weight, tuned.features[0].weight)
    assert loaded.transform is not None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvision:alexnett", "torchvision has no model 'alexnett'; the closest are alexnet"),
        ("timm:resnett18", "timm has no model 'resnett18'; the closest are resnet18"),
        ("torchvision:raft_small", "only image classification models are scanned"),
        ("torchvision:evil:net", "torchvision has no model 'evil:net'"),
        ("timm:evil:net", "timm has no model 'evil:net'"),
        ("timm:./evil.py:net", "timm has no model './evil.py:net'"),
    ],
)
def test_names_that_are_not_there(spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "timm:").mkdir()
    for path in ("torchvision:evil.py", "timm:evil.py", "timm:/evil.py"):  # names of a library, and never of a file
        (tmp_path / path).write_text("from torch import nn\nnet = nn.Conv2d(3, 3, 3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnitvisError, match=message):
        models.load(spec, pretrained=False)


def test_without_a_network_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UnitvisError, match=r"Name or service not known.*--weights FILE.*--no-pretrained"):
        models.load("torchvision:alexnet")


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UnitvisError, match=r"timm is not installed; pip install 'unitvis\[timm\]'"):
        models.load("timm:resnet18")


def test_the_lectures_slide_from_a_torchvision_dataset(tmp_path: Path) -> None:
    """The lines of docs/scanning.md with all of AlexNet; random weights and made-up pictures replace the downloads."""
    import torchvision

    pictures = torchvision.datasets.FakeData(size=20, image_size=(3, 260, 300))
    run = unitvis.scan(models.load("torchvision:alexnet", pretrained=False), pictures, progress=False)
    assert run.layers == [f"features.{number}" for number in (0, 3, 6, 8, 10)]
    assert [run[name].info["receptive_field"]["size"][0] for name in run] == [11, 51, 99, 131, 163]
    page = run.sheet("features.3", range(9))
    page.save(tmp_path / "features.3.png")
    assert page.width > 300
