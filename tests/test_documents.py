"""The documents do what they say: their code runs, their links lead somewhere, and the README is short.

Python blocks of a page run in one namespace, shell blocks through the command line's own entry, one after the other in
a temporary folder and with smaller images. What is large or comes from a network has a small stand-in. A block that is
not run says why in an HTML comment before it, `<!-- not run: REASON -->`; its commands are parsed.
"""

from __future__ import annotations

import ast
import functools
import glob
import importlib.util
import json
import re
import shlex
import sys
import tarfile
import tomllib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import unitvis
from support import zoos
from unitvis import cli
from unitvis.cli.commands import COMMANDS
from unitvis.demo import command, network

zoos.importable()

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS]
NOTEBOOK = ROOT / "examples" / "alexnet.ipynb"
BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
COUNT = 10  # photographs
SIZES = {"256": "80", "224": "64"}  # of images in the documents, and what they are here


class Block(NamedTuple):
    language: str
    code: str
    line: int  # of its first line of code, in the page
    mark: str  # the comment before it, or empty


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["language"], found["code"], text[: found.start("code")].count("\n") + 1, found["mark"] or "")
        for found in BLOCK.finditer(text)
    ]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# What the documents' code finds


MY_MODEL = """
import torch
from torch import nn


class Net(nn.Module):  # AlexNet's layers by name, few channels
    def __init__(self):
        super().__init__()
        parts = [nn.Conv2d(3, 9, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)]
        parts += [nn.Conv2d(9, 9, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
        for _ in range(3):
            parts += [nn.Conv2d(9, 9, 3, padding=1), nn.ReLU()]
        self.features = nn.Sequential(*parts)

    def forward(self, x):
        return self.features(x).amax((2, 3))


def net():
    torch.manual_seed(0)
    return Net().eval()
"""


def photograph(number: int) -> Image.Image:
    coarse = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((300, 240), Image.Resampling.BICUBIC)


def small_demo_network() -> nn.Sequential:
    """The demo's layers by name, few channels."""
    torch.manual_seed(0)
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    inputs = 3
    for layer, outputs, stride in zip(network.LAYERS, (9, 9, 9, 13, 9), (4, 2, 2, 1, 1), strict=True):
        parts[layer] = nn.Conv2d(inputs, outputs, 5, stride, 2)
        parts[f"relu of {layer}"] = nn.ReLU()
        inputs = outputs
    return nn.Sequential(parts).eval()


class NeuronGradient:
    """In place of Captum's class, with its arguments: the gradient of the neuron, whose value it notes."""

    values: list[float] = []  # noqa: RUF012  one list for all

    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        self.model, self.layer = model, layer

    def attribute(self, pixels: torch.Tensor, neuron: tuple[int, ...]) -> torch.Tensor:
        found: list[torch.Tensor] = []
        handle = self.layer.register_forward_hook(lambda module, inputs, output: found.append(output))
        pixels = pixels.requires_grad_()
        self.model(pixels)
        handle.remove()
        value = found[0][(0, *neuron)]
        self.values.append(value.item())
        return torch.autograd.grad(value, pixels)[0]


class Rows:
    """In place of a data set of Ray's: two actors take turns with its batches."""

    def __init__(self, pixels: np.ndarray, ray: ModuleType) -> None:
        self.pixels, self.ray = pixels, ray

    def map_batches(self, actor: Any, *, fn_constructor_args: list[Any], batch_size: int, compute: Any) -> Rows:
        actors = []
        for number in range(2):
            self.ray.get_runtime_context = lambda number=number: SimpleNamespace(get_actor_id=lambda: f"actor{number}")
            actors.append(actor(*fn_constructor_args))
        for number, ids in enumerate(np.arange(len(self.pixels)).reshape(-1, 2)):
            actors[number % 2]({"image": self.pixels[ids], "id": ids})
        return self

    def materialize(self) -> None:
        return


def module(name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(contents)
    return made


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are so small here that threads would mostly wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs, as files and in archives, a file with a network, and its weights."""
    root = tmp_path_factory.mktemp("files")
    (root / "photos").mkdir()
    (root / "shards").mkdir()
    for number in range(COUNT):
        photograph(number).save(root / "photos" / f"{number:02}.jpg")
    photograph(COUNT).save(root / "photo.jpg")
    for shard in range(3):
        with tarfile.open(root / "shards" / f"train-{shard:03}.tar", "w") as archive:
            for number in range(shard, COUNT, 3):
                archive.add(root / "photos" / f"{number:02}.jpg", f"{number:04}.jpg")
    (root / "my_model.py").write_text(MY_MODEL)
    space: dict[str, Any] = {}
    exec(MY_MODEL, space)  # noqa: S102
    torch.save(space["net"]().state_dict(), root / "alexnet.pt")
    return root


@pytest.fixture
def space(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The namespace of a page's Python blocks, in a folder with the files, and all stand-ins in their places."""
    for path in files.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Image.Image, "show", lambda image: image.load())
    monkeypatch.delitem(sys.modules, "my_model", raising=False)
    net = importlib.import_module("my_model").net

    import torchvision
    from torchvision.transforms import InterpolationMode

    class Photographs(torchvision.datasets.FakeData):
        def __init__(self, root: str, split: str, size: str, download: bool) -> None:
            super().__init__(COUNT, (3, 240, 300))

    size = {"resize_size": [int(SIZES["256"])], "crop_size": [int(SIZES["224"])]}
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    preset = SimpleNamespace(**size, mean=mean, std=std, interpolation=InterpolationMode.BILINEAR)
    weights = SimpleNamespace(DEFAULT=SimpleNamespace(transforms=lambda: preset, meta={"categories": ["cat", "dog"]}))
    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda name: weights)
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights=None: net())
    monkeypatch.setattr(torchvision.datasets, "Imagenette", Photographs)
    monkeypatch.setattr(network, "load", small_demo_network)
    monkeypatch.setattr(command, "demo", functools.partial(command.demo, count=COUNT, workers=1))
    monkeypatch.setattr(NeuronGradient, "values", [])
    monkeypatch.setitem(sys.modules, "captum", module("captum"))
    monkeypatch.setitem(sys.modules, "captum.attr", module("captum.attr", NeuronIntegratedGradients=NeuronGradient))
    ray = module("ray", data=SimpleNamespace(ActorPoolStrategy=lambda size: size))
    monkeypatch.setitem(sys.modules, "ray", ray)
    pixels = np.stack([np.asarray(photograph(number).resize((80, 64))) for number in range(COUNT)])
    normal = torch.utils.data.TensorDataset(torch.randn(COUNT, 3, 64, 64), torch.zeros(COUNT))
    return {
        "model": net(),
        "transform": unitvis.Transform(*map(int, SIZES.values()), mean, std),
        "loader": torch.utils.data.DataLoader(normal, 4),
        "pixels": pixels,
        "data": Rows(pixels, ray),
    }


# Running and parsing


def commands(code: str) -> Iterator[list[str]]:
    """The words of each command; a script of an array of jobs gives those of every job."""
    array = re.search(r"^#SBATCH --array=(\d+)-(\d+)$", code, re.M)
    for job in range(int(array[1]), int(array[2]) + 1) if array else [None]:
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line.replace("$SLURM_ARRAY_TASK_ID", str(job)), comments=True)
            if words:
                yield words


def run(words: list[str]) -> None:
    assert words[0] == "unitvis", f"{words[0]} cannot be run here; say why with <!-- not run: REASON -->"
    expanded = [path for word in words[1:] for path in sorted(glob.glob(word)) or [word]]
    try:
        code = cli.main(expanded)
    except SystemExit as ended:  # of --version, and of wrong usage
        code = ended.code or 0
    assert code == 0, shlex.join(words)


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a command that is not run could not be."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    program = Path(words[0]).name
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(words[1:]) <= set(targets)
    elif program == "pip":
        extras = [extra for word in words for found in re.findall(r"\[(.*)\]", word) for extra in found.split(",")]
        assert words[1] == "install"
        assert set(extras) <= set(project["project"]["optional-dependencies"])
        assert all((ROOT / words[at + 1]).is_file() for at, word in enumerate(words) if word == "-c")
    elif "unitvis" in words:
        with monkeypatch.context() as patched:
            for known in COMMANDS:
                patched.setitem(COMMANDS, known, lambda arguments: 77)
            assert cli.main(words[words.index("unitvis") + 1 :]) == 77
    else:
        assert program == "python", f"nothing is known of {program}"
        assert words[1] == "-m"
        assert importlib.util.find_spec(words[2]) is not None
        if words[2] == "pytest":
            assert words[3] == "-m"
            assert words[4] in [marker.split(":")[0] for marker in project["tool"]["pytest"]["ini_options"]["markers"]]


@pytest.mark.parametrize("page", PAGES, ids=name)
@pytest.mark.filterwarnings("ignore:.*the originals.*:UserWarning")
def test_the_code_of_a_page_runs(page: Path, space: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for block in blocks(page):
        assert block.language in ("python", "sh", "text"), f"line {block.line} of {page.name} names no language"
        small = re.sub(r"\b(256|224)\b", lambda found: SIZES[found[0]], block.code)
        if block.language == "python":
            code = compile("\n" * (block.line - 1) + small, str(page), "exec")
            if not block.mark.startswith("not run: "):
                exec(code, space)  # noqa: S102
        elif block.language == "sh":
            for words in commands(small):
                if block.mark.startswith("not run: "):
                    parse(words, monkeypatch)
                else:
                    run(words)
    if page.name == "looking.md":  # what is handed to Captum is the winning neuron
        assert NeuronGradient.values == [pytest.approx(float(space["top"].values[0]), rel=1e-4)]
    if page.name == "large-data-sets.md":
        whole = unitvis.scan(space["net"](), space["pixels"], transform=space["TRANSFORM"], progress=False)
        assert all((space["run"][layer].values == whole[layer].values).all() for layer in whole)
        parted, packed = unitvis.load("run"), unitvis.load("pack-run")
        assert all((parted[layer].values == packed[layer].values).all() for layer in packed)


def test_every_page_has_code_that_runs() -> None:
    for page in PAGES:
        ran = [block for block in blocks(page) if block.language != "text" and not block.mark.startswith("not run")]
        assert ran, page


def test_fences_are_closed_and_no_block_is_overlooked() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("```") == 2 * len(blocks(page)), page
        assert len(re.findall("<!-- (?:not run|tested with stand-ins): .", text)) == sum(
            bool(block.mark) for block in blocks(page)
        ), page


def test_documents_name_public_modules_alone() -> None:
    public = {*unitvis.__all__, "__version__", "demo"}
    for page in PAGES:
        assert set(re.findall(r"\bunitvis\.([A-Za-z_]\w*)", page.read_text(encoding="utf-8"))) <= public, page
        for block in blocks(page):
            for node in ast.walk(ast.parse(block.code)) if block.language == "python" else ():
                if isinstance(node, ast.ImportFrom) and str(node.module).startswith("unitvis"):
                    assert node.module == "unitvis.demo"


# Links, length and figures


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)}


def test_links_inside_the_project_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if link.startswith("https://"):
                continue
            place, _, anchor = link.partition("#")
            target = (page.parent / place).resolve() if place else page
            assert target.is_relative_to(ROOT), link
            assert target.is_file(), f"{page.name} links to {link}"
            assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


def test_the_tests_that_are_named_exist() -> None:
    """A link to a file of tests names some of its tests."""
    for page in PAGES:
        for names, link in re.findall(r"\[([^]]+)\]\((\.\./tests/[^)]+\.py)\)", page.read_text(encoding="utf-8")):
            source = (page.parent / link).read_text(encoding="utf-8")
            for test in names.split(", "):
                assert re.search(rf"^ *def {test}\(", source, re.M), f"{page.name}: there is no {test} in {link}"


def test_the_readme_links_to_every_page() -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", README.read_text(encoding="utf-8"))
    assert {name(page) for page in DOCS} | {name(NOTEBOOK)} <= set(links)


def test_the_readme_is_short() -> None:
    text = re.sub(r"<!--.*?-->", "", BLOCK.sub("", README.read_text(encoding="utf-8")), flags=re.S)
    assert len(text.split()) <= 800


def test_the_readmes_figures_are_those_that_were_measured() -> None:
    text = README.read_text(encoding="utf-8")
    measured = json.loads((ROOT / "benchmarks" / "results" / "gpu" / "h200-steps.json").read_text())
    rows = {(row["network"], row["contender"]): row for row in measured["rows"]}
    assert measured["machine"]["name"] in text
    assert measured["machine"]["commit"] in text
    assert measured["machine"]["date"] in text
    for one in ("alexnet", "resnet50", "vgg16"):
        own = rows[one, "unitvis"]
        assert f"{round(own['images_s'], -2):,}" in text
        for rival in ("bare forward, captured", "bare forward, torch.compile"):
            assert f"{own['ms_median'] / rows[one, rival]['ms_median']:.2f}" in text


# The notebook


def cells() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_small_and_its_outputs_are_stored() -> None:
    assert NOTEBOOK.stat().st_size < 1_000_000
    pictures = 0
    for number, cell in enumerate(cells(), start=1):
        assert cell["execution_count"] == number
        assert cell["outputs"], number
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "execute_result")
            pictures += bool({"image/png", "image/jpeg"} & set(output.get("data", {})))
    assert pictures >= 6


def test_the_notebooks_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With few pictures; the last expression of each cell shows itself as the stored output does."""
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    few = 0
    for number, cell in enumerate(cells(), start=1):
        source = "".join(cell["source"])
        code, changes = re.subn(r"^COUNT = \d+$", "COUNT = 32", source, flags=re.M)
        few += changes
        tree = ast.parse(code)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"cell {number}", "exec"), space)  # noqa: S102
        shown = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), space) if last else None  # noqa: S307
        printed = any(output["output_type"] == "stream" for output in cell["outputs"])
        assert bool(capsys.readouterr().out) == printed
        for output in cell["outputs"]:
            for kind in set(output.get("data", {})) - {"text/plain"}:
                assert getattr(shown, f"_repr_{kind.split('/')[1]}_")(), f"cell {number} as {kind}"
    assert few == 1
    assert (tmp_path / "alexnet-run" / "index.html").is_file()
