"""The gallery: a run as web pages in a folder, which a browser opens from the disk, without server or network."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unitvis import models
from unitvis.drawing.patches import crop_of
from unitvis.drawing.sheets import drawable
from unitvis.drawing.units import Units, units_by_layer
from unitvis.errors import UnitvisError
from unitvis.files import make_folder, replacing
from unitvis.pages import earlier, facts, pictures, projections, sprites, usual
from unitvis.results.data import RunData
from unitvis.results.drawn_files import remove_drawn, warn_of_kept
from unitvis.results.folder import holds_run
from unitvis.results.same_model import checked_network

MAX_UNITS = 200_000  # in all layers: each has its own tile on a page
_HERE = Path(__file__).parent


def gallery(
    run: RunData,
    path: str | Path,
    model: nn.Module | str | models.Loaded | None = None,
    *,
    project: bool | str = False,
    units: Units = None,
    crop: str | None = None,
    device: torch.device | str | None = None,
) -> Path:
    """Write a gallery into a folder (a new one, the run's own, or one with a gallery); returns the path of index.html.

    model: needed to draw the winners' response maps, the first layer's filters and, with `project`, projections;
    without it, those in the run's own folder are kept. project: "deconvnet" (or True) or "guided", see
    `unitvis.project`. units: of which projections are drawn: numbers, for every layer, or {layer: numbers}; None: all.
    The run's own folder keeps them, so that none is computed twice. crop: see `Run.patch`. Raises UnitvisError for a
    folder that holds anything else, for another model than was scanned, and for images that have changed since.
    """
    try:
        return draw(run, Path(path), model, project=project, units=units, crop=crop, device=device)[0]
    except OSError as error:
        raise UnitvisError(f"the gallery could not be written into {path}: {error}; give another path") from error


@torch.inference_mode(False)
def draw(
    run: RunData,
    path: Path,
    model: nn.Module | str | models.Loaded | None = None,
    *,
    project: bool | str = False,
    units: Units = None,
    crop: str | None = None,
    device: torch.device | str | None = None,
    with_sheets: bool = False,
) -> tuple[Path, list[Path]]:
    """Write a gallery as `gallery` does, and with_sheets the layers' sheets too, for which no picture is read again.

    Returns the path of index.html and those of the sheets.
    """
    run.need_winners()
    number = sum(len(top) for top in run.tops.values())
    if number > MAX_UNITS:
        raise UnitvisError(
            f"a gallery of {number:,} units would be too large (more than {MAX_UNITS:,}); name fewer layers"
        )
    method = projections.method_asked_for(project)
    if method and model is None:
        raise UnitvisError("projections need the model; give it")
    if units is not None and not method:
        raise UnitvisError("units are chosen for projections alone; ask for them (project=, --project)")
    every = {layer: range(len(run[layer])) for layer in run}
    chosen = units_by_layer({layer: len(own) for layer, own in every.items()}, every if units is None else units)
    network = None
    if model is not None:
        model, _, _ = models.resolved(model)
        network = checked_network(run, model, device)
    run = drawable(run)
    folder = _prepare_folder(run, path)
    drawn = _earlier_drawings(run, folder, crop)
    written, mapped = pictures.draw_run(run, folder, crop, network, with_sheets=with_sheets)
    for layer, size in mapped.items():
        drawn[layer]["responses"] = size
    if model is not None:
        for layer in pictures.draw_filters(model, run, folder):
            drawn[layer]["filters"] = True
        if method:
            found = projections.draw_projections(run, folder, chosen, method, crop, model, device)
            for layer in run:
                drawn[layer] |= found.get(layer, {"projections": None, "projected": None})
    sampled = usual.draw_sample(run, folder)
    return _write_pages(run, folder, drawn, sampled=sampled), written


def _prepare_folder(run: RunData, folder: Path) -> Path:
    """Create the folder and return it; removes a gallery of another run, and refuses a folder with anything else."""
    if folder.exists() and not folder.is_dir():
        raise UnitvisError(f"{folder} is a file; a gallery is a folder: give another path")
    is_known = holds_run(folder) or earlier.is_gallery(folder)
    if folder.is_dir() and any(folder.iterdir()) and not is_known:
        raise UnitvisError(
            f"{folder} is not empty and holds no gallery, so nothing is written there; give another path"
        )
    if not earlier.drawings(run, folder):
        warn_of_kept(folder, remove_drawn(folder, ["gallery"]))
    try:
        make_folder(folder / "gallery")
    except OSError as error:
        raise UnitvisError(f"cannot write into {folder}: {error.strerror}; give another path") from error
    return folder


def _earlier_drawings(run: RunData, folder: Path, crop: str | None) -> dict[str, dict[str, Any]]:
    """The entries of drawn.json by layer, for earlier pictures that are still valid.

    A folder without a gallery gets copies of those in the run's own folder.
    """
    before = earlier.drawings(run, folder)
    if not before and run.folder != folder:
        before = earlier.copy_drawings(run, folder)
    drawn: dict[str, dict[str, Any]] = {}
    for layer in run:
        drawn[layer] = before.get(layer, {})
        new_crop = crop_of(run, layer, crop)
        if drawn[layer].get("crop") != new_crop:
            drawn[layer] |= {"projections": None, "projected": None}  # a projection is cut to the same box as its patch
        drawn[layer]["crop"] = new_crop
    return drawn


def _write_pages(run: RunData, folder: Path, drawn: dict[str, dict[str, Any]], *, sampled: bool) -> Path:
    """Write the page, its script and style, and the run's data; returns the path of index.html.

    sampled: the images of the run's sample were drawn.
    """
    within = folder / "gallery"
    texts = {
        within / "drawn.json": json.dumps(earlier.described(run, drawn)),
        within / "index.js": facts.script(
            "unitvis.index", facts.index(run) | {"sample": usual.sample_entry(run) if sampled else None}
        ),
        within / "images.js": facts.script("unitvis.search.images", facts.images(run)),
        **{
            sprites.layer_folder(folder, layer) / "layer.js": facts.script(
                "unitvis.layer",
                facts.layer(run, layer, drawn[layer]) | {"usual": usual.usual_entries(run, layer) if sampled else None},
            )
            for layer in run
        },
        **{
            within / name: (_HERE / name).read_text(encoding="utf-8")
            for name in ("gallery.js", "search.js", "gallery.css")
        },
    }
    page = (_HERE / "template.html").read_text(encoding="utf-8")
    texts[folder / "index.html"] = page.replace("TITLE", html.escape(facts.title(run)))  # last, when all else exists
    for path, text in texts.items():
        with replacing(path) as target:
            target.write_text(text, encoding="utf-8", errors="backslashreplace")
    return folder / "index.html"
