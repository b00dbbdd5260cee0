"""Pages for print: pictures and text at places in dots, saved as PNG, JPEG, WebP, SVG (text as text) or PDF."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from xml.sax.saxutils import escape

from PIL import Image, ImageDraw, ImageFont

from unitvis.errors import UnitvisError, printable
from unitvis.files import replacing

DPI = 300  # dots an inch: the unit of lengths on a page, and the resolution of its pictures
POINT = DPI / 72  # dots of a typographic point
MILLIMETRE = DPI / 25.4  # dots
PAPER, FRAME = (255, 255, 255), (205, 205, 205)  # colours of a page and of the line around pictures, most of all white
PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # formats of pixels alone, by ending
ENDINGS = (*PICTURES, ".svg", ".pdf")  # of the files that a page is saved as
MAX_PAGE_PIXELS = 100_000_000  # of a picture; PNG files of more are not opened by many programs
_MAX_SIDES = {"JPEG": 65_500, "WEBP": 16_383}  # pixels
MAX_SIDE = 32_000  # dots of a page's side: half of what a JPEG picture has, which a PDF holds
_JPEG = {"quality": 95, "subsampling": 0}  # text and the edges of patches are not blurred
_UNITS = {"mm": 1.0, "cm": 10.0, "in": 25.4}  # millimetres
_WIDTHS = 40.0, 1000.0  # millimetres: of a page, at least and at most
_NO_XML = re.compile("[\ufffe\uffff]")  # characters that `printable` leaves and XML does not allow


@dataclass(frozen=True)
class _Text:
    x: float
    y: float  # of the line on which the letters stand
    text: str
    size: float  # of the font, dots
    colour: tuple[int, int, int]
    ends: bool  # the text ends at x, instead of starting there


@dataclass(eq=False)
class Page:
    """A page of pictures and text for print; `width` and `height` in dots, of which an inch has `DPI`."""

    width: int
    height: int
    _frames: list[tuple[int, int, int, int]] = field(default_factory=list, repr=False)  # left, upper, right, lower
    _pictures: list[tuple[int, int, Image.Image]] = field(default_factory=list, repr=False)  # left, upper, pixels
    _texts: list[_Text] = field(default_factory=list, repr=False)

    @property
    def millimetres(self) -> tuple[float, float]:
        """Width and height, to a tenth."""
        return round(self.width / MILLIMETRE, 1), round(self.height / MILLIMETRE, 1)

    def place(self, picture: Image.Image, x: int, y: int) -> None:
        """Put a picture's upper left corner at a place, with a hairline around it; a pixel takes a dot."""
        self._frames.append((x - 1, y - 1, x + picture.width + 1, y + picture.height + 1))
        self._pictures.append((x, y, picture))

    def write(
        self, text: str, x: float, y: float, size: float, colour: tuple[int, int, int], *, ends: bool = False
    ) -> None:
        """Put a line of text on the line y, from x, or with `ends` up to x. size: of the font in dots."""
        self._texts.append(_Text(x, y, printable(text), size, colour, ends))

    def image(self, scale: int = 1) -> Image.Image:
        """Paint the page at `scale` pixels a dot: text gets sharper, and pictures as many pixels larger."""
        page = Image.new("RGB", (self.width * scale, self.height * scale), PAPER)
        draw = ImageDraw.Draw(page)
        for left, upper, right, lower in self._frames:
            draw.rectangle((left * scale, upper * scale, right * scale - 1, lower * scale - 1), FRAME)
        for x, y, picture in self._pictures:
            size = picture.width * scale, picture.height * scale
            page.paste(picture.resize(size, Image.Resampling.NEAREST), (x * scale, y * scale))
        for one in self._texts:
            place, anchor = (one.x * scale, one.y * scale), "rs" if one.ends else "ls"
            draw.text(place, one.text, one.colour, font(one.size * scale), anchor=anchor)
        return page

    def svg(self) -> str:
        """Write the page as SVG that needs no other file: text as text, in an embedded font, and pictures as JPEG."""
        wide, _ = self.millimetres
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{wide:g}mm" '
            f'height="{wide * self.height / self.width:.3f}mm" viewBox="0 0 {self.width} {self.height}">',
            f"<style>{_font_face()}text{{font-family:Aileron,Helvetica,Arial,sans-serif;white-space:pre}}</style>",
            f'<rect width="{self.width}" height="{self.height}" fill="#fff"/>',
        ]
        for left, upper, right, lower in self._frames:
            place = f'x="{left}" y="{upper}" width="{right - left}" height="{lower - upper}"'
            parts.append(f'<rect {place} fill="#{bytes(FRAME).hex()}"/>')
        for x, y, picture in self._pictures:
            data = base64.b64encode(_encoded(picture, "JPEG", **_JPEG)).decode()
            parts.append(  # SVG 1.1's xlink:href is what editors of drawings read
                f'<image x="{x}" y="{y}" width="{picture.width}" height="{picture.height}" '
                f'xlink:href="data:image/jpeg;base64,{data}"/>'
            )
        for one in self._texts:
            anchor = ' text-anchor="end"' if one.ends else ""
            parts.append(
                f'<text x="{one.x:g}" y="{one.y:g}" font-size="{one.size:.2f}" '
                f'fill="#{bytes(one.colour).hex()}"{anchor}>{escape(_NO_XML.sub(chr(0xFFFD), one.text))}</text>'
            )
        return "\n".join([*parts, "</svg>\n"])

    def save(self, path: str | Path) -> None:
        """Write the page into a file, in the format of the path's ending; raises UnitvisError for one not in `ENDINGS`.

        Pixel formats have `DPI` dots an inch; a PDF holds one picture of twice that, for the text, unless that would
        be more than `MAX_PAGE_PIXELS`.
        """
        check_ending(path := Path(path), ENDINGS)
        if path.suffix.lower() in PICTURES:
            save_picture(self.image(), path)
            return
        with replacing(path) as part:
            part.write_bytes(self.svg().encode() if path.suffix.lower() == ".svg" else self._pdf())

    def _pdf(self) -> bytes:
        scale = 2 if 4 * self.width * self.height <= MAX_PAGE_PIXELS else 1
        return _encoded(self.image(scale), "PDF", resolution=DPI * scale, **_JPEG)

    def _repr_png_(self) -> bytes:
        return _encoded(self.image().reduce(2), "PNG")


def check_ending(path: Path, endings: tuple[str, ...]) -> None:
    """Raise UnitvisError for a path that ends in none of the given endings."""
    if path.suffix.lower() not in endings:
        told = [ending for ending in endings if ending != ".jpeg"]
        raise UnitvisError(f"{path} must end in {', '.join(told[:-1])} or {told[-1]}")


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture with `DPI` pixels an inch, in the format of the path's ending, one of `PICTURES`."""
    kind = PICTURES[path.suffix.lower()]
    if max(picture.size) > (most := _MAX_SIDES.get(kind, MAX_PAGE_PIXELS)):
        raise UnitvisError(f"a {kind} file has at most {most:,} pixels a side, not {max(picture.size):,}; write a .png")
    with replacing(path) as part:
        part.write_bytes(_encoded(picture, kind, dpi=(DPI, DPI), **(_JPEG if kind == "JPEG" else {})))


def page_dots(width: float | str) -> int:
    """The width of a page in dots, of millimetres, or of text such as "160mm", "16cm" or "6.3in"."""
    text = width.strip().lower() if isinstance(width, str) else f"{width}mm"
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*(mm|cm|in)", text)
    if found is None:
        raise UnitvisError(f"{width!r} is no width of a page; write 160mm, 16cm or 6.3in")
    if not _WIDTHS[0] <= (length := float(found[1]) * _UNITS[found[2]]) <= _WIDTHS[1]:
        raise UnitvisError(f"a page is {_WIDTHS[0]:g} to {_WIDTHS[1]:g} mm wide, not {width}")
    return round(length * MILLIMETRE)


def _encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@lru_cache(maxsize=32)
def font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of pages, whose size is given in pixels."""
    return ImageFont.load_default(size)


def _font_face() -> str:
    """The font of pages as a rule of CSS, where it can be embedded; programs that cannot read it show a similar one."""
    loaded = font(10)
    if not isinstance(loaded, ImageFont.FreeTypeFont) or not loaded.font_bytes:
        return ""
    data = base64.b64encode(loaded.font_bytes).decode()
    return f"@font-face{{font-family:Aileron;src:url(data:font/ttf;base64,{data})}}"
