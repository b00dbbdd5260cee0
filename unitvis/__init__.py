"""For every unit of a ConvNet, the nine image patches that excite it most."""

from unitvis.deconvnet import Projection, project
from unitvis.errors import ImageError, Interrupted, UnitvisError
from unitvis.gallery import gallery
from unitvis.merge import merge
from unitvis.receptive_field import ReceptiveField, receptive_field
from unitvis.recorder import Recorder
from unitvis.responses import ResponseMap, response_map
from unitvis.run import LayerTop, Run, load
from unitvis.scan import scan
from unitvis.transform import Transform

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
    "project",
    "receptive_field",
    "response_map",
    "scan",
]
