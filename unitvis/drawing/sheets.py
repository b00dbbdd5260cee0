"""Tiles (the 3x3 patches of a unit) and sheets (pages of tiles)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unitvis.drawing.patches import Wanted, crop_of, cut_patches
from unitvis.errors import UnitvisError, check_unit
from unitvis.files import file_name, make_folder, replacing
from unitvis.results.arrays import SEPARATED, LayerArrays
from unitvis.results.data import RunData

PAPER, INK, FAINT = (255, 255, 255), (30, 30, 30), (120, 120, 120)  # colours of page, text and smaller text
EMPTY, EMPTY_MARK = (238, 238, 238), (205, 205, 205)  # colours of a placeholder and of the line through it
MAX_PIXELS_IN_MEMORY = 400_000_000  # of patches that are held at once while a run is rendered


def patch(run: RunData, layer: str, unit: int, rank: int, *, crop: str | None, size: int) -> Image.Image:
    """Cut the patch of one winner; see `Run.patch`."""
    top = _checked_layer(run, layer, unit)
    if not 0 <= rank < top.values.shape[1]:
        raise UnitvisError(f"there is no rank {rank}: the run keeps {top.values.shape[1]} winners, from 0")
    cells = patches_by_winner(run, {layer: ([unit], crop_of(run, layer, crop), size)})[layer]
    return cells.get((unit, rank)) or placeholder(top, unit, rank, size)


def tile(run: RunData, layer: str, unit: int, *, crop: str | None, size: int) -> Image.Image:
    """Draw a unit's tile; see `Run.tile`."""
    _checked_layer(run, layer, unit)
    cells = patches_by_winner(run, {layer: ([unit], crop_of(run, layer, crop), size)})[layer]
    return compose(run[layer], unit, cells, size)


def sheet(run: RunData, layer: str, units: Sequence[int] | None, *, crop: str | None, size: int | None) -> Image.Image:
    """Draw a page of tiles; see `Run.sheet`."""
    chosen = checked_units(run, layer, units)
    size = size or _patch_size(len(chosen))
    crop = crop_of(run, layer, crop)
    cells = patches_by_winner(run, {layer: (chosen, crop, size)})[layer]
    return _sheet(run, layer, chosen, crop, size, cells)


def render(run: RunData, folder: Path, *, crop: str | None = None) -> list[Path]:
    """Write sheets/LAYER.png for every layer and return the paths.

    Each picture is opened once for as many layers as fit in memory together.
    """
    run.need_winners()
    make_folder(folder / "sheets")
    written = []
    for group in memory_groups(run, {layer: _patch_size(len(run[layer])) for layer in run}):
        wanted = {n: (checked_units(run, n, None), crop_of(run, n, crop), _patch_size(len(run[n]))) for n in group}
        cut = patches_by_winner(run, wanted)
        for layer, (units, kind, size) in wanted.items():
            path = folder / "sheets" / f"{file_name(layer)}.png"
            with replacing(path) as target:
                _sheet(run, layer, units, kind, size, cut.pop(layer)).save(target, "PNG")
            written.append(path)
    return written


def memory_groups(run: RunData, sizes: Mapping[str, int]) -> list[list[str]]:
    """Split the run's layers into groups whose patches, `sizes` pixels wide, fit in memory together."""
    groups: list[list[str]] = [[]]
    held = 0
    for layer in run:
        need = run[layer].values.size * sizes[layer] ** 2
        if held + need > MAX_PIXELS_IN_MEMORY and groups[-1]:
            groups.append([])
            held = 0
        groups[-1].append(layer)
        held += need
    return groups


def patches_by_winner(run: RunData, wanted: Wanted) -> dict[str, dict[tuple[int, int], Image.Image]]:
    """Cut patches into {layer: {(unit, rank): patch}}."""
    cells: dict[str, dict[tuple[int, int], Image.Image]] = {layer: {} for layer in wanted}
    for layer, unit, rank, image in cut_patches(run, wanted):
        cells[layer][unit, rank] = image
    return cells


def _patch_size(units: int) -> int:
    """Pixels of one patch on a sheet of so many units: fewer for more units, to limit the size of the page."""
    return 64 if units <= 64 else 48 if units <= 256 else 40


def placeholder(top: LayerArrays, unit: int, rank: int, size: int) -> Image.Image:
    """Draw what stands in place of a patch: empty for a blank, struck out for a response that does not fire."""
    image = Image.new("RGB", (size, size), EMPTY)
    if top.images[unit, rank] >= 0:
        ImageDraw.Draw(image).line((0, size - 1, size - 1, 0), fill=EMPTY_MARK, width=max(1, size // 24))
    return image


def compose(top: LayerArrays, unit: int, cells: dict[tuple[int, int], Image.Image], size: int) -> Image.Image:
    """Put a unit's tile together from patches {(unit, rank): patch}, each `size` pixels wide."""
    k = top.values.shape[1]
    columns, gap = tile_columns(k), _gap(size)
    image = Image.new("RGB", (_tile_side(columns, size), _tile_side(math.ceil(k / columns), size)), PAPER)
    for rank in range(k):
        corner = (rank % columns * (size + gap), rank // columns * (size + gap))
        image.paste(cells.get((unit, rank)) or placeholder(top, unit, rank, size), corner)
    return image


def _sheet(
    run: RunData, layer: str, units: Sequence[int], crop: str, size: int, cells: dict[tuple[int, int], Image.Image]
) -> Image.Image:
    """Draw a page of tiles from patches {(unit, rank): patch}, each `size` pixels wide."""
    top = run[layer]
    k = top.values.shape[1]
    wide, high = _tile_side(tile_columns(k), size), _tile_side(math.ceil(k / tile_columns(k)), size)
    text, margin = max(10, size // 5), max(12, size // 3)
    font, heading = ImageFont.load_default(text), ImageFont.load_default(round(1.5 * max(text, 13)))
    small = ImageFont.load_default(max(text, 12))
    columns = math.ceil(math.sqrt(len(units) * (1 if len(units) <= 9 else 1.6)))  # up to nine units make a square
    rows = math.ceil(len(units) / columns)
    lines = _caption(run, top, crop)
    caption = small.getbbox("Ag")[3] * 1.35
    head = round(margin + heading.getbbox("Ag")[3] * 1.4 + caption * len(lines) + margin / 2)
    needed = max([heading.getlength(layer), *(small.getlength(line) for line in lines)])
    width = max(2 * margin + columns * wide + (columns - 1) * margin, math.ceil(needed) + 2 * margin)
    page = Image.new("RGB", (width, head + rows * (high + 2 * text + margin) + margin // 2), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((margin, margin), layer, INK, heading)
    for number, line in enumerate(lines):
        draw.text((margin, margin + heading.getbbox("Ag")[3] * 1.4 + number * caption), line, FAINT, small)
    for number, unit in enumerate(units):
        x, y = margin + number % columns * (wide + margin), head + number // columns * (high + 2 * text + margin)
        page.paste(compose(top, unit, cells, size), (x, y))
        draw.text((x, y + high + text * 0.25), unit_name(top, unit), INK, font)
        draw.text((x + wide, y + high + text * 0.25), _note(top, unit), FAINT, font, anchor="ra")
    return page


def _caption(run: RunData, top: LayerArrays, crop: str) -> list[str]:
    """The lines below a sheet's heading."""
    info, field = top.info, top.info["receptive_field"]
    height, width = run.input_size
    extent = "the whole image" if field["whole_image"] else f"{field['size'][1]} x {field['size'][0]} input pixels"
    shown = {
        "rf": f"a patch is the unit's receptive field, {extent}",
        "effective": f"a patch is the effective box, {info['effective_box']} input pixels wide, which holds 90% "
        f"of a response's squared gradient (the receptive field is {extent})",
        "image": f"a patch is the whole image (the receptive field is {extent})",
    }[crop]
    lines = [
        f"{len(top)} {info['unit']}s, map {info['height']} x {info['width']}; the {run.manifest['k']} strongest of "
        f"{run.manifest['images']:,} images, at most one patch an image, strongest first",
        f"{shown}; the input is {width} x {height} pixels, plain grey is outside it",
    ]
    if (~top.fired).any():
        lines.append("struck out: the response is at most 0, so the ReLU that follows gives 0 (it did not fire)")
    return lines


def unit_name(top: LayerArrays, unit: int) -> str:
    """The name of a unit: a channel's number, or a neuron's channel/row/column."""
    if top.info["unit"] == "channel":
        return str(unit)
    height, width = top.info["height"], top.info["width"]
    return f"{unit // (height * width)}/{unit // width % height}/{unit % width}"


def _note(top: LayerArrays, unit: int) -> str:
    """The text beside a unit's number: its largest value and any status but separated, or "dead", or "no response"."""
    if top.images[unit, 0] < 0:
        return "no response"
    if top.dead[unit]:
        return "dead"
    value = f"{top.values[unit, 0]:.3g}"
    return value if top.status[unit] == SEPARATED else f"{value} {top.status[unit]}"


def tile_columns(k: int) -> int:
    """Patches in a row of a tile of k patches."""
    return math.ceil(math.sqrt(k))


def _gap(size: int) -> int:
    """Pixels between patches of a tile."""
    return max(1, size // 24)


def _tile_side(patches: int, size: int) -> int:
    """Pixels of so many patches of a tile side by side."""
    return patches * size + (patches - 1) * _gap(size)


def _checked_layer(run: RunData, layer: str, unit: int) -> LayerArrays:
    """The layer, if it has the unit; else raises UnitvisError."""
    top = run[layer]
    check_unit(layer, unit, len(top))
    return top


def checked_units(run: RunData, layer: str, units: Sequence[int] | None) -> list[int]:
    """The given units of a layer, or all for None; raises UnitvisError for an empty list or a unit it does not have."""
    chosen = list(range(len(run[layer]))) if units is None else [int(np.int64(u)) for u in units]
    for unit in chosen:
        _checked_layer(run, layer, unit)
    if not chosen:
        raise UnitvisError("no unit was named for the sheet")
    return chosen


MAX_LISTED_UNITS = 100_000  # in one range of `parse_units`


def parse_units(text: str) -> list[int]:
    """Parse numbers and inclusive ranges: "0-8,12" is 0 to 8 and 12; raises UnitvisError for anything else."""
    units: list[int] = []
    for item in text.split(","):
        first, dash, last = item.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UnitvisError(f"units {text!r} cannot be read; write numbers and ranges, such as 0-8,12")
        end = int(last if dash else first) + 1
        if end - int(first) > MAX_LISTED_UNITS:
            raise UnitvisError(f"units {text!r} are more than the {MAX_LISTED_UNITS:,} that a sheet can hold")
        units.extend(range(int(first), end))
    return units
