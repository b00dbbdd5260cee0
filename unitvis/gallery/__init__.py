"""A run as pages: a folder to open from a disk, in any browser, without a server or a network."""

from __future__ import annotations

import hashlib
import html
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unitvis import models
from unitvis.drawing.patches import crop_of
from unitvis.errors import UnitvisError
from unitvis.files import replacing
from unitvis.gallery import facts, pictures
from unitvis.network.network import Network
from unitvis.results.data import RunData

MOST_UNITS = 200_000  # of files in a folder, and of tiles on a page
_HERE = Path(__file__).parent


@torch.inference_mode(False)
def gallery(
    run: RunData,
    path: str | Path,
    model: nn.Module | str | models.Loaded | None = None,
    *,
    project: bool = False,
    crop: str | None = None,
    device: torch.device | str | None = None,
) -> Path:
    """Write index.html and what it needs into a folder: a new one, the run's own, or one with a gallery in it.

    model: draws the winners' response maps and the first layer's filters as well, and with `project` the projections;
    without it, those of the run's own folder are kept. crop: as for sheets. Returns the path of index.html. Raises
    UnitvisError for a folder that holds anything else, and for images that are no longer those that were scanned.
    """
    units = sum(len(top) for top in run.tops.values())
    if units > MOST_UNITS:
        raise UnitvisError(
            f"a gallery of {units:,} units would be too large (more than {MOST_UNITS:,}); name fewer layers"
        )
    if project and model is None:
        raise UnitvisError("projections need the model; give it")
    if isinstance(model, str):
        model = models.load(model)
    if isinstance(model, models.Loaded):
        model = model.model
    if model is not None:
        _check_model(run, model, device)
    folder = _prepared(run, Path(path))
    drawn = _drawn_before(run, folder, crop)
    pictures.draw_patches(run, folder, crop)
    if model is not None:
        for layer in pictures.draw_filters(model, run, folder):
            drawn[layer]["filters"] = True
        for layer, kept in pictures.draw_responses(model, run, folder, device).items():
            drawn[layer]["responses"] = kept
        if project:
            for layer, method in pictures.draw_projections(model, run, folder, crop, device).items():
                drawn[layer]["projections"] = method
    return _write_pages(run, folder, drawn)


def _check_model(run: RunData, model: nn.Module, device: torch.device | str | None) -> None:
    found = Network(model, device=device).description["weights"]
    if found != (scanned := run.manifest["model"]["weights"]):
        raise UnitvisError(f"the model has other weights ({found}) than the one that was scanned ({scanned})")


def _prepared(run: RunData, folder: Path) -> Path:
    """The folder, made if need be; a gallery of another run in it goes, anything else in it is not touched."""
    if folder.exists() and not folder.is_dir():
        raise UnitvisError(f"{folder} is a file; a gallery is a folder: give another path")
    ours = (folder / "manifest.json").exists() or (folder / "gallery" / "drawn.json").exists()
    if folder.is_dir() and any(folder.iterdir()) and not ours:
        raise UnitvisError(
            f"{folder} is not empty and holds no gallery, so nothing is written there; give another path"
        )
    if pictures.read_drawn(folder).get("run") != _digest(run):
        shutil.rmtree(folder / "gallery", ignore_errors=True)
    try:
        (folder / "gallery").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnitvisError(f"cannot write into {folder}: {error.strerror}; give another path") from error
    return folder


def _drawn_before(run: RunData, folder: Path, crop: str | None) -> dict[str, dict[str, Any]]:
    """What was drawn with the model and still holds, by layer; fetched from the run's own folder if need be."""
    before = pictures.read_drawn(folder)
    if not before and run.folder is not None and run.folder != folder:
        before = pictures.read_drawn(run.folder)
        before = before if before.get("run") == _digest(run) else {}
        for layer in before.get("layers", {}):
            target = pictures.layer_folder(folder, layer)
            for file in pictures.layer_folder(run.folder, layer).glob("*-*"):
                shutil.copyfile(file, target / file.name)
    drawn: dict[str, dict[str, Any]] = {}
    for layer in run:
        drawn[layer] = before.get("layers", {}).get(layer, {})
        now = crop_of(run, layer, crop)
        if drawn[layer].get("crop") != now:
            drawn[layer].pop("projections", None)  # each is cut as its patch is
        drawn[layer]["crop"] = now
    return drawn


def _digest(run: RunData) -> str:
    """Which run it is: the model's weights and all winners."""
    digest = hashlib.blake2b(run.manifest["model"]["weights"].encode(), digest_size=16)
    for layer, top in run.tops.items():
        digest.update(layer.encode())
        for array in (top.values, top.images, top.positions):
            digest.update(array.tobytes())
    return digest.hexdigest()


def _write_pages(run: RunData, folder: Path, drawn: dict[str, dict[str, Any]]) -> Path:
    within = folder / "gallery"
    texts = {
        within / "drawn.json": json.dumps({"run": _digest(run), "layers": drawn}),
        within / "index.js": facts.script("unitvis.index", facts.index(run)),
        **{
            pictures.layer_folder(folder, layer) / "layer.js": facts.script(
                "unitvis.layer", facts.layer(run, layer, drawn[layer])
            )
            for layer in run
        },
        **{within / name: (_HERE / name).read_text(encoding="utf-8") for name in ("gallery.js", "gallery.css")},
    }
    page = (_HERE / "template.html").read_text(encoding="utf-8")
    texts[folder / "index.html"] = page.replace("TITLE", html.escape(facts.title(run)))  # last: then all is there
    for path, text in texts.items():
        with replacing(path) as part:
            part.write_text(text, encoding="utf-8")
    return folder / "index.html"
