"""CUDA graphs of a scan's step on a GPU; a second stream copies the next batch while one is computed."""

# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unitvis.errors import error_text
from unitvis.network.memory import shortage
from unitvis_kernels.layout import memory_format


class _Slot:
    """A fixed buffer for one batch on the device, and the CUDA graph that computes from it."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.ids = torch.full(images.shape[:1], -1, dtype=torch.int64, device=images.device)
        self.pinned_images: Tensor | None = None  # for batches in pageable memory, made for the first
        self.pinned_ids = torch.empty(images.shape[:1], dtype=torch.int64, pin_memory=True)
        self.copied, self.computed = torch.cuda.Event(), torch.cuda.Event()
        self.graph: torch.cuda.CUDAGraph | None = None

    def staged(self, images: Tensor) -> Tensor:
        """The images in memory that the device can copy from asynchronously: pinned, or its own."""
        if images.device.type != "cpu" or images.is_pinned():
            return images
        if self.pinned_images is None:
            self.pinned_images = torch.empty_like(self.images, device="cpu", pin_memory=True)
        return self.pinned_images[: len(images)].copy_(images)


class ForbidHostSync(TorchDispatchMode):
    """Raises RuntimeError for an operator that makes the host wait for the device: no CUDA graph can capture it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs, outputs = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in ((args, kwargs), result)
        )
        reads_values = torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
        if func is torch.ops.aten.index.Tensor:  # its output's shape depends on values only for boolean masks
            reads_values = any(index.dtype == torch.bool for index in inputs[1:])
        copies_to_host = any(x.is_cuda for x in inputs) and not all(x.is_cuda for x in outputs)
        if reads_values or copies_to_host:
            raise RuntimeError(f"{func} makes the host wait for the device")
        return result


def root_cause(error: BaseException) -> BaseException:
    """The first error of a chain: ending a failed capture raises another one, which hides its cause."""
    while error.__context__ is not None:
        error = error.__context__
    return error


class Replay:
    """Calls `step(images, ids)` with batches of one fixed size, from two buffers used in turn.

    While one is computed the other is filled. The host waits only until the batch before last has been copied from its
    pinned buffer. Behind a shorter batch the buffer still holds old images, with the id -1, which the merge ignores.
    like: a batch with the shape, dtype and layout of all. capture_error: why the step runs eagerly; None: captured.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], None], size: int, like: Tensor, device: torch.device) -> None:
        self._step, self._device = step, device
        with torch.cuda.device(device):
            empty = torch.zeros((size, *like.shape[1:]), dtype=like.dtype, device=device)
            self._slots = [_Slot(empty.clone(memory_format=memory_format(like))) for _ in range(2)]
            self._copy_stream = torch.cuda.Stream(device)
            self.capture_error = self._capture()

    def _capture(self) -> str | None:
        """Capture the step once for each slot; returns the error where that fails, else None.

        A lack of memory is raised: a smaller batch may be captured.

        The step is run with the id -1 for every image, so the top-k does not change.
        """
        current, capture_stream = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        capture_stream.wait_stream(current)
        pool = torch.cuda.graph_pool_handle()  # one for both graphs, which never run at the same time
        graphs = [torch.cuda.CUDAGraph() for _ in self._slots]
        try:
            with torch.cuda.stream(capture_stream):  # also restores the caller's stream after a failed capture
                self._step(self._slots[0].images, self._slots[0].ids)  # warm-up: kernels compile, libraries initialise
                with ForbidHostSync():  # checked first: torch 2.11's allocator does not recover from a failed capture
                    self._step(self._slots[0].images, self._slots[0].ids)
                for slot, graph in zip(self._slots, graphs, strict=True):
                    # thread_local: other threads may allocate meanwhile.
                    with torch.cuda.graph(graph, pool=pool, stream=capture_stream, capture_error_mode="thread_local"):
                        self._step(slot.images, slot.ids)
        except Exception as error:
            if shortage(error) is not None:
                raise
            return error_text(root_cause(error))
        finally:
            current.wait_stream(capture_stream)
        for slot, graph in zip(self._slots, graphs, strict=True):
            slot.graph = graph
        return None

    def __call__(self, images: Tensor, ids: Tensor) -> None:
        """Run the step on a batch of at most the fixed size; images and ids may be pinned or on the device already."""
        slot = self._slots[0]
        self._slots.reverse()
        count = len(ids)
        compute_stream = torch.cuda.current_stream(self._device)
        slot.copied.synchronize()
        with torch.cuda.stream(self._copy_stream):
            self._copy_stream.wait_event(slot.computed)
            if images.device.type != "cpu" or ids.device.type != "cpu":
                self._copy_stream.wait_stream(compute_stream)  # which may still be writing them
            images = slot.staged(images)
            slot.images[:count].copy_(images, non_blocking=True)
            if ids.device.type == "cpu":
                slot.pinned_ids.fill_(-1)[:count] = ids
                slot.ids.copy_(slot.pinned_ids, non_blocking=True)
            else:
                slot.ids.fill_(-1)[:count].copy_(ids)
                ids.record_stream(self._copy_stream)
            if images.device.type != "cpu":
                images.record_stream(self._copy_stream)
            slot.copied.record()
        compute_stream.wait_event(slot.copied)
        if slot.graph is None:
            self._step(slot.images, slot.ids)
        else:
            with torch.cuda.device(self._device):
                slot.graph.replay()
        slot.computed.record(compute_stream)
