"""How layers stand on a page for print: as large as its width allows, with text that can be read, and little space."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageFont

from unitvis.drawing.page import MAX_PAGE_PIXELS, MAX_SIDE, MILLIMETRE, POINT, Page, page_dots
from unitvis.drawing.patches import Cells, LayerCuts, crop_of, patches_by_winner
from unitvis.drawing.sheets import (
    FAINT,
    INK,
    PATCH_SIZE,
    caption,
    compose,
    drawable,
    fitting_name,
    note,
    tile_shape,
    unit_name,
)
from unitvis.drawing.units import checked_units
from unitvis.errors import UnitvisError
from unitvis.results.data import RunData

LEAST_POINTS = 7.0  # size of the smallest text on a page of a given width
_POINTS = 9.0  # of the smallest text on a page without a given width, which is a slide as well
_HEADING, _TITLE = 1.4, 2.0  # sizes of larger text, times the smallest
_LINE = 1.3  # height of a line of text, times its size
_MARGIN = MILLIMETRE  # around a page of a given width, which has margins of its own around it
_WIDE_MARGIN = 6 * MILLIMETRE  # around another
_LEAST_PATCH = 2.5 * MILLIMETRE  # width of a patch, where the page is long enough
_LEAST_SECTION = 50 * MILLIMETRE  # width of a layer on a page without a given width, for the lines of text above it
_ASPECT = 1.45  # height of a page at most, where that leaves patches of the least width; times its width
_ROOM = 0.92  # of a line's width that its text takes at most: programs may show another font

DrawTile = Callable[[int, int], Image.Image]  # (unit, pixels of a patch) -> a picture as large as its tile


@dataclass(frozen=True)
class Beside:
    """What is drawn to the left of each tile, or above it, and what that is in words."""

    draw: DrawTile
    words: str


@dataclass(frozen=True)
class Section:
    """One layer of a page: the lines below its name, its units, and notes beside their numbers."""

    layer: str
    units: Sequence[int]
    crop: str
    lines: Sequence[str]
    notes: Sequence[str] = ()
    beside: Beside | None = None


@dataclass(frozen=True)
class Words:
    """The lines of a page: a title and what is told below it, and the notes at the foot."""

    title: str = ""
    told: Sequence[str] = ()
    foot: Sequence[str] = ()


@dataclass(frozen=True)
class Arrangement:
    """Layers in a row of the page, tiles in a row of a layer, whether halves stand below each other, a patch's dots."""

    layers: int
    tiles: int
    stacked: bool
    patch: int


def printed(
    run: RunData, sections: Sequence[Section], words: Words, width: int | None, layers: int | None = None
) -> Page:
    """Draw layers on a page.

    width: dots; the layers are arranged so that patches cover as much of the page as they can. None: patches have
    `PATCH_SIZE` dots, and `layers` layers stand in a row. Raises UnitvisError where the page would be too large.
    """
    layout = _Layout(run, sections, words, width)
    if width is None:
        tiles = max(math.ceil(math.sqrt(len(section.units))) for section in sections)
        chosen = Arrangement(layers or len(sections), max(1, tiles), stacked=False, patch=PATCH_SIZE)
    else:
        chosen = layout.best()
    return layout.page(chosen)


def printed_sheet(
    run: RunData, layer: str, units: Sequence[int] | None, *, crop: str | None, width: float | str
) -> Page:
    """Draw a page of tiles for print; see `Run.sheet`."""
    run, dots = drawable(run), page_dots(width)
    chosen, crop = checked_units(layer, len(run[layer]), units), crop_of(run, layer, crop)
    lines = caption(run, run[layer], chosen, crop)
    return printed(
        run, [Section(layer, chosen, crop, lines, [note(run[layer], unit) for unit in chosen])], Words(), dots
    )


class _Layout:
    """Places on a page; all lengths in dots."""

    def __init__(self, run: RunData, sections: Sequence[Section], words: Words, width: int | None) -> None:
        self._run, self._sections, self._words, self._width = run, sections, words, width
        self._k = run.manifest["k"]
        self._text = (_POINTS if width is None else LEAST_POINTS) * POINT
        self._heading = self._text * _HEADING
        self._margin = round(_WIDE_MARGIN if width is None else _MARGIN)
        self._halves = 2 if any(section.beside for section in sections) else 1
        font = self._font = ImageFont.load_default(self._text)
        self._names = [[unit_name(run[section.layer], unit) for unit in section.units] for section in sections]
        names = [font.getlength(name) for own in self._names for name in own]
        notes = [font.getlength(text) for section in sections for text in section.notes] or [0.0] * len(names)
        both = max((a + b + (b and self._text) for a, b in zip(names, notes, strict=True)), default=0.0)
        self._label_widths = both, max([*names, *notes], default=0.0)  # of name and note in one line, or in two

    def best(self) -> Arrangement:
        """The arrangement whose patches cover most of the page, with little left empty.

        Among those in which a patch has the least width and every unit's number fits below its tile; and of these
        those that are not too high, or else the least high.
        """
        found: list[tuple[tuple[bool, float, float], Arrangement]] = []
        most = max(1, *(len(section.units) for section in self._sections))
        for stacked in (False, True)[: self._halves]:
            for layers in range(1, len(self._sections) + 1):
                for tiles in range(1, most + 1):
                    patch = self._patch(layers, tiles, stacked)
                    if patch < _LEAST_PATCH and found:
                        break  # more tiles make it smaller still
                    arrangement = Arrangement(layers, tiles, stacked, max(1, patch))
                    found.append((self._rank(arrangement), arrangement))
        return min(found, key=lambda pair: pair[0])[1]

    def _rank(self, arrangement: Arrangement) -> tuple[bool, float, float]:
        """Less is better, see `best`."""
        assert self._width is not None  # noqa: S101 - for mypy
        wide, high = tile_shape(self._k, arrangement.patch)
        height, units = self._height(arrangement), sum(len(section.units) for section in self._sections)
        rows = self._rows(arrangement)
        places = sum(max(self._tile_rows(section, arrangement) for section in row) for row in rows)
        filled = units / max(1, places * arrangement.layers * arrangement.tiles)
        covered = units * self._halves * wide * high / (self._width * height)
        bad = arrangement.patch < _LEAST_PATCH or self._label_widths[1] > wide
        return bad, max(0.0, height - _ASPECT * self._width), -covered * filled**2

    def _patch(self, layers: int, tiles: int, stacked: bool) -> int:
        """The largest patch with which so many layers and tiles fit side by side."""
        assert self._width is not None  # noqa: S101 - for mypy
        room = self._width - 2 * self._margin

        def needed(patch: int) -> int:
            return self._section_width(tiles, stacked, patch) * layers + self._apart(stacked) * (layers - 1)

        return bisect_right(range(1, room), room, key=needed)

    def _apart(self, stacked: bool) -> int:
        """Between layers; more where their halves are apart as well."""
        return round(self._text * (3.5 if self._halves == 2 and not stacked else 1.5))

    def _section_width(self, tiles: int, stacked: bool, patch: int) -> int:
        half = tiles * tile_shape(self._k, patch)[0] + (tiles - 1) * _gap(patch)
        return half if stacked or self._halves == 1 else 2 * half + self._apart(True)

    def _step(self, arrangement: Arrangement) -> int:
        """The height of a row of tiles with its numbers and the space below."""
        wide, high = tile_shape(self._k, arrangement.patch)
        lines = 2 if any(section.notes for section in self._sections) and self._label_widths[0] > wide else 1
        if arrangement.stacked:
            high = 2 * high + _gap(arrangement.patch) // 2
        return round(high + lines * _LINE * self._text + _gap(arrangement.patch))

    def _rows(self, arrangement: Arrangement) -> list[Sequence[Section]]:
        return [
            self._sections[start : start + arrangement.layers]
            for start in range(0, len(self._sections), arrangement.layers)
        ]

    def _tile_rows(self, section: Section, arrangement: Arrangement) -> int:
        return math.ceil(len(section.units) / arrangement.tiles)

    def _height(self, arrangement: Arrangement) -> int:
        inner, section = self._inner(arrangement)
        height = self._words_height(inner) + 2 * self._margin
        for row in self._rows(arrangement):
            heads = max(self._head_height(own, arrangement, section) for own in row)
            tiles = max(self._tile_rows(own, arrangement) for own in row)
            height += heads + tiles * self._step(arrangement) + round(self._text)
        return height if self._words.foot else height - round(self._text) - _gap(arrangement.patch)

    def _inner(self, arrangement: Arrangement) -> tuple[int, int]:
        """Widths of the page within its margins, and of a layer."""
        if self._width is None:
            section = max(self._section_width(arrangement.tiles, False, arrangement.patch), round(_LEAST_SECTION))
            return (section + self._apart(False)) * arrangement.layers - self._apart(False), section
        inner = self._width - 2 * self._margin
        apart = self._apart(arrangement.stacked)
        return inner, (inner + apart) // arrangement.layers - apart

    def _words_height(self, inner: int) -> int:
        title = [self._text * _TITLE] * len(self._wrapped(self._title(), inner, self._text * _TITLE))
        told, foot = (self._wrapped(lines, inner, self._text) for lines in (self._words.told, self._words.foot))
        sizes = title + [self._text] * (len(told) + len(foot))
        return round(sum(_LINE * size for size in sizes) + (self._text if title or told else 0))

    def _title(self) -> list[str]:
        return [self._words.title] if self._words.title else []

    def _lines(self, section: Section, arrangement: Arrangement) -> list[str]:
        where = "above" if arrangement.stacked else "left"
        return [*section.lines, *([f"{where}: {section.beside.words}"] if section.beside else [])]

    def _head(self, section: Section, arrangement: Arrangement, width: int) -> tuple[str, float | None, list[str]]:
        """A layer's name, where the line beside it begins, None if it stands below, and the lines."""
        font = ImageFont.load_default(self._heading)
        name, lines = fitting_name(section.layer, font, round(width * _ROOM)), self._lines(section, arrangement)
        begin, line = font.getlength(name) + 1.5 * self._text, "; ".join(lines)
        if begin + self._font.getlength(line) <= width * _ROOM:
            return name, begin, [line]
        return name, None, self._wrapped(lines, width, self._text)

    def _head_height(self, section: Section, arrangement: Arrangement, width: int) -> int:
        _, begin, lines = self._head(section, arrangement, width)
        below = 0 if begin is not None else len(lines)
        return round(_LINE * (self._heading + below * self._text) + 0.5 * self._text)

    def _wrapped(self, lines: Iterable[str], width: int, size: float) -> list[str]:
        """Lines that are at most so wide, broken between words."""
        font, found = ImageFont.load_default(size), []
        for line in lines:
            whole = ""
            for word in line.split(" "):
                longer = f"{whole} {word}" if whole else word
                if whole and font.getlength(longer) > width * _ROOM:
                    found.append(whole)
                    longer = word
                whole = longer
            found.append(whole)
        return found

    def page(self, arrangement: Arrangement) -> Page:
        """Draw the page."""
        inner, width = self._inner(arrangement)
        page = Page(self._width or inner + 2 * self._margin, self._height(arrangement))
        if page.width * page.height > MAX_PAGE_PIXELS or max(page.width, page.height) > MAX_SIDE:
            units, (wide, high) = sum(len(section.units) for section in self._sections), page.millimetres
            raise UnitvisError(
                f"{units:,} units do not fit on one page, which would be {wide:,} x {high:,} mm; name fewer (units=, "
                "--units)"
            )
        cuts = {b.layer: LayerCuts(b.units, b.crop, arrangement.patch, arrangement.patch) for b in self._sections}
        cells = patches_by_winner(self._run, cuts)
        y = float(self._margin)
        title = self._wrapped(self._title(), inner, self._text * _TITLE)
        y = self._write(page, title, self._margin, y, self._text * _TITLE, INK)
        told = self._wrapped(self._words.told, inner, self._text)
        y = self._write(page, told, self._margin, y, self._text, FAINT) + (self._text if title or told else 0)
        names = iter(self._names)
        for row in self._rows(arrangement):
            head = max(self._head_height(section, arrangement, width) for section in row)
            for number, section in enumerate(row):
                x = self._margin + number * (width + self._apart(arrangement.stacked))
                name, begin, lines = self._head(section, arrangement, width)
                below = self._write(page, [name], x, y, self._heading, INK)
                if begin is not None:
                    page.write(lines[0], x + begin, y + self._heading, self._text, FAINT)
                else:
                    self._write(page, lines, x, below, self._text, FAINT)
                self._place(page, section, next(names), cells[section.layer], arrangement, (x, round(y) + head, width))
            y += head + max(self._tile_rows(own, arrangement) for own in row) * self._step(arrangement)
            y += round(self._text)
        self._write(page, self._wrapped(self._words.foot, inner, self._text), self._margin, y, self._text, FAINT)
        return page

    def _write(
        self, page: Page, lines: Iterable[str], x: float, y: float, size: float, colour: tuple[int, int, int]
    ) -> float:
        """Write lines below y; returns where the next one begins."""
        for line in lines:
            page.write(line, x, y + size, size, colour)
            y += _LINE * size
        return y

    def _place(
        self,
        page: Page,
        section: Section,
        names: Sequence[str],
        cells: Cells,
        arrangement: Arrangement,
        corner: tuple[int, int, int],
    ) -> None:
        """Put a layer's tiles on the page. corner: left, upper and the width of the layer."""
        top, size, (left, upper, width) = self._run[section.layer], arrangement.patch, corner
        wide, high = tile_shape(self._k, size)
        sides = 1 if arrangement.stacked or self._halves == 1 else 2
        half = (width - (sides - 1) * self._apart(True)) // sides
        if self._width is None:
            half = arrangement.tiles * (wide + _gap(size)) - _gap(size)
        for index, (unit, name) in enumerate(zip(section.units, names, strict=True)):
            column, row = index % arrangement.tiles, index // arrangement.tiles
            # Dots that are left over, fewer than patches in a row, go between the tiles.
            x = left + round(column * (half - wide) / max(1, arrangement.tiles - 1))
            y = upper + row * self._step(arrangement)
            places = [(x + side * (half + self._apart(True)), y) for side in range(sides)]
            if arrangement.stacked:
                places.append((x, y + high + _gap(size) // 2))
            page.place(compose(top, unit, cells, size), *places[-1])
            if section.beside:
                page.place(section.beside.draw(unit, size), *places[0])
            beside = section.notes[index] if section.notes else ""
            for place in places[1:] if arrangement.stacked else places:
                below = place[1] + high + 1.05 * self._text
                page.write(name, place[0], below, self._text, INK)
                if beside and self._label_widths[0] > wide:
                    page.write(beside, place[0], below + _LINE * self._text, self._text, FAINT)
                elif beside:
                    page.write(beside, place[0] + wide, below, self._text, FAINT, ends=True)


def _gap(patch: int) -> int:
    """Dots between tiles."""
    return max(8, patch // 5)
