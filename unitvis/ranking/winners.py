"""From places in a top-k to winners: rows, columns, boxes, and what a run says of their layer."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unitvis.network.layers import Layer
from unitvis.receptive_fields.fields import ReceptiveField
from unitvis.results.nonfinite import infinite_info
from unitvis.run import UNSEPARATED, LayerTop


class Top(NamedTuple):
    """A layer's part of the state, on the host."""

    values: NDArray[np.float32]  # [units, places], descending; NaN where blank
    ids: NDArray[np.int64]  # [units, places]; -1 where blank
    positions: NDArray[np.int64]  # [units, places], of the flattened map, or anything where the unit is a neuron
    nan: NDArray[np.int64]  # [units, 2]: how many responses were NaN, and the first image with one


def layer_top(layer: Layer, field: ReceptiveField, unit: str, k: int, top: Top, status: NDArray[np.str_]) -> LayerTop:
    """The k winners of every unit ("channel" or "neuron") of a layer; the places beyond k only count."""
    info = asdict(layer) | {"unit": unit, "units": len(status)}
    info |= {"receptive_field": _field(field), "effective_box": None}
    info |= {"nan": _nan(top.nan), "infinite": infinite_info(top.values, top.ids)}
    status = status.astype(f"<U{len(UNSEPARATED)}")  # as wide whatever a layer's units are
    info["unseparated"] = int((status == UNSEPARATED).sum())

    values, ids, flat = top.values[:, :k], top.ids[:, :k], top.positions[:, :k]
    channels = np.arange(len(ids))[:, None]
    if unit == "neuron":  # the unit is the position
        channels, flat = channels // (layer.height * layer.width), channels % (layer.height * layer.width)
    channels, flat, blank = np.broadcast_arrays(channels, flat, ids < 0)
    positions = np.stack([flat // layer.width, flat % layer.width], axis=-1).astype(np.int32)
    positions[blank] = -1
    boxes = np.zeros((*ids.shape, 4), np.int32)
    live = ~blank
    boxes[live] = field.boxes(channels[live], positions[live][:, 0], positions[live][:, 1])
    return LayerTop(layer.name, values, ids, positions, boxes, status, info)


def _field(field: ReceptiveField) -> dict[str, Any]:
    """A layer's receptive field in plain numbers."""
    return {
        "size": list(field.size),
        "stride": list(field.stride) if field.stride else None,
        "whole_image": field.whole_image,
        "method": field.method,
        "note": field.note,
    }


def _nan(nan: NDArray[np.int64]) -> dict[str, int] | None:
    """How many responses were NaN, of how many units, and the first image with one; nan: [units, 2]."""
    if not nan[:, 0].any():
        return None
    return {"responses": int(nan[:, 0].sum()), "units": int((nan[:, 0] > 0).sum()), "first_image": int(nan[:, 1].min())}
