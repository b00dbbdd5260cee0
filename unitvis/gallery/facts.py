"""What the gallery's pages say: the run as data for the script, and the answers to what people ask."""

from __future__ import annotations

import json
import math
import os
import urllib.parse
from collections.abc import Mapping
from typing import Any

import numpy as np

from unitvis.attribution.responses import covered
from unitvis.drawing.sheets import unit_name
from unitvis.files import file_name
from unitvis.gallery.pictures import across
from unitvis.results.arrays import SEPARATED, LayerArrays
from unitvis.results.data import RunData

STRIP = 16  # units of a layer on the first page


def index(run: RunData) -> dict[str, Any]:
    """What the first page shows: the run, and each layer with a strip of its units."""
    manifest = run.manifest
    height, width = run.input_size
    return {
        "title": title(run),
        "run": f"The {manifest['k']} strongest of {manifest['images']:,} images{_data_set(manifest)}, for each unit of "
        f"{len(run)} layers; the model's input is {width} x {height} pixels.",
        "across": across(manifest["k"]),
        "layers": [_layer_entry(run[layer]) for layer in run],
        "notes": NOTES,
    }


def title(run: RunData) -> str:
    """The model, as it was named."""
    spec = run.manifest["model"].get("spec")
    return os.path.basename(spec) if spec else run.manifest["model"]["class"]


def _layer_entry(top: LayerArrays) -> dict[str, Any]:
    live = np.flatnonzero(top.fired[:, 0])
    strip = live[np.linspace(0, len(live) - 1, min(STRIP, len(live))).round().astype(int)] if len(live) else live
    counts = {"dead": int(top.dead.sum()), "not separated": int((top.status != SEPARATED).sum())}
    facts = [
        f"{len(top):,} {top.info['unit']}s",
        f"map {top.info['height']} x {top.info['width']}",
        f"receptive field {_field(top)}",
        *(f"{count:,} {what}" for what, count in counts.items() if count),
    ]
    return {
        "name": top.name,
        "folder": urllib.parse.quote(file_name(top.name)),
        "units": len(top),
        "facts": ", ".join(facts),
        "strip": strip.tolist(),
    }


def layer(run: RunData, name: str, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """What a layer's page and its units' views show; lists have one entry a unit, blanks are null."""
    top = run[name]
    height, width = run.input_size
    images = np.unique(top.images[top.images >= 0]).tolist()
    return {
        "name": name,
        "k": run.manifest["k"],
        "across": across(run.manifest["k"]),
        "input": [width, height],
        "shows": {"rf": "receptive field", "effective": "effective box", "image": "whole image"}[drawn["crop"]],
        "effective": _inner_box(top),
        "answers": answers(run, name, drawn),
        "projections": drawn.get("projections"),
        "responses": _area(run, name, drawn["responses"]) if drawn.get("responses") else None,
        "filters": drawn.get("filters", False),
        "images": {image: run.records[image]["name"] if image in run.records else f"image {image}" for image in images},
        "labels": None if top.info["unit"] == "channel" else [unit_name(top, unit) for unit in range(len(top))],
        "notes": [note(top, unit) for unit in range(len(top))],
        "fired": top.fired.sum(axis=1).tolist(),
        "winners": [_winners(top, unit) for unit in range(len(top))],
    }


def _inner_box(top: LayerArrays) -> int | None:
    """The side of the effective box where it is another one than the receptive field, about a known centre."""
    side, field = top.info["effective_box"], top.info["receptive_field"]
    return side if side and not field["whole_image"] and side < max(field["size"]) else None


def note(top: LayerArrays, unit: int) -> str:
    """What is out of the ordinary with a unit, in a few words; empty where nothing is."""
    values = top.values[unit]
    if top.images[unit, 0] < 0:
        return "no response"
    if top.dead[unit]:
        return "dead"
    if len(values) > 1 and top.fired[unit].all() and values[0] == values[-1]:
        return "constant"
    return "" if top.status[unit] == SEPARATED else str(top.status[unit])


NOTES = {
    "no response": "not one image gave it a response that is a number",
    "dead": "not even its strongest response gets through the ReLU that follows",
    "constant": "its strongest responses are all the same, so their order says nothing",
    "tied": "the last place has the same value as an image that found no room",
    "unseparated": "the scan could not decide between its last places",
}


def _winners(top: LayerArrays, unit: int) -> list[list[Any]]:
    """[value, image, row, column, left, top, right, bottom] for each that is not blank."""
    count = int((top.images[unit] >= 0).sum())
    columns = [
        [_number(value) for value in top.values[unit, :count].tolist()],
        top.images[unit, :count].tolist(),
        *top.positions[unit, :count].T.tolist(),
        *top.boxes[unit, :count].T.tolist(),
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def _number(value: float) -> float | str:
    """What JSON can hold and JavaScript's Number() reads."""
    return float(f"{value:.5g}") if math.isfinite(value) else "Infinity" if value > 0 else "-Infinity"


def _area(run: RunData, name: str, kept: list[int]) -> dict[str, Any]:
    """Of the kept response maps: rows and columns, and what they cover, as shares of the input's width and height."""
    top, (rows, columns, block) = run[name], kept
    field = top.info["receptive_field"]
    unit, rank = np.argwhere(top.fired)[0]
    stride = field["stride"] and [step * block for step in field["stride"]]
    # A cell of several neurons is as good as one in the middle of them.
    position = [(place + 0.5) / block - 0.5 for place in top.positions[unit, rank].tolist()]
    height, width = run.input_size
    box = top.boxes[unit, rank].tolist()
    left, upper, right, lower = covered(
        stride, field["whole_image"], box, (position[0], position[1]), (rows, columns), (height, width)
    )
    return {"rows": rows, "columns": columns, "area": [left / width, upper / height, right / width, lower / height]}


def _field(top: LayerArrays) -> str:
    field = top.info["receptive_field"]
    return "the whole image" if field["whole_image"] else f"{field['size'][1]} x {field['size'][0]} pixels"


def _data_set(manifest: Mapping[str, Any]) -> str:
    path = manifest["source"].get("path") or []
    paths = [path] if isinstance(path, str) else path  # archives are a list
    if not paths:
        return ""
    return f" of {os.path.basename(paths[0])}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def answers(run: RunData, name: str, drawn: Mapping[str, Any]) -> list[list[str]]:
    """[question, answer] in one line each, about what stands on a layer's page."""
    top, manifest = run[name], run.manifest
    info, field, crop, filters = top.info, top.info["receptive_field"], drawn["crop"], drawn.get("filters", False)
    height, width = run.input_size
    shown = {
        "rf": (field["size"][1], "its receptive field"),
        "effective": (
            info["effective_box"],
            "the effective box, a square about the neuron with 90% of what moves it",
        ),
        "image": (width, "the whole image"),
    }[crop]
    if info["unit"] == "channel":
        unit = f"one channel of {name}: one filter, applied at {info['height']} x {info['width']} positions of an image"
        response = "its largest value over all positions"
    else:
        unit = f"one neuron of {name}: one channel at one of {info['height']} x {info['width']} positions"
        response = "its value"
    if info["feeds_relu"]:
        ranked = f"By {response}, before the ReLU that follows; at most 0 does not get through, and is struck out."
    elif info["fed_by"]:
        ranked = f"By {response}, after the activation; {info['fed_by']} is what goes into it."
    else:
        ranked = f"By {response}, as the layer returns it, before any activation that follows."
    effective = f"; the effective box is {info['effective_box']} pixels wide" if info["effective_box"] else ""
    weights = "no activations; the small squares alone are weights" if filters else "no activations, and no weights"
    lines = [
        ["What is a unit?", f"Here {unit}."],
        ["What do the pictures show?", f"Pieces of the input images, plain grey beyond their borders; {weights}."],
        ["How are images ranked?", ranked],
        ["How much does a unit see?", f"{_field(top)} of {width} x {height}{effective}; patches show {shown[1]}."],
        [
            "Why are deep patches no bigger?",
            f"All patches are drawn at one size, whatever they cover; here that is {shown[0]} input pixels.",
        ],
        ["May an image come twice?", "Not in one unit: each image has one place, where its response is largest."],
        ["Which images?", f"The {manifest['k']} strongest of {manifest['images']:,}{_data_set(manifest)}."],
    ]
    if filters:
        lines.append(["What is the small square?", "The unit's weights: grey is 0, one scale a filter; no photograph."])
    if method := drawn.get("projections"):
        lines.append(
            [
                "What is a projection?",
                f"What the one neuron, set to 1, leaves when carried back to the pixels: {method}. Grey is 0, and each "
                "has its own scale, the same for both signs and all colours.",
            ]
        )
    if drawn.get("responses"):
        lines.append(
            [
                "What is the coloured map?",
                "The unit's response at every position of the image: clear where at most 0, yellow where largest.",
            ]
        )
    return lines


def script(call: str, value: Any) -> str:
    """A call with data, as a script that a page can load from a disk, which forbids it to read other files."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return f"{call}({text.replace('<', chr(92) + 'u003c')});\n"
