"""For every unit of a ConvNet, the nine image patches that excite it most."""

from unitvis.errors import ImageError, Interrupted, UnitvisError
from unitvis.merge import merge
from unitvis.receptive_field import ReceptiveField, receptive_field
from unitvis.recorder import Recorder
from unitvis.run import LayerTop, Run, load
from unitvis.scan import scan
from unitvis.transform import Transform

__all__ = [
    "ImageError",
    "Interrupted",
    "LayerTop",
    "ReceptiveField",
    "Recorder",
    "Run",
    "Transform",
    "UnitvisError",
    "load",
    "merge",
    "receptive_field",
    "scan",
]
