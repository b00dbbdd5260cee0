"""HTML and PNG representations for notebooks, kept small so that a cell does not bloat the notebook's file."""

from __future__ import annotations

import base64
import html
import io

from PIL import Image

from unitvis.drawing.sheets import sheet
from unitvis.errors import UnitvisError
from unitvis.results.arrays import LayerArrays, extent_text
from unitvis.results.data import RunData

PATCH_SIZE = 56  # pixels of a patch in a unit's tile; half of it in a layer's sheet of nine units


def png(image: Image.Image) -> bytes:
    """Encode a picture as PNG."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def layer_html(top: LayerArrays, run: RunData | None) -> str:
    """Describe a layer, with a sheet of its first nine units if their images can be read."""
    words = f"<p>{html.escape(_summary(top))}</p>"
    if run is None:
        return words
    try:
        page = sheet(run, top.name, range(min(9, len(top))), crop=None, size=PATCH_SIZE // 2)
    except UnitvisError:
        return words
    file = io.BytesIO()
    page.save(file, "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    return f'{words}<img alt="patches of the first units" src="data:image/jpeg;base64,{data}">'


def run_html(run: RunData) -> str:
    """Describe a run by a table of its layers."""
    head = "".join(f"<th>{name}</th>" for name in ("layer", "units", "map", "receptive field", "dead"))
    rows = []
    for top in run.tops.values():
        size = top.info["receptive_field"]["size"]
        cells = (
            html.escape(top.name),
            f"{len(top):,}",
            f"{top.info['height']} x {top.info['width']}",
            extent_text(top.info["receptive_field"], f"{size[0]} x {size[1]}"),
            int(top.dead.sum()),
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<p>{html.escape(repr(run).strip('<>'))}</p><table><tr>{head}</tr>{''.join(rows)}</table>"


def _summary(top: LayerArrays) -> str:
    k = top.values.shape[1]
    return f"{top.name}: the {k} strongest images of {len(top):,} {top.info['unit']}s, {int(top.dead.sum())} dead"
