"""Whether a run folder contradicts itself: what of its manifest, arrays and records does not fit together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from unitvis.results.arrays import ARRAYS, SEPARATED, TIED, UNSEPARATED, LayerArrays
from unitvis.results.nonfinite import infinite_info
from unitvis.state.interval_set import IntervalSet
from unitvis.state.partial import Partial, batch_sizes

HALF = ("fp16", "bf16")  # precisions whose responses are not canonical
_DTYPES = {"values": "<f4", "images": "<i8", "positions": "<i4", "boxes": "<i4"}
_BLANKS = {"values": np.nan, "positions": -1, "boxes": 0}  # what a place without a winner holds beside image -1
_CROPPED = {"folder", "list", "paths", "tar", "pack"}  # sources whose images all pass the transform
_MAX_BOX = 10**7  # pixels that a side of a box may lie from the image's corner


def manifest_problem(manifest: Mapping[str, Any]) -> str | None:
    """What entries of a manifest contradict each other; None if none do."""
    if not manifest["layers"]:
        return "layers is empty"
    return (
        _crop_problem(manifest)
        or _count_problem(manifest)
        or _precision_problem(manifest)
        or next((wrong for name in manifest["layers"] if (wrong := _layer_problem(name, manifest))), None)
    )


def _crop_problem(manifest: Mapping[str, Any]) -> str | None:
    """Whether the transform of files crops to another size than the network's input."""
    crop, (_, *size) = (manifest["transform"] or {}).get("crop"), manifest["input"]
    if (
        crop is None
        or manifest["source"]["kind"] not in _CROPPED
        or (crop if isinstance(crop, list) else [crop] * 2) == size
    ):
        return None
    return f"transform.crop is {crop} and the input {size}"


def _count_problem(manifest: Mapping[str, Any]) -> str | None:
    """Whether images, coverage, failures and the number of images in the source do not add up."""
    ranges = np.array(manifest["coverage"], np.int64).reshape(-1, 2)
    if (np.diff(ranges.ravel()) <= 0).any():
        return "coverage is no list of ranges"
    coverage, images = IntervalSet(ranges), manifest["images"]
    failed = np.array([failure["id"] for failure in manifest["failures"]], np.int64)
    if len(np.unique(failed)) < len(failed):
        return "an image is listed twice among the failures"
    if len(both := failed[coverage.holds(failed)]):
        return f"image {both[0]} failed, and lies in the coverage"
    if len(coverage) not in (images, 0):  # 0: a loop gave ids on a GPU, where nothing reads them
        return f"images is {images}, and the coverage holds {len(coverage)}"
    # A loop may stop early; a scan, and what shards are merged into, has met every image.
    scanned = "scan" in manifest["seconds"] and not manifest.get("partial") and manifest.get("shard") is None
    if scanned and manifest["source"]["kind"] in _CROPPED and len(coverage) != images:
        return f"images is {images}, of a {manifest['source']['kind']}, and there is no coverage"
    total = manifest["source"].get("images")
    if total is None:
        return None
    if (last := max(int(ranges.max(initial=0)) - 1, int(failed.max(initial=-1)))) >= total:
        return f"image {last} was ranked or failed, and source.images is {total}"
    if scanned and images + len(failed) != total:
        return f"images is {images} and {len(failed)} failed, and source.images is {total}"
    return None


def _precision_problem(manifest: Mapping[str, Any]) -> str | None:
    """Whether the precision that was asked for cannot have led to that of the scan and of the second pass."""
    asked, scanned = manifest["precision"], manifest["scan"]["precision"]
    if asked == "fp32" and scanned != "fp32":
        return f"precision is fp32 and scan.precision {scanned}"
    if sizes := None if scanned in HALF else manifest["scan"].get("batch_sizes"):
        return f"scan.batch_sizes is {sizes}, and scan.precision {scanned}, which has one batch size"
    again = manifest.get("rescored")
    if manifest.get("partial") is True:
        return None
    if (asked == "exact" and scanned in HALF) != (again is not None):
        return f"precision is {asked}, scan.precision {scanned}, and rescored is {'there' if again else 'missing'}"
    if again is not None and not again["sample"] <= again["images"] <= manifest["images"]:
        return f"{again['images']} images were rescored, {again['sample']} of a sample, of {manifest['images']}"
    return None


def _layer_problem(name: str, manifest: Mapping[str, Any]) -> str | None:
    """What a layer's entry says that the rest of the manifest, or of the entry, contradicts."""
    info, place = manifest["layers"][name], f"layers.{name}"
    if info["name"] != name:
        return f"{place}.name is {info['name']!r}"
    if manifest.get("partial") is True:
        return None
    if info["unit"] != manifest["unit"]:
        return f"{place}.unit is {info['unit']} and unit {manifest['unit']}"
    field = info["receptive_field"]
    if (field["method"] == "unknown") != bool(field["note"]):
        return f"{place}.receptive_field has the method {field['method']} and the note {field['note'][:80]!r}"
    if field["method"] == "unknown" and (field["size"], field["stride"], field["whole_image"]) != (
        manifest["input"][1:],
        None,
        False,
    ):
        return f"{place}.receptive_field is unknown, and has a size, a stride or an extent of its own"
    if nan := info["nan"]:
        if not nan["units"] <= min(info["units"], nan["responses"]) or nan["responses"] < 1 or nan["units"] < 1:
            return f"{place}.nan counts {nan['responses']} responses in {nan['units']} of {info['units']} units"
        if manifest["coverage"] and not IntervalSet(manifest["coverage"]).holds(np.array([nan["first_image"]]))[0]:
            return f"{place}.nan.first_image is {nan['first_image']}, which was not ranked"
    return None


def arrays_problem(top: LayerArrays, manifest: Mapping[str, Any]) -> str | None:
    """What of a layer's arrays does not belong to its entry in the manifest; None if all does."""
    info, k = top.info, manifest["k"]
    neurons = info["height"] * info["width"] if info["unit"] == "neuron" else 1
    if info["units"] != info["channels"] * neurons:
        return f"{info['units']} units in {info['channels']} channels"
    shapes = {"values": (k,), "images": (k,), "positions": (k, 2), "boxes": (k, 4), "status": ()}
    for name in ARRAYS:
        array, shape = getattr(top, name), (info["units"], *shapes[name])
        if array.shape != shape or (name in _DTYPES and array.dtype != np.dtype(_DTYPES[name])):
            wanted = np.dtype(_DTYPES[name]) if name in _DTYPES else "text"
            return f"{name} is {array.dtype} {list(array.shape)}, not {wanted} {list(shape)}"
    if (least := top.images.min(initial=0)) < -1:
        return f"a winner is image {least}"
    blank = top.images < 0
    if (blank[:, :-1] & ~blank[:, 1:]).any():
        return "a winner follows a blank place"
    for name, value in _BLANKS.items():
        if not np.array_equal(held := getattr(top, name)[blank], np.full_like(held, value), equal_nan=True):
            return f"a blank place has {name}"
    ordered = np.sort(top.images, axis=1)
    if ((np.diff(ordered, axis=1) == 0) & (ordered[:, 1:] >= 0)).any():
        return "a unit has an image twice among its winners"
    if (np.isnan(top.values) & ~blank).any():
        return "a winner has no value"
    if not ((top.values[:, :-1] >= top.values[:, 1:]) | blank[:, 1:]).all():
        return "values of winners do not descend"
    whole = [0, info["height"], 0, info["width"]]
    upper, lower, left, right = info.get("inside", whole)
    if not (upper < lower <= info["height"] and left < right <= info["width"]):
        return f"inside is {info['inside']}, of {info['height']} x {info['width']} positions"
    inside = (top.positions >= [upper, left]) & (top.positions < [lower, right])
    if not (inside.all(axis=2) | blank).all():
        return "a winner lies outside of the feature map, or of the part of it that was ranked"
    own = np.arange(len(top))[:, None] % neurons  # of a neuron, whose place is its number
    if info["unit"] == "neuron" and ((top.positions @ [info["width"], 1] != own) & ~blank).any():
        return "a neuron has a winner at another neuron's place"
    return (
        _status_problem(top, manifest)
        or _number_problem(top, manifest)
        or _infinite_problem(top)
        or _box_problem(top, manifest["input"][1:])
    )


def _status_problem(top: LayerArrays, manifest: Mapping[str, Any]) -> str | None:
    """What statuses a layer's units cannot have."""
    if top.status.dtype.kind != "U" or not np.isin(top.status, (SEPARATED, TIED, UNSEPARATED)).all():
        return "a status is none of separated, tied, unseparated"
    unseparated = top.status == UNSEPARATED
    if (found := int(unseparated.sum())) != top.info["unseparated"]:
        return f"{found} units are unseparated, and the manifest counts {top.info['unseparated']}"
    if ((top.images[:, -1] < 0) & (top.status == TIED)).any():
        return "a unit without k winners is called tied"
    moving = manifest.get("weights") == "moving"
    scanned = manifest["scan"]["precision"]
    if moving or (manifest["precision"] in HALF and scanned in HALF):
        return None if unseparated.all() else "a unit is called separated or tied, and nothing decided it"
    if scanned == "fp32" and found:
        return "a unit is called unseparated after a scan in float32, which decides all"
    return None


def _number_problem(top: LayerArrays, manifest: Mapping[str, Any]) -> str | None:
    """Whether a unit has fewer winners than there are images, and no NaN responses to account for it."""
    k, counts = manifest["k"], (top.images >= 0).sum(axis=1)
    coverage = IntervalSet(manifest["coverage"])
    outside = ~coverage.holds(top.images) & (top.images >= 0)
    if len(coverage) and outside.any():
        return f"image {top.images[outside][0]} won and lies outside of the coverage"
    # Without a coverage some images may have come twice: so many are different as some unit ranks.
    images = manifest["images"] if len(coverage) else min(manifest["images"], int(counts.max(initial=0)))
    if counts.max(initial=0) > images:
        return f"a unit has {counts.max()} winners of {images} images"
    # Of units that float32 did not decide, images may be left out that hold NaN in half precision alone.
    missing = np.where(top.status == UNSEPARATED, min(k, images), images) - counts
    missing = missing[counts < min(k, images)]
    nan = top.info["nan"] or {"responses": 0, "units": 0}
    if missing.sum() > nan["responses"] or len(missing) > nan["units"]:
        return (
            f"{len(missing)} units have fewer than {min(k, images)} winners of {images} images, and the manifest "
            f"counts {nan['responses']} NaN responses in {nan['units']} units"
        )
    return None


def _infinite_problem(top: LayerArrays) -> str | None:
    """Whether the manifest counts other infinite responses than the arrays hold."""
    found, said = infinite_info(top.values, top.images), top.info["infinite"]
    if (found is None) != (said is None):
        return f"the manifest counts {'no' if said is None else 'some'} infinite responses"
    if found and said:
        same = all(found[key] == said[key] for key in ("units", "first_image"))
        if not same or said["responses"] < found["responses"]:  # a place beyond the k-th may be infinite, too
            return f"infinite responses are {found}, and the manifest says {said}"
    return None


def _box_problem(top: LayerArrays, size: list[int]) -> str | None:
    """Whether boxes do not fit what the manifest says of the layer's receptive field; size: of the input."""
    boxes, field = top.boxes[top.images >= 0].astype(np.int64), top.info["receptive_field"]
    if (np.abs(boxes) > _MAX_BOX).any():
        return "a box lies far outside of the image"
    if field["whole_image"] or field["method"] == "unknown":
        if (boxes != [0, 0, size[1], size[0]]).any():
            return "a box is not the whole image, as the manifest says"
        return None
    extent = boxes[:, [3, 2]] - boxes[:, [1, 0]]
    if (extent < 0).any() or (extent > field["size"]).any():
        return f"a box is larger than the receptive field, {field['size']}, or turned inside out"
    return None


def state_problem(tops: Mapping[str, LayerArrays], partial: Partial, manifest: Mapping[str, Any]) -> str | None:
    """What of the state that `merge` reads is not that of the run; None if all is."""
    if partial.coverage.ranges.tolist() != manifest["coverage"]:
        return f"its coverage is {partial.coverage}, and that of the run {IntervalSet(manifest['coverage'])}"
    if partial.batch_sizes and sorted(partial.batch_sizes) != (sizes := batch_sizes(manifest["scan"])):
        return f"its batch sizes are {sorted(partial.batch_sizes)}, and those of the run {sizes}"
    if failed := partial.failures.keys() - {failure["id"] for failure in manifest["failures"]}:
        return f"image {min(failed)} failed there, and not in the run"
    if not tops or partial.identity["precision"] != "fp32":
        return None
    ranked, start = partial.ordered(list(tops)).topk.read(), 0
    for name, top in tops.items():
        own = ranked.of(slice(start, start + len(top)))
        start += len(top)
        k = top.images.shape[1]
        if not (
            np.array_equal(own.images[:, :k], top.images)
            and np.array_equal(own.values[:, :k], top.values, equal_nan=True)
        ):
            return f"its winners in layer {name!r} are not those of the run"
    return None
