"""Devices: moving a model to one, its free memory, and the fingerprint of its arithmetic."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from torch import nn

from unitvis.errors import UnitvisError
from unitvis.network.copies import copied


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
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def on_device(model: nn.Module, device: torch.device | str | None) -> tuple[nn.Module, torch.device]:
    """Return (the model in float32 on the device, the device): the model itself where it is so already, else a copy.

    device: None is the device of the model's first tensor. Raises UnitvisError for a device other than the CPU and
    CUDA GPUs that are present.
    """
    tensors = [*model.parameters(), *model.buffers()]
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
    foreign = any(t.device != wanted or (t.is_floating_point() and t.dtype != torch.float32) for t in tensors)
    return (copied(model).to(wanted, torch.float32) if foreign else model), wanted


def free_memory(device: torch.device) -> float:
    """Bytes of memory that can be allocated on a device; infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except OSError:  # /proc exists on Linux only; elsewhere the allocation itself has to fail
        return float("inf")


def fingerprint(device: torch.device) -> dict[str, str]:
    """Describe what the last bits of a response depend on besides model and image: hardware, torch version, layout."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {"device": device.type, "hardware": hardware, "torch": torch.__version__, "layout": "channels_last"}


def refuse_state(units: int, places: int, images: int, device: torch.device) -> None:
    """Raise UnitvisError where the top-k state and the first merge into it do not fit into free memory.

    places: responses kept of each unit. images: in a batch.
    """
    need = units * 8 * 6 * (places + images)  # bytes: int64 key and id of each, three times while the merge sorts
    free = free_memory(device)
    if need > free:
        raise UnitvisError(
            f"the state of {units:,} units needs {need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; "
            f"name fewer layers, or rank channels instead of neurons"
        )
