"""verify: read every winner's image again, and compute its responses again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from unitvis.errors import UnitvisError
from unitvis.half_precision.step import HALF
from unitvis.network.device import fingerprint
from unitvis.network.forward import COMPUTE_BATCH
from unitvis.network.network import Network
from unitvis.reranking.places import Places
from unitvis.results.data import RunData
from unitvis.sources import Source


class _Winners:
    """Every place of a run as one row, sorted by image: which unit's column, and the response it must have."""

    def __init__(self, run: RunData) -> None:
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


class Comparison:
    """A run's winners beside what their responses are now, `again`."""

    def __init__(self, network: Network, run: RunData) -> None:
        self._network = network
        self.winners = _Winners(run)
        self.again = Places(self.winners.images, self.winners.columns)

    def read(self, source: Source, ids: Iterable[int]) -> None:
        """Compute the responses of the images again; no threshold, since a winner counts whatever it is now."""
        network = self._network
        with network.evaluating(), network.reading() as canonical:
            for batch in source.batches(COMPUTE_BATCH, ids=ids):
                self.again.take(canonical.keys(batch.pixels), batch.ids)

    @property
    def equal(self) -> NDArray[np.bool_]:
        """Bool [places]: value and position came out again, bit for bit."""
        same = self.again.values.view(np.int32) == self.winners.values.view(np.int32)
        return same & (self.again.positions == self.winners.positions)

    def describe(self, place: int) -> str:
        """One place in words: what the run says and what came out now."""
        winners = self.winners
        return (
            f"image {winners.images[place]} in layer {self._network.layers[winners.layer[place]].name!r}: "
            f"{winners.values[place]:.9g} in the run, {self.again.values[place]:.9g} now"
        )


def verify(run: RunData, model: nn.Module, device: torch.device | str | None = None) -> dict[str, Any]:
    """Recompute every winner of a run: {"winners", "equal", "wrong", "worst", "same_fingerprint", "first_wrong"}.

    Under the run's own fingerprint a value and its position must come out bit for bit, under another the value within
    1e-5 of the layer's largest. worst: the largest distance, as a share of that. first_wrong: a sentence, or None.
    """
    run.need_winners()
    if (precision := run.manifest["precision"]) in HALF:
        raise UnitvisError(
            f"the run was ranked in {precision}, so its values are not canonical; scan with exact or fp32"
        )
    for record in run.records.values() if run.source.separate_originals else ():
        run.source.check(record)
    network = Network(model, device=device, transform=run.source.transform)
    channels, height, width = run.manifest["input"]
    network.examine((channels, height, width), run.layers, run.manifest["unit"])
    comparison = Comparison(network, run)
    comparison.read(run.source, run.winners.tolist())
    winners, now = comparison.winners, comparison.again.values.astype(np.float64)
    same = fingerprint(network.device) == run.manifest["fingerprint"]
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
