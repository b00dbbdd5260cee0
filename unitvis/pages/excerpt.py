"""An excerpt: chosen units of a run as one HTML file with all its pictures, without scripts, to be sent on."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from unitvis.drawing.hands import Hands
from unitvis.drawing.patches import Cells, LayerCuts, crop_of, cut_layers, drawn_box, fired_winners
from unitvis.drawing.sheets import drawable, tile_columns, unit_name
from unitvis.drawing.units import Units, units_by_layer
from unitvis.errors import UnitvisError, printable
from unitvis.files import replacing
from unitvis.pages import facts
from unitvis.results.arrays import LayerArrays
from unitvis.results.data import RunData
from unitvis.version import __version__

MAX_UNITS = 64  # in one file; of nine winners each, they take about 20 MB
PATCH_SIDE = 240  # pixels of a patch, which is drawn half as wide, for dense screens and print
WHOLE_SIDE = 320  # pixels of a whole image's longer side, at most
_QUALITY = 88  # of the pictures, as JPEG
_HERE = Path(__file__).parent


def excerpt(run: RunData, path: str | Path, units: Units, *, crop: str | None = None) -> Path:
    """Write chosen units into one HTML file that needs no other file and no network; returns its path.

    units: {layer: numbers}, or numbers, of every layer. crop: see `Run.patch`. Raises UnitvisError for more than
    `MAX_UNITS` units, for a unit or layer that the run does not have, and for images that have changed since the scan.
    """
    target = _checked_target(Path(path))
    run = drawable(run)
    run.need_winners()
    chosen = units_by_layer({layer: len(run[layer]) for layer in (units if isinstance(units, Mapping) else run)}, units)
    chosen = {layer: list(dict.fromkeys(numbers)) for layer, numbers in chosen.items()}
    if (number := sum(map(len, chosen.values()))) > MAX_UNITS:
        raise UnitvisError(
            f"an excerpt holds at most {MAX_UNITS} units, so that it can be sent, not {number:,}; name fewer"
        )
    if not number:
        raise UnitvisError("no unit was named; name one, such as {layer: [0, 1]}")
    page = _page(run, chosen, crop)
    try:
        with replacing(target) as part:
            part.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UnitvisError(
            f"{target} could not be written: {error.strerror or error}; make room there, or give another path"
        ) from error
    return target


def _checked_target(target: Path) -> Path:
    """The path, if a page can be written there; else raises UnitvisError, before anything is drawn."""
    if target.suffix.lower() not in (".html", ".htm"):
        raise UnitvisError(f"{target} must end in .html")
    if not target.parent.is_dir():
        raise UnitvisError(f"there is no folder {target.parent} to write {target.name} into")
    if target.is_dir():
        raise UnitvisError(f"{target} is a folder; name a file")
    return target


class _Wholes:
    """Keeps the whole images of winners, as JPEG files of at most `WHOLE_SIDE` pixels a side."""

    def __init__(self) -> None:
        self.files: dict[int, bytes] = {}  # by image

    def wants_input(self, image: int) -> bool:
        return False

    def take(self, image: int, whole: bytes, model_input: NDArray[Any] | None) -> None:
        picture = Image.open(io.BytesIO(whole))
        picture.thumbnail((WHOLE_SIDE, WHOLE_SIDE))
        self.files[image] = _jpeg(picture)


def _page(run: RunData, chosen: Mapping[str, Sequence[int]], crop: str | None) -> str:
    """Make the whole page."""
    crops = {layer: crop_of(run, layer, crop) for layer in chosen}
    wanted = {layer: LayerCuts(units, crops[layer], PATCH_SIDE, PATCH_SIDE) for layer, units in chosen.items()}
    images = set().union(*(fired_winners(run, layer, units) for layer, units in chosen.items()))
    wholes = _Wholes()
    with Hands(run, len(images)) as hands:
        cells = {layer: patches for layer, patches, _ in cut_layers(run, wanted, hands, wholes)}
    sections = [
        section
        for layer, units in chosen.items()
        for section in _layer_sections(run, layer, units, crops[layer], cells[layer], wholes.files)
    ]
    names = ", ".join(f"{layer}/{unit_name(run[layer], unit)}" for layer, units in chosen.items() for unit in units)
    page = (_HERE / "excerpt.html").read_text(encoding="utf-8")
    parts = {
        "TITLE": _text(f"{names} of {facts.title(run)}"),
        "STYLE": (_HERE / "excerpt.css").read_text(encoding="utf-8"),
        "HEADING": _text(facts.title(run)),
        "RUN": _text(_summary(run, chosen)),
        "KEYS": "".join(f'<span class="key {kind}">{_text(words)}</span>' for kind, words in _keys(run, crops).items()),
        "VERSION": _text(__version__),
        "SECTIONS": "\n".join(sections),
    }
    before, *rest = page.split("$")  # the template holds $NAME$ where a part stands
    return before + "".join(parts[piece] if index % 2 == 0 else piece for index, piece in enumerate(rest))


def _summary(run: RunData, chosen: Mapping[str, Sequence[int]]) -> str:
    """The line below the page's title: what the units are chosen from, and which images were ranked."""
    height, width = run.input_size
    shown, every = sum(map(len, chosen.values())), sum(len(top) for top in run.tops.values())
    return (
        f"{shown:,} of {every:,} units, each with the {facts.strongest(run.manifest)} of "
        f"{facts.images_text(run.manifest)}; the model's input is {width} x {height} pixels."
    )


def _keys(run: RunData, crops: Mapping[str, str]) -> dict[str, str]:
    """What the frames in whole images mean, by kind, of those that are drawn."""
    keys = {}
    if any(run[layer].info["receptive_field"]["method"] != "unknown" for layer in crops):
        keys["field"] = "receptive field: the pixels that can change the response"
    if "effective" in crops.values():
        keys["effective"] = "effective box: what the patch shows where the receptive field is large"
    return keys


def _text(words: str) -> str:
    """Words as they stand in HTML, in an attribute too; control characters and directions of writing are shown."""
    return html.escape(printable(words))


def _layer_sections(
    run: RunData, layer: str, units: Sequence[int], crop: str, cells: Cells, wholes: Mapping[int, bytes]
) -> Iterator[str]:
    """Yield a layer's heading with what its pictures show, then each of its units."""
    data = facts.layer(run, layer, {"crop": crop})
    answers = "".join(f"<dt>{_text(asked)}</dt><dd>{_text(answer)}</dd>" for asked, answer in data["answers"])
    details = f"<details><summary>What is this?</summary><dl>{answers}</dl></details>"
    yield f'<section class="layer"><h2>{_text(layer)}</h2><p>{_text(facts.layer_line(run, run[layer]))}</p>{details}'
    for unit in units:
        yield _unit_article(run, data, unit, crop, cells, wholes)
    yield "</section>"


def _unit_article(
    run: RunData, data: Mapping[str, Any], unit: int, crop: str, cells: Cells, wholes: Mapping[int, bytes]
) -> str:
    """Make one unit: its number and class, what is unusual of it, its winners and their classes.

    data: see `facts.layer`.
    """
    top = run[data["name"]]
    note = data["notes"][unit]
    fired = [rank for rank in range(top.values.shape[1]) if top.fired[unit, rank]]
    name = f": {data['names'][unit]}" if data["names"] else ""
    parts = [f"<h3>{_text(top.name)} <span>unit {_text(unit_name(top, unit) + name)}</span></h3>"]
    if note:
        parts.append(f"<p><em>{_text(note)}</em>: {_text(facts.explanations()[note])}.</p>")
    if data["classes"] and data["classes"][unit]:
        parts.append(f"<p>Its images by class: {_text(data['classes'][unit])}.</p>")
    winners = [_winner(run, top, data, unit, rank, crop, cells, wholes) for rank in fired]
    if winners:
        parts.append(f'<ol style="--across:{tile_columns(top.values.shape[1])}">{"".join(winners)}</ol>')
    rest = data["winners"][unit][len(fired) :]
    if rest:
        words = ", ".join(f"{data['images'][image]} ({_number(value)})" for value, image, *_ in rest)
        parts.append(f"<p>Did not fire: {_text(words)}.</p>")
    return f"<article>{''.join(parts)}</article>"


def _winner(
    run: RunData,
    top: LayerArrays,
    data: Mapping[str, Any],
    unit: int,
    rank: int,
    crop: str,
    cells: Cells,
    wholes: Mapping[int, bytes],
) -> str:
    """Make one winner: its patch, and the whole image with the receptive field and what the patch shows."""
    value, image, row, column, *box = data["winners"][unit][rank]
    name = data["images"][image]
    frames = _frame("field", box, run.input_size) if data["boxes"] else ""
    if crop == "effective":
        frames += _frame("effective", drawn_box(top, unit, rank, crop, run.input_size), run.input_size)
    height, width = run.input_size
    where = f"row {row}, column {column}"
    return (
        f'<li><img class="patch" src="{_url(_jpeg(cells[unit, rank]))}" alt="{_text(f"Patch of {name}")}">'
        f'<div class="scene" style="aspect-ratio:{width}/{height}"><img src="{_url(wholes[image])}" '
        f'alt="{_text(f"Whole image {name}")}">{frames}</div>'
        f"<p><b>{rank + 1}. {_number(value)}</b> {where}</p><p>{_text(name)}</p></li>"
    )


def _frame(kind: str, box: Sequence[int], size: tuple[int, int]) -> str:
    """Draw a box over the whole image, as far as it lies in it. size: (height, width) of the model's input."""
    left, upper, right, lower = box
    ends = upper / size[0], 1 - right / size[1], 1 - lower / size[0], left / size[1]  # as CSS's inset has them
    inset = " ".join(f"{100 * min(1.0, max(0.0, end)):.3f}%" for end in ends)
    return f'<span class="frame {kind}" style="inset:{inset}"></span>'


def _jpeg(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def _url(data: bytes) -> str:
    """A JPEG file as a data URL."""
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def _number(value: float | str) -> str:
    """A response with four digits; an infinite one is a word."""
    return f"{float(value):.4g}"
