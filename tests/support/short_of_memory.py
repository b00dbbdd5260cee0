"""Memory that runs out when more than so many images are computed at once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from support.half import Rounded

# What PyTorch, CUDA, cuBLAS and cuDNN raise, and what a CPU really does.
SHORTAGES: dict[str, Callable[[], object]] = {
    "allocator of a GPU": lambda: _raise(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
    "CUDA": lambda: _raise(RuntimeError("CUDA error: out of memory")),
    "cuBLAS": lambda: _raise(
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    ),
    "cuDNN": lambda: _raise(
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED")  # of version 9
    ),
    "older cuDNN": lambda: _raise(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")),
    "no algorithm of cuDNN": lambda: _raise(
        RuntimeError("GET was unable to find an engine to execute this computation")
    ),
    "allocator of the CPU": lambda: torch.empty(1 << 60, dtype=torch.uint8),
    "Python": lambda: bytearray(1 << 60),
}


def _raise(error: Exception) -> None:
    raise error


class Short(Rounded):
    """Half precision emulated, in which memory runs out. Attributes of the class, which `short_of_memory` restores:

    limit: images that fit at once. after: batches that are computed before it holds. merging: memory runs out once the
    batch is in the top-k, with other responses than smaller batches give. raising: what is called where they do not
    fit. sizes: of the batches that were merged.
    """

    limit, after, merging = sys.maxsize, 0, False
    raising: Callable[[], object] = SHORTAGES["allocator of a GPU"]
    sizes: ClassVar[list[int]] = []

    def _merge(self, images: Tensor, ids: Tensor) -> None:
        if not Short.merging:
            self._allocate(len(images))
        super()._merge(images, ids)
        if Short.merging:
            self._allocate(len(images))
        Short.sizes.append(len(images))

    def _input(self, images: Tensor) -> Tensor:
        taken = super()._input(images)
        return taken * 1.25 if Short.merging and len(images) > Short.limit else taken

    def _allocate(self, images: int) -> None:
        if images > Short.limit and len(Short.sizes) >= Short.after:
            Short.raising()

    def keys(self, images: Tensor, size: int | None = None) -> Tensor:
        self._allocate(size or self.size)
        return super().keys(images, size)
