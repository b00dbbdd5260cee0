"""The sample of a run: responses of a few of its images, chosen by hash, that show what is usual for a unit.

The nine winners are extremes. The sample has the same images for every unit, up to 256, whatever the order of the scan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unitvis.errors import UnitvisError
from unitvis.files import read_arrays, write_arrays
from unitvis.state.interval_set import IntervalSet
from unitvis.state.sampling import SIZE

MAX_BYTES = 2**27  # of responses: 256 images of 131,072 units. A run with more units keeps no sample.
QUARTILES = (0.25, 0.5, 0.75)
_MAX_HASH = 64  # characters
MIDDLE = 9  # images around the median, as many as a tile has


class Typical(NamedTuple):
    """Images of the sample that stand for a unit's usual responses, float32, each beside its id, int64."""

    quantiles: tuple[float, ...]
    images: NDArray[np.int64]  # [quantiles]: at each quantile
    values: NDArray[np.float32]  # [quantiles]
    middle_images: NDArray[np.int64]  # [9, or fewer where there are fewer]: around the median, values descending
    middle_values: NDArray[np.float32]  # the same shape


class Histogram(NamedTuple):
    """How many images of the sample give a unit a response between two edges, the last one included."""

    counts: NDArray[np.int64]  # [bins]
    edges: NDArray[np.float64]  # [bins + 1]
    left_out: int  # images whose response is NaN or infinite


@dataclass(frozen=True)
class Sample:
    """Canonical responses of the sampled images in all layers of a run."""

    images: NDArray[np.int64]  # [n], ids, ascending
    hashes: NDArray[np.str_]  # [n]: of their contents, as in their records; empty where there is none
    responses: Mapping[str, NDArray[np.float32]]  # by layer, [n, units]; NaN where an image gives NaN

    def typical(self, layer: str, unit: int, quantiles: Sequence[float] = QUARTILES) -> Typical:
        """The images at quantiles of a unit's responses, and the nine around the median.

        At quantile q is the image with the smallest response that at least q of the images do not exceed; images with
        NaN do not count. Of equal responses the one with the lower id is the stronger, as among winners.
        """
        if wrong := [q for q in quantiles if not 0 <= q <= 1]:
            raise UnitvisError(f"a quantile must lie from 0 to 1, and {wrong[0]!r} was given")
        values = self.responses[layer][:, unit]
        order = np.lexsort((-self.images, values))  # ascending; NaN come last
        order = order[: len(values) - int(np.isnan(values).sum())]
        count = len(order)
        if not count:
            raise UnitvisError(f"unit {unit} of layer {layer!r} gives NaN for all {len(values)} images of the sample")
        at = order[[max(0, int(np.ceil(q * count)) - 1) for q in quantiles]]
        first = min(max(0, (count + 1) // 2 - 1 - MIDDLE // 2), max(0, count - MIDDLE))
        middle = order[first : first + MIDDLE][::-1]
        return Typical(tuple(quantiles), self.images[at], values[at], self.images[middle], values[middle])

    def histogram(self, layer: str, unit: int, bins: int, largest: float) -> Histogram:
        """A unit's responses in `bins` intervals of one width, from the smallest one to `largest` if that is larger."""
        values = self.responses[layer][:, unit].astype(np.float64)
        finite = values[np.isfinite(values)]
        ends = [*finite, largest] if np.isfinite(largest) else finite
        extent = (min(ends), max(ends)) if len(ends) else (0.0, 1.0)
        counts, edges = np.histogram(finite, bins, extent)
        return Histogram(counts.astype(np.int64), edges, len(values) - len(finite))


def why_none(manifest: Mapping[str, Any]) -> str | None:
    """Why a run with this manifest keeps no sample, in words; None if it does where its images can be read again."""
    units = sum(info["units"] for info in manifest["layers"].values())
    if manifest["unit"] == "neuron":
        return "its units are neurons"
    if manifest.get("weights") == "moving":
        return "its network's weights moved"
    if not manifest["coverage"]:
        return "the ids of its images are not known"
    if 4 * SIZE * units > MAX_BYTES:
        return f"it has {units:,} units, for which that of {SIZE} images would take more than {MAX_BYTES >> 20} MiB"
    return None


def refuse_without_sample(manifest: Mapping[str, Any]) -> UnitvisError:
    """The error for a run with this manifest, of which a sample is asked for and which has none."""
    if (reason := why_none(manifest)) is None:
        reason = "its images could not be read again when it was made, or an earlier version of unitvis made it"
    return UnitvisError(f"the run keeps no sample of its images, because {reason}; its winners are all that it shows")


def write_sample(sample: Sample, path: Path) -> None:
    """Write a sample as an npz file, which is not compressed: responses hardly get smaller."""
    arrays = {f"{name}/responses": responses for name, responses in sample.responses.items()}
    write_arrays(path, {"images": sample.images, "hashes": sample.hashes, **arrays})


def read_sample(path: Path, manifest: Mapping[str, Any]) -> Sample:
    """Read the sample of a run with this manifest; ValueError where it does not belong to it."""
    names = {f"{name}/responses": name for name in manifest["layers"]}
    arrays = read_arrays(path, {"images", "hashes", *names})
    found = Sample(arrays["images"], arrays["hashes"], {name: arrays[array] for array, name in names.items()})
    if wrong := _problem(found, manifest):
        raise ValueError(f"{path.name}: {wrong}")
    return found


def _problem(sample: Sample, manifest: Mapping[str, Any]) -> str | None:
    """What of a sample does not belong to the manifest of its run; None if all does."""
    if (reason := why_none(manifest)) is not None:
        return f"a run keeps none where {reason}"
    ids, coverage = sample.images, IntervalSet(manifest["coverage"])
    count = min(SIZE, len(coverage))
    if ids.dtype != np.dtype("<i8") or ids.shape != (count,):
        return f"images is {ids.dtype} {list(ids.shape)}, not int64 [{count}]"
    if (hashes := sample.hashes).dtype.kind != "U" or hashes.shape != (count,) or hashes.itemsize > 4 * _MAX_HASH:
        return f"hashes is {hashes.dtype} {list(hashes.shape)}, not text [{count}]"
    if (np.diff(ids) <= 0).any():
        return "the ids of images do not ascend"
    if not (inside := coverage.holds(ids)).all():
        return f"image {ids[~inside][0]} lies outside of the coverage"
    for name, info in manifest["layers"].items():
        responses, shape = sample.responses[name], (count, info["units"])
        if responses.dtype != np.dtype("<f4") or responses.shape != shape:
            return f"layer {name!r}: responses is {responses.dtype} {list(responses.shape)}, not float32 {list(shape)}"
    return None
