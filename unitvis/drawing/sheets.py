"""Patches put together: a unit's 3x3 tile, and a page of tiles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unitvis.drawing.patches import crop_of, patches
from unitvis.errors import UnitvisError, check_unit
from unitvis.files import file_name, replacing
from unitvis.results.arrays import SEPARATED, LayerArrays
from unitvis.results.data import RunData

PAPER, INK, FAINT = (255, 255, 255), (30, 30, 30), (120, 120, 120)
EMPTY, EMPTY_MARK = (238, 238, 238), (205, 205, 205)
MOST_PIXELS = 400_000_000  # of patches held at once while a run is rendered


def patch(run: RunData, layer: str, unit: int, rank: int, *, crop: str | None, size: int) -> Image.Image:
    top = _unit(run, layer, unit)
    if not 0 <= rank < top.values.shape[1]:
        raise UnitvisError(f"there is no rank {rank}: the run keeps {top.values.shape[1]} winners, from 0")
    cells = cut_cells(run, {layer: ([unit], crop_of(run, layer, crop), size)})[layer]
    return cells.get((unit, rank)) or not_there(top, unit, rank, size)


def tile(run: RunData, layer: str, unit: int, *, crop: str | None, size: int) -> Image.Image:
    _unit(run, layer, unit)
    cells = cut_cells(run, {layer: ([unit], crop_of(run, layer, crop), size)})[layer]
    return compose(run[layer], unit, cells, size)


def sheet(run: RunData, layer: str, units: Sequence[int] | None, *, crop: str | None, size: int | None) -> Image.Image:
    chosen = checked_units(run, layer, units)
    size = size or _patch_size(len(chosen))
    crop = crop_of(run, layer, crop)
    cells = cut_cells(run, {layer: (chosen, crop, size)})[layer]
    return _sheet(run, layer, chosen, crop, size, cells)


def render(run: RunData, folder: Path, *, crop: str | None = None) -> list[Path]:
    """Write sheets/LAYER.png for every layer; each picture is opened once for as many layers as fit in memory."""
    run.need_winners()
    (folder / "sheets").mkdir(parents=True, exist_ok=True)
    written = []
    for group in grouped(run, {layer: _patch_size(len(run[layer])) for layer in run}):
        wanted = {n: (checked_units(run, n, None), crop_of(run, n, crop), _patch_size(len(run[n]))) for n in group}
        cut = cut_cells(run, wanted)
        for layer, (units, kind, size) in wanted.items():
            path = folder / "sheets" / f"{file_name(layer)}.png"
            with replacing(path) as part:
                _sheet(run, layer, units, kind, size, cut.pop(layer)).save(part, "PNG")
            written.append(path)
    return written


def grouped(run: RunData, sizes: Mapping[str, int]) -> list[list[str]]:
    """Layers whose patches, `sizes` pixels wide, are held at once."""
    groups: list[list[str]] = [[]]
    held = 0
    for layer in run:
        need = run[layer].values.size * sizes[layer] ** 2
        if held + need > MOST_PIXELS and groups[-1]:
            groups.append([])
            held = 0
        groups[-1].append(layer)
        held += need
    return groups


def cut_cells(
    run: RunData, wanted: dict[str, tuple[list[int], str, int]]
) -> dict[str, dict[tuple[int, int], Image.Image]]:
    """{layer: (units, crop, size)} -> {layer: {(unit, rank): patch}}."""
    cells: dict[str, dict[tuple[int, int], Image.Image]] = {layer: {} for layer in wanted}
    for layer, unit, rank, image in patches(run, wanted):
        cells[layer][unit, rank] = image
    return cells


def _patch_size(units: int) -> int:
    """Pixels of one patch on a sheet: smaller where there are many, so that a page stays a picture one can open."""
    return 64 if units <= 64 else 48 if units <= 256 else 40


def not_there(top: LayerArrays, unit: int, rank: int, size: int) -> Image.Image:
    """The place of a blank (empty), or of a response that does not get through the ReLU (struck out)."""
    image = Image.new("RGB", (size, size), EMPTY)
    if top.images[unit, rank] >= 0:
        ImageDraw.Draw(image).line((0, size - 1, size - 1, 0), fill=EMPTY_MARK, width=max(1, size // 24))
    return image


def compose(top: LayerArrays, unit: int, cells: dict[tuple[int, int], Image.Image], size: int) -> Image.Image:
    """A unit's tile from patches that are cut already: {(unit, rank): patch}, each `size` pixels wide."""
    k = top.values.shape[1]
    across, gap = math.ceil(math.sqrt(k)), _gap(size)
    image = Image.new("RGB", (_side(across, size), _side(math.ceil(k / across), size)), PAPER)
    for rank in range(k):
        corner = (rank % across * (size + gap), rank // across * (size + gap))
        image.paste(cells.get((unit, rank)) or not_there(top, unit, rank, size), corner)
    return image


def _sheet(
    run: RunData, layer: str, units: Sequence[int], crop: str, size: int, cells: dict[tuple[int, int], Image.Image]
) -> Image.Image:
    top = run[layer]
    across = math.ceil(math.sqrt(top.values.shape[1]))
    wide, high = _side(across, size), _side(math.ceil(top.values.shape[1] / across), size)
    text, margin = max(10, size // 5), max(12, size // 3)
    font, heading = ImageFont.load_default(text), ImageFont.load_default(round(1.5 * max(text, 13)))
    small = ImageFont.load_default(max(text, 12))
    columns = math.ceil(math.sqrt(len(units) * (1 if len(units) <= 9 else 1.6)))  # nine stand as three by three
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
    for place, unit in enumerate(units):
        x, y = margin + place % columns * (wide + margin), head + place // columns * (high + 2 * text + margin)
        page.paste(compose(top, unit, cells, size), (x, y))
        draw.text((x, y + high + text * 0.25), unit_name(top, unit), INK, font)
        draw.text((x + wide, y + high + text * 0.25), _note(top, unit), FAINT, font, anchor="ra")
    return page


def _caption(run: RunData, top: LayerArrays, crop: str) -> list[str]:
    info, field = top.info, top.info["receptive_field"]
    height, width = run.input_size
    seen = "the whole image" if field["whole_image"] else f"{field['size'][1]} x {field['size'][0]} input pixels"
    shown = {
        "rf": f"a patch is the unit's receptive field, {seen}",
        "effective": f"a patch is the effective box, {info['effective_box']} input pixels wide, which holds 90% "
        f"of what moves a unit (its receptive field is {seen})",
        "image": f"a patch is the whole image (the receptive field is {seen})",
    }[crop]
    lines = [
        f"{len(top)} {info['unit']}s, map {info['height']} x {info['width']}; the {run.manifest['k']} strongest of "
        f"{run.manifest['images']:,} images, one place an image, strongest first",
        f"{shown}; the input is {width} x {height}, plain grey lies outside it",
    ]
    if (~top.fired).any():
        lines.append("struck out: at most 0, so the ReLU that follows lets nothing through (it did not fire)")
    return lines


def unit_name(top: LayerArrays, unit: int) -> str:
    """A channel's number, or a neuron's channel/row/column."""
    if top.info["unit"] == "channel":
        return str(unit)
    height, width = top.info["height"], top.info["width"]
    return f"{unit // (height * width)}/{unit // width % height}/{unit % width}"


def _note(top: LayerArrays, unit: int) -> str:
    """What stands beside the unit's number: its largest value, or why it has none worth showing."""
    if top.images[unit, 0] < 0:
        return "no response"
    if top.dead[unit]:
        return "dead"
    value = f"{top.values[unit, 0]:.3g}"
    return value if top.status[unit] == SEPARATED else f"{value} {top.status[unit]}"


def _gap(size: int) -> int:
    return max(1, size // 24)


def _side(patches: int, size: int) -> int:
    return patches * size + (patches - 1) * _gap(size)


def _unit(run: RunData, layer: str, unit: int) -> LayerArrays:
    top = run[layer]
    check_unit(layer, unit, len(top))
    return top


def checked_units(run: RunData, layer: str, units: Sequence[int] | None) -> list[int]:
    """The units of a layer that were named, or all; UnitvisError for one that is not there, or none."""
    chosen = list(range(len(run[layer]))) if units is None else [int(np.int64(u)) for u in units]
    for unit in chosen:
        _unit(run, layer, unit)
    if not chosen:
        raise UnitvisError("no unit was named for the sheet")
    return chosen


MOST_UNITS = 100_000


def parse_units(text: str) -> list[int]:
    """Numbers and ranges: 0-8,12 is 0 to 8 and 12."""
    units: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UnitvisError(f"units {text!r} cannot be read; write numbers and ranges, such as 0-8,12")
        end = int(last if dash else first) + 1
        if end - int(first) > MOST_UNITS:
            raise UnitvisError(f"units {text!r} are more than the {MOST_UNITS:,} that a sheet can hold")
        units.extend(range(int(first), end))
    return units
