"""What a run says of images that it leaves out: those that failed, and those whose responses are NaN."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

import unitvis_kernels as uk
from unitvis.network.forward import COMPUTE_BATCH
from unitvis.network.network import Network
from unitvis.results.arrays import UNSEPARATED, LayerArrays
from unitvis.results.data import RunData
from unitvis.sources import Source
from unitvis.state.sampling import sample, smallest_hashes

SAMPLED = 64  # images that stand for all


def readable_failures(failed: Iterable[int], source: Source) -> list[str]:
    """Sentences about images that a run lists as failed and that can be read; of more than 64, a sample is read."""
    if not source.rereadable:
        return []
    ids = smallest_hashes(np.array(sorted(failed), np.int64), SAMPLED)
    return [
        f"image {id}, {source.name(id)!r}, is listed as failed and can be read now (scan again with --overwrite)"
        for id in ids.tolist()
        if source.is_readable(id)
    ]


def differing_nan(run: RunData, network: Network, source: Source) -> list[str]:
    """Sentences about NaN responses that a run counts and that some images do not give.

    Of each layer with NaN responses the first image must give one. Units with fewer than k winners, though there are k
    images, must give NaN for all other images; a sample of 64 is computed, and no NaN among them may come before the
    layer's first. Nothing is compared of a scan in half precision, whose NaN may be finite in float32, nor without a
    coverage, which tells the images.
    """
    coverage = np.array(run.manifest["coverage"], np.int64).reshape(-1, 2)
    if run.manifest["scan"]["precision"] != "fp32" or not len(coverage) or not source.rereadable:
        return []
    lacking = {name: _lacking(top, run.manifest["images"]) for name, top in run.tops.items()}
    first = {name: top.info["nan"]["first_image"] for name, top in run.tops.items() if top.info["nan"]}
    some = sample(coverage, SAMPLED + run.manifest["k"]) if any(map(len, lacking.values())) else coverage[:0, 0]
    found: dict[str, str] = {}  # by layer
    columns = dict(zip(network.layer_names, network.columns, strict=True))
    with network.evaluating(), network.reading() as canonical:
        for batch in source.batches(COMPUTE_BATCH, ids=np.union1d(some, list(first.values())).astype(int).tolist()):
            nan = (canonical.keys(batch.pixels) == uk.NAN_KEY).cpu().numpy()
            for name, top in run.tops.items():
                for id, row in zip(batch.ids.tolist(), nan[:, columns[name]], strict=True):
                    for sentence in _differences(top, id, row, lacking[name], first.get(name)):
                        found.setdefault(name, sentence)
    return list(found.values())


def _lacking(top: LayerArrays, images: int) -> np.ndarray:
    """Units, int64 [n], with fewer winners than places and images, which must have given NaN for all other images."""
    counts = (top.images >= 0).sum(axis=1)
    return np.flatnonzero((counts < min(top.images.shape[1], images)) & (top.status != UNSEPARATED))


def _differences(top: LayerArrays, id: int, nan: np.ndarray, lacking: np.ndarray, first: int | None) -> Iterator[str]:
    """Sentences about one image, which gives NaN in some units of a layer, bool [units]."""
    if nan.any() and (first is None or id < first):
        said = "none" if first is None else f"image {first} as the first"
        yield f"image {id} gives NaN in layer {top.name!r}, and the run says {said}"
    if id == first and not nan.any():
        yield f"layer {top.name!r} gives no NaN for image {id}, which the run says is the first with one"
    missing = lacking[~nan[lacking] & (top.images[lacking] != id).all(axis=1)]
    if len(missing):
        yield (
            f"unit {missing[0]} of layer {top.name!r} has fewer than {top.images.shape[1]} winners, and image {id}, "
            "none of them, gives it a response"
        )
