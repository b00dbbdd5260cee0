"""Tiles (the 3x3 patches of a unit) and sheets (pages of tiles)."""

from __future__ import annotations

import math
import zlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unitvis.drawing.hands import Hands
from unitvis.drawing.page import MAX_PAGE_PIXELS, PAPER
from unitvis.drawing.patches import Cells, LayerCuts, crop_of, cut_layers, patches_by_winner
from unitvis.drawing.units import checked_units
from unitvis.errors import UnitvisError, check_unit, printable
from unitvis.files import file_name, make_folder
from unitvis.results.arrays import SEPARATED, STATUSES, LayerArrays, extent_text, map_text
from unitvis.results.classes import classes_text, unit_names, winner_classes
from unitvis.results.data import RunData

Drawn = TypeVar("Drawn", bound=RunData)

INK, FAINT = (30, 30, 30), (120, 120, 120)  # colours of text and of smaller text
EMPTY, EMPTY_MARK = (238, 238, 238), (205, 205, 205)  # colours of a placeholder and of the line through it
_WHITE = 230  # a patch whose channels all have a larger mean gets an outline
_MAX_CHARACTERS = 400  # of a layer's name on a page
MAX_BYTES_IN_MEMORY = 1_200_000_000  # of patches and response maps that are held at once while a run is rendered
PATCH_SIZE = 112  # pixels of a patch when it is cut: a multiple of 16, so that no block of a JPEG file reaches across
# Of zlib: what takes more time makes photographs hardly smaller.
_PNG = {"compress_level": 1, "compress_type": zlib.Z_RLE}
MAX_PATCHES = 25  # of a unit, in a tile: of a larger k only the strongest are drawn
_SHEET_PIXELS = 32_000_000  # of a page of a layer's sheet, about; a layer with more units has several
# Units of a layer that its sheet shows, at most: single neurons are too many to draw them all; channels are so
# only in a run that no network gave.
_MAX_ON_SHEET = {"neuron": 1024, "channel": 32_768}
_PATCH_BYTES = 20_000  # that a patch takes for its sheet and as a cell of the gallery, about
_WINNER_BYTES = 600  # that a winner takes beside its patch


def patch(run: RunData, layer: str, unit: int, rank: int, *, crop: str | None, size: int) -> Image.Image:
    """Cut the patch of one winner; see `Run.patch`."""
    top = _checked_layer(run, layer, unit)
    if not 0 <= rank < top.values.shape[1]:
        raise UnitvisError(f"there is no rank {rank}: the run keeps {top.values.shape[1]} winners, from 0")
    run = drawable(run) if rank < MAX_PATCHES else run  # as in the tile
    cells = patches_by_winner(run, {layer: LayerCuts([unit], crop_of(run, layer, crop), size, size)})[layer]
    return cells.get((unit, rank)) or placeholder(top, unit, rank, size)


def tile(run: RunData, layer: str, unit: int, *, crop: str | None, size: int) -> Image.Image:
    """Draw a unit's tile; see `Run.tile`."""
    _checked_layer(run, layer, unit)
    run = drawable(run)
    cells = patches_by_winner(run, {layer: LayerCuts([unit], crop_of(run, layer, crop), size, size)})[layer]
    return compose(run[layer], unit, cells, size)


def sheet(run: RunData, layer: str, units: Sequence[int] | None, *, crop: str | None, size: int | None) -> Image.Image:
    """Draw a page of tiles; see `Run.sheet`."""
    run = drawable(run)
    chosen = checked_units(layer, len(run[layer]), units)
    usual = _patch_size(len(chosen))
    refuse_too_many(run, len(chosen), size or usual)
    crop = crop_of(run, layer, crop)
    cells = patches_by_winner(run, {layer: LayerCuts(chosen, crop, size or PATCH_SIZE, size or usual)})[layer]
    return _sheet(run, layer, chosen, crop, size or usual, cells)


def render(run: RunData, folder: Path, *, crop: str | None = None) -> list[Path]:
    """Write sheets/LAYER.png for every layer, with LAYER+2.png and so on for more units; returns the paths."""
    run.need_winners()
    run = drawable(run)
    written = []
    for group in memory_groups(run, crop):
        wanted = {layer: on_sheet(run, layer, crop) for layer in group}
        with Hands(run, images_of(run, group)) as hands:
            for layer, cells, _ in cut_layers(run, wanted, hands):
                written += write_sheet(run, layer, folder, wanted[layer].crop, cells, hands)
    return written


def on_sheet(run: RunData, layer: str, crop: str | None) -> LayerCuts:
    """What is cut for the sheet of a layer."""
    units = _units_on_sheet(run[layer])
    return LayerCuts(units, crop_of(run, layer, crop), PATCH_SIZE, _patch_size(len(units)))


def write_sheet(run: RunData, layer: str, folder: Path, crop: str, cells: Cells, hands: Hands) -> list[Path]:
    """Write the pages of a layer's sheet into folder/sheets; returns their paths. cells: as `on_sheet` says."""
    units = _units_on_sheet(run[layer])
    make_folder(folder / "sheets")
    size = _patch_size(len(units))
    step = _units_on_page(run, size, _SHEET_PIXELS)
    written = []
    for number, start in enumerate(range(0, len(units), step), 1):
        name = file_name(layer) + (f"+{number}" if number > 1 else "")  # no layer's: there, + is encoded
        path = folder / "sheets" / f"{name}.png"
        page = _sheet(run, layer, units[start : start + step], crop, size, cells)
        hands.save(page, path, "PNG", **_PNG)
        written.append(path)
    return written


def drawable(run: Drawn) -> Drawn:
    """The run with as many winners of a unit as are drawn."""
    return run.strongest(MAX_PATCHES)


def _units_on_sheet(top: LayerArrays) -> list[int]:
    """The units that a layer's sheet shows: all, or of more than `_MAX_ON_SHEET` evenly spaced ones."""
    if len(top) <= (most := _MAX_ON_SHEET[top.info["unit"]]):
        return list(range(len(top)))
    return np.linspace(0, len(top) - 1, most).round().astype(int).tolist()


def refuse_too_many(run: RunData, units: int, size: int) -> None:
    """Raise UnitvisError for more units than fit on a page, at `size` pixels a patch."""
    if units > (most := _units_on_page(run, size, MAX_PAGE_PIXELS)):
        raise UnitvisError(
            f"{units:,} units do not fit on one page of {size} pixels a patch; name at most {most:,} (units=, --units)"
        )


def _units_on_page(run: RunData, size: int, pixels: int) -> int:
    """How many units fit on a page of so many pixels, at `size` pixels a patch; at least 1."""
    wide, high = tile_shape(run.manifest["k"], size)
    text, margin = _text_and_margin(size)
    return max(1, pixels // ((wide + margin) * (high + _text_height(run, text) + margin)))


def memory_groups(run: RunData, crop: str | None, maps: Mapping[str, int] | None = None) -> list[list[str]]:
    """Split layers into groups whose patches fit in memory together; pictures are read once for each group.

    maps: bytes of a winner's response map, of the layers that have them.
    """
    groups: list[list[str]] = [[]]
    held = 0
    for layer in run:
        need = _different_patches(run, layer, crop_of(run, layer, crop)) * _PATCH_BYTES
        need += int(run[layer].fired.sum()) * (_WINNER_BYTES + (maps or {}).get(layer, 0))
        if held + need > MAX_BYTES_IN_MEMORY and groups[-1]:
            groups.append([])
            held = 0
        groups[-1].append(layer)
        held += need
    return groups


def _different_patches(run: RunData, layer: str, crop: str) -> int:
    """Number of patches of a layer, those counted once that show the same box of an image."""
    top = run[layer]
    shown = top.images[top.fired][:, None]
    if crop != "image":
        shown = np.concatenate([shown, top.boxes[top.fired]], axis=1)
    return len(np.unique(shown, axis=0))


def images_of(run: RunData, layers: Sequence[str]) -> int:
    """Number of images that have winners in any of the layers."""
    return len(np.unique(np.concatenate([run[layer].images[run[layer].fired] for layer in layers])))


def _patch_size(units: int) -> int:
    """Pixels of one patch on a sheet of so many units: fewer for more units, to limit the size of the page."""
    return 64 if units <= 64 else 48 if units <= 256 else 40


def placeholder(top: LayerArrays, unit: int, rank: int, size: int) -> Image.Image:
    """Draw what stands in place of a patch: empty for a blank, struck out for a response that does not fire."""
    image = Image.new("RGB", (size, size), EMPTY)
    if top.images[unit, rank] >= 0:
        ImageDraw.Draw(image).line((0, size - 1, size - 1, 0), fill=EMPTY_MARK, width=max(1, size // 24))
    return image


def compose(top: LayerArrays, unit: int, cells: Cells, size: int) -> Image.Image:
    """Put a unit's tile together from patches {(unit, rank): patch}, each `size` pixels wide."""
    k = top.values.shape[1]
    columns, gap = tile_columns(k), _gap(size)
    image = Image.new("RGB", tile_shape(k, size), PAPER)
    draw = ImageDraw.Draw(image)
    for rank in range(k):
        left, upper = rank % columns * (size + gap), rank // columns * (size + gap)
        patch = cells.get((unit, rank))
        image.paste(patch or placeholder(top, unit, rank, size), (left, upper))
        if patch and _is_white(patch):
            draw.rectangle((left, upper, left + size - 1, upper + size - 1), outline=EMPTY_MARK)
    return image


def _is_white(patch: Image.Image) -> bool:
    """Whether the mean colour of a patch can hardly be told from the paper, so that a tile of such looks like a gap."""
    return min(np.asarray(patch.reduce(patch.size)).ravel().tolist()) > _WHITE


def _sheet(run: RunData, layer: str, units: Sequence[int], crop: str, size: int, cells: Cells) -> Image.Image:
    """Draw a page of tiles from patches {(unit, rank): patch}, each `size` pixels wide."""
    top = run[layer]
    wide, high = tile_shape(top.values.shape[1], size)
    text, margin = _text_and_margin(size)
    font, heading = ImageFont.load_default(text), ImageFont.load_default(round(1.5 * max(text, 13)))
    small = ImageFont.load_default(max(text, 12))
    columns = math.ceil(math.sqrt(len(units) * (1 if len(units) <= 9 else 1.6)))  # up to nine units make a square
    rows = math.ceil(len(units) / columns)
    lines = caption(run, top, units, crop)
    line_height = small.getbbox("Ag")[3] * 1.35
    head = round(margin + heading.getbbox("Ag")[3] * 1.4 + line_height * len(lines) + margin / 2)
    needed = max(math.ceil(small.getlength(line)) for line in lines)
    width = 2 * margin + max(columns * wide + (columns - 1) * margin, needed)
    below, (names, _) = _text_height(run, text), head_names(run, layer, units)
    page = Image.new("RGB", (width, head + rows * (high + below + margin) + margin // 2), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((margin, margin), fitting_name(layer, heading, width - 2 * margin), INK, heading)
    for number, line in enumerate(lines):
        draw.text((margin, margin + heading.getbbox("Ag")[3] * 1.4 + number * line_height), line, FAINT, small)
    classes = winner_classes(run, top, units) if run.class_folders else []
    for number, unit in enumerate(units):
        x, y = margin + number % columns * (wide + margin), head + number // columns * (high + below + margin)
        page.paste(compose(top, unit, cells, size), (x, y))
        remark, name = note(top, unit), unit_name(top, unit)
        if names:
            name = fitting_name(f"{name} {names[number]}", font, wide - math.ceil(font.getlength(f" {remark}")))
        draw.text((x, y + high + text * 0.25), name, INK, font)
        draw.text((x + wide, y + high + text * 0.25), remark, FAINT, font, anchor="ra")
        if classes:
            draw.text((x, y + high + text * 1.5), fitting_classes(classes[number], font, wide), FAINT, font)
    return page


def caption(run: RunData, top: LayerArrays, units: Sequence[int], crop: str) -> list[str]:
    """The lines below a sheet's heading."""
    info, field = top.info, top.info["receptive_field"]
    height, width = run.input_size
    extent = extent_text(field, f"{field['size'][1]} x {field['size'][0]} input pixels")
    shown = {
        "rf": f"a patch is the unit's receptive field, {extent}",
        "effective": f"a patch is the effective box, {info['effective_box']} input pixels wide, which holds 90% "
        f"of a response's squared gradient (the receptive field is {extent})",
        "image": f"a patch is the whole image (the receptive field is {extent})",
    }[crop]
    drawn = "" if len(units) == len(top) else f"{len(units):,} of "
    kept = f" (the run keeps {run.manifest['kept']:,})" if "kept" in run.manifest else ""
    lines = [
        f"{drawn}{len(top):,} {info['unit']}s, {map_text(info)}; the {run.manifest['k']} "
        f"strongest{kept} of {run.manifest['images']:,} images, at most one patch an image, strongest first",
        f"{shown}; the input is {width} x {height} pixels, plain grey is outside it",
    ]
    lines += head_names(run, top.name, units)[1]
    if run.class_folders:
        lines.append("below each tile: the classes of its images, which are the folders that they lie in")
    if (~top.fired).any():
        lines.append("struck out: the response is at most 0, so the ReLU that follows gives 0 (it did not fire)")
    statuses = set(top.status[list(units)].tolist())
    lines += [f"{name}: {meaning}" for name, meaning in STATUSES.items() if name in statuses]
    return lines


def head_names(run: RunData, layer: str, units: Sequence[int]) -> tuple[list[str], list[str]]:
    """The names of the classes of a head's units, and the line that tells their origin; none for other layers."""
    if (found := unit_names(run, layer)) is None:
        return [], []
    return [found[0][unit] for unit in units], [f"names of classes: {printable(found[1])}"]


def fitting_name(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """A name in one line of at most so many pixels: of a longer one the two ends, with an ellipsis between them."""
    name = printable(name)
    if len(name) <= _MAX_CHARACTERS and font.getlength(name) <= width:
        return name

    def ends(count: int) -> str:
        return f"{name[: count - count // 2]}\u2026{name[len(name) - count // 2 :]}"

    fits = bisect_right(
        range(min(len(name), _MAX_CHARACTERS)), float(width), key=lambda count: font.getlength(ends(count))
    )
    return ends(max(0, fits - 1))


def fitting_classes(classes: Mapping[str, int], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Counts by class in one line of at most so many pixels: where not all fit the first, and an ellipsis."""
    counts = list(classes.items())
    for number in range(len(counts), 0, -1):
        text = printable(classes_text(dict(counts[:number]))) + ("" if number == len(counts) else " \u2026")
        if len(text) <= _MAX_CHARACTERS and font.getlength(text) <= width:
            return text
    return fitting_name(classes_text(dict(counts[:1])), font, width)


def unit_name(top: LayerArrays, unit: int) -> str:
    """The name of a unit: a channel's number, or a neuron's channel/row/column."""
    if top.info["unit"] == "channel":
        return str(unit)
    height, width = top.info["height"], top.info["width"]
    return f"{unit // (height * width)}/{unit // width % height}/{unit % width}"


def note(top: LayerArrays, unit: int) -> str:
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


def tile_shape(k: int, size: int) -> tuple[int, int]:
    """Width and height in pixels of a tile of k patches."""
    columns = tile_columns(k)
    wide, high = (n * size + (n - 1) * _gap(size) for n in (columns, math.ceil(k / columns)))
    return wide, high


def _text_and_margin(size: int) -> tuple[int, int]:
    """Pixels of a tile's text and of the margin between tiles, on a sheet."""
    return max(10, size // 5), max(12, size // 3)


def _text_height(run: RunData, text: int) -> int:
    """Pixels below a tile, for text of so many: a line more where images lie in class folders."""
    return 3 * text if run.class_folders else 2 * text


def _checked_layer(run: RunData, layer: str, unit: int) -> LayerArrays:
    """The layer, if it has the unit; else raises UnitvisError."""
    top = run[layer]
    check_unit(layer, unit, len(top))
    return top
