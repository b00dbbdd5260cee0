"""Classes of winners and names of units: counted by hand from the files' names, and kept, drawn and refused as data."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import unitvis
from support.commands import call
from support.drawings import Drawing
from support.foreign import refusal
from support.galleries import data
from support.mutations import DELETED, changed, read, write
from unitvis import UnitvisError, cli
from unitvis.pages.figures import figure
from unitvis.results.class_folders import class_folders
from unitvis.scanning.verify import verify

COLOURS = {"blue": (40, 40, 210), "green": (40, 210, 40), "red": (210, 40, 40)}
CODES = {"blue": "n01", "green": "n02", "red": "n03"}
TRANSFORM = unitvis.Transform(8, 8, mean=(0.5,) * 3, std=(0.5,) * 3)
NET = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with torch.no_grad():
        model[0].weight[:3] = torch.eye(3)[:, :, None, None] / 9  # the mean of a colour
        model[0].bias.zero_()
        model[1].weight[:] = torch.tensor(ORDER)[..., None, None]
        model[1].bias.zero_()
    return model
"""
IN_ORDER = [[0.0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0]]  # units for blue, green, red: the folders' names, sorted
SHUFFLED = [IN_ORDER[1], IN_ORDER[2], IN_ORDER[0]]


def spec(folder: Path, order: list[list[float]] = IN_ORDER) -> str:
    (folder / "nets.py").write_text(NET.replace("ORDER", repr(order)))
    return f"{folder / 'nets.py'}:net"


def photographs(folder: Path, named: dict[str, str] | None = None) -> Path:
    """Noise around three colours, seven images of each, in a folder for each colour."""
    random = np.random.default_rng(0)
    for colour, values in COLOURS.items():
        inside = folder / "photos" / (named or {}).get(colour, colour)
        inside.mkdir(parents=True)
        for number in range(7):
            noise = random.integers(-40, 41, (8, 8, 3)) + random.integers(-30, 31)
            Image.fromarray((np.array(values) + noise).clip(0, 255).astype(np.uint8)).save(inside / f"{number}.png")
    return folder / "photos"


def scanned(folder: Path, order: list[list[float]] = IN_ORDER, **options: Any) -> unitvis.Run:
    named = options.pop("named", None)
    images = photographs(folder, named)
    return unitvis.scan(
        spec(folder, order), images, ["0", "1"], transform=TRANSFORM, precision="fp32", progress=False, **options
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> unitvis.Run:
    folder = tmp_path_factory.mktemp("classes")
    return scanned(folder, out=folder / "run")


def by_hand(run: unitvis.Run, layer: str, unit: int) -> dict[str, int]:
    """Counts by class of the nine images with the largest responses, found by a float32 forward with a hook."""
    files = sorted((Path(run.source.path)).glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    batch = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    model = unitvis.models.load(run.manifest["model"]["spec"]).model
    seen = []
    model.get_submodule(layer).register_forward_hook(lambda module, given, maps: seen.append(maps))
    with torch.no_grad():
        model(batch)
    strongest = seen[0][:, unit].amax((1, 2)).sort(descending=True, stable=True).indices[:9].tolist()
    return dict(Counter(files[id].parent.name for id in strongest))


FOLDERS = {
    "class/image": (["cat/1.png", "dog/1.png", "dog/2.png"], ["cat", "dog", "dog"]),
    "one image": (["cat/1.png"], []),
    "one class": (["cat/1.png", "cat/2.png"], []),
    "no folders": (["1.png", "2.png"], []),
    "some in none": (["cat/1.png", "2.png"], []),
    "folders of folders": (["cat/a/1.png", "dog/b/2.png"], []),
    "some deeper": (["cat/1.png", "dog/b/2.png"], []),
    "below a common folder": (["train/cat/1.png", "train/dog/2.png"], ["cat", "dog"]),
    "paths of a list": (["/data/in/cat/1.png", "/data/in/dog/2.png"], ["cat", "dog"]),
    "members of archives": (["0.tar/cat/1.png", "1.tar/./dog/2.png"], ["cat", "dog"]),
    "archives alone": (["0.tar/1.png", "1.tar/2.png"], []),
    "names that are no paths": (["image 0", "image 1"], []),
    "nothing": ([], []),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_class_folders(what: str) -> None:
    names, folders = FOLDERS[what]
    assert list(class_folders(dict(enumerate(names))).values()) == folders


def test_the_classes_of_winners_are_those_of_their_files(run: unitvis.Run) -> None:
    assert run.layers == ["0", "1"]
    for layer in run:
        for unit in range(len(run[layer])):
            classes = run[layer].classes(unit)
            assert classes == by_hand(run, layer, unit), (layer, unit)
            assert list(classes.values()) == sorted(classes.values(), reverse=True)
    assert run["1"][2].classes["red"] == 7
    with pytest.raises(UnitvisError, match="has no unit 3"):
        run["1"].classes(3)


def test_units_that_did_not_fire_have_no_classes(run: unitvis.Run) -> None:
    top = run["1"]
    floored = type(top)(top.name, top.values - 100, *(getattr(top, key) for key in ("images", "positions", "boxes")),
                        top.status, top.info | {"feeds_relu": True}, run=run)  # fmt: skip
    assert floored.classes(0) == {}


def test_folders_name_the_units_of_a_head_whose_winners_agree(run: unitvis.Run, tmp_path: Path) -> None:
    assert (run["0"].labels, run["1"].labels) == (None, ["blue", "green", "red"])
    assert (run["1"][2].label, run["0"][2].label) == ("red", None)
    assert "unit 2 (red) of 1" in repr(run["1"][2])
    shuffled = scanned(tmp_path, SHUFFLED)
    assert shuffled["1"].labels is None
    assert shuffled["1"].classes(0)["green"] == 7


def test_labels_are_kept_with_the_run_and_belong_to_its_head(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("azur\nvert\nrouge\n")
    scanned(tmp_path, SHUFFLED, labels=tmp_path / "names.txt", out=tmp_path / "run")
    found = unitvis.load(tmp_path / "run")
    assert (found["0"].labels, found["1"].labels) == (None, ["azur", "vert", "rouge"])
    assert found["1"].strongest(2).labels == ["azur", "vert", "rouge"]
    assert found.strongest(2)["1"].labels == ["azur", "vert", "rouge"]
    found.set_labels(None)
    assert found["1"].labels is None
    found.save(tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "labels.json").exists()


def test_codes_are_shown_as_names_with_the_code_where_two_share_one(tmp_path: Path) -> None:
    index = {"0": ["n01", "crane"], "1": ["n02", "crane"], "2": ["n03", "kite"]}
    (tmp_path / "index.json").write_text(json.dumps(index))
    run = scanned(tmp_path, named=CODES, labels=str(tmp_path / "index.json"))
    assert run["1"].labels == ["crane", "crane", "kite"]
    assert run["1"].classes(0)["crane (n01)"] == 7
    assert run["1"].classes(2)["kite"] == 7


@pytest.mark.parametrize(
    ("layers", "names", "said"),
    [
        (
            ["0", "1"],
            5,
            r"labels \(5 classes, a list of names\) name no unit: layer '1', the network's last, has 3",
        ),
        (["0"], 3, "name no unit: the network's last layer is not ranked; name it"),
        (["0"], 4, "name no unit: the network's last layer is not ranked; name it"),  # layer 0 has four units
    ],
)
def test_labels_that_name_nothing_are_told_of(layers: list[str], names: int, said: str, tmp_path: Path) -> None:
    pixels, labels = photographs(tmp_path), [f"class {n}" for n in range(names)]
    with pytest.warns(UserWarning, match=said):
        run = unitvis.scan(spec(tmp_path), pixels, layers, transform=TRANSFORM, labels=labels, progress=False)
    assert run["0"].labels is None


def test_shards_keep_labels_for_the_merged_run(tmp_path: Path) -> None:
    images, model, names = photographs(tmp_path), spec(tmp_path), ["a", "b", "c"]
    options: dict[str, Any] = {"transform": TRANSFORM, "precision": "fp32", "progress": False}
    shards = [
        unitvis.scan(model, images, "1", shard=(n, 2), labels=names, out=tmp_path / f"{n}", **options) for n in (1, 2)
    ]
    assert unitvis.merge([tmp_path / "1", tmp_path / "2"], model)["1"].labels == names
    shards[1].set_labels(["c", "b", "a"])
    said = refusal(lambda: unitvis.merge(shards, model))
    assert said == "run 1 and run 2 name classes differently; remove the labels.json of one of them"


def test_a_recorder_names_the_classes_of_weights(tmp_path: Path) -> None:
    loaded = unitvis.models.load(spec(tmp_path))
    labels = unitvis.models.labels.Labels(("a", "b", "c"), "the weights of a library")
    with unitvis.Recorder(loaded._replace(labels=labels), ["1"], 2) as recorder:
        recorder(torch.randn(4, 3, 8, 8))
    assert recorder.result()["1"].labels == ["a", "b", "c"]


def test_render_and_resume_name_the_classes_of_a_finished_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, model, out, names = photographs(tmp_path), spec(tmp_path, SHUFFLED), tmp_path / "run", tmp_path / "names"
    size = ["--resize", "8x8", "--mean", ".5", "--std", ".5"]
    scan = ["scan", model, images, "-o", out, *size, "--layer", "1"]
    assert call(capsys, *scan)[0] == cli.DONE
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".json", ".npz", ".jsonl")}
    assert "labels.json" not in before
    names.write_text("a\nb\n<img src=x onerror=alert(1)>\n")
    assert call(capsys, "render", out, "--labels", names)[0] == cli.DONE
    assert unitvis.load(out)["1"].labels == ["a", "b", "<img src=x onerror=alert(1)>"]
    assert all((out / name).read_bytes() == content for name, content in before.items())
    page = data(out / "gallery" / "layers" / "1" / "layer.js")
    assert page["names"][2] == "<img src=x onerror=alert(1)>"
    assert "<img" not in (out / "gallery" / "layers" / "1" / "layer.js").read_text()
    come_from = dict(page["answers"])["Where do the units' names come from?"]
    assert come_from == "They name the network's classes: the file names."
    names.write_text("x\ny\nz\n")
    assert call(capsys, *scan, "--resume", "--labels", names)[0] == cli.DONE
    assert unitvis.load(out)["1"].labels == ["x", "y", "z"]
    code, _, error = call(capsys, "render", out, "--labels", tmp_path / "nothing")
    assert code == cli.USAGE
    assert error.startswith(f"unitvis: the labels {tmp_path / 'nothing'} cannot be read: No such file or directory; ")


def test_sheets_and_pages_show_names_and_counts(
    run: unitvis.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    draw = ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, at: Any, what: str, *rest: Any, **more: Any) -> None:
        drawn.append(what)
        draw(self, at, what, *rest, **more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    run.sheet("1")
    assert {"0 blue", "1 green", "2 red", "names of classes: the folders of the images, sorted"} <= set(drawn)
    assert ", ".join(f"{name} {count}" for name, count in run["1"].classes(2).items()) in drawn
    drawn.clear()
    run.sheet("0")
    assert {"0", "1", "2", "3"} <= set(drawn)
    unitvis.gallery(run, tmp_path / "gallery")
    first, head = (data(tmp_path / "gallery" / "gallery" / "layers" / layer / "layer.js") for layer in "01")
    assert (first["names"], head["names"]) == (None, ["blue", "green", "red"])
    assert head["classes"][2] == ", ".join(f"{name} {count}" for name, count in run["1"].classes(2).items())
    assert first["classes"][3].split()[0] in COLOURS


def test_pages_for_print_and_excerpts_show_names_and_counts(run: unitvis.Run, tmp_path: Path) -> None:
    counts = ", ".join(f"{name} {count}" for name, count in run["1"].classes(2).items())
    origin = "names of classes: the folders of the images, sorted"
    pages = {
        "a sheet": run.sheet("1", width=160),
        "a narrow sheet": run.sheet("1", width=40),
        "an overview": run.overview(["0", "1"], width=80),
        "a figure": figure(run, ["0", "1"], "lecture", width=80),
        "a slide": figure(run, ["1"], "lecture"),
    }
    for what, page in pages.items():
        found = Drawing(page.svg())
        found.check()
        assert {"blue", "green", "red"} <= set(found.texts), what
        assert origin in " ".join(found.texts), what
        assert (counts in found.texts) == (what == "a sheet")
        assert any(text.startswith("red ") for text in found.texts) == ("sheet" in what)  # counts, shortened
    assert not {"blue", "green", "red"} & set(Drawing(run.sheet("0", width=80).svg()).texts)  # its units have no class
    words = unitvis.excerpt(run, tmp_path / "units.html", {"0": [3], "1": [2]}).read_text()
    assert "unit 3</span>" in words
    assert "unit 2: red</span>" in words
    assert f"Its images by class: {counts}." in words


def test_a_sheet_drops_the_last_classes_where_not_all_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = {"blue": "a very long name of a class, 1", "green": "b" * 200, "red": "c"}
    run, drawn = scanned(tmp_path, named=named), []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, at, what, *rest, **more: drawn.append(what))
    run.sheet("1")
    assert run["1"].classes(2)["c"] == 7
    assert len(run["1"].classes(2)) > 1
    assert any(text == "c 7 \u2026" for text in drawn)
    assert any(text.startswith("bbb") and "\u2026" in text and text.endswith(" 7") for text in drawn)


LABELS = {"names": ["a", "b", "c"], "codes": ["n1", "n2", "n3"], "from": "the file names"}
WRONG = {
    "no object": ((), [], r"it is \[\], not an object"),
    "no names": (("names",), DELETED, "names is missing"),
    "none": (("names",), [], "names is empty"),
    "a number": (("names", 1), 5, r"names\[1\] is 5, not text of 1 to 1,000 characters"),
    "an empty name": (("names", 1), "", r"names\[1\] is '', not text"),
    "a long name": (("names", 1), "x" * 10**5, r"names\[1\] is 'xxx"),
    "fewer codes": (("codes",), ["n1"], "it has 3 names and 1 codes"),
    "a code that is none": (("codes", 0), None, r"codes\[0\] is None"),
    "no origin": (("from",), DELETED, "from is missing"),
    "a long origin": (("from",), "x" * 301, "not text of at most 300 characters"),
}


@pytest.fixture
def folder(run: unitvis.Run, tmp_path: Path) -> Path:
    run.save(tmp_path / "run")
    write(tmp_path / "run" / "labels.json", LABELS)
    return tmp_path / "run"


@pytest.mark.parametrize("what", WRONG)
def test_each_field_of_labels_is_checked(what: str, folder: Path) -> None:
    place, new, said = WRONG[what]
    path = folder / "labels.json"
    write(path, changed(read(path), place, new) if place else new)
    with pytest.raises(UnitvisError, match=said) as refused:
        unitvis.load(folder)
    assert str(refused.value).startswith(f"{path} holds no names of classes (")
    assert str(refused.value).endswith("); remove it, and give --labels")


@pytest.mark.parametrize("what", ["a link", "a pipe", "a folder", "no JSON"])
def test_what_stands_in_the_place_of_labels_is_not_followed(what: str, folder: Path) -> None:
    path = folder / "labels.json"
    kept = path.rename(folder.parent / "elsewhere.json")
    put, said = {
        "a link": (lambda: path.symlink_to(kept), "it is a link"),
        "a pipe": (lambda: os.mkfifo(path), "not a regular file"),
        "a folder": (path.mkdir, "Is a directory"),
        "no JSON": (lambda: path.write_text("["), "Expecting"),
    }[what]
    put()
    assert f"holds no names of classes ({said}" in refusal(lambda: unitvis.load(folder))


@pytest.mark.parametrize("name", ["\ud800", "a\nb", "\u202e", "x" * 1000, "<script>alert(1)</script>", "犬"])
def test_names_of_any_content_are_drawn(name: str, folder: Path) -> None:
    write(folder / "labels.json", LABELS | {"names": [name, "b", "c"], "from": name[:300]})
    found = unitvis.load(folder)
    assert found["1"].labels == [name, "b", "c"]
    assert repr(found["1"][0]).isprintable()
    assert found.sheet("1").width < 2000
    Drawing(found.sheet("1", width=60).svg()).check()
    assert "unit 0: " in unitvis.excerpt(found, folder.parent / "units.html", {"1": [0]}).read_text(encoding="utf-8")
    assert found["1"]._repr_html_()
    unitvis.gallery(found, folder)
    assert data(folder / "gallery" / "layers" / "1" / "layer.js")["names"][0] == name


def test_a_forged_head_is_found(run: unitvis.Run, folder: Path) -> None:
    path, spec_of_run = folder / "manifest.json", run.manifest["model"]["spec"]
    before = path.read_text()
    for layer, head, now in (("0", True, "true and false"), ("1", False, "false and true")):
        path.write_text(before)
        write(path, changed(read(path), ("layers", layer, "head"), head))
        assert f"layers.{layer}.head is {now}" in verify(unitvis.load(folder), spec_of_run)["differing"]
    path.write_text(before)
    assert verify(unitvis.load(folder), spec_of_run)["differing"] == []
