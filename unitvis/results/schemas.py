"""The schemas of a run folder's JSON files, and the shapes of its arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from unitvis.decoding.options import SCHEMA as DECODING
from unitvis.results.arrays import ARRAYS, SEPARATED, TIED, UNSEPARATED, LayerArrays
from unitvis.schema import (
    COUNT,
    FLAG,
    NUMBER,
    OBJECT,
    SECONDS,
    TEXT,
    ByName,
    Is,
    Optional,
    Schema,
    choice,
    either,
    whole,
)
from unitvis.state.partial import SHARED

_SIDE = whole(1, 10**6)  # pixels of an input, cells of a map
_STRIDE = Is("a number of pixels", lambda v: NUMBER.holds(v) and abs(v) <= 10**9)
_LAYER: dict[str, Schema] = {
    "name": TEXT,
    "channels": _SIDE,
    "height": _SIDE,
    "width": _SIDE,
    "feeds_relu": FLAG,
    "fed_by": Optional(TEXT),
    "inside?": (COUNT, COUNT, COUNT, COUNT),
}
_RANKED_LAYER = _LAYER | {
    "unit": choice("channel", "neuron"),
    "units": COUNT,
    "receptive_field": {
        "size": (whole(0, 10**9), whole(0, 10**9)),
        "stride": Optional((_STRIDE, _STRIDE)),
        "whole_image": FLAG,
        "method": choice("traced", "unknown"),
        "note": TEXT,
    },
    "effective_box": Optional(_SIDE),
    "nan": Optional(OBJECT),
    "infinite": Optional(OBJECT),
    "unseparated": COUNT,
}
_SOURCE = {
    "kind": TEXT,
    "path?": Optional(either(TEXT, [TEXT])),
    "images?": Optional(COUNT),
    "others?": COUNT,
    "other_endings?": ByName(COUNT),
    "images_ending?": [TEXT],
    "pillow?": ByName(Optional(either(COUNT, FLAG))),
    "entry?": either(TEXT, COUNT),
    "decoding?": DECODING,
}
_MANIFEST: dict[str, Schema] = SHARED | {
    "model": SHARED["model"] | {"spec?": Optional(TEXT), "file?": Optional(TEXT), "pretrained?": FLAG},
    "precision": choice("exact", "fp32", "fp16", "bf16"),
    "plan": TEXT,
    "source": _SOURCE,
    "scan": {"precision": TEXT, "batch_size": whole(1, 2**40), "by_slot?": [TEXT]},
    "images": COUNT,
    "coverage": [(COUNT, COUNT)],
    "failures": [{"id": COUNT, "name": TEXT, "reason": TEXT}],
    "seconds": ByName(SECONDS),
    "warnings?": [TEXT],
    "shard?": Optional(TEXT),
    "partial?": FLAG,
    "files?": ByName(TEXT),
}
MANIFEST_OF_A_SHARD = _MANIFEST | {"layers": ByName(_LAYER)}
MANIFEST = _MANIFEST | {"layers": ByName(_RANKED_LAYER)}
RECORD = {"id": COUNT, "name": TEXT, "width?": Optional(COUNT), "height?": Optional(COUNT), "hash?": Optional(TEXT)}
DRAWN = {
    "run": TEXT,
    "layers": ByName(
        {
            "crop?": choice("rf", "effective", "image"),
            "filters?": FLAG,
            "projections?": Optional(TEXT),
            "responses?": Optional((_SIDE, _SIDE, _SIDE)),
        }
    ),
}
_DTYPES = {"values": "<f4", "images": "<i8", "positions": "<i4", "boxes": "<i4"}
_CROPPED = {"folder", "list", "paths", "tar", "pack"}  # sources whose images all pass the transform
_MAX_BOX = 10**7  # pixels that a side of a box may lie from the image's corner


def crop_problem(manifest: Mapping[str, Any]) -> str | None:
    """Whether the transform of files crops to another size than the network's input; None if it does not."""
    crop, (_, *size) = (manifest["transform"] or {}).get("crop"), manifest["input"]
    if (
        crop is None
        or manifest["source"]["kind"] not in _CROPPED
        or (crop if isinstance(crop, list) else [crop] * 2) == size
    ):
        return None
    return f"transform.crop is {crop} and the input {size}"


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
    if top.status.dtype.kind != "U" or not np.isin(top.status, (SEPARATED, TIED, UNSEPARATED)).all():
        return "a status is none of separated, tied, unseparated"
    if (found := int((top.status == UNSEPARATED).sum())) != info["unseparated"]:
        return f"{found} units are unseparated, and the manifest counts {info['unseparated']}"
    blank = top.images < 0
    if (blank[:, :-1] & ~blank[:, 1:]).any():
        return "a winner follows a blank place"
    if (blank[:, -1] & (top.status == TIED)).any():
        return "a unit without k winners is called tied"
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
    if (top.images < -1).any() or not (inside.all(axis=2) | blank).all():
        return "a winner lies outside of the feature map, or of the part of it that was ranked"
    own = np.arange(len(top))[:, None] % neurons  # of a neuron, whose place is its number
    if info["unit"] == "neuron" and ((top.positions @ [info["width"], 1] != own) & ~blank).any():
        return "a neuron has a winner at another neuron's place"
    if (np.abs(top.boxes.astype(np.int64)) > _MAX_BOX).any():
        return "a box lies far outside of the image"
    return None
