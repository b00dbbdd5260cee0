"""Figures for slides and papers: a few units of several layers on one page, in print resolution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unitvis.choices import FIGURES
from unitvis.drawing import sheets
from unitvis.drawing.patches import LayerCuts, crop_of, patches_by_winner
from unitvis.drawing.sheets import FAINT, INK, PAPER, PATCH_SIZE, unit_name
from unitvis.errors import UnitvisError
from unitvis.pages.earlier import filter_of, projections_of
from unitvis.results.arrays import LayerArrays, extent_text
from unitvis.results.data import RunData

UNITS_PER_LAYER = 9  # if none are named
DPI = 300
TILE_GAP, MARGIN = 28, 72  # pixels between tiles; around the page and between a layer's two halves
_HEADING_HEIGHT = 140  # pixels above a layer's tiles


def figure(
    run: RunData, layers: Sequence[str], style: str, units: Sequence[int] | None = None, *, crop: str | None = None
) -> Image.Image:
    """Draw a page of 3x3 tiles, nine units of each layer unless units are given.

    style: "lecture": patches, with the layers from left to right; "paper" (Zeiler & Fergus 2013, figure 2): each
    layer's projections, or the first layer's filters, to the left of the same units' patches. Raises UnitvisError where
    projections are missing from the run's folder or were cut to another crop.
    """
    if style not in FIGURES:
        raise UnitvisError(f"a figure is one of {', '.join(FIGURES)}, not {style!r}")
    run = sheets.drawable(run)
    named = [(layer, sheets.checked_units(run, layer, units or _default_units(run[layer]))) for layer in layers]
    sheets.refuse_too_many(run, sum(len(chosen) for _, chosen in named), PATCH_SIZE)
    blocks = [_block(run, layer, style, chosen, crop) for layer, chosen in named]
    columns = len(blocks) if style == "lecture" else math.ceil(len(blocks) / 3)
    rows = math.ceil(len(blocks) / columns)
    wide, high = max(block.width for block in blocks), max(block.height for block in blocks)
    foot = ImageFont.load_default(38)
    note = _note(run, style)
    apart = 2 * MARGIN if style == "paper" else MARGIN
    width = max(columns * (wide + apart) - apart + 2 * MARGIN, math.ceil(foot.getlength(note)) + 2 * MARGIN)
    page = Image.new("RGB", (width, rows * (high + MARGIN) + 2 * MARGIN), PAPER)
    for number, block in enumerate(blocks):
        # The layers of a paper's figure follow each other down the columns.
        column, row = (number, 0) if style == "lecture" else divmod(number, rows)
        page.paste(block, (MARGIN + column * (wide + apart), MARGIN // 2 + row * (high + MARGIN)))
    ImageDraw.Draw(page).text((MARGIN, page.height - MARGIN), note, FAINT, foot, anchor="lm")
    return page


def _default_units(top: LayerArrays) -> list[int]:
    """The first nine units that fire for all their winners, then the first of the others."""
    return np.argsort(~top.fired.all(axis=1), kind="stable")[:UNITS_PER_LAYER].tolist()


def _note(run: RunData, style: str) -> str:
    """The line at the foot of the page."""
    k, images = run.manifest["k"], run.manifest["images"]
    left = "" if style == "lecture" else "; left: its projections, or its filter (grey is 0)"
    return f"Each tile is one unit: its {k} strongest patches of {images:,} images, at most one an image{left}."


def _block(run: RunData, layer: str, style: str, units: Sequence[int], crop: str | None) -> Image.Image:
    """Draw one layer: its name, the size of its receptive field, and its tiles, in two halves for a paper."""
    top, kind = run[layer], crop_of(run, layer, crop)
    cells = patches_by_winner(run, {layer: LayerCuts(units, kind, PATCH_SIZE, PATCH_SIZE)})[layer]
    halves = [[sheets.compose(top, unit, cells, PATCH_SIZE) for unit in units]]
    if style == "paper":
        halves.insert(0, [_left_tile(run, top, unit, kind) for unit in units])
    side = halves[0][0].width, halves[0][0].height
    columns = math.ceil(math.sqrt(len(units)))
    rows = math.ceil(len(units) / columns)
    text = ImageFont.load_default(32)
    step = side[0] + TILE_GAP, side[1] + TILE_GAP + 36
    half = columns * step[0] - TILE_GAP
    block = Image.new("RGB", (len(halves) * (half + MARGIN) - MARGIN, _HEADING_HEIGHT + rows * step[1]), PAPER)
    draw = ImageDraw.Draw(block)
    heading = ImageFont.load_default(64)
    draw.text((0, 0), sheets.fitting_name(layer, heading, block.width), INK, heading)
    draw.text((0, 84), _field_text(run, top, kind), FAINT, ImageFont.load_default(38))
    for number, tiles in enumerate(halves):
        for index, (unit, tile) in enumerate(zip(units, tiles, strict=True)):
            x = number * (half + MARGIN) + index % columns * step[0]
            y = _HEADING_HEIGHT + index // columns * step[1]
            block.paste(tile, (x, y))
            draw.text((x, y + side[1] + 3), unit_name(top, unit), FAINT, text)
    return block


def _left_tile(run: RunData, top: LayerArrays, unit: int, crop: str) -> Image.Image:
    """Draw the tile to the left of a unit's patches: its filter in the first layer, else its projections."""
    empty = sheets.compose(top, unit, {}, PATCH_SIZE)
    if (weights := filter_of(run, top.name, unit)) is not None:
        scale = min(empty.width / weights.width, empty.height / weights.height)
        size = max(1, round(weights.width * scale)), max(1, round(weights.height * scale))
        page = Image.new("RGB", empty.size, PAPER)
        page.paste(weights.resize(size, Image.Resampling.NEAREST))
        return page
    found = projections_of(run, top.name, unit, crop)
    if found is None:
        raise UnitvisError(
            f"the run has no projections of layer {top.name!r} that are cut as its patches are ({crop}); draw them: "
            f"unitvis render RUN --model MODEL --project"
        )
    cells = {(unit, rank): found[rank] for rank in range(int(top.fired[unit].sum()))}
    return sheets.compose(top, unit, cells, PATCH_SIZE)


def _field_text(run: RunData, top: LayerArrays, crop: str) -> str:
    """The line below a layer's name: the size of its receptive field, and of the crop where that is another."""
    field, (height, width) = top.info["receptive_field"], run.input_size
    size = extent_text(field, f"{field['size'][1]} x {field['size'][0]}").replace("unknown", "an unknown part")
    shown = {"rf": "", "effective": f"; {top.info['effective_box']} drawn", "image": "; the whole image drawn"}[crop]
    return f"sees {size} of {width} x {height} pixels{shown}"
