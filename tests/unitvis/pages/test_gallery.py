"""The gallery's files: the pictures hold what they should, the pages what was found, and nothing else is touched."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import unitvis
from support.galleries import ODD, contrast, data, network, photographs, scanned
from unitvis import UnitvisError, cli
from unitvis.drawing import colours, patches, sheets
from unitvis.pages import facts, sprites

# A layer whose every neuron sees the whole image, and one about which nothing is known.
UNKNOWN_AND_WHOLE = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.whole, self.unknown = nn.Conv2d(3, 4, 12), nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.whole(x) + self.unknown(x if x.sum() > -1e9 else -x)

net = Net
"""
LAYERS = ["--layer", "whole", "--layer", "unknown"]
REASON = "the model's code asks for values that are computed from the image"

HERE = Path(unitvis.__file__).parent / "pages"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[unitvis.Run, Path]:
    folder = tmp_path_factory.mktemp("gallery")
    run = scanned(folder)
    run.save(folder / "run")
    page = unitvis.gallery(run, folder / "run", network(), project=True)
    assert page == folder / "run" / "index.html"
    return run, page.parent


def unit_file(folder: Path, layer: str, name: str) -> np.ndarray:
    with Image.open(sprites.layer_folder(folder, layer) / name) as image:
        return np.asarray(image.convert("RGBA")).astype(int)


def tile(sprite: np.ndarray, unit: int, units: int) -> np.ndarray:
    """The tile of one of so many units in a sprite of six columns of tiles."""
    columns = min(6, units)
    height, width = sprite.shape[0] // -(-units // 6), sprite.shape[1] // columns
    return sprite[unit // columns * height :, unit % columns * width :][:height, :width]


def place(tile: np.ndarray, rank: int) -> np.ndarray:
    """One of nine cells."""
    height, width = tile.shape[0] // 3, tile.shape[1] // 3
    return tile[rank // 3 * height :, rank % 3 * width :][:height, :width]


def test_each_unit_has_its_pictures(shown: tuple[unitvis.Run, Path]) -> None:
    """JPEG: a mean error of 6 levels of 255 is allowed, which another patch would exceed many times."""
    run, folder = shown
    model = network()
    projections = {(p.layer, p.unit, p.rank): p for p in unitvis.project(model, run)}
    for layer, unit, rank in (("first", 0, 0), ("first", 11, 8), (ODD, 3, 4), (ODD, 5, 1)):
        top = run[layer]
        size, units = sheets.PATCH_SIZE, len(top)

        def found(name: str, unit: int = unit, rank: int = rank, layer: str = layer, units: int = units) -> np.ndarray:
            return place(tile(unit_file(folder, layer, name), unit, units), rank)

        patch = np.asarray(run.patch(layer, unit, rank, size=size)).astype(int)
        assert abs(found("patches-0.jpg")[..., :3] - patch).mean() < 6

        box = patches.drawn_box(top, unit, rank, patches.crop_of(run, layer, None), (33, 45))
        projection = np.asarray(projections[layer, unit, rank].picture(box, size)).astype(int)
        assert abs(found("projections-0.jpg")[..., :3] - projection).mean() < 6

        pixels = run.source.transform.normalize(run.source.read(int(top.images[unit, rank]))[None])[0]
        levels = colours.heat_levels(unitvis.response_map(model, pixels, layer, unit).map)
        np.testing.assert_array_equal(found("responses-0.png"), colours.HEAT[levels])
    weights = model.first.weight.detach()[7].numpy()
    filters = tile(unit_file(folder, "first", "filters-0.png"), 7, 12)[..., :3]
    np.testing.assert_array_equal(filters, np.asarray(colours.signed(weights)))
    whole = np.asarray(Image.open(folder / "gallery" / "images" / f"{run['first'].images[0, 0]}.jpg")).astype(int)
    assert whole.shape == (44, 60, 3)
    picture, _ = run.source.picture(int(run["first"].images[0, 0]))
    assert abs(whole - np.asarray(picture).astype(int)).mean() < 6
    struck = tile(unit_file(folder, "first", "patches-0.jpg"), 4, 12)[1:-1, 1:-1, :3]  # JPEG colours cross borders
    assert abs(struck - 238).max() < 45  # dead: nothing but empty places, struck out


def test_the_pages_say_what_was_found(shown: tuple[unitvis.Run, Path]) -> None:
    run, folder = shown
    index = data(folder / "gallery" / "index.js")
    assert [layer["name"] for layer in index["layers"]] == run.layers
    assert "12 channels, map 15 x 21, receptive field 5 x 5 pixels, 1 dead" in index["layers"][0]["facts"]
    assert 4 not in index["layers"][0]["strip"]
    assert "the 9 strongest of the 12 images in photos;" in index["run"]
    for layer, entry in zip(run.layers, index["layers"], strict=True):
        page = data(sprites.layer_folder(folder, layer) / "layer.js")
        top = run[layer]
        assert page["name"] == layer
        assert len(page["winners"]) == entry["units"] == len(top)
        for unit in range(len(top)):
            for rank, (value, image, row, column, *box) in enumerate(page["winners"][unit]):
                assert value == pytest.approx(float(top.values[unit, rank]), rel=1e-4)
                assert page["images"][str(image)] == run.records[image]["name"]
                assert [image, row, column, *box] == [
                    top.images[unit, rank],
                    *top.positions[unit, rank],
                    *top.boxes[unit, rank],
                ]
        assert page["fired"] == top.fired.sum(axis=1).tolist()
    first = data(sprites.layer_folder(folder, "first") / "layer.js")
    assert first["notes"] == ["dead" if unit == 4 else "" for unit in range(12)]
    assert page["notes"][0] == "constant, tied"
    said = " ".join(f"{question} {answer}" for question, answer in first["answers"])
    for words in (
        "one channel of first",
        "before the ReLU that follows",
        "small squares show weights",
        "5 x 5 pixels of 45 x 33",
        "each image counts once",
        "The 9 strongest of the 12 images in photos.",
        "deconvnet (no ReLU lies below)",
    ):
        assert words in said
    assert all(len(answer) < 200 for _, answer in first["answers"])


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)
        self.found += [value or "" for name, value in attributes if name in ("href", "src")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_unknown_boxes_are_told_apart_from_neurons_that_see_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nets.py").write_text(UNKNOWN_AND_WHOLE)
    model = f"{tmp_path / 'nets.py'}:net"
    assert cli.main(["layers", model, "--crop", "12", *LAYERS]) == cli.DONE
    table = capsys.readouterr().out.splitlines()
    assert table[1].split()[:1] + table[1].split()[-3:] == ["whole", "whole", "image", "-"]
    assert table[2].split()[-2:] == ["unknown", "-"]
    assert table[3] == f"  receptive field unknown, so whole images are drawn: {REASON}"
    images = np.random.default_rng(0).integers(0, 256, (12, 12, 12, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    arguments = [model, tmp_path / "images.npy", "-o", tmp_path / "run", "--crop", "12", *LAYERS]
    assert cli.main(["scan", *map(str, arguments)]) == cli.DONE
    assert f"warning: the receptive fields of unknown are unknown, so whole images are drawn: {REASON}" in (
        capsys.readouterr().err
    )
    run = unitvis.load(tmp_path / "run")
    found = {name: run[name].info["receptive_field"] for name in ("whole", "unknown")}
    assert [(field["method"], field["whole_image"]) for field in found.values()] == [
        ("traced", True),
        ("unknown", False),
    ]
    assert (run["unknown"].boxes[:, :9] == [0, 0, 12, 12]).all()
    index = data(tmp_path / "run" / "gallery" / "index.js")
    assert [entry["facts"].split(", ")[2] for entry in index["layers"]] == [
        "receptive field the whole image",
        "receptive field unknown",
    ]
    answers = [dict(facts.layer(run, name, {"crop": "image"})["answers"]) for name in ("whole", "unknown")]
    assert [facts.layer(run, name, {"crop": "image"})["boxes"] for name in ("whole", "unknown")] == [True, False]
    question = "How much of the image can change a response?"
    assert answers[0][question].startswith("the whole image of 12 x 12")
    assert answers[1][question] == f"Unknown ({REASON}); patches show the whole image."
    assert patches.crop_of(run, "unknown", "rf") == patches.crop_of(run, "unknown", None) == "image"


def test_the_page_is_small_whole_and_links_to_its_own_folder(shown: tuple[unitvis.Run, Path]) -> None:
    _, folder = shown
    parser = _Links()
    parser.feed((folder / "index.html").read_text())
    assert not parser.open
    assert all((folder / link).is_file() for link in parser.found if not link.startswith("data:"))
    own = [HERE / name for name in ("template.html", "gallery.js", "search.js", "gallery.css")]
    assert sum(len(file.read_text().splitlines()) for file in own) < 700
    assert not any("http" in file.read_text() for file in own)
    assert all(b"<" not in file.read_bytes() for file in folder.rglob("layer.js"))


def test_words_can_be_read_on_light_and_dark_paper() -> None:
    assert contrast("#000", "#ffffff") == 21
    style = (HERE / "gallery.css").read_text()
    light, dark = (dict(re.findall(r"--(\w+): (#\w+);", part)) for part in style.split("prefers-color-scheme")[:2])
    for scheme in (light, light | dark):
        for ink in ("ink", "faint", "link", "warn"):
            assert min(contrast(scheme[ink], scheme[paper]) for paper in ("paper", "card")) >= 4.5, ink
    assert len(light | dark) > len(dark) >= 7


def test_data_in_scripts_cannot_end_them() -> None:
    text = facts.script("f", {"a": "</script><!--\u2028", "b": "\udcff"})
    assert text.isascii()
    assert "<" not in text


def test_what_the_model_drew_stays_until_it_no_longer_holds(tmp_path: Path) -> None:
    run = scanned(tmp_path)
    run.save(tmp_path / "run")
    page = unitvis.gallery(run, tmp_path / "run", network(), project=True).parent
    first = sprites.layer_folder(page, "first")
    before = (first / "responses-0.png").read_bytes()

    again = unitvis.load(tmp_path / "run")
    unitvis.gallery(again, tmp_path / "run")
    assert data(first / "layer.js")["projections"] == "deconvnet (no ReLU lies below)"
    other = unitvis.gallery(again, tmp_path / "other").parent  # taken along
    assert (sprites.layer_folder(other, "first") / "responses-0.png").read_bytes() == before
    assert (sprites.layer_folder(other, ODD) / "projections-0.jpg").is_file()
    assert data(sprites.layer_folder(other, "first") / "layer.js")["filters"]

    unitvis.gallery(again, tmp_path / "run", crop="image")  # other patches, so the projections do not stand beside them
    assert data(first / "layer.js")["projections"] is None
    assert data(first / "layer.js")["responses"]

    run.save(tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "gallery").exists()
    assert not (tmp_path / "run" / "index.html").exists()
    few = unitvis.scan(network(), torch.rand(2, 3, 33, 45), "first", progress=False)
    unitvis.gallery(few, other)  # takes the other's place
    assert [path.name for path in (other / "gallery" / "layers").iterdir()] == ["first"]
    assert data(sprites.layer_folder(other, "first") / "layer.js")["responses"] is None


def test_a_gallery_is_refused_where_it_would_be_wrong(tmp_path: Path) -> None:
    run = unitvis.scan(network(), torch.rand(2, 3, 33, 45), "first", progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    other = network()
    other.first.weight.data += 1
    for path, model, project, message in (
        (tmp_path / "mine", None, False, "holds no gallery, so nothing is written there"),
        (tmp_path / "mine" / "thesis.txt", None, False, "is a file"),
        (tmp_path / "new", other, False, "not the one that was scanned .*model.weights is"),
        (tmp_path / "new", None, True, "need the model"),
    ):
        with pytest.raises(UnitvisError, match=message):
            unitvis.gallery(run, path, model, project=project)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "mine" / "manifest.json").write_text('{"name": "My web app"}')  # of another program
    (tmp_path / "mine" / "gallery").mkdir()
    for write in (
        lambda: unitvis.gallery(run, tmp_path / "mine"),
        lambda: run.save(tmp_path / "mine", overwrite=True),
    ):
        with pytest.raises(UnitvisError, match="is not empty and holds no"):
            write()
    assert len(list((tmp_path / "mine").iterdir())) == 3


def test_neurons_infinite_values_and_blanks(tmp_path: Path) -> None:
    class Unbounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    images = torch.rand(3, 3, 11, 11)
    images[1] = 3e38
    model = Unbounded().eval()
    model.conv.weight.data.fill_(1)
    run = unitvis.scan(model, images, unit="neuron", progress=False)
    folder = unitvis.gallery(run, tmp_path / "g", model).parent
    page = data(sprites.layer_folder(folder, "conv") / "layer.js")
    assert page["labels"][:4] == ["0/0/0", "0/0/1", "0/0/2", "0/1/0"]
    assert page["winners"][0][0][0] == "Infinity"
    assert len(page["winners"][0]) == 3
    assert page["responses"] is None


def test_large_maps_are_kept_as_maxima_of_blocks(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 1, 1)).eval()
    model[0].weight.data.fill_(1)
    model[0].bias.data.fill_(0)
    images = torch.zeros(1, 3, 90, 113)
    images[:, :, 44, 112] = 1.0
    run = unitvis.scan(model, images, progress=False)
    folder = unitvis.gallery(run, tmp_path / "g", model).parent
    kept = place(unit_file(folder, "0", "responses-0.png"), 0)
    assert kept.shape == (30, 38, 4)  # blocks of 3
    assert np.argwhere(kept[..., 3] > 0).tolist() == [[14, 37]]
    area = data(sprites.layer_folder(folder, "0") / "layer.js")["responses"]["area"]
    np.testing.assert_allclose(area, [0, 0, 114 / 113, 1], atol=1e-9)


def test_commands_draw_the_gallery(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = photographs(tmp_path / "photos", 3)
    (tmp_path / "net.py").write_text(
        "import torch\ndef net():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.ReLU(), torch.nn.Conv2d(2, 2, 3))\n"
        "def other():\n    return torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3))\n"
    )
    run, spec = tmp_path / "run", f"{tmp_path / 'net.py'}:net"
    sizes = ["--resize", "20x20"]
    assert cli.main(["scan", spec, str(photos), "-o", str(run), "--project", *sizes]) == cli.DONE
    assert f"gallery: open {run / 'index.html'} in a browser" in capsys.readouterr().out
    layer = sprites.layer_folder(run, "2") / "layer.js"
    assert data(layer)["projections"].startswith("deconvnet (no max-pooling")
    assert cli.main(["render", str(run), "--crop", "image"]) == cli.DONE
    assert data(layer)["projections"] is None
    assert cli.main(["render", str(run), "--model", spec, "--project"]) == cli.DONE
    assert data(layer)["projections"].startswith("deconvnet (no max-pooling")
    for arguments, message in (
        (["--project"], "--project and --weights need --model"),
        (["--model", f"{tmp_path / 'net.py'}:other"], "the model is not the one that was scanned"),
    ):
        capsys.readouterr()
        assert cli.main(["render", str(run), *arguments]) == cli.USAGE
        assert message in capsys.readouterr().err
