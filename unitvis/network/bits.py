"""What the last bits of responses depend on, found by passes that must agree: other threads, other slots of the batch.

PyTorch promises neither. A matrix product may be split along its sum over the threads, and element-wise functions round
otherwise in the last elements of each thread's share, which a vector of the processor does not fill.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from unitvis.network.canonical import flushes_denormals

ReadMap = Callable[[int, Tensor], None]  # takes the number of the layer and its map [N, C, H, W]
Run = Callable[[Tensor, ReadMap], None]  # a forward pass of a batch, which calls back for every layer

PROBED_ELEMENTS = 4096  # of an element-wise operator, on which it is seen whether two ways of computing it round alike


@dataclass
class Bits:
    """What is known of a network's bits.

    layers: those that were looked at. threads: for a number of threads that the caller has, the largest number under
    which all bits are those of one thread. by_slot: layers whose bits depend on an image's slot in its compute batch.
    mixed: the first layer whose responses depend on the other images, or on chance, by more than rounding.
    """

    layers: frozenset[str] = frozenset()
    threads: dict[int, int] = field(default_factory=dict)
    by_slot: list[str] = field(default_factory=list)
    mixed: str | None = None


@contextmanager
def computing_threads(count: int) -> Iterator[None]:
    """Compute on so many threads for a `with` block."""
    before = torch.get_num_threads()
    if before != count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if before != count:
            torch.set_num_threads(before)


def examine_bits(names: list[str], run: Run, batch: Tensor) -> Bits:
    """Compare the maps of a batch with those of the batch reversed and rotated, computed on one thread.

    names: of the layers that `run` reads. batch: [N, C, H, W], its last quarter noise, in whose place each of the two
    has other images, which are not compared. Where maps differ, more passes tell whether slots or threads are the
    cause. On a CPU the canonical bits are those of one thread; more threads are used where none of their bits differ:
    all that the caller has, else the largest power of two below, which gives each thread whole images more often.
    """
    here = torch.get_num_threads() if batch.device.type == "cpu" else 1
    flushing = here > 1 and flushes_denormals(here * 2**16)  # a thread that began under another setting keeps it
    order = torch.arange(len(batch), device="cpu").flip(0).roll(10)  # no image keeps its slot, and noise gets the last
    neighbours = batch.clone()
    neighbours[-(len(batch) // 4) :] *= 2
    one = straight = _Seen(run, batch, here)
    moved, threads = _Seen(run, neighbours, 1, order), here
    if here > 1 and (flushing or not straight.same_bits(moved)):
        one, threads = _Seen(run, batch, 1), 1
        for count in () if flushing else (here, 1 << ((here - 1).bit_length() - 1)):
            if count > 1 and (straight if count == here else _Seen(run, batch, count)).same_bits(one):
                threads = count
                break
    both = list(enumerate(names))
    by_slot = [
        name for index, name in both if index >= one.first_uneven or not torch.equal(one.sums[index], moved.sums[index])
    ]
    mixed = next((name for index, name in both if not one.close(moved, index)), None)
    return Bits(frozenset(names), {here: threads}, by_slot, mixed)


def close(a: Tensor, b: Tensor) -> Tensor:
    """Where the responses of a layer, [images, units], differ by no more than rounding: bool of that shape.

    What rounding may do to an image's responses is measured by the largest of them, whatever the other images have.
    """
    slack = 1e-4 * a.nan_to_num(0, 0, 0).abs().amax(1, keepdim=True)
    return (a == b) | ((a - b).abs() <= slack) | (a.isnan() & b.isnan())


class _Seen:
    """What a forward pass showed of each layer, of the first three quarters of the images.

    order: int64 [N], the image of the batch that each slot is given. sums: of each layer, int32 [images], over the
    squared bits of each image's map, modulo 2^32, equal where all its bits are. largest: of each layer, its largest
    values [images, C]. patterns: see `_RoundingByPlace`. first_uneven: the number of the first layer after an operator
    that does not treat all images alike; the number of layers without one.
    """

    def __init__(self, run: Run, batch: Tensor, threads: int, order: Tensor | None = None) -> None:
        slots = torch.arange(len(batch), device="cpu") if order is None else order.argsort()
        slots = slots[: len(batch) - len(batch) // 4]
        sums: dict[int, Tensor] = {}
        self.largest: dict[int, Tensor] = {}

        def read(index: int, maps: Tensor) -> None:
            maps = maps.float()
            bits = maps.view(torch.int32)
            # -0.0 counts as 0.0; one image at a time stays in the cache
            sums[index] = torch.stack([(one * one).sum(dtype=torch.int32) for one in bits]).cpu()[slots]
            self.largest[index] = maps.amax((2, 3)).cpu()[slots]

        mode = _RoundingByPlace(lambda: len(sums), len(batch)) if batch.device.type == "cpu" else None
        with computing_threads(threads) if mode else nullcontext(), mode or nullcontext():
            run(batch if order is None else batch[order.to(batch.device)], read)
        self.sums = [sums[index] for index in sorted(sums)]
        self.patterns = mode.patterns if mode else []
        self.first_uneven = mode.first_uneven if mode and mode.first_uneven is not None else len(sums)

    def same_bits(self, other: _Seen) -> bool:
        """Whether all maps have the same bits, and no operator rounds at other places."""
        sums = all(torch.equal(a, b) for a, b in zip(self.sums, other.sums, strict=True))
        return sums and self.patterns == other.patterns

    def close(self, other: _Seen, index: int) -> bool:
        """Whether a layer's largest values differ by no more than rounding."""
        return bool(close(self.largest[index], other.largest[index]).all())


class _RoundingByPlace(TorchDispatchMode):
    """Finds the places at which element-wise operators round otherwise than elsewhere, for the length of a pass.

    Few elements of a map lie there, and few of these differ, so comparing maps may miss it. Here each operator is first
    asked, on some of its elements, whether it rounds alike with the vectors of the processor and without; if not, it is
    given tensors full of one element that differs, whose result shows every such place.

    layers_read: how many layers were read so far. patterns: the places, as bytes, for each such operator.
    """

    def __init__(self, layers_read: Callable[[], int], images: int) -> None:
        super().__init__()
        self._layers_read, self._images = layers_read, images
        self.patterns: list[bytes] = []
        self.first_uneven: int | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.pointwise in func.tags and torch.Tag.nondeterministic_seeded not in func.tags:
            with suppress(Exception):  # of operators that want other tensors; the comparison of maps remains
                self._probe(func, args, kwargs)
        return func(*args, **kwargs)

    def _probe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [one for one in args if isinstance(one, Tensor)]
        if not tensors or not all(one.dtype == torch.float32 for one in tensors):
            return
        shape = torch.broadcast_shapes(*(one.shape for one in tensors))
        at = torch.unravel_index(torch.arange(PROBED_ELEMENTS, device="cpu") * shape.numel() // PROBED_ELEMENTS, shape)
        scales = torch.linspace(0.5, 1.5, PROBED_ELEMENTS, device="cpu")  # for small maps, which have few elements
        elements = tree_map_only(Tensor, lambda one: one.expand(shape)[at] * scales, args)
        apart = tree_map_only(Tensor, lambda one: one.repeat_interleave(2)[::2], elements)  # not next to one another
        differ = func(*elements, **kwargs).view(torch.int32) != func(*apart, **kwargs).view(torch.int32)
        if not differ.any():
            return
        first = int(differ.int().argmax())
        filled = [
            torch.full_like(one, float(element[first])) if isinstance(one, Tensor) else one
            for one, element in zip(args, elements, strict=True)
        ]
        bits = func(*filled, **kwargs).view(torch.int32)
        other = bits != bits.flatten()[0]
        self.patterns.append(other.flatten().nonzero().numpy().tobytes())
        images = other.flatten().split(-(-other.numel() // self._images))
        alike = len(images[-1]) == len(images[0]) and all(torch.equal(image, images[0]) for image in images)
        if not alike and other.any() and self.first_uneven is None:
            self.first_uneven = self._layers_read()
