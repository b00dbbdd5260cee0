"""For every unit of a ConvNet, the nine image patches that excite it most."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from unitvis.errors import ImageError, Interrupted, UnitvisError
from unitvis.version import __version__ as __version__

if TYPE_CHECKING:
    from unitvis.attribution.deconvnet import Projection, project
    from unitvis.attribution.feature_maps import FeatureMaps, feature_maps
    from unitvis.attribution.responses import ResponseMap, response_map
    from unitvis.drawing.page import Page
    from unitvis.network.receptive_fields.fields import receptive_field
    from unitvis.network.receptive_fields.receptive_field import ReceptiveField
    from unitvis.pages import gallery
    from unitvis.pages.excerpt import excerpt
    from unitvis.ranking.recorder import Recorder
    from unitvis.run import LayerTop, Run, load
    from unitvis.scanning.merge import merge
    from unitvis.scanning.pack import pack
    from unitvis.scanning.scan import scan
    from unitvis.sources.transform import Transform

__all__ = [
    "FeatureMaps",
    "ImageError",
    "Interrupted",
    "LayerTop",
    "Page",
    "Projection",
    "ReceptiveField",
    "Recorder",
    "ResponseMap",
    "Run",
    "Transform",
    "UnitvisError",
    "excerpt",
    "feature_maps",
    "gallery",
    "load",
    "merge",
    "pack",
    "project",
    "receptive_field",
    "response_map",
    "scan",
]

# Where the names are that need PyTorch, which takes seconds to import: they are looked up when they are first used.
_MODULES = {
    "FeatureMaps": "attribution.feature_maps",
    "LayerTop": "run",
    "Page": "drawing.page",
    "Projection": "attribution.deconvnet",
    "ReceptiveField": "network.receptive_fields.receptive_field",
    "Recorder": "ranking.recorder",
    "ResponseMap": "attribution.responses",
    "Run": "run",
    "Transform": "sources.transform",
    "excerpt": "pages.excerpt",
    "feature_maps": "attribution.feature_maps",
    "gallery": "pages",
    "load": "run",
    "merge": "scanning.merge",
    "pack": "scanning.pack",
    "project": "attribution.deconvnet",
    "receptive_field": "network.receptive_fields.fields",
    "response_map": "attribution.responses",
    "scan": "scanning.scan",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        found = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = found
        return found
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
