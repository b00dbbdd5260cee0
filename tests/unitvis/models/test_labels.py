"""Labels: files of them, and what libraries know of their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from support import zoos
from support.foreign import refusal
from unitvis import models
from unitvis.models.labels import labels_from

zoos.importable()
FORMS = {
    "lines": ("cat\ndog\n", ("cat", "dog"), None),
    "lines of Windows, behind a byte order mark": ("\ufeffcat\r\ndog, hound\r\n", ("cat", "dog, hound"), None),
    "one name": ("cat", ("cat",), None),
    "a list": ('["cat", "dog"]', ("cat", "dog"), None),
    "pairs": ('[["n1", "cat"], ["n2", "dog"]]', ("cat", "dog"), ("n1", "n2")),
    "by number": ('{"0": "cat", "1": "dog"}', ("cat", "dog"), None),
    "by number, in any order": ('{"1": "dog", "0": "cat"}', ("cat", "dog"), None),
    "Keras' class index": ('{"0": ["n1", "cat"], "1": ["n2", "dog"]}', ("cat", "dog"), ("n1", "n2")),
    "numbers by name": ('{"dog": 1, "cat": 0}', ("cat", "dog"), None),
    "a Python dict": ("{0: 'cat, \"feline\"',\n 1: \"dog's\"}", ('cat, "feline"', "dog's"), None),
}  # fmt: skip
REFUSED = {
    "no file": (None, "cannot be read: No such file or directory; write one name a line, or JSON"),
    "nothing": ("", "line 1 of the labels PATH is empty"),
    "a gap": ("cat\n\ndog", "line 2 of the labels PATH is empty"),
    "bytes": (b"\xff\xfe\x00c", "are no text in UTF-8"),
    "numbers from 1": ('{"1": "cat", "2": "dog"}', "name no class 0: the numbers of 2 classes are 0 to 1"),
    "one number for two": ('{"cat": 0, "dog": 0}', "name no class"),
    "an empty object": ("{}", "name no class 0"),
    "an empty list": ("[]", "names is empty"),
    "half of a file": ('["cat", "do', "begin as JSON and are none"),
    "deep": ("[" * 100_000, "begin as JSON and are none"),
    "numbers": ("[1, 2]", "names[0] is 1, not text of 1 to 1,000 characters"),
    "a name too long": ("x" * 1001, "not text of 1 to 1,000 characters"),
    "pairs and names": ('[["n1", "cat"], "dog"]', "names[0] is ['n1', 'cat'], not text"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_file(form: str, tmp_path: Path) -> None:
    text, names, codes = FORMS[form]
    (tmp_path / "classes").write_bytes(text.encode())
    assert labels_from(tmp_path / "classes") == (names, "the file classes", codes)


@pytest.mark.parametrize("what", REFUSED)
def test_a_file_that_holds_no_names(what: str, tmp_path: Path) -> None:
    content, said = REFUSED[what]
    path = tmp_path / "classes"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said.replace("PATH", str(path)) in refusal(lambda: labels_from(str(path)))


def test_names_in_python() -> None:
    assert labels_from(["cat", "dog"]) == (("cat", "dog"), "a list of names", None)
    assert "names[1] is None" in refusal(lambda: labels_from(["cat", None]))  # type: ignore[list-item]


def built(spec: str, build: Any) -> nn.Module:
    """A module in place of one with downloaded weights, with the configuration that timm's would have."""
    module = nn.Conv2d(3, 3, 3)
    if spec.startswith("timm:"):
        import timm

        module.pretrained_cfg = timm.get_pretrained_cfg(spec.removeprefix("timm:")).to_dict()
    return module


def test_the_classes_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_built_model", built)
    torchvisions, timms = (models.load(spec).labels for spec in ("torchvision:alexnet", "timm:resnet18"))
    assert torchvisions is not None
    assert timms is not None
    assert (len(torchvisions.names), torchvisions.names[207], torchvisions.codes) == (1000, "golden retriever", None)
    assert timms.codes is not None
    assert (len(timms.names), timms.names[207], timms.codes[207]) == (1000, "golden retriever", "n02099601")
    assert timms.origin == "the weights of timm:resnet18"
    assert models.load("torchvision:alexnet", pretrained=False).labels is None
    assert models.load("timm:resnet18", pretrained=False).labels is None


def test_other_weights_have_no_known_classes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "_built_model", built)
    monkeypatch.setattr(models, "load_weights", lambda model, path: None)
    assert models.load("torchvision:alexnet", tmp_path / "own.pt").labels is None


@pytest.mark.parametrize(
    ("spec", "suggested"),
    [
        ("alexnet", "; write torchvision:alexnet"),
        ("resnet18", "; write torchvision:resnet18 or timm:resnet18"),
        ("resnetv2_50", "; write timm:resnetv2_50"),
        ("nets.py", "; name a function in it: nets.py:FUNCTION"),
        ("nothing", "package.module:function"),
    ],
)
def test_a_name_without_its_library_is_answered_with_the_spec(spec: str, suggested: str) -> None:
    assert refusal(lambda: models.load(spec)).endswith(suggested)
