"""How layers stand on a page for print: as large as its width allows, with text that can be read, and little space."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from unitvis.drawing.page import MAX_PAGE_PIXELS, MAX_SIDE, MILLIMETRE, POINT, Page, font, page_dots
from unitvis.drawing.patches import Cells, LayerCuts, crop_of, patches_by_winner
from unitvis.drawing.sheets import (
    FAINT,
    INK,
    PATCH_SIZE,
    caption,
    compose,
    drawable,
    fitting_classes,
    fitting_name,
    head_names,
    note,
    tile_shape,
    unit_name,
)
from unitvis.drawing.units import checked_units
from unitvis.errors import UnitvisError
from unitvis.results.classes import winner_classes
from unitvis.results.data import RunData

LEAST_POINTS = 7.0  # size of the smallest text on a page of a given width
_POINTS = 9.0  # of the smallest text on a page without a given width, which is a slide as well
_HEADING, _TITLE = 1.4, 2.0  # sizes of larger text, times the smallest
_LINE = 1.3  # height of a line of text, times its size
_MARGIN = MILLIMETRE  # around a page of a given width, which has margins of its own around it
_WIDE_MARGIN = 6 * MILLIMETRE  # around another
_LEAST_PATCH = 2.5 * MILLIMETRE  # width of a patch, where the page is long enough
_LEAST_SECTION = 50 * MILLIMETRE  # width of a layer on a page without a given width, for the lines of text above it
_ASPECT = 1.55  # height of a page at most, where that leaves patches of the least width; times its width, as A4's text
_WIDE = 2.0  # width of a page without a given width at most, times its height, where that is possible
_ROOM = 0.92  # of a line's width that its text takes at most: programs may show another font

DrawTile = Callable[[int, int], Image.Image]  # (unit, pixels of a patch) -> a picture as large as its tile


@dataclass(frozen=True)
class Beside:
    """What is drawn to the left of each tile, or above it, and what that is in words."""

    draw: DrawTile
    words: str


@dataclass(frozen=True)
class Section:
    """One layer of a page: the lines below its name, its units, and for each of them, or for none, what stands below.

    notes: beside its number; names: of its class, on a line of its own; classes: see `winner_classes`, on another.
    """

    layer: str
    units: Sequence[int]
    crop: str
    lines: Sequence[str]
    notes: Sequence[str] = ()
    names: Sequence[str] = ()
    classes: Sequence[Mapping[str, int]] = ()
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
    """Draw layers on a page, arranged so that patches cover as much of it as they can.

    width: dots; None: patches have `PATCH_SIZE` dots. layers: without a width, how many stand in a row, each with its
    tiles in a square; None: any number. Raises UnitvisError where the page would be too large.
    """
    layout = _Layout(run, sections, words, width)
    return layout.page(layout.best(layers))


def printed_sheet(
    run: RunData, layer: str, units: Sequence[int] | None, *, crop: str | None, width: float | str
) -> Page:
    """Draw a page of tiles for print; see `Run.sheet`."""
    run, dots = drawable(run), page_dots(width)
    chosen, crop = checked_units(layer, len(run[layer]), units), crop_of(run, layer, crop)
    top = run[layer]
    section = Section(
        layer,
        chosen,
        crop,
        caption(run, top, chosen, crop),
        [note(top, unit) for unit in chosen],
        head_names(run, layer, chosen)[0],
        winner_classes(run, top, chosen) if run.class_folders else (),
    )
    return printed(run, [section], Words(), dots)


class _Layout:
    """Places on a page; all lengths in dots."""

    def __init__(self, run: RunData, sections: Sequence[Section], words: Words, width: int | None) -> None:
        self._run, self._sections, self._words, self._width = run, sections, words, width
        self._k = run.manifest["k"]
        self._text = (_POINTS if width is None else LEAST_POINTS) * POINT
        self._heading = self._text * _HEADING
        self._between = round(1.5 * self._text)  # halves, and layers whose halves are not apart
        self._margin = round(_WIDE_MARGIN if width is None else _MARGIN)
        self._halves = 2 if any(section.beside for section in sections) else 1
        self._font = font(self._text)
        self._names = [[unit_name(run[section.layer], unit) for unit in section.units] for section in sections]
        names = [self._font.getlength(name) for own in self._names for name in own]
        notes = [self._font.getlength(text) for section in sections for text in section.notes] or [0.0] * len(names)
        both = max((a + b + (b and self._text) for a, b in zip(names, notes, strict=True)), default=0.0)
        self._label_widths = both, max([*names, *notes], default=0.0)  # of name and note in one line, or in two

    def best(self, layers: int | None) -> Arrangement:
        """The arrangement whose patches cover most of the page, with little left empty.

        Among those in which a patch has the least width and every unit's number fits below its tile; and of these
        those that are not too high or wide, or else those that are so least. layers: see `printed`.
        """
        found: list[tuple[tuple[bool, float, float], Arrangement]] = []
        counts = {len(section.units) for section in self._sections}
        if layers:
            return Arrangement(layers, max(1, math.ceil(math.sqrt(max(counts)))), stacked=False, patch=PATCH_SIZE)
        # How many tiles may stand in a row; where more of them make no fewer rows, they would only leave a hole.
        fewest = {tuple(-(-count // tiles) for count in counts): tiles for tiles in range(max(1, *counts), 0, -1)}
        for stacked in (False, True)[: self._halves]:
            for columns in range(1, len(self._sections) + 1):
                for tiles in sorted(fewest.values()):
                    patch = self._patch(columns, tiles, stacked)
                    if patch < _LEAST_PATCH and found:
                        break  # more tiles make it smaller still
                    arrangement = Arrangement(columns, tiles, stacked, max(1, patch))
                    found.append((self._rank(arrangement), arrangement))
        return min(found, key=lambda pair: pair[0])[1]

    def _rank(self, arrangement: Arrangement) -> tuple[bool, float, float]:
        """Less is better, see `best`."""
        wide, high = tile_shape(self._k, arrangement.patch)
        width, height = self._inner(arrangement)[0] + 2 * self._margin, self._height(arrangement)
        units = sum(len(section.units) for section in self._sections)
        rows = self._rows(arrangement)
        places = sum(max(self._tile_rows(section, arrangement) for section in row) for row in rows)
        filled = units / max(1, places * arrangement.layers * arrangement.tiles)
        covered = units * self._halves * wide * high / (width * height)
        bad = arrangement.patch < _LEAST_PATCH or self._label_widths[1] > wide
        too_wide = 0.0 if self._width else width - _WIDE * height
        return bad, max(0.0, height - _ASPECT * width, too_wide), -covered * filled**3

    def _patch(self, layers: int, tiles: int, stacked: bool) -> int:
        """The largest patch with which so many layers and tiles fit side by side."""
        if self._width is None:
            return PATCH_SIZE
        room = self._width - 2 * self._margin

        def needed(patch: int) -> int:
            return self._section_width(tiles, stacked, patch) * layers + self._apart(stacked) * (layers - 1)

        return bisect_right(range(1, room), room, key=needed)

    def _apart(self, stacked: bool) -> int:
        """Between layers; more where their halves stand side by side."""
        return self._between if stacked or self._halves == 1 else 2 * self._between

    def _section_width(self, tiles: int, stacked: bool, patch: int) -> int:
        half = tiles * tile_shape(self._k, patch)[0] + (tiles - 1) * _gap(patch)
        return half if stacked or self._halves == 1 else 2 * half + self._between

    def _step(self, arrangement: Arrangement) -> int:
        """The height of a row of tiles with its numbers and the space below."""
        wide, high = tile_shape(self._k, arrangement.patch)
        lines = 2 if any(section.notes for section in self._sections) and self._label_widths[0] > wide else 1
        lines += any(section.names for section in self._sections) + any(section.classes for section in self._sections)
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
        apart = self._apart(arrangement.stacked)
        if self._width is None:
            section = self._section_width(arrangement.tiles, arrangement.stacked, arrangement.patch)
            section = max(section, round(_LEAST_SECTION))
            return (section + apart) * arrangement.layers - apart, section
        inner = self._width - 2 * self._margin
        return inner, (inner + apart) // arrangement.layers - apart

    def _wrapped_words(self, inner: int) -> tuple[list[str], list[str], list[str]]:
        """The lines of the title, below it, and at the foot, on a page so wide within its margins."""
        title = [self._words.title] if self._words.title else []
        sizes = (title, self._text * _TITLE), (self._words.told, self._text), (self._words.foot, self._text)
        wrapped = [self._wrapped(lines, inner, size) for lines, size in sizes]
        return wrapped[0], wrapped[1], wrapped[2]

    def _words_height(self, inner: int) -> int:
        title, told, foot = self._wrapped_words(inner)
        lines = _TITLE * len(title) + len(told) + len(foot)
        return round((_LINE * lines + bool(title or told)) * self._text)

    def _lines(self, section: Section, arrangement: Arrangement) -> list[str]:
        where = "above" if arrangement.stacked else "left"
        return [*section.lines, *([f"{where}: {section.beside.words}"] if section.beside else [])]

    def _head(self, section: Section, arrangement: Arrangement, width: int) -> tuple[str, float | None, list[str]]:
        """A layer's name, where the line beside it begins, None if it stands below, and the lines."""
        heading = font(self._heading)
        name, lines = fitting_name(section.layer, heading, round(width * _ROOM)), self._lines(section, arrangement)
        begin, line = heading.getlength(name) + 1.5 * self._text, "; ".join(lines)
        if begin + self._font.getlength(line) <= width * _ROOM:
            return name, begin, [line]
        return name, None, self._wrapped(lines, width, self._text)

    def _head_height(self, section: Section, arrangement: Arrangement, width: int) -> int:
        _, begin, lines = self._head(section, arrangement, width)
        below = 0 if begin is not None else len(lines)
        return round(_LINE * (self._heading + below * self._text) + 0.5 * self._text)

    def _wrapped(self, lines: Iterable[str], width: int, size: float) -> list[str]:
        """Lines that are at most so wide, broken between words; a wider word is shortened."""
        found = []
        for line in lines:
            whole = ""
            for word in (fitting_name(word, font(size), round(width * _ROOM)) for word in line.split(" ")):
                longer = f"{whole} {word}" if whole else word
                if whole and font(size).getlength(longer) > width * _ROOM:
                    found.append(whole)
                    longer = word
                whole = longer
            found.append(whole)
        return found

    def page(self, arrangement: Arrangement) -> Page:
        """Draw the page."""
        inner, width = self._inner(arrangement)
        page = Page(inner + 2 * self._margin, self._height(arrangement))
        if page.width * page.height > MAX_PAGE_PIXELS or max(page.width, page.height) > MAX_SIDE:
            units, (wide, high) = sum(len(section.units) for section in self._sections), page.millimetres
            raise UnitvisError(
                f"{units:,} units do not fit on one page, which would be {wide:,.0f} x {high:,.0f} mm; name fewer "
                "(units=, --units)"
            )
        size = arrangement.patch
        cuts = {own.layer: LayerCuts(own.units, own.crop, size, size) for own in self._sections}
        cells = patches_by_winner(self._run, cuts)
        y = float(self._margin)
        title, told, foot = self._wrapped_words(inner)
        y = self._write(page, title, self._margin, y, self._text * _TITLE, INK)
        y = self._write(page, told, self._margin, y, self._text, FAINT)
        y += self._text if title or told else 0
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
        self._write(page, foot, self._margin, y, self._text, FAINT)
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
        half = (width - (sides - 1) * self._between) // sides
        if self._width is None:
            half = arrangement.tiles * (wide + _gap(size)) - _gap(size)
        for index, (unit, name) in enumerate(zip(section.units, names, strict=True)):
            column, row = index % arrangement.tiles, index // arrangement.tiles
            # Dots that are left over, fewer than patches in a row, go between the tiles.
            x = left + round(column * (half - wide) / max(1, arrangement.tiles - 1))
            y = upper + row * self._step(arrangement)
            places = [(x + side * (half + self._between), y) for side in range(sides)]
            if arrangement.stacked:
                places.append((x, y + high + _gap(size) // 2))
            page.place(compose(top, unit, cells, size), *places[-1])
            if section.beside:
                page.place(section.beside.draw(unit, size), *places[0])
            beside = section.notes[index] if section.notes else ""
            more = self._more(section, index, wide)
            for place in places[1:] if arrangement.stacked else places:
                below = place[1] + high + 1.05 * self._text
                page.write(name, place[0], below, self._text, INK)
                own = [beside, *more] if beside and self._label_widths[0] > wide else more
                if own is more and beside:
                    page.write(beside, place[0] + wide, below, self._text, FAINT, ends=True)
                for line, text in enumerate(own, 1):
                    if text:
                        page.write(text, place[0], below + line * _LINE * self._text, self._text, FAINT)

    def _more(self, section: Section, index: int, wide: int) -> list[str]:
        """What stands below a unit's number, shortened to the width of its tile: its class, its winners' classes."""
        room = round(wide * _ROOM)
        names = [fitting_name(section.names[index], self._font, room)] if section.names else []
        return names + ([fitting_classes(section.classes[index], self._font, room)] if section.classes else [])


def _gap(patch: int) -> int:
    """Dots between tiles."""
    return max(8, patch // 5)
