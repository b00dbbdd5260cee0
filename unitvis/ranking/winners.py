"""From a top-k to a run: rows, columns, boxes, status, and what the manifest says of each layer."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unitvis.errors import UnitvisError
from unitvis.network.layers import Layer
from unitvis.network.network import Network
from unitvis.network.receptive_fields.receptive_field import ReceptiveField
from unitvis.ranking.repetition import repetition_warning
from unitvis.reranking.bound import EXCEEDING_PROBABILITY
from unitvis.reranking.rerank import Scanned, rerank
from unitvis.reranking.rereading import responses_again
from unitvis.results.arrays import SEPARATED, TIED, UNSEPARATED, LayerArrays
from unitvis.results.manifest import saturation_warning, unknown_boxes_warning
from unitvis.results.nonfinite import infinite_info, nan_info
from unitvis.results.sample import Sample, why_none
from unitvis.run import Run
from unitvis.sources import Source
from unitvis.state.sampling import sample
from unitvis.state.topk import Ranked, TopK


def ranked_run(network: Network, topk: TopK, k: int, decided: NDArray[np.bool_], manifest: Mapping[str, Any]) -> Run:
    """The run of a top-k; see `winners`. manifest: of the scan, to which the layers and their warnings are added."""
    ranked = topk.read()
    tops = winners(network, ranked, k, decided)
    layers = {name: top.info for name, top in tops.items()}
    warned = [sentence for top in tops.values() if (sentence := saturation_warning(top))]
    warned += unknown_boxes_warning(tops)
    if repeated := repetition_warning(ranked, k):
        warned.append(repeated)
    return Run(tops, {**manifest, "layers": layers, "warnings": warned}, {})


def reranked_run(network: Network, scanned: Scanned, source: Source, manifest: Mapping[str, Any]) -> Run:
    """The exact run after a scan in half precision: each unit's status says whether it is decided; see `rerank`."""
    start = time.perf_counter()
    with network.evaluating():
        found = rerank(network, scanned, source)
    counts = {
        "images": found.computed,
        "sample": len(found.sample),
        "outlying": found.outlying,
        "doubt": EXCEEDING_PROBABILITY,
    }
    run = ranked_run(network, found.topk, scanned.k, found.decided, {**manifest, "rescored": counts})
    run.manifest["seconds"]["rescoring"] = time.perf_counter() - start
    if why_none(run.manifest) is None:
        run.sample = _sample_of(network, source, found.sample, found.sample_responses)
    run.attach(source)
    return run


def keep_sample(run: Run, network: Network, source: Source) -> None:
    """Give a run the sample of its images, which are read again, unless it has one or `why_none` says why it has none.

    A warning, in the manifest too, tells of an image that cannot be read, or of memory that runs out: a scan of hours
    is not lost for it.
    """
    if run.sample is not None or why_none(run.manifest) is not None:
        return
    try:
        run.sample = sampled_again(run.manifest, network, source)
    except UnitvisError as error:
        said = f"the run keeps no sample of its images, so nothing shows what is usual for a unit: {error}"
        run.manifest["warnings"].append(said)
        warnings.warn(said)


def sampled_again(manifest: Mapping[str, Any], network: Network, source: Source) -> Sample:
    """The sample of a run with this manifest and a coverage, computed from the images; see `responses_again`."""
    ids = sample(np.array(manifest["coverage"], np.int64))
    return _sample_of(network, source, ids, responses_again(network, source, ids))


def _sample_of(network: Network, source: Source, ids: NDArray[np.int64], responses: NDArray[np.float32]) -> Sample:
    """A sample as a run keeps it, of ids [n] and their responses [n, units]."""
    own = zip(network.layers, network.columns, strict=True)
    hashes = np.array([source.record(id).get("hash") or "" for id in ids.tolist()], np.str_)
    return Sample(ids, hashes, {layer.name: np.ascontiguousarray(responses[:, columns]) for layer, columns in own})


def winners(network: Network, ranked: Ranked, k: int, decided: NDArray[np.bool_]) -> Mapping[str, LayerArrays]:
    """The k winners of every unit, by layer.

    ranked: k places a unit or more; those beyond k tell whether the k-th shares its value, and count as responses.
    decided: bool [units], the first k places are exactly brute force's.
    """
    found = {}
    for layer, units in zip(network.layers, network.columns, strict=True):
        own = ranked.of(units)
        tied = (own.images[:, k] >= 0) & (own.values[:, k] == own.values[:, k - 1])
        status = np.where(decided[units], np.where(tied, TIED, SEPARATED), UNSEPARATED)
        field, side = network.fields[layer.name], network.drawn_sides.get(layer.name)
        found[layer.name] = _layer(layer, field, side, network.unit, k, own, status)
    return found


def _layer(
    layer: Layer,
    field: ReceptiveField,
    drawn_side: int | None,
    unit: str,
    k: int,
    own: Ranked,
    status: NDArray[np.str_],
) -> LayerArrays:
    info = layer.to_json() | {"unit": unit, "units": len(status)}
    info |= {"receptive_field": field_info(field), "effective_box": drawn_side}
    info |= {"nan": nan_info(own.nan), "infinite": infinite_info(own.values, own.images)}
    status = status.astype(f"<U{len(UNSEPARATED)}")  # of one width whatever a layer's units are
    info["unseparated"] = int((status == UNSEPARATED).sum())

    values, images, flat = own.values[:, :k], own.images[:, :k], own.positions[:, :k]
    channels = np.arange(len(images))[:, None]
    if unit == "neuron":  # the unit is the position
        channels, flat = channels // (layer.height * layer.width), channels % (layer.height * layer.width)
    channels, flat, blank = np.broadcast_arrays(channels, flat, images < 0)
    positions = np.stack([flat // layer.width, flat % layer.width], axis=-1).astype(np.int32)
    positions[blank] = -1
    boxes = np.zeros((*images.shape, 4), np.int32)
    live = ~blank
    boxes[live] = field.boxes(channels[live], positions[live][:, 0], positions[live][:, 1])
    return LayerArrays(layer.name, values, images, positions, boxes, status, info)


def field_info(field: ReceptiveField) -> dict[str, Any]:
    """A layer's receptive field in plain numbers, for the manifest."""
    return {
        "size": list(field.size),
        "stride": list(field.stride) if field.stride else None,
        "whole_image": field.whole_image,
        "method": field.method,
        "note": field.note,
    }
