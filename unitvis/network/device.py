"""Devices: moving a model to one, its free memory, and the fingerprint of its arithmetic."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from unitvis.decoding.memory import available_memory
from unitvis.errors import UnitvisError
from unitvis.network.copies import copied
from unitvis.network.memory import holding


def unwrapped(model: object) -> nn.Module:
    """The module whose layers have their own names, out of the wrappers of torch.compile and of data parallelism.

    Raises UnitvisError for what is no eager module: scripted, traced and exported models keep no layers to read.
    """
    while True:
        if isinstance(model, torch.jit.ScriptModule | torch.export.ExportedProgram):
            raise UnitvisError(
                f"the model is a {type(model).__name__}, which keeps no layers that can be read; give the eager module "
                "that it was made from"
            )
        if not isinstance(model, nn.Module):
            raise UnitvisError(f"the model must be a torch.nn.Module, not {type(model).__name__}")
        if _is_sharded(model):
            raise UnitvisError(
                "the model's weights are spread over processes (FSDP); give a whole one: load into it what "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict gives with full_state_dict=True"
            )
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def _is_sharded(model: nn.Module) -> bool:
    """Whether no process has all of the weights; told by names, since distributed PyTorch is not built everywhere."""
    wrappers = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    tensors = {type(parameter.data).__name__ for parameter in model.parameters()}
    return bool({"FullyShardedDataParallel", "FSDPModule"} & wrappers or "DTensor" in tensors)


def on_device(model: nn.Module, device: torch.device | str | None) -> tuple[nn.Module, torch.device]:
    """Return (the model in float32 on the device, the device): the model itself where it is so already, else a copy.

    device: None is the device of the model's first tensor. Raises UnitvisError for a device other than the CPU and
    CUDA GPUs that are present.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    if unmade := [name for name, tensor in named if is_lazy(tensor)]:
        raise UnitvisError(
            f"{unmade[0]!r} has no shape yet (a lazy module); run the model once on a batch, then scan it"
        )
    tensors = [tensor for _, tensor in named]
    own = tensors[0].device if tensors else torch.device("cpu")
    try:
        wanted = own if device is None else torch.device(device)
    except RuntimeError:
        raise UnitvisError(f"device {device!r} is unknown; give cpu, cuda or cuda:1") from None
    if wanted.type not in ("cpu", "cuda"):
        raise UnitvisError(f"a model on device {str(wanted)!r} cannot be scanned; give device='cpu' or a GPU of cuda's")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise UnitvisError(f"device {str(device)!r} is not there ({torch.cuda.device_count()} GPUs); give cpu, or none")
    if wanted.type == "cuda" and wanted.index is None:
        wanted = torch.device("cuda", torch.cuda.current_device())
    if all(t.device == wanted and t.dtype == _single_precision(t) for t in tensors):
        return model, wanted
    with holding("the model in float32", wanted):
        move: Any = copied(model)._apply  # what to() calls, which would give all tensors one type, complex ones too
        return move(lambda tensor: tensor.to(wanted, _single_precision(tensor))), wanted


def _single_precision(tensor: Tensor) -> torch.dtype:
    """float32 for a tensor of real numbers, complex64 for one of complex numbers, and its own type for any other."""
    return torch.float32 if tensor.is_floating_point() else torch.complex64 if tensor.is_complex() else tensor.dtype


def default_batch(device: torch.device) -> int:
    """How many images are read, and in half precision computed, at once if nobody says another number."""
    return 256 if device.type == "cuda" else 64


def free_memory(device: torch.device) -> float:
    """Bytes of memory that can be allocated on a device; infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory()


_cudnn: Any = torch.backends.cudnn
# Variables of the environment that make libraries choose other algorithms, and so other last bits.
_CPU_VARIABLES = (
    "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_CPU_ISA_HINTS", "DNNL_CPU_ISA_HINTS", "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS", "MKL_DEBUG_CPU_TYPE", "MKL_DISABLE_FAST_MM", "MKL_NUM_STRIPES", "OPENBLAS_CORETYPE",
    "TORCH_MKLDNN_MATMUL_MIN_DIM", "TORCH_MKLDNN_MATMUL_MIN_SIZE", "TORCH_LINEAR_FLATTEN_3D",
)  # fmt: skip
_CUDA_VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "CUDNN_CONV_WSCAP_DBG", "NVIDIA_TF32_OVERRIDE",
    "TORCH_BLAS_PREFER_CUBLASLT", "TORCH_LINALG_PREFER_CUSOLVER", "TORCH_CUDNN_V8_API_DISABLED",
    "TORCH_CUDNN_USE_HEURISTIC_MODE_B", "TORCH_LINEAR_FLATTEN_3D",
)  # fmt: skip


def fingerprint(device: torch.device) -> dict[str, str]:
    """Describe what the last bits of a response depend on besides model and image.

    Hardware, torch version, layout; and, where it is not PyTorch's default, what cannot be set for a while: variables
    of the environment that libraries read, and the default dtype.
    """
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    found = {"device": device.type, "hardware": hardware, "torch": torch.__version__, "layout": "channels_last"}
    if device.type == "cuda":  # cuDNN is a package of its own, which may be exchanged
        found["cudnn"] = str(_cudnn.version()) if _cudnn.enabled else "off"
    if torch.get_default_dtype() != torch.float32:
        found["default dtype"] = str(torch.get_default_dtype())
    names = _CUDA_VARIABLES if device.type == "cuda" else _CPU_VARIABLES
    return found | {name: os.environ[name] for name in names if name in os.environ}


def refuse_state(units: int, places: int, images: int, device: torch.device) -> None:
    """Raise UnitvisError where the top-k state, a copy of it and the first merge do not fit into free memory.

    places: responses kept of each unit. images: in a batch.
    """
    # Bytes: int64 key and id of each, three times while the merge sorts; the copy holds those of the places.
    need = units * 8 * (6 * (places + images) + 2 * places)
    free = free_memory(device)
    if need > free:
        raise UnitvisError(
            f"the state of {units:,} units needs {need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; "
            f"name fewer layers, or rank channels instead of neurons"
        )
