"""The demo as a whole: what the embedded network's units like, by labels, and the one line that it prints."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import unitvis
from unitvis import cli
from unitvis.demo import command, network, overview
from unitvis.demo.pictures import CLASSES, label, pictures

COUNT = 4096


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo") / "run"
    return folder, command.demo(folder)


def test_units_become_selective_from_layer_to_layer(shown: tuple[Path, str]) -> None:
    run = unitvis.load(shown[0])
    labels = np.array([label(command.SEED, number) for number in range(COUNT)])
    purity = {}
    for layer in run:
        top = run[layer]
        fires = top.fired.all(axis=1)
        assert all(len(set(images)) == 9 for images in top.images[fires].tolist())
        winner, count = overview.majority(top, labels)
        purity[layer] = count[fires].mean()
        owners = {label for label, votes in zip(winner[fires], count[fires], strict=True) if votes >= 7}
    assert np.median(count[fires]) >= 7  # of the last layer
    assert list(purity) == list(network.LAYERS)
    assert purity["conv1"] < purity["conv3"] < purity["conv5"]
    assert list(purity.values()) == sorted(purity.values())
    assert len(owners) >= 0.8 * len(CLASSES)


def test_the_line_tells_what_the_run_measured(shown: tuple[Path, str]) -> None:
    folder, line = shown
    units = sum(len(top) for top in unitvis.load(folder).tops.values())
    assert re.fullmatch(
        rf"4,096 pictures, {units} units in [\d.]+ s; {units} of {units} equal brute force; "
        rf"[\d.]+ times the naive hook; look at {re.escape(str(folder / 'overview.png'))} "
        rf"and {re.escape(str(folder / 'index.html'))}",
        line,
    )
    with Image.open(folder / "overview.png") as page:
        assert page.width > 2 * page.height
    assert len(list((folder / "sheets").iterdir())) == 5
    assert cli.main(["verify", str(folder), "unitvis.demo.network:load"]) == cli.DONE


def test_brute_force_finds_a_wrong_winner(shown: tuple[Path, str]) -> None:
    run = unitvis.load(shown[0])
    drawn, _ = pictures(64, command.SEED, 1)
    responses = command.naive_hook(network.load(), command.TRANSFORM, drawn, ["conv5"])
    values, positions = responses["conv5"]
    few = unitvis.scan(network.load(), drawn, "conv5", transform=command.TRANSFORM, progress=False)
    assert command.units_equal(few, responses) == 96
    few["conv5"].images[3, :2] = few["conv5"].images[3, 1::-1]
    few["conv5"].positions[5, 8] += 1
    assert command.units_equal(few, {"conv5": (values, positions)}) == 94
    assert len(run) == 5


def test_without_weights_the_demo_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(network.load, "__defaults__", (tmp_path / "nothing.safetensors",))
    assert cli.main(["demo", "-o", str(tmp_path / "run")]) == cli.USAGE
    error = capsys.readouterr().err
    assert "the demo's weights are missing" in error
    assert "python -m unitvis.demo.train" in error
