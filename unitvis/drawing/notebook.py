"""How results show themselves in a notebook: small, so that a cell does not outweigh the notebook."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unitvis.errors import UnitvisError

if TYPE_CHECKING:
    from unitvis.run import LayerTop, Run

PATCH = 56  # pixels of a patch of one unit; of a layer's nine units half as many


def png(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True, eq=False)
class Unit:
    """One unit's top-k: `run["features.10"][12]`."""

    layer: LayerTop
    number: int

    @property
    def values(self) -> NDArray[np.float32]:
        """[k], descending; NaN where blank."""
        return self.layer.values[self.number]

    @property
    def images(self) -> NDArray[np.int64]:
        """[k]; -1 where blank."""
        return self.layer.images[self.number]

    @property
    def positions(self) -> NDArray[np.int32]:
        """[k, 2]: row, column; -1 where blank."""
        return self.layer.positions[self.number]

    @property
    def boxes(self) -> NDArray[np.int32]:
        """[k, 4]: left, top, right, bottom in model-input pixels; 0 where blank."""
        return self.layer.boxes[self.number]

    @property
    def status(self) -> str:
        """separated, tied or unseparated."""
        return str(self.layer.status[self.number])

    def tile(self, *, crop: str | None = None, size: int = 96) -> Image.Image:
        """The unit's patches, strongest first; `size` is one patch's."""
        return _run(self.layer).tile(self.layer.name, self.number, crop=crop, size=size)

    def __repr__(self) -> str:
        values = " ".join(f"{value:.4g}" for value in self.values)
        return f"<unit {self.number} of {self.layer.name}: {self.status}, {values}>"

    def _repr_png_(self) -> bytes | None:
        try:
            return png(self.tile(size=PATCH))
        except UnitvisError:  # its images cannot be read: the words have to do
            return None


def _run(top: LayerTop) -> Run:
    if top.run is None:
        raise UnitvisError(f"layer {top.name!r} belongs to no run, so there are no images to cut patches from")
    return top.run


def layer_html(top: LayerTop) -> str:
    """A layer in words, and its first nine units where their images can be read."""
    words = f"<p>{html.escape(_described(top))}</p>"
    try:
        page = _run(top).sheet(top.name, list(range(min(9, len(top)))), size=PATCH // 2)
    except UnitvisError:
        return words
    file = io.BytesIO()
    page.save(file, "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    return f'{words}<img alt="patches of the first units" src="data:image/jpeg;base64,{data}">'


def run_html(run: Run) -> str:
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


def _described(top: LayerTop) -> str:
    k = top.values.shape[1]
    return f"{top.name}: the {k} strongest images of {len(top):,} {top.info['unit']}s, {int(top.dead.sum())} dead"
