"""The second pass: the few images that matter are read again, and their responses computed again.

After a scan in float32 nothing is left to decide: the second pass shows that winners come out again bit for bit, and
how much of its receptive field a layer really uses.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unitvis.errors import UnitvisError, first_line
from unitvis.half_precision.step import HALF
from unitvis.network.canonical import BATCH, canonical_settings
from unitvis.network.device import fingerprint
from unitvis.network.layers import Taps
from unitvis.ranking.recorder import Recorder
from unitvis.reranking.places import Places
from unitvis.run import LayerTop, Run
from unitvis.sources import Source

SAMPLE = 8  # winners a layer whose gradients give its effective box; their activations are all held at once
SHARE = 0.9  # of the squared gradient that the effective box holds


class _Winners:
    """Every place of a run as one row, sorted by image: which unit's column, and the response it must have."""

    def __init__(self, run: Run) -> None:
        columns, images, values, flat, layers = [], [], [], [], []
        start = 0
        for number, top in enumerate(run.tops.values()):
            unit, rank = np.nonzero(top.images >= 0)
            width = top.info["width"]
            columns.append(start + unit)
            images.append(top.images[unit, rank])
            values.append(top.values[unit, rank])
            rows, cols = top.positions[unit, rank].astype(np.int64).T
            flat.append(np.zeros_like(rows) if top.info["unit"] == "neuron" else rows * width + cols)
            layers.append(np.full(len(unit), number))
            start += len(top)
        order = np.argsort(np.concatenate(images), kind="stable")
        self.columns, self.images, self.values, self.positions, self.layer = (
            np.concatenate(part)[order] for part in (columns, images, values, flat, layers)
        )


class Comparison(Recorder):
    """Recomputes a run's winners; `again` holds what each response is now."""

    def __init__(self, model: nn.Module, run: Run, device: torch.device | str | None = None) -> None:
        source = run.source
        super().__init__(
            model, run.layers, run.manifest["k"], unit=run.manifest["unit"], device=device, transform=source.transform
        )
        self.winners = _Winners(run)
        self.again = Places(self.winners.images, self.winners.columns)

    def _floor(self) -> None:
        return None  # a winner must be compared whatever it is now

    def _take(self, keys: Tensor, ids: Tensor) -> None:
        self.again.take(keys, ids)

    def read(self, source: Source, ids: Iterable[int], batch_size: int = 4 * BATCH) -> None:
        """Compute the responses of the images again."""
        for batch in source.batches(batch_size, ids=ids):
            self(batch.pixels, batch.ids)
        self.flush()

    @property
    def equal(self) -> NDArray[np.bool_]:
        """[places]: value and position came out again, bit for bit."""
        same = self.again.values.view(np.int32) == self.winners.values.view(np.int32)
        return same & (self.again.positions == self.winners.positions)

    def describe(self, place: int) -> str:
        """One place in words: what the run says and what came out now."""
        winners = self.winners
        return (
            f"image {winners.images[place]} in layer {self.layers[winners.layer[place]].name!r}: "
            f"{winners.values[place]:.9g} in the run, {self.again.values[place]:.9g} now"
        )


def effective_boxes(model: nn.Module, run: Run, device: torch.device | str | None = None) -> dict[str, int | None]:
    """Each layer's effective box: the side, in model-input pixels, of the smallest square centred on the neuron that
    holds 90% of the squared input gradient, averaged over a sample of the layer's winners that a hash chooses.

    None for a layer none of whose winners has a gradient. (Luo et al. 2016, section 2: the effective receptive field.)
    """
    chosen = {name: _sample(top) for name, top in run.tops.items()}
    ids = sorted({image for winners in chosen.values() for image, _, _ in winners})
    recorder = Recorder(model, run.layers, device=device, transform=run.source.transform)
    images: dict[int, Tensor] = {}
    for batch in run.source.batches(4 * BATCH, ids=ids):
        images.update(zip(batch.ids.tolist(), batch.pixels, strict=True))
    sides: dict[str, int | None] = {}
    with recorder:
        for name, winners in chosen.items():
            sides[name] = None
            if winners:
                pixels = recorder.as_images(torch.stack([images[image] for image, _, _ in winners]))
                try:
                    squares = _squared_gradients(recorder, name, pixels, [neuron for _, neuron, _ in winners])
                except (RuntimeError, UnitvisError) as error:  # it is only for drawing
                    warnings.warn(f"layer {name!r} has no effective box, for want of gradients ({first_line(error)})")
                    continue
                sides[name] = _side(squares, np.array([centre for *_, centre in winners]))
    return sides


def _sample(top: LayerTop) -> list[tuple[int, tuple[int, int, int], tuple[float, float]]]:
    """(image, neuron, centre of its box) of the winners with the smallest hash of image and unit."""
    units, ranks = np.nonzero(top.fired)
    with np.errstate(over="ignore"):
        mixed = top.images[units, ranks].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + units.astype(np.uint64)
        mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    per_channel = top.info["height"] * top.info["width"] if top.info["unit"] == "neuron" else 1
    sample = []
    for place in np.argsort(mixed ^ (mixed >> np.uint64(29)), kind="stable")[:SAMPLE]:
        unit, rank = units[place], ranks[place]
        row, column = top.positions[unit, rank].tolist()
        left, upper, right, lower = top.boxes[unit, rank].tolist()
        centre = ((left + right) / 2, (upper + lower) / 2)
        sample.append((int(top.images[unit, rank]), (int(unit) // per_channel, row, column), centre))
    return sample


def _squared_gradients(
    recorder: Recorder, layer: str, images: Tensor, neurons: list[tuple[int, int, int]]
) -> NDArray[np.float64]:
    """[n, H, W]: the squared gradient of one neuron's response to each image, summed over the colours."""
    pixels = images.contiguous(memory_format=torch.channels_last).requires_grad_()
    responses: list[Tensor] = []

    def read(_: int, maps: Tensor) -> None:
        channel, row, column = torch.tensor(neurons, device=maps.device).T
        responses.append(maps[torch.arange(len(neurons), device=maps.device), channel, row, column])

    with torch.enable_grad(), canonical_settings(recorder.device), Taps(recorder.model, [layer]) as taps:
        taps.run(pixels.clone(), read)  # a clone: a model may overwrite its input
        if not responses[0].requires_grad:
            return np.zeros((len(neurons), *images.shape[2:]))
        (gradient,) = torch.autograd.grad(responses[0].sum(), pixels)
    return gradient.double().square().sum(dim=1).cpu().numpy()


def _side(squares: NDArray[np.float64], centres: NDArray[np.float64]) -> int | None:
    """The side of the square that holds `SHARE` of squares [n, H, W] about centres [n, 2] (x, y), on average."""
    total = squares.sum(axis=(1, 2))
    alive = (total > 0) & np.isfinite(total)
    if not alive.any():
        return None
    height, width = squares.shape[1:]
    sides = []  # [n, H, W]: the side of the smallest centred square that contains each pixel
    for x, y in centres[alive]:
        across, down = abs(np.arange(width) + 0.5 - x), abs(np.arange(height) + 0.5 - y)
        sides.append(np.rint(2 * np.maximum(across[None, :], down[:, None]) + 1).astype(int))
    shares = (squares / np.where(alive, total, 1)[:, None, None])[alive] / alive.sum()
    held = np.bincount(np.ravel(sides), weights=shares.ravel()).cumsum()
    return int(np.searchsorted(held, SHARE))


def verify(run: Run, model: nn.Module, device: torch.device | str | None = None) -> dict[str, Any]:
    """Recompute every winner of a run: {"winners", "equal", "wrong", "worst", "same_fingerprint", "first_wrong"}.

    Under the run's own fingerprint a value and its position must come out bit for bit, under another the value within
    1e-5 of the layer's largest. worst: the largest distance, as a share of that. first_wrong: a sentence, or None.
    """
    run.need_winners()
    if (precision := run.manifest["precision"]) in HALF:
        raise UnitvisError(
            f"the run was ranked in {precision}, so its values are not canonical; scan with exact or fp32"
        )
    for record in run.records.values() if run.source.apart else ():
        run.source.check(record)
    with Comparison(model, run, device) as comparison:
        comparison.read(run.source, run.winners.tolist())
    winners, now = comparison.winners, comparison.again.values.astype(np.float64)
    same = fingerprint(comparison.device) == run.manifest["fingerprint"]
    largest = np.zeros(len(run))
    np.maximum.at(largest, winners.layer, np.where(np.isfinite(winners.values), np.abs(winners.values), 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        distance = np.where(comparison.equal, 0, np.abs(now - winners.values) / largest[winners.layer])
    wrong = ~comparison.equal if same else ~(distance <= 1e-5)
    return {
        "winners": len(wrong),
        "equal": int(comparison.equal.sum()),
        "wrong": int(wrong.sum()),
        "worst": float(np.nanmax(distance, initial=0)),
        "same_fingerprint": same,
        "first_wrong": comparison.describe(int(np.argmax(wrong))) if wrong.any() else None,
    }
