"""A scan's step on a GPU: captured into CUDA graphs, its batches copied by a stream of their own meanwhile."""

# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unitvis.errors import error_text
from unitvis_kernels.layout import memory_format


class _Slot:
    """Where one batch lies on the device, and the graph that computes it from there."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.ids = torch.full(images.shape[:1], -1, dtype=torch.int64, device=images.device)
        self.pinned_images: Tensor | None = None  # made when a batch comes that is neither pinned nor on the device
        self.pinned_ids = torch.empty(images.shape[:1], dtype=torch.int64, pin_memory=True)
        self.copied, self.computed = torch.cuda.Event(), torch.cuda.Event()
        self.graph: torch.cuda.CUDAGraph | None = None

    def staged(self, images: Tensor) -> Tensor:
        """The images where the device can fetch them by itself."""
        if images.device.type != "cpu" or images.is_pinned():
            return images
        if self.pinned_images is None:
            self.pinned_images = torch.empty_like(self.images, device="cpu", pin_memory=True)
        return self.pinned_images[: len(images)].copy_(images)


class _NobodyLooks(TorchDispatchMode):
    """Raises where the host would wait for a value of the device: such a step cannot be captured."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = (
            [leaf for leaf in tree_leaves(some) if isinstance(leaf, Tensor)] for some in ((args, kwargs), result)
        )
        looks = torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
        if func is torch.ops.aten.index.Tensor:  # only by a mask
            looks = any(one.dtype == torch.bool for one in given[1:])
        leaves = any(one.is_cuda for one in given) and not all(one.is_cuda for one in made)
        if looks or leaves:
            raise RuntimeError(f"{func} makes the host wait for the device")
        return result


def _first(error: BaseException) -> BaseException:
    """What went wrong before anything else did: the end of a failed capture raises an error of its own."""
    while error.__context__ is not None:
        error = error.__context__
    return error


class Replay:
    """Calls `step(images, ids)` with batches of one fixed size, in two buffers that take turns.

    While one is computed the other is filled. The host waits for one thing only: that the batch before last has left
    its pinned buffer. A shorter batch leaves old images behind its own, under the id -1, which the merge ignores.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], None], size: int, like: Tensor, device: torch.device) -> None:
        self._step, self._device = step, device
        with torch.cuda.device(device):
            empty = torch.zeros((size, *like.shape[1:]), dtype=like.dtype, device=device)
            self._slots = [_Slot(empty.clone(memory_format=memory_format(like))) for _ in range(2)]
            self._copies = torch.cuda.Stream(device)
            self.eager_because = self._capture()

    def _capture(self) -> str | None:
        """Why the step cannot be captured; None if it was. With the id -1 everywhere the state stays as it is."""
        current, aside = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        aside.wait_stream(current)
        pool = torch.cuda.graph_pool_handle()  # the slots take turns, so they can share what lies between
        graphs = [torch.cuda.CUDAGraph() for _ in self._slots]
        try:
            with torch.cuda.stream(aside):  # which also brings the caller's stream back where a capture fails
                self._step(self._slots[0].images, self._slots[0].ids)  # compiles, and lets libraries choose
                with _NobodyLooks():  # torch 2.11's allocator does not get over a capture that fails, so ask before
                    self._step(self._slots[0].images, self._slots[0].ids)
                for slot, graph in zip(self._slots, graphs, strict=True):
                    # Other threads may go on allocating.
                    with torch.cuda.graph(graph, pool=pool, stream=aside, capture_error_mode="thread_local"):
                        self._step(slot.images, slot.ids)
        except Exception as error:
            return error_text(_first(error))
        finally:
            current.wait_stream(aside)
        for slot, graph in zip(self._slots, graphs, strict=True):
            slot.graph = graph
        return None

    def __call__(self, images: Tensor, ids: Tensor) -> None:
        """Fold a batch of at most the fixed size; images and ids may be pinned, or on the device already."""
        slot = self._slots[0]
        self._slots.reverse()
        count = len(ids)
        computing = torch.cuda.current_stream(self._device)
        slot.copied.synchronize()
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(slot.computed)
            if images.device.type != "cpu" or ids.device.type != "cpu":
                self._copies.wait_stream(computing)  # whoever made them may not be done
            images = slot.staged(images)
            slot.images[:count].copy_(images, non_blocking=True)
            if ids.device.type == "cpu":
                slot.pinned_ids.fill_(-1)[:count] = ids
                slot.ids.copy_(slot.pinned_ids, non_blocking=True)
            else:
                slot.ids.fill_(-1)[:count].copy_(ids)
                ids.record_stream(self._copies)
            if images.device.type != "cpu":
                images.record_stream(self._copies)
            slot.copied.record()
        computing.wait_event(slot.copied)
        if slot.graph is None:
            self._step(slot.images, slot.ids)
        else:
            with torch.cuda.device(self._device):
                slot.graph.replay()
        slot.computed.record(computing)
