"""The command `unitvis demo`: generate pictures, scan them, compare every unit with brute force, draw the result."""

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
from unitvis.files import replacing, unoccupied
from unitvis.network.canonical import canonical_settings
from unitvis.network.forward import compute_batch
from unitvis.pages import gallery
from unitvis.results.folder import check_output
from unitvis.run import Run
from unitvis.scanning.scan import scan
from unitvis.sources.transform import Transform

PICTURES, SEED = 4096, 2024  # number of pictures, and the seed of their series
TRANSFORM = Transform(mean=network.MEAN, std=network.STD)


def demo(
    out: Path,
    *,
    count: int = PICTURES,
    overwrite: bool = False,
    project: bool | str = False,
    workers: int | None = None,
) -> str:
    """Scan `count` generated pictures with the embedded network and draw the run in the folder `out`.

    Returns one line with the time, the comparison with brute force, and the naive hook's time divided by the scan's;
    the latter without the preparation that each model needs once.
    """
    folder = check_output(out, overwrite=overwrite)
    model = network.load()
    drawn, labels = pictures(count, SEED, workers)
    file = folder / "pictures.npy"  # kept, because drawing and verifying a run read its images again
    with replacing(file) as target, open(target, "wb") as stream:
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
    overview(run, labels, CLASSES).save(unoccupied(picture))
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
    """Compute all responses by the plainest hook: it copies every map to the host, where NumPy finds the maxima.

    Returns {layer: (values, positions)}, each [images, units]. The compute batches are the canonical ones, so that the
    values can be compared bit for bit.
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
        layer: tuple(np.concatenate(arrays)[: len(drawn)] for arrays in zip(*kept[layer], strict=True))
        for layer in layers
    }
    return joined  # type: ignore[return-value]


def units_equal(run: Run, responses: dict[str, tuple[np.ndarray, np.ndarray]]) -> int:
    """Count the units with exactly the winners of brute force: the same images, values and positions in this order.

    responses: {layer: (values, positions)} of all images, see `naive_hook`.
    """
    equal = 0
    for layer, (values, positions) in responses.items():
        top = run[layer]
        k = top.values.shape[1]
        rows = np.argsort(-values, axis=0, kind="stable")[:k].T  # equal values in the order of their images
        units = np.arange(len(top))[:, None]
        flat = top.positions[..., 0] * top.info["width"] + top.positions[..., 1]
        same = (rows == top.images) & (values[rows, units] == top.values) & (positions[rows, units] == flat)
        equal += int(same.all(axis=1).sum())
    return equal
