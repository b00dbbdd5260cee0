"""What is usual for a unit, beside its winners: the run's sample as one picture, and each unit's histogram."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unitvis.decoding.cutting import Cut, Cuts, cut
from unitvis.decoding.mosaic import Encoding, cell_scan, joined
from unitvis.drawing.hands import Hands
from unitvis.drawing.sheets import EMPTY
from unitvis.errors import UnitvisError
from unitvis.files import unoccupied
from unitvis.pages.facts import json_number
from unitvis.results.data import RunData
from unitvis.results.sample import Sample

FILE = "sample.jpg"  # in the gallery's folder: all images of the sample, in their order, row by row
CELL = 96  # pixels that an image is wide and high there
COLUMNS = 16  # images side by side, at most
BINS = 24  # of a histogram
_QUARTERS = (0.75, 0.25)  # quantiles that are shown beside the images around the median
_ENCODING = Encoding(80, subsampled=True)


def draw_sample(run: RunData, folder: Path) -> bool:
    """Write the images of a run's sample as one small picture into a gallery; False where there is none.

    A warning tells of an image that cannot be read or has changed: then none is drawn.
    """
    path = unoccupied(folder / "gallery" / FILE)
    if run.sample is None or not len(run.winners):
        return False
    try:
        scans = _scans(run, run.sample, folder / "gallery" / "images")
    except UnitvisError as error:
        warnings.warn(f"no typical images are drawn, because one of them cannot be used: {error}")
        return False
    columns = min(COLUMNS, len(scans))
    scans += [cell_scan(Image.new("RGB", (CELL, CELL), EMPTY), _ENCODING)] * (-len(scans) % columns)
    rows = [scans[start : start + columns] for start in range(0, len(scans), columns)]
    path.write_bytes(joined(rows, CELL, _ENCODING))
    return True


def _scans(run: RunData, sample: Sample, images: Path) -> list[bytes]:
    """What the model sees of each image of the sample, as cells; UnitvisError about one that has changed.

    images: the folder with what the model sees of winning images that were drawn: no file of those is read again.
    """
    height, width = run.input_size
    whole = Cuts([Cut((0, 0, width, height), CELL, None, _ENCODING)])
    ids, winners = sample.images.tolist(), set(run.winners.tolist())
    shown = {id for id in ids if id in winners and (images / f"{id}.jpg").is_file()}  # not those of dead units alone
    hashes = dict(zip(ids, sample.hashes.tolist(), strict=True))
    others = {id: {"id": id, "name": run.source.name(id), "hash": hashes[id] or None} for id in ids if id not in shown}
    scans = {id: cell_scan(_reduced(images / f"{id}.jpg", width, height), _ENCODING) for id in ids if id in shown}
    with Hands(run, len(others), others) as hands:
        for id, pieces in hands.cut(((id, whole) for id in others), len(others)):
            scans[id] = pieces.patches[0].scan or b""
    return [scans[id] for id in ids]


def _reduced(path: Path, width: int, height: int) -> Image.Image:
    """A picture of the model's whole input, of so many pixels, as a cell."""
    with Image.open(path) as picture:
        return cut(picture, lambda box: (0, 0, *picture.size), (0, 0, width, height), (height, width), CELL)


def sample_entry(run: RunData) -> dict[str, Any] | None:
    """What the pages say of a sample that was drawn: the names of its images, and how many stand side by side."""
    if run.sample is None:
        return None
    ids = run.sample.images.tolist()
    return {"names": [run.source.name(id) for id in ids], "columns": min(COLUMNS, len(ids)), "file": FILE}


def usual_entries(run: RunData, layer: str) -> list[dict[str, Any] | None]:
    """For each unit {"counts", "extent", "images", "left_out"}; None for one that gives NaN alone.

    counts: how many images lie in each of equal parts of the extent, [smallest, largest]. images: [place in the
    sample, value] of the one at the upper quartile, those around the median, and the one at the lower quartile.
    """
    return [_usual_entry(run, layer, unit) for unit in range(len(run[layer]))]


def _usual_entry(run: RunData, layer: str, unit: int) -> dict[str, Any] | None:
    sample = run.sample
    if sample is None or np.isnan(sample.responses[layer][:, unit]).all():
        return None
    found = sample.typical(layer, unit, _QUARTERS)
    counts, edges, left_out = sample.histogram(layer, unit, BINS, float(run[layer].values[unit, 0]))
    ids = [found.images[0], *found.middle_images, found.images[1]]
    values = [found.values[0], *found.middle_values, found.values[1]]
    places = np.searchsorted(sample.images, ids).tolist()
    return {
        "counts": counts.tolist(),
        "extent": [json_number(edges[0]), json_number(edges[-1])],
        "images": [[place, json_number(value)] for place, value in zip(places, values, strict=True)],
        "left_out": left_out,
    }
