"""Whatever options a scan takes, its run can be read; else it is refused when it begins, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, PngImagePlugin

import unitvis
from support.foreign import refusal
from support.scans import arrays, scan, two_convolutions
from unitvis.scanning import scan as module
from unitvis.sources import ArraySource

COUNT = 12
TRANSFORM = unitvis.Transform(crop=16)


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(COUNT):
        (tmp_path / "photos").mkdir(exist_ok=True)
        picture(number).save(tmp_path / "photos" / f"{number:02}.png")
    return tmp_path / "photos"


ITEMS = [(number, picture(number)) for number in range(COUNT)]
OPTIONS: dict[str, tuple[object, dict[str, Any]]] = {
    "the last entry": (ITEMS, {"entry": -1}),
    "entry of NumPy": (ITEMS, {"entry": np.int64(1)}),
    "named entry": ([{"a": one, "b": one} for _, one in ITEMS], {"entry": np.str_("b")}),
    "numbers of NumPy": (None, {"k": np.int64(2), "max_failures": np.int32(3), "workers": np.uint8(1)}),
    "batch size": (None, {"batch_size": np.int64(5), "precision": "bf16"}),
    "shard": (None, {"shard": (np.int64(1), np.int64(2))}),
    "flags": (None, {"scaled": 1, "allow_truncated": np.True_}),
    "transform": (None, {"transform": unitvis.Transform(crop=np.int64(16), mean=np.float32(0.5), std=(1, 1, 1))}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_run_is_read_and_resumed_whatever_its_options(case: str, folder: Path, tmp_path: Path) -> None:
    images, options = OPTIONS[case]
    wanted = {"transform": TRANSFORM, "k": 2, "precision": "fp32", "out": tmp_path / "run"} | options
    run = scan(two_convolutions(), images or folder, **wanted)
    again = unitvis.load(tmp_path / "run", images)
    assert again.manifest["source"] == run.manifest["source"]
    assert arrays(again) == arrays(run)
    assert arrays(scan(two_convolutions(), images or folder, **wanted, resume=True)) == arrays(run)


@pytest.mark.parametrize(
    ("place", "name", "value", "told"),
    [
        (PngImagePlugin, "MAX_TEXT_CHUNK", 1e8, 10**8),
        (PngImagePlugin, "MAX_TEXT_MEMORY", np.float64(2.5), 2.5),
        (PngImagePlugin, "MAX_TEXT_MEMORY", float("inf"), None),
        (PngImagePlugin, "MAX_TEXT_MEMORY", 10**400, None),
        (Image, "MAX_IMAGE_PIXELS", 5e7, 5 * 10**7),
        (ImageFile, "LOAD_TRUNCATED_IMAGES", np.True_, True),
    ],
)
def test_settings_of_pillow_may_be_any_numbers(
    place: object, name: str, value: object, told: object, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, name, value)
    scan(two_convolutions(), folder, k=2, transform=TRANSFORM, precision="fp32", out=tmp_path / "run", workers=0)
    found = unitvis.load(tmp_path / "run").manifest["source"]["pillow"]
    assert found == {name: told}
    assert type(found[name]) is type(told)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"entry": 1.5}, r"entry=1.5; the key of an entry \(text\) or its number is needed"),
        ({"entry": True}, "entry=True; the key"),
        ({"entry": 2**70}, "entry=1180591620717411303424; the key"),
        ({"k": True}, "k must be a whole number of at least 1, not True"),
        ({"k": 2.0}, "k must be a whole number of at least 1, not 2.0"),
        ({"k": 10**20}, "k must be a whole number of at most 1,000,000,000, not 1000"),
        ({"batch_size": 10**20}, "batch_size must be a whole number of at most 1,099,511,627,776, not 1000"),
        ({"batch_size": 2.5}, "batch_size must be a whole number of at least 1, not 2.5"),
        ({"max_failures": 0.5}, "max_failures must be a whole number of at least 0, not 0.5"),
        ({"scaled": "no"}, "scaled='no'; it must be True or False"),
        ({"shard": (True, 2)}, r"shard \(True, 2\) is none; write I/N"),
        ({"shard": f"1/{'9' * 5000}"}, "is none; write I/N"),
        ({"workers": -1}, "workers must be a whole number of at least 0, not -1"),
        ({"workers": 2**20}, r"workers must be a whole number of at most \d+, not 1048576"),
        ({"workers": 2**200}, "workers must be a whole number of at most"),
        ({"device": ""}, "device '' is unknown; give cpu"),
    ],
)
def test_options_that_are_none_are_refused_before_anything_is_removed(
    option: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(unitvis.UnitvisError, match=message):
        scan(two_convolutions(), ITEMS, transform=TRANSFORM, out=tmp_path / "run", **option)
    assert not list((tmp_path / "run").glob("*"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"others": "x"}, "source.others is 'x', not a whole number from 0"),
        ({"images": np.int64(3)}, "Object of type int64 is not JSON serializable"),
        ({"entry": [1]}, r"source.entry is \[1\], not text or the number of an entry"),
    ],
)
def test_a_source_that_cannot_be_described_is_refused_before_its_images_are_ranked(
    entry: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("images were ranked")

    described = ArraySource.describe
    monkeypatch.setattr(ArraySource, "describe", lambda self: described(self) | entry)
    monkeypatch.setattr(module.Recorder, "__call__", never)
    with pytest.raises(unitvis.UnitvisError, match=f"nothing could read again: {message}"):
        scan(two_convolutions(), np.zeros((5, 16, 16, 3), np.uint8), transform=TRANSFORM, out=tmp_path / "run")


def test_what_is_known_at_the_end_alone_costs_no_scan(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"k": 2, "transform": TRANSFORM, "precision": "fp32", "out": tmp_path / "run"}
    with monkeypatch.context() as patched:
        patched.setattr(module, "effective_boxes", lambda *_: {"0": 2.5})
        said = refusal(lambda: scan(two_convolutions(), folder, **options))
    assert said.startswith("a run is not written that nothing could read again: layers.0.effective_box is 2.5, not a")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["progress.npz"]

    def never(*_: object) -> None:
        raise AssertionError("images were ranked again")

    monkeypatch.setattr(module.Recorder, "__call__", never)
    run = scan(two_convolutions(), folder, **options, resume=True)
    assert arrays(unitvis.load(tmp_path / "run")) == arrays(run)


@pytest.mark.parametrize("save", [lambda r: r.result(), lambda r: r.partial()], ids=["result", "partial"])
def test_ids_reach_as_far_as_64_bits(save: Callable[[unitvis.Recorder], unitvis.Run], tmp_path: Path) -> None:
    ids = [7, 2**62 + 1, 2**63 - 3, 2**63 - 2]
    with unitvis.Recorder(two_convolutions(), ["0"], k=4) as recorder:
        recorder(torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor(ids))
        for beyond in (torch.tensor([2**63 - 1]), [2**63 - 1]):
            with pytest.raises(unitvis.UnitvisError, match=rf"the id {2**63 - 1}; ids go up to {2**63 - 2}"):
                recorder(torch.rand(1, 3, 16, 16), beyond)
    run = save(recorder)
    run.save(tmp_path / "run")
    again = unitvis.load(tmp_path / "run")
    assert again.manifest["coverage"] == [[7, 8], [2**62 + 1, 2**62 + 2], [2**63 - 3, 2**63 - 1]]
    assert arrays(again) == arrays(run)
    if run.tops:
        assert {tuple(sorted(row)) for row in again["0"].images.tolist()} == {tuple(ids)}
