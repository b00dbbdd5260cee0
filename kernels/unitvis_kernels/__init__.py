"""Operators that keep a scan on the device: the argmax of every channel, a streaming top-k, and what surrounds them.

They are `torch.library` operators (namespace `unitvis`): fake tensors and `torch.compile` work, and every device has
the plain PyTorch implementation of `reference.py` where it has no kernel of its own.
"""

from unitvis_kernels.conv_argmax import conv_argmax
from unitvis_kernels.epilogue import epilogue
from unitvis_kernels.keys import BLANK, NAN_KEY, pack, unpack
from unitvis_kernels.normalize import normalize
from unitvis_kernels.spatial_argmax import spatial_argmax
from unitvis_kernels.topk_merge import topk_merge_, topk_merge_states_, topk_read, topk_state

__all__ = [
    "BLANK",
    "NAN_KEY",
    "conv_argmax",
    "epilogue",
    "normalize",
    "pack",
    "spatial_argmax",
    "topk_merge_",
    "topk_merge_states_",
    "topk_read",
    "topk_state",
    "unpack",
]
