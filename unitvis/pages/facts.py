"""The text and data of the gallery's pages, as scripts that hold JSON."""

from __future__ import annotations

import json
import math
import os
import urllib.parse
from collections.abc import Mapping
from typing import Any

import numpy as np

from unitvis.attribution.responses import map_area
from unitvis.drawing.patches import units_at_the_border
from unitvis.drawing.sheets import PATCH_SIZE, tile_columns, unit_name
from unitvis.files import file_name
from unitvis.pages.sprites import sprite_tiles
from unitvis.results.arrays import SEPARATED, STATUSES, LayerArrays, extent_text, map_text
from unitvis.results.classes import classes_text, unit_names, winner_classes
from unitvis.results.data import RunData

UNITS_IN_STRIP = 16  # units of each layer on the first page, at most


def index(run: RunData) -> dict[str, Any]:
    """Make the first page's data: the run, and each layer with a strip of its units."""
    manifest = run.manifest
    height, width = run.input_size
    return {
        "title": title(run),
        "run": f"For each unit of {len(run)} layers, the {strongest(manifest)} of "
        f"{images_text(manifest)}; the model's input is {width} x {height} pixels.",
        "k": manifest["k"],
        "across": tile_columns(manifest["k"]),
        "cell": PATCH_SIZE,
        "sprite": list(sprite_tiles(manifest["k"])),
        "layers": [_layer_entry(run, run[layer]) for layer in run],
        "notes": explanations(),
    }


def strongest(manifest: Mapping[str, Any]) -> str:
    """How many winners of a unit are shown: "25 strongest", and how many the run keeps if those are more."""
    kept = f" ({manifest['kept']:,} are kept)" if "kept" in manifest else ""
    return f"{manifest['k']} strongest{kept}"


def title(run: RunData) -> str:
    """The title of the pages: the model's name as it was given, else its class."""
    spec = run.manifest["model"].get("spec")
    return os.path.basename(spec) if spec else run.manifest["model"]["class"]


def _layer_entry(run: RunData, top: LayerArrays) -> dict[str, Any]:
    """Describe one layer for the first page."""
    return {
        "name": top.name,
        "folder": urllib.parse.quote(file_name(top.name)),
        "units": len(top),
        "neurons": [top.info["height"], top.info["width"]] if top.info["unit"] == "neuron" else None,
        "facts": layer_line(run, top),
        "strip": strip(top),
    }


def images(run: RunData) -> dict[str, Any]:
    """Make the data of the images' views: their names, and in which units they win.

    {"names": {image: name}, "wins": {image: [[index of a layer, unit * k + rank, ...], ...]}}, of winners that fired.
    """
    wins: dict[int, list[list[int]]] = {}
    for index, top in enumerate(run.tops.values()):
        codes = np.flatnonzero(top.fired)
        own: dict[int, list[int]] = {}
        for image, code in zip(top.images.ravel()[codes].tolist(), codes.tolist(), strict=True):
            own.setdefault(image, [index]).append(code)
        for image, entry in own.items():
            wins.setdefault(image, []).append(entry)
    return {"names": {image: image_name(run, image) for image in sorted(wins)}, "wins": wins}


def image_name(run: RunData, image: int) -> str:
    """The name of an image, or its number where none is recorded."""
    return run.records[image]["name"] if image in run.records else f"image {image}"


def layer_line(run: RunData, top: LayerArrays) -> str:
    """The line below a layer's name: the numbers of its units, the sizes of its map and receptive field."""
    counts = top.count() | {
        "at the border, where padding excites them (scan --inside)": units_at_the_border(run, top.name),
    }
    facts = [
        f"{len(top):,} {top.info['unit']}s",
        map_text(top.info),
        f"receptive field {_field_text(top)}",
        *(f"{number:,} {name}" for name, number in counts.items() if number),
    ]
    return ", ".join(facts)


def strip(top: LayerArrays) -> list[int]:
    """The units of a layer that the first page shows, evenly spaced among those that fire."""
    firing = np.flatnonzero(top.fired[:, 0])
    count = min(UNITS_IN_STRIP, len(firing))
    return firing[np.linspace(0, len(firing) - 1, count).round().astype(int)].tolist() if count else []


def layer(run: RunData, name: str, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """Make the data of a layer's page and its units' views; lists have one entry for each unit.

    drawn: the layer's entry in drawn.json.
    """
    top = run[name]
    height, width = run.input_size
    classes = [*map(classes_text, winner_classes(run, top, range(len(top))))] if run.class_folders else None
    return {
        "name": name,
        "input": [width, height],
        "crop": drawn["crop"],
        "shows": {"rf": "receptive field", "effective": "effective box", "image": "whole image"}[drawn["crop"]],
        "boxes": top.info["receptive_field"]["method"] != "unknown",
        "whole": top.info["receptive_field"]["whole_image"],
        "side": top.info["effective_box"],
        "effective": _frame_side(top),
        "answers": answers(run, name, drawn),
        "projections": drawn.get("projections"),
        "projected": drawn.get("projected") or [],
        "responses": _responses(run, name, drawn["responses"]) if drawn.get("responses") else None,
        "filters": drawn.get("filters", False),
        "images": {image: image_name(run, image) for image in np.unique(top.images[top.images >= 0]).tolist()},
        "labels": None if top.info["unit"] == "channel" else [unit_name(top, unit) for unit in range(len(top))],
        "names": (unit_names(run, name) or [None])[0],
        "classes": classes,
        "notes": [note(top, unit) for unit in range(len(top))],
        "fired": top.fired.sum(axis=1).tolist(),
        "winners": [_winner_rows(top, unit) for unit in range(len(top))],
    }


def _frame_side(top: LayerArrays) -> int | None:
    """The side of the effective box in pixels, to be drawn as a frame; None if it is no smaller than a known field."""
    side, field = top.info["effective_box"], top.info["receptive_field"]
    return side if side and not field["whole_image"] and side < max(field["size"]) else None


def note(top: LayerArrays, unit: int) -> str:
    """What is unusual of a unit, as "constant, tied": a key of `NOTES` and its status unless separated; else empty."""
    values = top.values[unit]
    words = []
    if top.images[unit, 0] < 0:
        words.append("no response")
    elif top.dead[unit]:
        words.append("dead")
    elif len(values) > 1 and top.fired[unit].all() and values[0] == values[-1]:
        words.append("constant")
    if top.status[unit] != SEPARATED:
        words.append(str(top.status[unit]))
    return ", ".join(words)


NOTES = {
    "no response": "its response is NaN for every image",
    "dead": "even its strongest response is at most 0, so the ReLU that follows always gives 0",
    "constant": "its strongest responses are all equal, so the images are in the order of their ids",
    **STATUSES,
}


def explanations() -> dict[str, str]:
    """Explain everything that `note` returns, in one line each."""
    pairs = ((f"{word}, {status}", f"{NOTES[word]}; {NOTES[status]}") for word in NOTES for status in STATUSES)
    return NOTES | dict(pairs)


def _winner_rows(top: LayerArrays, unit: int) -> list[list[Any]]:
    """A unit's winners that are not blank, each as [value, image, row, column, left, top, right, bottom]."""
    count = int((top.images[unit] >= 0).sum())
    columns = [
        [json_number(value) for value in top.values[unit, :count].tolist()],
        top.images[unit, :count].tolist(),
        *top.positions[unit, :count].T.tolist(),
        *top.boxes[unit, :count].T.tolist(),
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def json_number(value: float) -> float | str:
    """Round a value to five digits; an infinite one becomes a string that JavaScript's Number() reads."""
    return float(f"{value:.5g}") if math.isfinite(value) else "Infinity" if value > 0 else "-Infinity"


def _responses(run: RunData, name: str, drawn_size: list[int]) -> dict[str, Any]:
    """Where the drawn response maps lie: their `map_area` and a neuron's size in it, as shares of the input's size.

    drawn_size: rows, columns, and the side of the block of neurons that one cell stands for.
    """
    top, (rows, columns, block) = run[name], drawn_size
    field = top.info["receptive_field"]
    unit, rank = np.argwhere(top.fired)[0]
    stride = field["stride"] and [step * block for step in field["stride"]]
    # In units of cells; a cell is centred on the neurons of its block.
    position = [(index + 0.5) / block - 0.5 for index in top.positions[unit, rank].tolist()]
    height, width = run.input_size
    box = top.boxes[unit, rank].tolist()
    left, upper, right, lower = map_area(
        stride, field["whole_image"], box, (position[0], position[1]), (rows, columns), (height, width)
    )
    area = [left / width, upper / height, right / width, lower / height]
    neuron = [(area[2] - area[0]) / (columns * block), (area[3] - area[1]) / (rows * block)]  # width, height
    return {"area": area, "neuron": neuron, "colours": _colours(top)}


def _colours(top: LayerArrays) -> str:
    """What the colours of a layer's response maps mean."""
    ring = (
        " where largest, ringed where largest of the ranked positions"
        if "inside" in top.info
        else (" and ringed where largest")
    )
    return f"clear where at most 0 or at most the map's median, yellow{ring}"


def _field_text(top: LayerArrays) -> str:
    """The size of the layer's receptive field in words."""
    field = top.info["receptive_field"]
    return extent_text(field, f"{field['size'][1]} x {field['size'][0]} pixels")


def images_text(manifest: Mapping[str, Any]) -> str:
    """The number of images and the name of the data set after its path: "the 500 images in photos"."""
    path = manifest["source"].get("path") or []
    paths = [path] if isinstance(path, str) else path  # a list for several archives
    images = f"the {manifest['images']:,} images"
    if not paths:
        return images
    return f"{images} in {os.path.basename(paths[0])}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def answers(run: RunData, name: str, drawn: Mapping[str, Any]) -> list[list[str]]:
    """The explanations on a layer's page as [question, answer], each answer in one line."""
    top, manifest = run[name], run.manifest
    info, field, crop, filters = top.info, top.info["receptive_field"], drawn["crop"], drawn.get("filters", False)
    height, width = run.input_size
    patch_width, patch_text = {
        "rf": (field["size"][1], "its receptive field"),
        "effective": (
            info["effective_box"],
            "the effective box, a centred square with 90% of the response's squared gradient",
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
        ranked = f"By {response}, before the ReLU that follows; responses of at most 0 do not fire and are struck out."
    elif info["fed_by"]:
        ranked = f"By {response}, after the activation; its input is {info['fed_by']}."
    else:
        ranked = f"By {response}, as the layer returns it, before any activation that follows."
    effective = f"; the effective box is {info['effective_box']} pixels wide" if info["effective_box"] else ""
    weights = "no activations; only the small squares show weights" if filters else "no activations, and no weights"
    extent = f"{_field_text(top)} of {width} x {height}"
    if field["method"] == "unknown":
        extent = f"Unknown ({field['note']})"
    lines = [
        ["What is a unit?", f"Here {unit}."],
        ["What do the pictures show?", f"Pieces of the input images, plain grey beyond their borders; {weights}."],
        ["How are images ranked?", ranked],
        [
            "How much of the image can change a response?",
            f"{extent}{effective}; patches show {patch_text}.",
        ],
        [
            "Why are deep patches no bigger?",
            f"All patches are drawn at one size, whatever they cover; here that is {patch_width} input pixels.",
        ],
        ["Can an image appear twice?", "Not for one unit: each image counts once, where its response is largest."],
        ["Which images?", f"The {strongest(manifest)} of {images_text(manifest)}."],
    ]
    if named := unit_names(run, name):
        lines.append(["Where do the units' names come from?", f"They name the network's classes: {named[1]}."])
    if run.class_folders:
        lines.append(["What are the counts by class?", "How many of its winners that fired lie in each class folder."])
    if filters:
        lines.append(["What is the small square?", "The unit's weights, no photograph: grey is 0, one scale a filter."])
    if method := drawn.get("projections"):
        lines.append(
            [
                "What is a projection?",
                f"The winning neuron alone, set to 1 and carried back to the pixels: {method}. Grey is 0, and each "
                "has its own scale, the same for both signs and all colours.",
            ]
        )
    if drawn.get("responses"):
        lines.append(
            [
                "What is the coloured map?",
                f"The unit's response at every position of the image: {_colours(top)}.",
            ]
        )
    return lines


def script(call: str, value: Any) -> str:
    """Make a script that calls a function with data: a page opened from a disk may load scripts, but no other files."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return f"{call}({text.replace('<', chr(92) + 'u003c')});\n"
