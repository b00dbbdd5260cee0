"""Operators for scanning images: the argmax of every channel, a streaming top-k, and what comes before and between.

They are `torch.library` operators (namespace `unitvis`), so fake tensors and `torch.compile` work. `naive` defines what
they compute; `cpu` implements them in PyTorch, and each operator's own module in Triton for GPUs.
"""

from unitvis_kernels.conv_argmax import conv_argmax
from unitvis_kernels.epilogue import epilogue
from unitvis_kernels.geometry import Blocks, ConvGeometry
from unitvis_kernels.keys import BLANK, NAN_KEY, pack, unpack
from unitvis_kernels.magnitudes import magnitudes
from unitvis_kernels.normalize import arrange, normalize
from unitvis_kernels.residual import residual
from unitvis_kernels.spatial_argmax import spatial_argmax
from unitvis_kernels.topk_merge import topk_merge_, topk_merge_states_, topk_read, topk_state

__all__ = [
    "BLANK",
    "NAN_KEY",
    "Blocks",
    "ConvGeometry",
    "arrange",
    "conv_argmax",
    "epilogue",
    "magnitudes",
    "normalize",
    "pack",
    "residual",
    "spatial_argmax",
    "topk_merge_",
    "topk_merge_states_",
    "topk_read",
    "topk_state",
    "unpack",
]
