"""torchvision and timm, importable beside a CPU build of torch that lacks the operators torchvision compiles itself."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import sys
from pathlib import Path

import torch


@functools.cache
def importable() -> torch.library.Library | None:
    """After this `import torchvision` works: operators that it cannot find get a schema, and no classification model
    calls them. The library that holds the schemas lives as long as this cache.
    """
    try:
        importlib.import_module("torchvision")
        return None
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] in ("torchvision", "timm")]:
            del sys.modules[name]
    found = importlib.util.find_spec("torchvision")
    assert found is not None
    assert found.origin is not None
    text = Path(found.origin).with_name("_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "DEF")
    for name in re.findall(r'register_fake\("torchvision::(\w+)"\)', text):
        library.define(f"{name}(Tensor x) -> Tensor")
    importlib.import_module("torchvision")
    return library
