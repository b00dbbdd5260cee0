"""The overview, a slide for lectures: layers from left to right, nine units of each, nine patches of each unit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from unitvis.drawing.page import PAPER, Page, page_dots
from unitvis.drawing.patches import Cells, LayerCuts, crop_of, drawn_boxes, patches_by_winner
from unitvis.drawing.printing import Section, Words, printed
from unitvis.drawing.sheets import FAINT, INK, compose, drawable, fitting_name, head_names
from unitvis.errors import UnitvisError
from unitvis.results.arrays import LayerArrays, extent_text
from unitvis.results.data import RunData

Item = TypeVar("Item")

PATCH_SIZE, TILE_GAP, MARGIN = 40, 14, 44  # pixels
UNITS_PER_LAYER, COLUMNS = 9, 3  # tiles of a layer, and tiles in a row
LAYERS, MAX_LAYERS = 5, 24  # if none are named, and at most
MAX_CANDIDATES = 96  # units of a layer among which nine are chosen; the patches of all of them are cut
QUESTION = "What do the units of a ConvNet respond to?"
RULE = (
    "Units are chosen by rule: among those with most patches inside the images, the nine whose mean patches differ most"
)


@dataclass(frozen=True)
class Block:
    """One layer of the slide: its heading, a line below it, its units, and a line below each of their tiles."""

    layer: str
    heading: str
    line: str
    units: Sequence[int]
    captions: Sequence[str] = ()


@dataclass(frozen=True)
class Chosen:
    """What an overview shows: its blocks, patches at the slide's size, and its two lines, see `slide`."""

    blocks: Sequence[Block]
    cells: Mapping[str, Cells]
    told: str
    rule: str


def overview(run: RunData, layers: Sequence[str] | None = None) -> Image.Image:
    """Draw nine units of each layer, chosen by `most_different`; the slide says so.

    layers: names; None: five of the run's, evenly spaced. Raises UnitvisError for a layer that the run does not have.
    """
    run = drawable(run)
    shown = _chosen(run, layers)
    return slide(run, shown.blocks, shown.cells, shown.told, shown.rule)


def printed_overview(run: RunData, layers: Sequence[str] | None = None, *, width: float | str) -> Page:
    """Draw what `overview` does as a page for print, with the numbers of the units. width: see `Run.sheet`."""
    run, dots = drawable(run), page_dots(width)
    shown = _chosen(run, layers)
    sections = []
    for one in shown.blocks:
        names, origin = head_names(run, one.layer, one.units)
        crop = crop_of(run, one.layer, None)
        sections.append(Section(one.layer, one.units, crop, [one.line, *origin], names=names))
    return printed(run, sections, Words(QUESTION, [shown.told], [shown.rule]), dots)


def _chosen(run: RunData, layers: Sequence[str] | None) -> Chosen:
    """Choose layers and units; see `overview`."""
    run.need_winners()
    names = list(layers) if layers else _evenly_spaced(run.layers, LAYERS)
    if len(names) > MAX_LAYERS:
        raise UnitvisError(f"an overview shows at most {MAX_LAYERS} layers, not {len(names)}; name fewer")
    firing = {name: firing_units(run[name]) for name in names}
    candidates = {name: _evenly_spaced(units, MAX_CANDIDATES) for name, units in firing.items()}
    cells = cells_of(run, candidates)
    blocks = []
    for name, units in candidates.items():
        chosen = most_different(run, name, units, cells[name]) if units else []
        blocks.append(Block(name, name, field_text(run, name) if units else "no unit fires for any image", chosen))
    k = run.manifest["k"]
    told = f"Each tile is one unit: of {run.manifest['images']:,} images, the {k} that excite it most, cut to what the "
    told += "unit saw. Strongest first, at most one patch an image."
    few = any(len(candidates[name]) < len(firing[name]) for name in names)
    rule = RULE + (f" (of layers with more than {MAX_CANDIDATES} units, of as many, evenly spaced)." if few else ".")
    return Chosen(blocks, cells, told, rule)


def _evenly_spaced(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of the items, evenly spaced, the first and the last among them."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in places]


def firing_units(top: LayerArrays) -> list[int]:
    """The units that fire for all of their winners; where there are fewer than nine, those that fire at all."""
    always = np.flatnonzero(top.fired.all(axis=1)).tolist()
    return always if len(always) >= UNITS_PER_LAYER else np.flatnonzero(top.fired[:, 0]).tolist()


def cells_of(run: RunData, units: Mapping[str, Sequence[int]]) -> dict[str, Cells]:
    """Patches of units, by layer, at the slide's size."""
    return patches_by_winner(
        run,
        {name: LayerCuts(own, crop_of(run, name, None), PATCH_SIZE, PATCH_SIZE) for name, own in units.items()},
    )


def most_different(run: RunData, layer: str, candidates: Sequence[int], cells: Cells) -> list[int]:
    """Choose nine units whose mean patches differ: first the one with the most contrast, then always the farthest one.

    Of the candidates those come first most of whose patches lie inside the image.
    """
    top, (height, width) = run[layer], run.input_size
    boxes = drawn_boxes(top, crop_of(run, layer, None), run.input_size)[list(candidates)]
    inside = (boxes[..., :2] >= 0).all(axis=2) & (boxes[..., 2:] <= [width, height]).all(axis=2)
    within = inside.sum(axis=1)
    enough = max(0, min(6, np.sort(within)[::-1][: min(UNITS_PER_LAYER, len(within))][-1]))
    units = [unit for unit, count in zip(candidates, within, strict=True) if count >= enough]
    means = np.stack([_mean_patch(top, unit, cells) for unit in units])
    chosen = [int(means.std(axis=1).argmax())]
    while len(chosen) < min(UNITS_PER_LAYER, len(units)):
        distance = np.linalg.norm(means[:, None] - means[chosen], axis=2).min(axis=1)
        distance[chosen] = -1  # others may be as close to them as they are to themselves
        chosen.append(int(distance.argmax()))
    return [units[index] for index in chosen]


def _mean_patch(top: LayerArrays, unit: int, cells: Cells) -> NDArray[np.float64]:
    """The mean of a unit's patches at 12 x 12 pixels, flat."""
    ranks = range(int(top.fired[unit].sum()))
    return np.mean([np.asarray(cells[unit, rank].resize((12, 12))) for rank in ranks], axis=0).ravel()


def slide(run: RunData, blocks: Sequence[Block], cells: Mapping[str, Cells], told: str, rule: str) -> Image.Image:
    """Draw blocks side by side. told: the line below the title; rule: the line at the foot."""
    title, heading, text = (ImageFont.load_default(size) for size in (34, 22, 15))
    tile = compose(run[blocks[0].layer], 0, {}, PATCH_SIZE).width
    block_width = COLUMNS * tile + (COLUMNS - 1) * TILE_GAP
    top_of_tiles, step = MARGIN + 138, tile + TILE_GAP + 16
    columns = MARGIN * 2 + len(blocks) * block_width + (len(blocks) - 1) * MARGIN
    lines = {title: QUESTION, text: max(told, rule, key=text.getlength)}
    width = max(columns, *(math.ceil(font.getlength(line)) + 2 * MARGIN for font, line in lines.items()))
    page = Image.new("RGB", (width, top_of_tiles + COLUMNS * step + MARGIN + 22), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN - 8), QUESTION, INK, title)
    draw.text((MARGIN, MARGIN + 40), told, FAINT, text)
    for number, block in enumerate(blocks):
        x = MARGIN + number * (block_width + MARGIN)
        draw.text((x, MARGIN + 80), fitting_name(block.heading, heading, block_width), INK, heading)
        draw.text((x, MARGIN + 108), block.line, FAINT, text)
        for index, unit in enumerate(block.units):
            left, upper = x + index % COLUMNS * (tile + TILE_GAP), top_of_tiles + index // COLUMNS * step
            page.paste(compose(run[block.layer], unit, cells[block.layer], PATCH_SIZE), (left, upper))
            if block.captions:
                draw.text((left, upper + tile + 3), block.captions[index], INK, text)
    draw.text((MARGIN, page.height - MARGIN + 4), rule, FAINT, text)
    return page


def field_text(run: RunData, layer: str) -> str:
    """The line below a layer's name: the number of its units and the size of their receptive fields and patches."""
    info, crop = run[layer].info, crop_of(run, layer, None)
    field = info["receptive_field"]
    sees = extent_text(field, "{1} x {0}".format(*field["size"]))
    if crop == "rf":
        return f"{len(run[layer])} units, each sees {sees} pixels"
    drawn = f"its middle {info['effective_box']} drawn" if crop == "effective" else "the whole image drawn"
    return f"{len(run[layer])} units, each sees {sees}; {drawn}"
