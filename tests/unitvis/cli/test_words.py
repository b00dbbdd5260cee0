"""The words of a unit's status in everything that shows it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageDraw
from torch import nn

import unitvis
from unitvis.cli.report import print_run
from unitvis.pages import facts
from unitvis.results.arrays import STATUSES


def test_statuses_have_one_word_and_one_meaning_wherever_they_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two units one is tied; of a scan in half precision alone both are unseparated."""
    np.save(tmp_path / "images.npy", np.arange(12 * 3 * 3 * 3, dtype=np.uint8).reshape(12, 3, 3, 3))
    model = nn.Sequential(nn.Conv2d(3, 2, 1)).eval()
    nn.init.zeros_(model[0].weight.data[0])
    written: list[str] = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, place, text, *rest, **more: written.append(text))
    for precision, counts in (("fp32", {"tied": 1}), ("bf16", {"unseparated": 2})):
        run = unitvis.scan(
            model, tmp_path / "images.npy", transform=unitvis.Transform(), precision=precision, progress=False
        )
        written.clear()
        run.sheet("0")
        print_run(run)
        shown = {
            "sheet": "\n".join(written),
            "gallery": f"{facts.index(run)} {facts.layer(run, '0', {'crop': 'rf'})['notes']}",
            "command": capsys.readouterr().out,
            "text": repr(run["0"]),
        }
        for where, text in shown.items():
            assert not re.search("not separated|undecided|not decided", text), where
            for name, number in counts.items():
                assert name in text, where
                if where != "sheet":
                    assert f"{number} {name}" in text, where
                if (where, name) in (("sheet", "tied"), ("sheet", "unseparated"), ("command", "unseparated")):
                    assert f"{name}: {STATUSES[name]}" in text, where
        assert facts.index(run)["notes"].items() >= {name: STATUSES[name] for name in counts}.items()
