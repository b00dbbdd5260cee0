"""The overview, a slide for lectures: the layers from left to right, nine units of each, nine patches of each unit."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from unitvis.drawing.patches import crop_of, patches_by_winner
from unitvis.drawing.sheets import FAINT, INK, PAPER, compose
from unitvis.run import LayerTop, Run

PATCH_SIZE, TILE_GAP, MARGIN = 40, 14, 44  # pixels
UNITS_PER_LAYER, COLUMNS = 9, 3  # tiles of a layer, and tiles in a row


def majority(top: LayerTop, labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The commonest label among each unit's winners and how many of them have it, both int64 [units]."""
    votes = np.zeros((len(top), labels.max() + 1), np.int64)
    units, ranks = np.nonzero(top.fired)
    np.add.at(votes, (units, labels[top.images[units, ranks]]), 1)
    return votes.argmax(axis=1), votes.max(axis=1)


def most_different(top: LayerTop, cells: dict[tuple[int, int], Image.Image], size: int) -> list[int]:
    """Choose nine units whose mean patches differ: first the one with the most contrast, then always the farthest one.

    Candidates fire for all their winners, and most of their boxes lie inside the picture. size: of the picture.
    """
    inside = (top.boxes[..., :2] >= 0).all(axis=2) & (top.boxes[..., 2:] <= size).all(axis=2)
    within = np.where(top.fired.all(axis=1), inside.sum(axis=1), -1)
    least = max(0, min(6, np.sort(within)[::-1][: min(UNITS_PER_LAYER, len(within))][-1]))
    units: list[int] = np.flatnonzero(within >= least).tolist()
    ranks = range(top.values.shape[1])
    small = [[np.asarray(cells[unit, rank].resize((12, 12))) for rank in ranks] for unit in units]
    means = np.mean(small, axis=1).reshape(len(units), -1)
    chosen = [int(means.std(axis=1).argmax())]
    while len(chosen) < min(UNITS_PER_LAYER, len(units)):
        distance = np.linalg.norm(means[:, None] - means[chosen], axis=2).min(axis=1)
        chosen.append(int(distance.argmax()))
    return [units[index] for index in chosen]


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
    every = {layer: (list(range(len(run[layer]))), crop_of(run, layer, None), PATCH_SIZE) for layer in run}
    cells = patches_by_winner(run, every)

    title, heading, text = (ImageFont.load_default(size) for size in (34, 22, 15))
    tile = compose(run[run.layers[0]], 0, {}, PATCH_SIZE).width
    block = COLUMNS * tile + (COLUMNS - 1) * TILE_GAP
    top_of_tiles, step = MARGIN + 138, tile + TILE_GAP + 16
    width = MARGIN * 2 + len(run) * block + (len(run) - 1) * MARGIN
    page = Image.new("RGB", (width, top_of_tiles + COLUMNS * step + MARGIN + 22), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN - 8), "What do the units of a ConvNet respond to?", INK, title)
    draw.text(
        (MARGIN, MARGIN + 40),
        f"Each 3 x 3 tile is one unit: of {run.manifest['images']:,} pictures, the nine that excite it most, cut to "
        "what the unit saw. Strongest first, at most one patch a picture.",
        FAINT,
        text,
    )
    for number, layer in enumerate(run):
        top, x = run[layer], MARGIN + number * (block + MARGIN)
        last = number == len(run) - 1
        winner, count = majority(top, labels)
        draw.text((x, MARGIN + 80), f"Layer {number + 1}", INK, heading)
        draw.text((x, MARGIN + 108), _field_text(run, layer, every[layer][1]), FAINT, text)
        for index, unit in enumerate(
            purest(top, labels) if last else most_different(top, cells[layer], run.manifest["input"][1])
        ):
            left, upper = x + index % COLUMNS * (tile + TILE_GAP), top_of_tiles + index // COLUMNS * step
            page.paste(compose(top, unit, cells[layer], PATCH_SIZE), (left, upper))
            if last:
                draw.text((left, upper + tile + 3), f"{names[winner[unit]]} {count[unit]}/9", INK, text)
    draw.text(
        (MARGIN, page.height - MARGIN + 4),
        "Units are chosen by rule: among those with most patches inside the pictures, the nine whose mean patches "
        "differ most; in the last layer, for each kind of picture, the unit with the most of its nine pictures of it.",
        FAINT,
        text,
    )
    return page


def _field_text(run: Run, layer: str, crop: str) -> str:
    """The line below a layer's name: the number of its units and the size of their receptive fields and patches."""
    info = run[layer].info
    size = info["receptive_field"]["size"][0]
    if crop == "rf":
        return f"{len(run[layer])} units, each sees {size} x {size} pixels"
    drawn = f"its middle {info['effective_box']} drawn" if crop == "effective" else "the whole picture drawn"
    return f"{len(run[layer])} units, each sees {size} x {size}; {drawn}"
