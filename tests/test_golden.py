"""Results that must stay byte for byte what they were, on every machine.

All arithmetic of these networks is exact, in half precision too (small whole numbers, or single products by powers of
two), so no library, thread count or processor can change a bit. `python tests/test_golden.py` writes golden/ anew: only
for a change that is meant to change results.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import unitvis

GOLDEN = Path(__file__).parent / "golden"
ARRAYS = ("values", "images", "positions", "boxes", "status")
NOT_COMPARED = ("seconds", "fingerprint", "plan", "warnings")  # of a manifest: times, machine and versions, sentences


def whole_numbers() -> nn.Module:
    """Responses are whole numbers up to 108, which bfloat16 holds exactly; many of them are equal."""
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 1, bias=False)
    )
    for parameter in model.parameters():
        parameter.data = torch.randint(-1, 2, parameter.shape, generator=g).float()
    return model.eval()


def single_products() -> nn.Module:
    """Each response is one pixel times a power of two."""
    model = nn.Sequential(nn.Conv2d(3, 6, 1, groups=3, bias=False), nn.MaxPool2d(3, 2))
    model[0].weight.data = torch.tensor([1.0, -1.0, 2.0, -0.5, 4.0, 0.25]).reshape(6, 1, 1, 1)
    return model.eval()


def binary_images(count: int) -> Tensor:
    return torch.randint(0, 2, (count, 3, 12, 10), generator=torch.Generator().manual_seed(1)).float()


def pictures(folder: Path) -> Path:
    """Thirty files of several sizes, of which one cannot be read."""
    folder.mkdir()
    for number in range(30):
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 256, (24 + number % 3, 20 + number % 5, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    (folder / "07.png").write_bytes(b"no picture")
    return folder


def runs(folder: Path) -> dict[str, unitvis.Run]:
    """Every way of scanning: each precision, re-ranked, merged shards, single neurons, files, a pack."""
    images, model = binary_images(400), whole_numbers()
    quiet: dict[str, Any] = {"progress": False}
    found = {name: unitvis.scan(model, images, precision=name, **quiet) for name in ("fp32", "fp16", "bf16")}
    found["neurons"] = unitvis.scan(model, images, ["3"], 4, unit="neuron", **quiet)
    with unitvis.Recorder(model, k=5, precision="fp16") as recorder:
        for start in range(0, 400, 50):
            recorder(images[start : start + 50])
    found["re-ranked"] = recorder.result(images)
    shards = [unitvis.scan(model, images, shard=(number, 3), precision="fp32", **quiet) for number in (1, 2, 3)]
    found["merged"] = unitvis.merge(shards, model, images=images)

    files, transform = pictures(folder / "pictures"), unitvis.Transform(20, 16, mean=(0, 0, 0), std=(0.5, 0.5, 0.5))
    model = single_products()
    found["files"] = unitvis.scan(model, files, ["0", "1"], transform=transform, precision="fp32", **quiet)
    unitvis.pack(files, folder / "pack.npy", unitvis.Transform(20, 16), progress=False)
    normalised = unitvis.Transform(mean=transform.mean, std=transform.std)
    packed = folder / "pack.npy"
    found["packed"] = unitvis.scan(model, packed, ["0", "1"], transform=normalised, precision="fp32", **quiet)
    return found


def contents(run: unitvis.Run) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays, and the manifest and image records without what depends on the machine."""
    arrays = {f"{layer}/{key}": getattr(top, key) for layer, top in run.tops.items() for key in ARRAYS}
    manifest = {key: value for key, value in run.manifest.items() if key not in NOT_COMPARED}
    model = manifest["model"]
    manifest["model"] = {key: value for key, value in model.items() if key not in ("modules", "responses", "channels")}
    manifest["source"] = {key: value for key, value in manifest["source"].items() if key != "path"}
    return arrays, json.loads(json.dumps({"manifest": manifest, "images": list(run.records.values())}))


def test_results_are_what_they_were(tmp_path: Path) -> None:
    kept = np.load(GOLDEN / "arrays.npz", allow_pickle=False)
    texts = json.loads((GOLDEN / "texts.json").read_text())
    found = runs(tmp_path)
    assert found.keys() == texts.keys()
    for name, run in found.items():
        arrays, text = contents(run)
        for key, array in arrays.items():
            want = kept[f"{name}/{key}"]
            assert (array.dtype, array.shape) == (want.dtype, want.shape), (name, key)
            assert array.tobytes() == want.tobytes(), (name, key)
        assert text == texts[name], name
    assert len(kept.files) == sum(len(run.tops) * len(ARRAYS) for run in found.values())


def write() -> None:
    """Write golden/ from what this version finds."""
    GOLDEN.mkdir(exist_ok=True)
    arrays, texts = {}, {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, run in runs(Path(folder)).items():
            found, texts[name] = contents(run)
            arrays |= {f"{name}/{key}": array for key, array in found.items()}
    np.savez_compressed(GOLDEN / "arrays.npz", **arrays)  # type: ignore[arg-type]
    (GOLDEN / "texts.json").write_text(json.dumps(texts, indent=1) + "\n")


if __name__ == "__main__":
    write()
