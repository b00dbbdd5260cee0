"""Figures for slides and papers: a few units of several layers on one page, in print resolution."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from unitvis import models
from unitvis.attribution.filters import first_filters
from unitvis.choices import FIGURES
from unitvis.drawing import sheets
from unitvis.drawing.colours import signed
from unitvis.drawing.patches import Cells, LayerCuts, crop_of, patches_by_winner
from unitvis.drawing.sheets import FAINT, INK, PAPER, PATCH_SIZE, unit_name
from unitvis.drawing.units import Units, checked_units, units_by_layer
from unitvis.errors import UnitvisError
from unitvis.pages.earlier import filter_of
from unitvis.pages.projections import method_asked_for, projected
from unitvis.results.arrays import LayerArrays, extent_text
from unitvis.results.data import RunData
from unitvis.results.same_model import checked_network

UNITS_PER_LAYER = 9  # if none are named
DPI = 300
TILE_GAP, MARGIN = 28, 72  # pixels between tiles; around the page and between a layer's two halves
_HEADING_HEIGHT = 140  # pixels above a layer's tiles
_LINE = 48  # pixels of a further line there


@torch.inference_mode(False)
def figure(
    run: RunData,
    layers: Sequence[str],
    style: str,
    units: Units = None,
    *,
    crop: str | None = None,
    model: nn.Module | str | models.Loaded | None = None,
    project: bool | str = True,
    device: torch.device | str | None = None,
) -> Image.Image:
    """Draw a page of 3x3 tiles, nine units of each layer unless units are given.

    style: "lecture": patches, with the layers from left to right; "paper" (Zeiler & Fergus 2013, figure 2): each
    layer's projections, or the first layer's filters, to the left of the same units' patches. units: numbers, of every
    layer, or {layer: numbers}. project: "deconvnet" (or True) or "guided", see `unitvis.project`. model: computes those
    projections that the run's folder does not keep yet; without it, raises UnitvisError where any is missing.
    """
    if style not in FIGURES:
        raise UnitvisError(f"a figure is one of {', '.join(FIGURES)}, not {style!r}")
    run = sheets.drawable(run)
    sizes = {layer: len(run[layer]) for layer in layers}
    default = {layer: checked_units(layer, sizes[layer], _default_units(run[layer])) for layer in layers}
    named = default | units_by_layer(sizes, units)
    sheets.refuse_too_many(run, sum(len(named[layer]) for layer in layers), PATCH_SIZE)
    left: dict[str, _Left] = {}
    if style == "paper":
        if model is not None:
            model, _, _ = models.resolved(model)
            checked_network(run, model, device)
        left = _left_halves(run, named, crop, model, method_asked_for(project) or "deconvnet", device)
    blocks = [_block(run, layer, named[layer], crop, left.get(layer)) for layer in layers]
    columns = len(blocks) if style == "lecture" else math.ceil(len(blocks) / 3)
    rows = math.ceil(len(blocks) / columns)
    wide, high = max(block.width for block in blocks), max(block.height for block in blocks)
    foot = ImageFont.load_default(38)
    notes = _notes(run, style)
    apart = 2 * MARGIN if style == "paper" else MARGIN
    needed = max(math.ceil(foot.getlength(note)) for note in notes)
    width = 2 * MARGIN + max(columns * (wide + apart) - apart, needed)
    height = rows * (high + MARGIN) + 2 * MARGIN + (len(notes) - 1) * _LINE
    page = Image.new("RGB", (width, height), PAPER)
    for number, block in enumerate(blocks):
        # The layers of a paper's figure follow each other down the columns.
        column, row = (number, 0) if style == "lecture" else divmod(number, rows)
        page.paste(block, (MARGIN + column * (wide + apart), MARGIN // 2 + row * (high + MARGIN)))
    for number, note in enumerate(reversed(notes)):
        ImageDraw.Draw(page).text((MARGIN, page.height - MARGIN - number * _LINE), note, FAINT, foot, anchor="lm")
    return page


def _default_units(top: LayerArrays) -> list[int]:
    """The first nine units that fire for all their winners, then the first of the others."""
    return np.argsort(~top.fired.all(axis=1), kind="stable")[:UNITS_PER_LAYER].tolist()


def _notes(run: RunData, style: str) -> list[str]:
    """The lines at the foot of the page."""
    k, images = run.manifest["k"], run.manifest["images"]
    return [
        f"Each tile is one unit: its {k} strongest patches of {images:,} images, at most one an image.",
        *(["Left: grey is 0, and each picture has its own scale."] if style == "paper" else []),
    ]


def _block(run: RunData, layer: str, units: Sequence[int], crop: str | None, left: _Left | None) -> Image.Image:
    """Draw one layer: its name, the size of its receptive field, and its tiles, in two halves for a paper."""
    top, kind = run[layer], crop_of(run, layer, crop)
    cells = patches_by_winner(run, {layer: LayerCuts(units, kind, PATCH_SIZE, PATCH_SIZE)})[layer]
    halves = [[sheets.compose(top, unit, cells, PATCH_SIZE) for unit in units]]
    lines = [_field_text(run, top, kind)]
    if left is not None:
        halves.insert(0, [left.tiles[unit] for unit in units])
        lines.append(left.caption)
    side = halves[0][0].width, halves[0][0].height
    columns = math.ceil(math.sqrt(len(units)))
    rows = math.ceil(len(units) / columns)
    text = ImageFont.load_default(32)
    step = side[0] + TILE_GAP, side[1] + TILE_GAP + 36
    half = columns * step[0] - TILE_GAP
    small, heading = ImageFont.load_default(38), ImageFont.load_default(64)
    head = _HEADING_HEIGHT + _LINE * (len(lines) - 1)
    width = max(len(halves) * (half + MARGIN) - MARGIN, *(math.ceil(small.getlength(line)) for line in lines))
    block = Image.new("RGB", (width, head + rows * step[1]), PAPER)
    draw = ImageDraw.Draw(block)
    draw.text((0, 0), sheets.fitting_name(layer, heading, block.width), INK, heading)
    for number, line in enumerate(lines):
        draw.text((0, 84 + number * _LINE), line, FAINT, small)
    for number, tiles in enumerate(halves):
        for index, (unit, tile) in enumerate(zip(units, tiles, strict=True)):
            x = number * (half + MARGIN) + index % columns * step[0]
            y = head + index // columns * step[1]
            block.paste(tile, (x, y))
            draw.text((x, y + side[1] + 3), unit_name(top, unit), FAINT, text)
    return block


@dataclass(frozen=True)
class _Left:
    """The left half of a layer's tiles."""

    tiles: Mapping[int, Image.Image]  # by unit
    caption: str  # what they are


def _left_halves(
    run: RunData,
    units: Mapping[str, Sequence[int]],
    crop: str | None,
    model: nn.Module | None,
    method: str,
    device: torch.device | str | None,
) -> dict[str, _Left]:
    """The tiles to the left of the patches of {layer: units}: filters of the first layer, else projections."""
    found = {}
    drawn = first_filters(model, run) if model is not None else {}
    for layer, chosen in units.items():
        top = run[layer]
        if top.info["unit"] != "channel":
            continue
        filters = {u: signed(drawn[layer][u]) if layer in drawn else filter_of(run, layer, u) for u in chosen}
        tiles = {unit: _filter_tile(top, unit, image) for unit, image in filters.items() if image is not None}
        if len(tiles) == len(filters):
            found[layer] = _Left(tiles, "left: filters, the weights of a unit")
    others = {layer: chosen for layer, chosen in units.items() if layer not in found}
    cells: dict[str, Cells] = {layer: {} for layer in others}
    words = dict.fromkeys(others, "nothing, because no unit fired")
    for one in projected(run, others, method, crop, model, device):
        cells[one.layer] |= one.cells(run.manifest["k"])
        words[one.layer] = one.method
    for layer, chosen in others.items():
        tiles = {unit: sheets.compose(run[layer], unit, cells[layer], PATCH_SIZE) for unit in chosen}
        found[layer] = _Left(tiles, f"left: {words[layer]}")
    return found


def _filter_tile(top: LayerArrays, unit: int, weights: Image.Image) -> Image.Image:
    """Draw a filter as large as the unit's tile."""
    page = Image.new("RGB", sheets.compose(top, unit, {}, PATCH_SIZE).size, PAPER)
    scale = min(page.width / weights.width, page.height / weights.height)
    size = max(1, round(weights.width * scale)), max(1, round(weights.height * scale))
    page.paste(weights.resize(size, Image.Resampling.NEAREST))
    return page


def _field_text(run: RunData, top: LayerArrays, crop: str) -> str:
    """The line below a layer's name: the size of its receptive field, and of the crop where that is another."""
    field, (height, width) = top.info["receptive_field"], run.input_size
    size = extent_text(field, f"{field['size'][1]} x {field['size'][0]}").replace("unknown", "an unknown part")
    shown = {"rf": "", "effective": f"; {top.info['effective_box']} drawn", "image": "; the whole image drawn"}[crop]
    return f"sees {size} of {width} x {height} pixels{shown}"
