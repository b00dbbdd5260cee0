"""How results show themselves in a notebook: small, so that a cell does not outweigh the notebook."""

from __future__ import annotations

import base64
import html
import io

from PIL import Image

from unitvis.drawing.sheets import sheet
from unitvis.errors import UnitvisError
from unitvis.results.arrays import LayerArrays
from unitvis.results.data import RunData

PATCH = 56  # pixels of a patch of one unit; of a layer's nine units half as many


def png(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def layer_html(top: LayerArrays, run: RunData | None) -> str:
    """A layer in words, and its first nine units where their images can be read."""
    words = f"<p>{html.escape(_described(top))}</p>"
    if run is None:
        return words
    try:
        page = sheet(run, top.name, range(min(9, len(top))), crop=None, size=PATCH // 2)
    except UnitvisError:
        return words
    file = io.BytesIO()
    page.save(file, "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    return f'{words}<img alt="patches of the first units" src="data:image/jpeg;base64,{data}">'


def run_html(run: RunData) -> str:
    """A run as a table of its layers."""
    head = "".join(f"<th>{name}</th>" for name in ("layer", "units", "map", "receptive field", "dead"))
    rows = []
    for top in run.tops.values():
        size = top.info["receptive_field"]["size"]
        cells = (
            html.escape(top.name),
            f"{len(top):,}",
            f"{top.info['height']} x {top.info['width']}",
            "whole image" if top.info["receptive_field"]["whole_image"] else f"{size[0]} x {size[1]}",
            int(top.dead.sum()),
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<p>{html.escape(repr(run).strip('<>'))}</p><table><tr>{head}</tr>{''.join(rows)}</table>"


def _described(top: LayerArrays) -> str:
    k = top.values.shape[1]
    return f"{top.name}: the {k} strongest images of {len(top):,} {top.info['unit']}s, {int(top.dead.sum())} dead"
