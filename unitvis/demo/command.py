"""unitvis demo: draw pictures, scan them, check every unit against brute force, and show the result. Offline."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from unitvis.demo import network
from unitvis.demo.overview import overview
from unitvis.demo.pictures import CLASSES, pictures
from unitvis.drawing.sheets import render
from unitvis.files import replacing
from unitvis.gallery import gallery
from unitvis.network.canonical import canonical_settings
from unitvis.network.forward import compute_batch
from unitvis.results.folder import check_output
from unitvis.run import Run
from unitvis.scanning.scan import scan
from unitvis.sources.transform import Transform

COUNT, SEED = 4096, 2024
TRANSFORM = Transform(mean=network.MEAN, std=network.STD)


def demo(
    out: Path, *, count: int = COUNT, overwrite: bool = False, project: bool = False, workers: int | None = None
) -> str:
    """Write a run of the embedded network on `count` drawn pictures into `out`, and say in one line how it went.

    The naive hook is compared with the scan's pass over the pictures; the preparation, once a model, has no like in it.
    """
    folder = check_output(out, overwrite=overwrite)
    model = network.load()
    drawn, labels = pictures(count, SEED, workers)
    file = folder / "pictures.npy"  # a run's pictures must be found again, to draw them and to verify it
    with replacing(file) as part, open(part, "wb") as stream:
        np.save(stream, drawn)
    run = scan(model, file, list(network.LAYERS), transform=TRANSFORM, progress=False)
    run.manifest["model"]["spec"] = f"{network.__name__}:{network.load.__name__}"
    run.write(folder)

    start = time.perf_counter()
    responses = naive_hook(model, TRANSFORM, drawn, run.layers)
    naive = time.perf_counter() - start
    equal = units_equal(run, responses)

    render(run, folder)
    page = gallery(run, folder, model, project=project)
    picture = folder / "overview.png"
    overview(run, labels, CLASSES).save(picture)
    units = sum(len(top) for top in run.tops.values())
    seconds = run.manifest["seconds"]
    return (
        f"{count:,} pictures, {units} units in {seconds['preparation'] + seconds['scan']:.1f} s; "
        f"{equal} of {units} equal brute force; {naive / seconds['scan']:.2f} times the naive hook; "
        f"look at {picture} and {page}"
    )


def naive_hook(
    model: nn.Module, transform: Transform, drawn: np.ndarray, layers: list[str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What one writes first: a hook that copies every map to the host, where numpy finds the largest value.

    {layer: (values, positions)}, each [images, units]: every response, kept. Its compute batches are the canonical
    ones, so that it can be compared bit for bit.
    """
    kept: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {layer: [] for layer in layers}

    def hook(layer: str) -> Callable[..., None]:
        def copy(module: nn.Module, inputs: object, output: Tensor) -> None:
            flat = output.detach().cpu().numpy().reshape(*output.shape[:2], -1)
            positions = flat.argmax(axis=2)
            kept[layer].append((np.take_along_axis(flat, positions[..., None], axis=2)[..., 0], positions))

        return copy

    handles = [model.get_submodule(layer).register_forward_hook(hook(layer)) for layer in layers]
    device = next(model.parameters()).device
    try:
        with torch.no_grad(), canonical_settings(device):
            for start in range(0, len(drawn), 16):
                model(compute_batch(transform.normalize(torch.from_numpy(drawn[start : start + 16]).to(device))))
    finally:
        for handle in handles:
            handle.remove()
    joined = {
        layer: tuple(np.concatenate(part)[: len(drawn)] for part in zip(*kept[layer], strict=True)) for layer in layers
    }
    return joined  # type: ignore[return-value]


def units_equal(run: Run, responses: dict[str, tuple[np.ndarray, np.ndarray]]) -> int:
    """How many units' winners are brute force's: same images, values and positions, in the same order."""
    equal = 0
    for layer, (values, positions) in responses.items():
        top = run[layer]
        k = top.values.shape[1]
        rows = np.argsort(-values, axis=0, kind="stable")[:k].T  # of equal values the lower image first
        units = np.arange(len(top))[:, None]
        flat = top.positions[..., 0] * top.info["width"] + top.positions[..., 1]
        same = (rows == top.images) & (values[rows, units] == top.values) & (positions[rows, units] == flat)
        equal += int(same.all(axis=1).sum())
    return equal
