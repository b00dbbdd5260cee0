"""For every unit of a ConvNet, the nine image patches that excite it most."""

from unitvis.attribution.deconvnet import Projection, project
from unitvis.attribution.responses import ResponseMap, response_map
from unitvis.errors import ImageError, Interrupted, UnitvisError
from unitvis.gallery import gallery
from unitvis.network.receptive_fields.fields import receptive_field
from unitvis.network.receptive_fields.receptive_field import ReceptiveField
from unitvis.ranking.recorder import Recorder
from unitvis.run import LayerTop, Run, load
from unitvis.scanning.merge import merge
from unitvis.scanning.pack import pack
from unitvis.scanning.scan import scan
from unitvis.sources.transform import Transform
from unitvis.version import __version__ as __version__

__all__ = [
    "ImageError",
    "Interrupted",
    "LayerTop",
    "Projection",
    "ReceptiveField",
    "Recorder",
    "ResponseMap",
    "Run",
    "Transform",
    "UnitvisError",
    "gallery",
    "load",
    "merge",
    "pack",
    "project",
    "receptive_field",
    "response_map",
    "scan",
]
