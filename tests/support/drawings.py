"""Pages for print as they were written, for tests of what stands on them."""

from __future__ import annotations

import base64
import io
import xml.etree.ElementTree as ET
from itertools import combinations

import pytest
from PIL import Image, ImageFont

SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"


class Drawing:
    """What an SVG holds, read as XML: lengths in millimetres."""

    def __init__(self, svg: str) -> None:
        root = ET.fromstring(svg)  # noqa: S314 - of this project's making
        self.size = tuple(float(root.attrib[side].removesuffix("mm")) for side in ("width", "height"))
        scale = self.size[0] / float(root.attrib["viewBox"].split()[2])
        assert self.size[1] == pytest.approx(scale * float(root.attrib["viewBox"].split()[3]), abs=0.1)
        self.boxes, self.images, self.texts, self.points = [], [], [], []
        for one in root.iter(f"{SVG}image"):
            self.boxes.append(tuple(scale * float(one.attrib[key]) for key in ("x", "y", "width", "height")))
            head, data = one.attrib[LINK].split(",")
            assert head == "data:image/jpeg;base64"
            self.images.append(Image.open(io.BytesIO(base64.b64decode(data))))
        for one in root.iter(f"{SVG}text"):
            size = float(one.attrib["font-size"]) * scale
            wide = ImageFont.load_default(100).getlength(one.text) * size / 100
            x = float(one.attrib["x"]) * scale - (wide if one.get("text-anchor") == "end" else 0)
            self.boxes.append((x, float(one.attrib["y"]) * scale - 0.7 * size, wide, 0.7 * size))
            self.texts.append(one.text)
            self.points.append(size * 72 / 25.4)

    def check(self) -> None:
        """Fails where anything lies outside of the page, or on anything else."""
        for x, y, wide, high in self.boxes:
            assert x >= 0
            assert y >= 0
            assert x + wide <= self.size[0]
            assert y + high <= self.size[1]
        for one, other in combinations(self.boxes, 2):
            apart = [max(one[a], other[a]) - min(one[a] + one[a + 2], other[a] + other[a + 2]) for a in (0, 1)]
            assert max(apart) > -0.01, (one, other)
