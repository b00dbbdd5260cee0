"""For every unit of a ConvNet, the nine image patches that excite it most."""

from unitvis.errors import ImageError, UnitvisError
from unitvis.receptive_field import ReceptiveField, receptive_field
from unitvis.recorder import Recorder
from unitvis.run import LayerTop, Run, load
from unitvis.scan import scan
from unitvis.transform import Transform

__all__ = [
    "ImageError",
    "LayerTop",
    "ReceptiveField",
    "Recorder",
    "Run",
    "Transform",
    "UnitvisError",
    "load",
    "receptive_field",
    "scan",
]
