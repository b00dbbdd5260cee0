"""The lecture's slide: layers 1 to 5 from left to right, nine units each, nine patches a unit."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from unitvis.drawing.patches import crop_of, patches
from unitvis.drawing.sheets import FAINT, INK, PAPER, compose
from unitvis.run import LayerTop, Run

PATCH, GAP, MARGIN = 40, 14, 44
UNITS, ACROSS = 9, 3


def majority(top: LayerTop, labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(label [units], count [units]): the commonest label among a unit's pictures, and how many of them have it."""
    votes = np.zeros((len(top), labels.max() + 1), np.int64)
    units, ranks = np.nonzero(top.fired)
    np.add.at(votes, (units, labels[top.images[units, ranks]]), 1)
    return votes.argmax(axis=1), votes.max(axis=1)


def most_different(top: LayerTop, cells: dict[tuple[int, int], Image.Image], size: int) -> list[int]:
    """Nine units of those that fire for all their pictures and most of whose boxes lie inside: first the one
    whose mean patch has the most contrast, then each time the one whose mean patch is farthest from all chosen.
    """
    inside = (top.boxes[..., :2] >= 0).all(axis=2) & (top.boxes[..., 2:] <= size).all(axis=2)
    within = np.where(top.fired.all(axis=1), inside.sum(axis=1), -1)
    least = max(0, min(6, np.sort(within)[::-1][: min(UNITS, len(within))][-1]))
    units: list[int] = np.flatnonzero(within >= least).tolist()
    ranks = range(top.values.shape[1])
    small = [[np.asarray(cells[unit, rank].resize((12, 12))) for rank in ranks] for unit in units]
    means = np.mean(small, axis=1).reshape(len(units), -1)
    chosen = [int(means.std(axis=1).argmax())]
    while len(chosen) < min(UNITS, len(units)):
        distance = np.linalg.norm(means[:, None] - means[chosen], axis=2).min(axis=1)
        chosen.append(int(distance.argmax()))
    return [units[place] for place in chosen]


def purest(top: LayerTop, labels: NDArray[np.int64]) -> list[int]:
    """For each label the unit with the most pictures of it (the lower number of equals); the nine best of these."""
    winner, count = majority(top, labels)
    best: dict[int, int] = {}
    for unit in np.argsort(-count, kind="stable").tolist():
        if top.fired[unit].all():
            best.setdefault(int(winner[unit]), unit)
    return list(best.values())[:UNITS]


def overview(run: Run, labels: NDArray[np.int64], names: tuple[str, ...]) -> Image.Image:
    """The slide. Units are chosen by `most_different`, in the last layer by `purest`, never by hand."""
    cells: dict[str, dict[tuple[int, int], Image.Image]] = {layer: {} for layer in run}
    every = {layer: (list(range(len(run[layer]))), crop_of(run, layer, None), PATCH) for layer in run}
    for layer, unit, rank, image in patches(run, every):
        cells[layer][unit, rank] = image

    title, heading, text = (ImageFont.load_default(size) for size in (34, 22, 15))
    tile = compose(run[run.layers[0]], 0, {}, PATCH).width
    block = ACROSS * tile + (ACROSS - 1) * GAP
    top_of_tiles, step = MARGIN + 138, tile + GAP + 16
    width = MARGIN * 2 + len(run) * block + (len(run) - 1) * MARGIN
    page = Image.new("RGB", (width, top_of_tiles + ACROSS * step + MARGIN + 22), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN - 8), "What do the units of a ConvNet respond to?", INK, title)
    draw.text(
        (MARGIN, MARGIN + 40),
        f"Each 3 x 3 tile is one unit: of {run.manifest['images']:,} pictures, the nine that excite it most, cut to "
        "what the unit saw. Strongest first, one patch a picture.",
        FAINT,
        text,
    )
    for number, layer in enumerate(run):
        top, x = run[layer], MARGIN + number * (block + MARGIN)
        last = number == len(run) - 1
        winner, count = majority(top, labels)
        draw.text((x, MARGIN + 80), f"Layer {number + 1}", INK, heading)
        draw.text((x, MARGIN + 108), _seen(run, layer, every[layer][1]), FAINT, text)
        for place, unit in enumerate(
            purest(top, labels) if last else most_different(top, cells[layer], run.manifest["input"][1])
        ):
            left, upper = x + place % ACROSS * (tile + GAP), top_of_tiles + place // ACROSS * step
            page.paste(compose(top, unit, cells[layer], PATCH), (left, upper))
            if last:
                draw.text((left, upper + tile + 3), f"{names[winner[unit]]} {count[unit]}/9", INK, text)
    draw.text(
        (MARGIN, page.height - MARGIN + 4),
        "Units chosen by rule: of those with most patches inside the pictures the nine whose mean patches differ most; "
        "in the last layer, for each kind of picture the unit with most of its nine from it.",
        FAINT,
        text,
    )
    return page


def _seen(run: Run, layer: str, crop: str) -> str:
    info = run[layer].info
    size = info["receptive_field"]["size"][0]
    if crop == "rf":
        return f"{len(run[layer])} units, each sees {size} x {size} pixels"
    drawn = f"its middle {info['effective_box']} drawn" if crop == "effective" else "the whole picture drawn"
    return f"{len(run[layer])} units, each sees {size} x {size}; {drawn}"
