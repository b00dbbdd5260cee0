"""An excerpt: one file that holds all it shows, as it is in the run."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import unitvis
from support import browsers
from support.galleries import HOSTILE, ODD, scanned, twelve_images
from unitvis import UnitvisError, cli
from unitvis.pages.excerpt import MAX_UNITS, PATCH_SIDE, WHOLE_SIDE


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> unitvis.Run:
    return scanned(tmp_path_factory.mktemp("excerpt"))


@pytest.fixture(scope="module")
def written(run: unitvis.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "unit.html"
    assert unitvis.excerpt(run, path, {ODD: [3, 0, 3], "first": [4]}) == path
    return path


class _Read(HTMLParser):
    """The tags of a page, its texts, and its pictures with their alternative texts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())

    def pictures(self, start: str) -> list[np.ndarray]:
        found = [tag for name, tag in self.tags if name == "img" and (tag["alt"] or "").startswith(start)]
        files = [base64.b64decode((tag["src"] or "").removeprefix("data:image/jpeg;base64,")) for tag in found]
        return [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int) for file in files]


def test_chosen_units_are_shown_once_with_their_patches_and_words(run: unitvis.Run, written: Path) -> None:
    """JPEG: a mean error of 6 levels of 255 is allowed, which another patch would exceed many times."""
    page = _Read(written)
    texts = " ".join(page.texts)
    assert re.findall(r"unit (\d+)", texts.split("What is this?", 1)[1]) == ["3", "0", "4"]
    assert "constant, tied: its strongest responses are all equal" in texts.replace(" : ", ": ")
    assert "the ReLU that follows always gives 0" in texts
    assert "3 of 18 units, each with the 9 strongest of the 12 images in photos" in texts
    shown = page.pictures("Patch of ")
    wanted = [run.patch(ODD, unit, rank, size=PATCH_SIDE) for unit in (3, 0) for rank in range(9)]
    assert len(shown) == len(wanted)
    for one, other in zip(shown, wanted, strict=True):
        assert abs(one - np.asarray(other).astype(int)).mean() < 6
    wholes = page.pictures("Whole image ")
    assert len(wholes) == 18
    assert max(max(whole.shape) for whole in wholes) <= WHOLE_SIDE
    names = [run.records[image]["name"] for image in run[ODD].images[3].tolist()]
    assert [text for text in page.texts if text in names][:9] == names
    assert f"1. {run[ODD].values[3, 0]:.4g}" in page.texts


def test_nothing_in_the_file_leads_out_of_it_or_runs(written: Path) -> None:
    page = _Read(written)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "iframe", "object", "embed", "form", "a", "base", "i"}  # <i>: a layer's name
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, name)
    assert "url(" not in written.read_text()
    assert HOSTILE in page.texts or any(HOSTILE in text for text in page.texts)  # as text
    assert ODD in page.texts
    policy = [attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv")]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_what_cannot_be_an_excerpt_is_refused(tmp_path: Path) -> None:
    _, run = twelve_images(tmp_path)
    (tmp_path / "folder.html").mkdir()
    too_many = "at most 64 units, so that it can be sent, not 65; name fewer"
    many = unitvis.scan(nn.Sequential(nn.Conv2d(3, 65, 1)).eval(), torch.rand(1, 3, 2, 2), k=1, progress=False)
    assert MAX_UNITS == 64
    for name, units, message, of in (
        ("a.html", {"0": [12]}, "layer '0' has no unit 12; it has 12", run),
        ("a.html", {"first": [0]}, "no layer 'first'; it has 0, 2", run),
        ("a.html", {}, "no unit was named", run),
        ("a.html", None, "no unit was named", run),
        ("a.html", range(65), too_many, many),
        ("a.pdf", {"0": [1]}, r"a\.pdf must end in \.html", run),
        ("no/a.html", {"0": [1]}, "there is no folder .*no to write a.html into", run),
        ("folder.html", {"0": [1]}, "is a folder; name a file", run),
    ):
        with pytest.raises(UnitvisError, match=message):
            unitvis.excerpt(of, tmp_path / name, units)
    assert not (tmp_path / "a.html").exists()
    assert unitvis.excerpt(many, tmp_path / "a.html", range(64)).is_file()
    assert unitvis.excerpt(run, tmp_path / "both.html", [1], crop="image").read_text().count("<h3>") == 2


def test_the_command_writes_one_and_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, run = twelve_images(tmp_path)
    run.save(tmp_path / "run")
    start = ["excerpt", str(tmp_path / "run")]
    end = ["-o", str(tmp_path / "u.html")]
    for words, message in (
        (["2"], "'2' names no unit; write LAYER/UNIT, such as conv4/12 or conv4/0-8,12"),
        (["2/x"], "units 'x' cannot be read"),
        (["2/10"], "layer '2' has no unit 10"),
    ):
        assert cli.main([*start, *words, *end]) == cli.USAGE
        told = capsys.readouterr().err
        assert message in told
        assert told.count("\n") == 1
    assert cli.main([*start, "2/0-1,5", "0/3", *end]) == cli.DONE
    assert re.fullmatch(r"\S+u\.html: 0\.\d MB, open it in a browser or send it on\n", capsys.readouterr().out)
    assert (tmp_path / "u.html").read_text().count("<article>") == 4


@pytest.mark.browser
@pytest.mark.skipif(browsers.CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")
def test_a_browser_shows_it_on_a_desk_and_a_phone_and_prints_it(run: unitvis.Run, written: Path) -> None:
    with browsers.launched() as browser:
        for width in (1280, 360):
            view = {"width": width, "height": 800}
            with browsers.opened(browser, written.as_uri(), viewport=view, color_scheme="dark") as (page, asked):
                assert [url for url in asked if not url.startswith("data:")] == [written.as_uri()]
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth)")
                scene = page.locator(".scene").first.bounding_box()
                frame = page.locator(".frame.field").first.bounding_box()
                left, upper, right, lower = run[ODD].boxes[3, 0].tolist()
                seen = max(0, left) / 45, max(0, upper) / 33, min(45, right) / 45, min(33, lower) / 33
                for at, start, side in ((0, "x", "width"), (1, "y", "height")):
                    assert abs(frame[start] - scene[start] - scene[side] * seen[at]) < 1.5
                    assert abs(frame[side] - scene[side] * (seen[at + 2] - seen[at])) < 2.5
                page.emulate_media(media="print")
                assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
