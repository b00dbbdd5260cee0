"""The demo's overview: the slide of `drawing.overview` with, in the last layer, the unit of each kind of picture."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unitvis.drawing.overview import RULE, UNITS_PER_LAYER, Block, cells_of, field_text, most_different, slide
from unitvis.run import LayerTop, Run


def majority(top: LayerTop, labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The commonest label among each unit's winners and how many of them have it, both int64 [units]."""
    votes = np.zeros((len(top), labels.max() + 1), np.int64)
    units, ranks = np.nonzero(top.fired)
    np.add.at(votes, (units, labels[top.images[units, ranks]]), 1)
    return votes.argmax(axis=1), votes.max(axis=1)


def purest(top: LayerTop, labels: NDArray[np.int64]) -> list[int]:
    """Choose for each label the unit with the most winners of it, the first of equal ones; of these the best nine."""
    winner, count = majority(top, labels)
    best: dict[int, int] = {}
    for unit in np.argsort(-count, kind="stable").tolist():
        if top.fired[unit].all():
            best.setdefault(int(winner[unit]), unit)
    return list(best.values())[:UNITS_PER_LAYER]


def overview(run: Run, labels: NDArray[np.int64], names: tuple[str, ...]) -> Image.Image:
    """Draw the slide. Units are chosen by `most_different`, and by `purest` in the last layer.

    labels: int64 [images]. names: of the labels.
    """
    firing = {layer: np.flatnonzero(run[layer].fired.all(axis=1)).tolist() for layer in run}
    cells = cells_of(run, firing)
    *others, last = run.layers
    blocks = [
        Block(layer, f"Layer {number}", field_text(run, layer), most_different(run, layer, firing[layer], cells[layer]))
        for number, layer in enumerate(others, 1)
    ]
    winner, count = majority(run[last], labels)
    units = purest(run[last], labels)
    captions = [f"{names[winner[unit]]} {count[unit]}/9" for unit in units]
    blocks.append(Block(last, f"Layer {len(run)}", field_text(run, last), units, captions))
    told = (
        f"Each 3 x 3 tile is one unit: of {run.manifest['images']:,} pictures, the nine that excite it most, cut to "
        "what the unit saw. Strongest first, at most one patch a picture."
    )
    rule = f"{RULE}; in the last layer, for each kind of picture, the unit with the most of its nine pictures of it."
    return slide(run, blocks, cells, told, rule)
