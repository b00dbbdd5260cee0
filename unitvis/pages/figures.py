"""Figures for slides and papers: a few units of several layers on one page, in print resolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import nn

from unitvis import models
from unitvis.attribution.filters import first_filters
from unitvis.choices import FIGURES
from unitvis.drawing import sheets
from unitvis.drawing.colours import signed
from unitvis.drawing.page import PAPER, Page, page_dots
from unitvis.drawing.patches import Cells, crop_of
from unitvis.drawing.printing import Beside, Section, Words, printed
from unitvis.drawing.sheets import PATCH_SIZE
from unitvis.drawing.units import Units, checked_units, units_by_layer
from unitvis.errors import UnitvisError
from unitvis.pages.earlier import filter_of
from unitvis.pages.projections import method_asked_for, projected
from unitvis.results.arrays import LayerArrays, extent_text
from unitvis.results.data import RunData
from unitvis.results.same_model import checked_network

UNITS_PER_LAYER = 9  # if none are named


@torch.inference_mode(False)
def figure(
    run: RunData,
    layers: Sequence[str],
    style: str,
    units: Units = None,
    *,
    width: float | str | None = None,
    crop: str | None = None,
    model: nn.Module | str | models.Loaded | None = None,
    project: bool | str = True,
    device: torch.device | str | None = None,
) -> Page:
    """Draw a page of 3x3 tiles, nine units of each layer unless units are given.

    style: "lecture": patches, and without a width all layers from left to right; "paper" (Zeiler & Fergus 2013, figure
    2): each layer's projections, or the first layer's filters, to the left of the same units' patches or above them.
    units: numbers, of every layer, or {layer: numbers}. width: see `Run.sheet`; None: patches have 112 dots. project:
    "deconvnet" (or True) or "guided", see `unitvis.project`. model: computes those projections that the run's folder
    does not keep yet; without it, raises UnitvisError where any is missing.
    """
    if style not in FIGURES:
        raise UnitvisError(f"a figure is one of {', '.join(FIGURES)}, not {style!r}")
    dots = None if width is None else page_dots(width)
    run = sheets.drawable(run)
    sizes = {layer: len(run[layer]) for layer in layers}
    default = {layer: checked_units(layer, sizes[layer], _default_units(run[layer])) for layer in layers}
    named = default | units_by_layer(sizes, units)
    sheets.refuse_too_many(run, sum(len(named[layer]) for layer in layers), PATCH_SIZE)
    left: dict[str, Beside] = {}
    if style == "paper":
        if model is not None:
            model, _, _ = models.resolved(model)
            checked_network(run, model, device)
        left = _left_halves(run, named, crop, model, method_asked_for(project) or "deconvnet", device)
    sections = []
    for layer in layers:
        kind, (names, origin) = crop_of(run, layer, crop), sheets.head_names(run, layer, named[layer])
        lines = [_field_text(run, run[layer], kind), *origin]
        sections.append(Section(layer, named[layer], kind, lines, names=names, beside=left.get(layer)))
    slide = style == "lecture" and dots is None
    return printed(run, sections, Words(foot=_notes(run, style)), dots, len(layers) if slide else None)


def _default_units(top: LayerArrays) -> list[int]:
    """The first nine units that fire for all their winners, then the first of the others."""
    return np.argsort(~top.fired.all(axis=1), kind="stable")[:UNITS_PER_LAYER].tolist()


def _notes(run: RunData, style: str) -> list[str]:
    """The lines at the foot of the page."""
    k, images = run.manifest["k"], run.manifest["images"]
    return [
        f"Each tile is one unit: its {k} strongest patches of {images:,} images, at most one an image.",
        *(["Projections and filters: grey is 0, and each picture has its own scale."] if style == "paper" else []),
    ]


def _left_halves(
    run: RunData,
    units: Mapping[str, Sequence[int]],
    crop: str | None,
    model: nn.Module | None,
    method: str,
    device: torch.device | str | None,
) -> dict[str, Beside]:
    """What stands beside the patches of {layer: units}: filters of the first layer, else projections."""
    found = {}
    drawn = first_filters(model, run) if model is not None else {}
    for layer, chosen in units.items():
        top = run[layer]
        if top.info["unit"] != "channel":
            continue
        filters = {u: signed(drawn[layer][u]) if layer in drawn else filter_of(run, layer, u) for u in chosen}
        images = {unit: image for unit, image in filters.items() if image is not None}
        if len(images) == len(filters):
            found[layer] = Beside(partial(_filter_tile, top, images), "filters, the weights of a unit")
    others = {layer: chosen for layer, chosen in units.items() if layer not in found}
    cells: dict[str, Cells] = {layer: {} for layer in others}
    words = dict.fromkeys(others, "nothing, because no unit fired")
    for one in projected(run, others, method, crop, model, device):
        cells[one.layer] |= one.cells(run.manifest["k"])
        words[one.layer] = one.method
    return found | {layer: Beside(partial(_projections, run[layer], cells[layer]), words[layer]) for layer in others}


def _projections(top: LayerArrays, cells: Cells, unit: int, size: int) -> Image.Image:
    """Draw the tile of a unit's projections at `size` pixels each."""
    ranks = range(top.values.shape[1])
    own = {(unit, rank): cells[unit, rank].resize((size, size)) for rank in ranks if (unit, rank) in cells}
    return sheets.compose(top, unit, own, size)


def _filter_tile(top: LayerArrays, filters: Mapping[int, Image.Image], unit: int, size: int) -> Image.Image:
    """Draw a filter as large as the unit's tile."""
    weights, page = filters[unit], Image.new("RGB", sheets.tile_shape(top.values.shape[1], size), PAPER)
    scale = min(page.width / weights.width, page.height / weights.height)
    shape = max(1, round(weights.width * scale)), max(1, round(weights.height * scale))
    page.paste(weights.resize(shape, Image.Resampling.NEAREST))
    return page


def _field_text(run: RunData, top: LayerArrays, crop: str) -> str:
    """The line below a layer's name: the size of its receptive field, and of the crop where that is another."""
    field, (height, width) = top.info["receptive_field"], run.input_size
    size = extent_text(field, f"{field['size'][1]} x {field['size'][0]}").replace("unknown", "an unknown part")
    shown = {"rf": "", "effective": f"; {top.info['effective_box']} drawn", "image": "; the whole image drawn"}[crop]
    return f"sees {size} of {width} x {height} pixels{shown}"
