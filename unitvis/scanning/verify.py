"""Verify a run: read every winner's image again, and compute its responses again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unitvis import models
from unitvis.attribution.effective_boxes import differing_effective_boxes
from unitvis.errors import UnitvisError
from unitvis.half_precision.step import HALF
from unitvis.network.device import fingerprint
from unitvis.network.forward import COMPUTE_BATCH, CanonicalPass
from unitvis.network.inside import rank_inside
from unitvis.network.network import Network
from unitvis.reranking.pairs import ResponsePairs
from unitvis.results.data import RunData
from unitvis.scanning.absences import differing_nan, readable_failures
from unitvis.scanning.claims import (
    compares_images,
    differing_images,
    differing_network,
    differing_sample,
    uncompared,
)
from unitvis.sources import Batch, Source
from unitvis.state.noise_numbers import ROUNDING
from unitvis.state.partial import OTHER_POSITIONS, ranked_inside, refuse_differences


class _WinnerRows:
    """Winners of a run as arrays [winners], sorted by image: the column of the unit, the value and the position.

    columns: units of all of the network's layers in one count, in its order, which may be another than the run's;
    positions: in the flattened map, 0 for a neuron; layer: its number in the run. neurons: [winners, 3], channel, row
    and column; boxes: [winners, 4].
    """

    def __init__(self, network: Network, run: RunData) -> None:
        columns, images, values, flat, layers, neurons, boxes = [], [], [], [], [], [], []
        starts = dict(zip(network.layer_names, (own.start for own in network.columns), strict=True))
        for number, (name, top) in enumerate(run.tops.items()):
            unit, rank = np.nonzero(top.images >= 0)
            width = top.info["width"]
            columns.append(starts[name] + unit)
            images.append(top.images[unit, rank])
            values.append(top.values[unit, rank])
            rows, cols = top.positions[unit, rank].astype(np.int64).T
            is_neuron = top.info["unit"] == "neuron"
            flat.append(np.zeros_like(rows) if is_neuron else rows * width + cols)
            channel = unit // (top.info["height"] * width) if is_neuron else unit
            neurons.append(np.stack([channel, rows, cols], axis=-1))
            boxes.append(top.boxes[unit, rank])
            layers.append(np.full(len(unit), number))
        order = np.argsort(np.concatenate(images), kind="stable")
        self.columns, self.images, self.values, self.positions, self.layer, self.neurons, self.boxes = (
            np.concatenate(part)[order] for part in (columns, images, values, flat, layers, neurons, boxes)
        )


class Comparison:
    """A run's winners beside their responses as they are now, `recomputed`, and their boxes now.

    boxes: int32 [winners, 4], those of the run where a layer's receptive field was unknown then or is unknown now.
    """

    def __init__(self, network: Network, run: RunData) -> None:
        self._network, self._tops, self._names = network, list(run.tops.values()), list(run.tops)
        self.winners = _WinnerRows(network, run)
        self.recomputed = ResponsePairs(self.winners.images, self.winners.columns)
        self.boxes = self.winners.boxes.copy()
        self._there = np.full(len(self.winners.images), np.nan, np.float32)
        self.there = self._there  # float32 [winners]: the responses now at the run's places
        self._unread: dict[int, str] = {}  # by image: its name, and why it could not be read
        for number, (layer, top) in enumerate(run.tops.items()):
            own, field = self.winners.layer == number, network.fields[layer]
            if field.method == top.info["receptive_field"]["method"]:
                self.boxes[own] = field.boxes(*self.winners.neurons[own].T)

    def read(self, source: Source, ids: Iterable[int]) -> None:
        """Compute the responses of the images again, without a threshold: a winner may have any value now."""
        network = self._network
        with network.evaluating(), network.reading() as canonical:
            for batch in source.batches(COMPUTE_BATCH, ids=ids):
                if not network.bits.layers:
                    canonical.check(batch.pixels)
                self.recomputed.take(canonical.keys(batch.pixels), batch.ids)
                self._look_elsewhere(canonical, batch)
        self.there = np.where(self.recomputed.positions == self.winners.positions, self.recomputed.values, self._there)
        for id in np.unique(self.winners.images[~self.recomputed.known]).tolist():
            self._unread[id] = f"{source.name(id)!r} cannot be read now: {source.failure_reasons.get(id, 'no reason')}"

    def _look_elsewhere(self, canonical: CanonicalPass, batch: Batch) -> None:
        """Note the response at the run's place of each winner in a batch that responds most elsewhere now."""
        winners, ids = self.winners, batch.ids.numpy()
        moved = np.isin(winners.images, ids) & (self.recomputed.positions != winners.positions)
        if not moved.any():
            return
        numbers = [self._names.index(layer.name) for layer in self._network.layers]

        def read(index: int, maps: Tensor) -> None:
            own = moved & (winners.layer == numbers[index])
            order = np.argsort(ids)
            image = order[np.searchsorted(ids[order], winners.images[own])]
            channel, row, column = winners.neurons[own].T
            self._there[own] = maps[image, channel, row, column].float().cpu().numpy()

        canonical.maps(batch.pixels, read)

    @property
    def same_boxes(self) -> NDArray[np.bool_]:
        """Bool [winners]: the box is the run's."""
        return (self.boxes == self.winners.boxes).all(axis=1)

    @property
    def equal(self) -> NDArray[np.bool_]:
        """Bool [winners]: value and position are bit-equal to the run's."""
        same = self.recomputed.values.view(np.int32) == self.winners.values.view(np.int32)
        return same & (self.recomputed.positions == self.winners.positions)

    def describe(self, row: int) -> str:
        """Describe one winner in words: its value in the run and now, with what else differs, or why it has none."""
        winners, top = self.winners, self._tops[self.winners.layer[row]]
        if unread := self._unread.get(int(winners.images[row])):
            return f"image {winners.images[row]} in layer {top.name!r}: {unread}"
        told = [f"{values[row]:.9g}" for values in (winners.values, self.recomputed.values)]
        positions = [int(found[row]) for found in (winners.positions, self.recomputed.positions)]
        if positions[0] != positions[1]:
            places = (divmod(position, top.info["width"]) for position in positions)
            told = [f"{value} at row {r}, column {c}" for value, (r, c) in zip(told, places, strict=True)]
        elif not self.same_boxes[row]:
            boxes = (found[row].tolist() for found in (winners.boxes, self.boxes))
            told = [f"{value} in box {box}" for value, box in zip(told, boxes, strict=True)]
        return f"image {winners.images[row]} in layer {top.name!r}: {told[0]} in the run, {told[1]} now"


def verify(
    run: RunData, model: nn.Module | str | models.Loaded, device: torch.device | str | None = None
) -> dict[str, Any]:
    """Compute every winner of a run again, with its box. model: the one that was scanned, or its spec.

    Under the run's own fingerprint (hardware, library versions) value and position must be bit-equal. Under another
    one, and in layers whose bits are found here to depend on an image's place in its compute batch, the value must lie
    within 1e-5 of the layer's largest, and so must the response at the run's place. The box must be equal, except where
    the layer's receptive field is unknown. What the manifest and images.jsonl say of the model, its layers and the
    images must be so; of the images that failed, a sample must fail again; of NaN responses see
    `absences.differing_nan`, of the run's sample `claims.differing_sample`. Not compared are what only a scan can tell:
    whether another image responds more strongly, and the units' statuses. Raises UnitvisError for a run ranked in half
    precision.

    Returns a dict: "winners", "equal" (bit-equal) and "wrong" count winners; "worst": the largest distance, relative to
    the layer's largest value; "same_fingerprint": bool; "by_slot": the layers whose bits depend on an image's place;
    "first_wrong": a sentence about the first wrong one, or None; "differing": sentences such as "source.images is 9 and
    8", about what the run says and what is now; "uncompared": a sentence about what of the images was not compared,
    because they are read from another kind of source, or None.
    """
    run.need_winners()
    precision = run.manifest["precision"]
    if precision in HALF and run.manifest["scan"]["precision"] in HALF:  # asked for, and not scanned in float32 instead
        raise UnitvisError(
            f"the run was ranked in {precision}, so its values are not canonical; scan with exact or fp32"
        )
    if run.manifest.get("weights") == "moving":
        raise UnitvisError("the weights moved while the run was recorded, so its values cannot be computed again")
    network = Network(models.resolved(model)[0], device=device, transform=run.source.transform)
    channels, height, width = run.manifest["input"]
    network.examine((channels, height, width), run.layers, run.manifest["unit"])
    network.find_receptive_fields()
    if inside := ranked_inside(run.manifest):
        rank_inside(network)
        refuse_differences(OTHER_POSITIONS, inside, {layer.name: layer.to_json()["inside"] for layer in network.layers})
    differing = differing_network(run, network)
    found = compare_winners(run, network)
    differing += differing_images(run)
    if compares_images(run):
        differing += readable_failures((failure["id"] for failure in run.manifest["failures"]), run.source)
    differing += differing_nan(run, network, run.source)
    differing += differing_sample(run, network, found["by_slot"])
    if not found["wrong"]:  # gradients are those of the winners
        differing += differing_effective_boxes(network, run)
    return found | {"differing": differing, "uncompared": uncompared(run)}


def compare_winners(run: RunData, network: Network) -> dict[str, Any]:
    """Compare a run's winners with their responses now; returns what `verify` does, but for "differing".

    network: with the run's layers and their receptive fields.
    """
    for record in run.records.values() if run.source.separate_originals else ():
        run.source.check(record)
    comparison = Comparison(network, run)
    comparison.read(run.source, run.winners.tolist())
    winners, now = comparison.winners, comparison.recomputed.values.astype(np.float64)
    same = fingerprint(network.device) == run.manifest["fingerprint"]
    largest = np.zeros(len(run))
    np.maximum.at(largest, winners.layer, np.where(np.isfinite(winners.values), np.abs(winners.values), 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        distance = np.where(comparison.equal, 0, np.abs(now - winners.values) / largest[winners.layer])
        elsewhere = np.abs(comparison.there - now) / largest[winners.layer]  # the run's place, beside the strongest
    by_slot = [name for name in run.layers if name in network.bits.by_slot] if same else layers_by_slot(run, network)
    to_rounding = np.isin(winners.layer, [run.layers.index(name) for name in by_slot]) | (not same)
    rounded = comparison.equal | ((distance <= ROUNDING) & (elsewhere <= ROUNDING))
    wrong = np.where(to_rounding, ~rounded, ~comparison.equal) | ~comparison.same_boxes
    return {
        "winners": len(wrong),
        "equal": int(comparison.equal.sum()),
        "wrong": int(wrong.sum()),
        "worst": float(np.nanmax(distance, initial=0)),
        "same_fingerprint": same,
        "by_slot": by_slot,
        "first_wrong": comparison.describe(int(np.argmax(wrong))) if wrong.any() else None,
    }


def layers_by_slot(run: RunData, network: Network) -> list[str]:
    """The layers whose bits depend on an image's place in its compute batch, as the run's scan or the network found."""
    found = {*run.manifest["scan"].get("by_slot", ()), *network.bits.by_slot}
    return [name for name in run.layers if name in found]
