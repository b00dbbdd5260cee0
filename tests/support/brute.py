"""Brute force, independent of the code under test: every response of every image is kept, then sorted."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn


def outputs(model: nn.Module, layers: list[str], batch: Tensor) -> dict[str, Tensor]:
    """The layers' outputs, copied before anything can overwrite them."""
    kept: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_hook(lambda m, i, out, name=name: kept.__setitem__(name, out.detach().clone()))
        for name in layers
    ]
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()
    return kept


def canonical_batches(images: Tensor) -> Iterable[tuple[slice, Tensor]]:
    """Batches as the canonical pass computes them: exactly 16 images, channels last, the last one padded with zeros."""
    for start in range(0, len(images), 16):
        part = images[start : start + 16]
        batch = torch.zeros(16, *images.shape[1:]).to(memory_format=torch.channels_last)
        batch[: len(part)] = part
        yield slice(start, start + len(part)), batch


def plain_batches(images: Tensor, size: int) -> Iterable[tuple[slice, Tensor]]:
    for start in range(0, len(images), size):
        part = images[start : start + size]
        yield slice(start, start + len(part)), part.contiguous()


def responses(
    model: nn.Module, layers: list[str], images: Tensor, batches: Iterable[tuple[slice, Tensor]], neurons: bool = False
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{layer: (values [images, units], positions [images, units])}; a vector is a 1x1 map."""
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for place, batch in batches:
        count = place.stop - place.start
        for name, out in outputs(model, layers, batch).items():
            flat = out[:count].reshape(count, out.shape[1], -1).numpy()
            if neurons:
                flat = flat.reshape(count, -1, 1)
            if name not in found:
                shape = (len(images), flat.shape[1])
                found[name] = np.full(shape, np.nan, flat.dtype), np.zeros(shape, np.int64)
            found[name][1][place] = flat.argmax(axis=2)  # the first of equal values
            found[name][0][place] = flat.max(axis=2) + 0.0
    return found


def top(values: np.ndarray, k: int, ids: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(ids [units, k], row of each in `values`): value descending, then id ascending; NaN never; -1 where blank."""
    ids = np.arange(len(values)) if ids is None else ids
    chosen = np.full((values.shape[1], k), -1)
    rows = np.full((values.shape[1], k), -1)
    for unit in range(values.shape[1]):
        column = values[:, unit]
        order = [row for row in np.lexsort((ids, -column)) if not np.isnan(column[row])][:k]
        chosen[unit, : len(order)], rows[unit, : len(order)] = ids[order], order
    return chosen, rows


def check(run, found: dict[str, tuple[np.ndarray, np.ndarray]], ids: np.ndarray | None = None) -> None:
    """Fail unless values, images and positions of every unit of a run are what `responses` found, bit for bit."""
    for name, (values, positions) in found.items():
        top_ids, rows = top(values, run[name].values.shape[1], ids)
        np.testing.assert_array_equal(run[name].images, top_ids, err_msg=name)
        units = np.arange(values.shape[1])[:, None]
        live = top_ids >= 0
        want = np.where(live, values[rows, units], np.nan).astype(np.float32)
        assert (want.view(np.int32) == run[name].values.view(np.int32))[live].all(), name
        assert np.isnan(run[name].values[~live]).all()
        width = run[name].info["width"]
        flat = run[name].positions[..., 0].astype(np.int64) * width + run[name].positions[..., 1]
        if run.manifest["unit"] == "neuron":
            height = run[name].info["height"]
            assert (flat == np.broadcast_to(units % (height * width), flat.shape))[live].all()
        else:
            assert (flat == positions[rows, units])[live].all(), name


def wrong(run, model: nn.Module, images: Tensor) -> int:
    """How many units are called separated or tied and are not what brute force finds.

    Fails where a unit's values are not the canonical float32 ones of its images, or where its status is not true.
    """
    found = responses(model, run.layers, images, canonical_batches(images))
    count = 0
    for name, (values, positions) in found.items():
        layer, k = run[name], run.manifest["k"]
        ids, rows = top(values, k)
        units = np.arange(len(ids))[:, None]
        flat = layer.positions[..., 0].astype(np.int64) * layer.info["width"] + layer.positions[..., 1]
        live = layer.images >= 0
        stated = values[layer.images, units][live]
        np.testing.assert_array_equal(
            stated.view(np.int32), layer.values[live].view(np.int32)
        )  # float32, not half precision
        np.testing.assert_array_equal(positions[layer.images, units][live], flat[live])
        same = (layer.images == ids).all(axis=1)
        count += int((~same & (layer.status != "unseparated")).sum())
        for column, chosen, status in zip(values.T, rows, layer.status, strict=True):
            last = column[chosen[-1]]
            if status != "unseparated":
                assert (status == "tied") == ((column > last).sum() + (column == last).sum() > k)
    return count
