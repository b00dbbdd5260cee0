"""The schemas of a run folder's JSON files."""

from __future__ import annotations

from unitvis.schema import (
    BATCH_SIZE,
    COUNT,
    FLAG,
    ID,
    NUMBER,
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
from unitvis.sources.description import SOURCE
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
    "head?": FLAG,
}
_ODD = {"responses": COUNT, "units": COUNT, "first_image": ID}  # NaN or infinite responses
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
    "nan": Optional(_ODD),
    "infinite": Optional(_ODD),
    "unseparated": COUNT,
}
_MANIFEST: dict[str, Schema] = SHARED | {
    "model": SHARED["model"] | {"spec?": Optional(TEXT), "file?": Optional(TEXT), "pretrained?": FLAG},
    "precision": choice("exact", "fp32", "fp16", "bf16"),
    "plan": TEXT,
    "source": SOURCE,
    "scan": {
        "precision": choice("fp32", "fp16", "bf16"),
        "batch_size": BATCH_SIZE,
        "batch_sizes?": [BATCH_SIZE],
        "by_slot?": [TEXT],
    },
    "images": COUNT,
    "coverage": [(ID, COUNT)],
    "failures": [{"id": ID, "name": TEXT, "reason": TEXT}],
    "seconds": ByName(SECONDS),
    "rescored?": {"images": COUNT, "sample": COUNT, "outlying?": COUNT, "doubt": NUMBER},
    "weights?": choice("moving"),
    "witness?": either(TEXT, ByName(COUNT)),
    "kept?": COUNT,
    "warnings?": [TEXT],
    "shard?": Optional(TEXT),
    "partial?": FLAG,
    "files?": ByName(TEXT),
}
MANIFEST_OF_A_SHARD = _MANIFEST | {"layers": ByName(_LAYER)}
MANIFEST = _MANIFEST | {"layers": ByName(_RANKED_LAYER)}
RECORD = {"id": ID, "name": TEXT, "width?": Optional(COUNT), "height?": Optional(COUNT), "hash?": Optional(TEXT)}
DRAWN = {
    "run": TEXT,
    "sprite": (_SIDE, _SIDE),
    "layers": ByName(
        {
            "crop?": choice("rf", "effective", "image"),
            "filters?": FLAG,
            "projections?": Optional(TEXT),
            "projected?": Optional([COUNT]),
            "responses?": Optional((_SIDE, _SIDE, _SIDE)),
        }
    ),
}
LABEL = {"of": TEXT, "method": TEXT, "hash": TEXT}  # of projections that are kept
