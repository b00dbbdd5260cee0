"""Forward passes that read layers: hooks that stop after the last layer, and the canonical pass built on them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import unitvis_kernels as uk
from unitvis.errors import UnitvisError, closest_names, error_text, first_line
from unitvis.network.bits import Bits, ReadMap, computing_threads, examine_bits
from unitvis.network.borrowing import Tensors
from unitvis.network.canonical import canonical_settings, refuse_other_arithmetic
from unitvis.network.memory import holding
from unitvis.sources.transform import Transform

COMPUTE_BATCH = 16  # images of a canonical forward pass
_WANTS_GRADIENTS = ("does not require grad", "inference tensor", "inference mode")  # in what PyTorch says of autograd
_RANKED_TYPES = (torch.float32, torch.float16, torch.bfloat16)  # which the operators take

Rectangle = tuple[int, int, int, int]  # of positions in a map: top, bottom, left, right; half-open


def as_map(name: str, axis: int | None, output: object) -> Tensor:
    """View a layer's output as a map [N, C, H, W]; axis: which of its axes holds the channels, None if unknown.

    [N, C] counts as a map of 1x1, a sequence [N, C, L] or [N, L, C] as one row of L positions. Values of another type
    than float32, float16 or bfloat16 are rounded to float32. Raises UnitvisError for any other output, and for an
    unknown axis, since units would be a guess.
    """
    if not isinstance(output, Tensor):
        raise UnitvisError(f"layer {name!r} returns {type(output).__name__}, not a tensor; name a layer inside it")
    if not output.is_floating_point():
        raise UnitvisError(f"layer {name!r} returns {output.dtype}; only floating-point responses can be ranked")
    if output.dtype not in _RANKED_TYPES:
        output = output.float()
    shape = list(output.shape)
    if output.ndim == 2:
        return output[:, :, None, None]
    if output.ndim not in (3, 4):
        raise UnitvisError(
            f"layer {name!r} returns a tensor of shape {shape}; a feature map [N, C, H, W], a sequence or a vector "
            f"[N, C] is needed"
        )
    if axis is None or not 0 < axis < output.ndim:
        raise UnitvisError(
            f"layer {name!r} returns a tensor of shape {shape}, and nothing tells which axis holds its channels; "
            f"name a convolution, Linear, BatchNorm or LayerNorm before it"
        )
    maps = output.movedim(axis, 1)
    return maps if output.ndim == 4 else maps[:, :, None, :]


def call(model: nn.Module, batch: Tensor) -> Any:
    """What one forward pass returns; what the model raises comes out as a UnitvisError that names the batch."""
    try:
        return model(batch)
    except UnitvisError:
        raise
    except Exception as error:
        if not torch.is_grad_enabled() and any(words in str(error).lower() for words in _WANTS_GRADIENTS):
            raise UnitvisError(
                f"the model differentiates within its forward pass, which runs without autograd here "
                f"({first_line(error)}); give a model whose forward pass needs no gradients"
            ) from error
        raise UnitvisError(
            f"the model raised {type(error).__name__} on a batch of shape {list(batch.shape)}: {first_line(error)}"
        ) from error


class _LastLayerRead(BaseException):
    """Ends a forward pass; no `except Exception` of a model's own swallows it."""


class Hooks:
    """Forward hooks on layers for the length of a `with` block. layers: their names, with the axis of their channels.

    shapes: [C, H, W] of each layer's map, where another one is to be refused. inside: the positions of each that `keys`
    reads alone; None: all. to_end: see `run`.
    `run` reads each layer's map as the layer returns it, before an in-place activation can overwrite it, and stops the
    forward pass after the last of the layers; or, for a model that may run a layer again for some images, lets it run
    to its end, to refuse a layer that does.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, int | None],
        shapes: Sequence[tuple[int, int, int]] = (),
        *,
        inside: Sequence[Rectangle | None] = (),
        to_end: bool = False,
    ) -> None:
        self._model, self._layers, self._shapes, self._to_end = model, dict(layers), shapes, to_end
        self._inside = inside or [None] * len(self._layers)
        self._handles: list[RemovableHandle] = []
        self._read: ReadMap | None = None
        self._thread = 0  # the one that reads
        self._seen: set[int] = set()
        self._error: UnitvisError | None = None  # the first one of a layer, also if the model's own code catches it

    def __enter__(self) -> Self:
        modules = dict(self._model.named_modules())
        for name in self._layers:
            if name not in modules:
                raise UnitvisError(f"the model has no layer {name!r}; {closest_names(name, filter(None, modules))}")
        for index, name in enumerate(self._layers):
            self._handles.append(modules[name].register_forward_hook(self._hook(index, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, index: int, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            if self._read is None or self._thread != threading.get_ident():  # somebody else calls the model, or a copy
                return
            try:
                self._read_layer(index, name, output, self._read)
            except Exception as error:
                told = f"layer {name!r} could not be read ({error_text(error)})"
                self._error = self._error or (error if isinstance(error, UnitvisError) else UnitvisError(told))
                raise self._error from (None if self._error is error else error)
            if len(self._seen) == len(self._layers) and not self._to_end:
                self._read = None  # code that catches even this may run layers in another way
                raise _LastLayerRead

        return hook

    def _read_layer(self, index: int, name: str, output: object, read: ReadMap) -> None:
        if index in self._seen:
            raise UnitvisError(f"layer {name!r} ran twice in one forward pass; only layers that run once can be ranked")
        self._seen.add(index)
        maps = as_map(name, self._layers[name], output)
        if self._shapes and tuple(maps.shape[1:]) != self._shapes[index]:
            raise UnitvisError(
                f"layer {name!r} gave maps of {list(self._shapes[index])} and now gives {list(maps.shape[1:])}; "
                "only layers whose maps have one size can be ranked: leave it out"
            )
        read(index, maps)

    def run(self, batch: Tensor, read: ReadMap) -> None:
        """Forward a batch and call `read(number of the layer, map [N, C, H, W])` for every layer."""

        def read_values(index: int, maps: Tensor) -> None:
            read(index, maps.detach())

        # Where gradients are off, the model's own code may enable them, and nobody reads those.
        self._read = read if torch.is_grad_enabled() else read_values
        self._seen, self._error, self._thread = set(), None, threading.get_ident()
        try:
            call(self._model, batch)
        except _LastLayerRead:
            pass
        except UnitvisError:
            # A failure after the last of the layers does not matter, such as a classifier made for another input size.
            if self._error is None and len(self._seen) < len(self._layers):
                raise
        finally:
            self._read = None
        if self._error is not None:
            raise self._error
        if missing := [name for index, name in enumerate(self._layers) if index not in self._seen]:
            raise UnitvisError(f"layer {missing[0]!r} never ran in this forward pass, though it did in the first")

    def keys(self, batch: Tensor, columns: Sequence[slice], threshold: Tensor | None, *, neurons: bool) -> Tensor:
        """Keys, int64 [N, units of all layers], of a batch.

        columns: each layer's units among those of all. threshold: float32 [units], see `uk.spatial_argmax`. neurons:
        each element of a map is a unit of its own.
        """
        keys = torch.empty(len(batch), columns[-1].stop, dtype=torch.int64, device=batch.device)

        def read(index: int, maps: Tensor) -> None:
            if neurons:
                maps = maps.flatten(1)[:, :, None, None]
            own = columns[index]
            floor = None if threshold is None else threshold[own]
            keys[:, own] = uk.spatial_argmax(maps, floor, self._inside[index])

        self.run(batch, read)
        return keys


class CanonicalPass:
    """Canonical forward passes that read some layers of a model in eval mode, for the length of a `with` block.

    layers: names with the axis of their channels, in the order of the forward pass. columns: the units of each, counted
    from 0; needed by `keys` alone. shapes, inside, to_end: see `Hooks`. channels: of the model's input. The model runs
    as given, eager, in IEEE float32, on channels-last input, in compute batches of exactly `COMPUTE_BATCH` images:
    convolution and matrix libraries choose another algorithm for another shape, and with it other last bits. On a CPU
    the bits are those of one thread; more compute where `check` found that they give the same. tensors, bits: what is
    known of the model, shared by its passes.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        transform: Transform | None,
        layers: Mapping[str, int | None],
        columns: Sequence[slice] = (),
        *,
        shapes: Sequence[tuple[int, int, int]] = (),
        inside: Sequence[Rectangle | None] = (),
        channels: int = 3,
        neurons: bool = False,
        to_end: bool = False,
        tensors: Tensors,
        bits: Bits,
    ) -> None:
        self._device, self._transform, self._channels = device, transform, channels
        self._columns, self._neurons = columns, neurons
        self._names = list(layers)
        self._hooks = Hooks(model, layers, shapes, inside=inside, to_end=to_end)
        self._tensors, self.bits = tensors, bits
        self._passes = 0

    def __enter__(self) -> Self:
        refuse_other_arithmetic(self._device)
        self._hooks.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.__exit__()

    def keys(self, images: Tensor, threshold: Tensor | None = None) -> Tensor:
        """Keys, int64 [n, units], of at most `COMPUTE_BATCH` images as they were read; threshold: see `Hooks.keys`."""
        with self._computing(images):
            batch = self._compute_batch(images)
            return self._hooks.keys(batch, self._columns, threshold, neurons=self._neurons)[: len(images)]

    def alone(self, images: Tensor, slots: Sequence[int] | None = None) -> Tensor:
        """Responses, float32 [n, units], of images as they were read, each computed in a forward pass of its own.

        slots: of the images in a compute batch whose others are black, which gives the bits of `keys` if they have
        those slots there; None: the pass is of one image, which is faster and differs by rounding.
        """
        # No position is looked for.
        never = torch.full((self._columns[-1].stop,), torch.inf, dtype=torch.float32, device=self._device)
        keys = []
        for number, image in enumerate(torch.split(images, 1)):
            slot = 0 if slots is None else slots[number]
            with self._computing(image):
                if slots is not None:
                    batch = self._compute_batch(image)
                    batch[[0, slot]] = batch[[slot, 0]]
                else:  # a copy: a model may overwrite its input
                    batch = model_input(image, self._transform, self._device, self._channels)
                    batch = batch.clone(memory_format=torch.channels_last)
                keys.append(self._hooks.keys(batch, self._columns, never, neurons=self._neurons)[slot : slot + 1])
        return uk.unpack(torch.cat(keys))[0]

    def maps(self, images: Tensor, read: ReadMap, under: AbstractContextManager[object] | None = None) -> None:
        """Call `read(number of the layer, map [n, C, H, W])` for every layer, of at most `COMPUTE_BATCH` images.

        under: a context for the forward pass alone, such as a mode that observes its operations.
        """
        with self._computing(images), under or nullcontext():
            self._hooks.run(self._compute_batch(images), lambda index, maps: read(index, maps[: len(images)]))

    def differentiable_maps(self, pixels: Tensor, read: ReadMap) -> None:
        """Like `maps`, with gradients: of the model's input, float32 [N, C, H, W] that requires them, any N."""
        with self._tensors.kept(), torch.inference_mode(False), torch.enable_grad(), canonical_settings(self._device):
            self._hooks.run(pixels.clone(), read)  # a clone: a model may overwrite its input

    @contextmanager
    def _computing(self, images: Tensor) -> Iterator[None]:
        """What a pass that is not differentiated runs under. images: those that it is for."""
        here, threads = torch.get_num_threads(), None
        if self._device.type == "cpu" and here > 1:
            known = self.bits.layers.issuperset(self._names) and here in self.bits.threads
            if not known and self._passes:  # one pass alone costs least on one thread, whose bits are canonical
                self.check(images)
                known = True
            threads = self.bits.threads[here] if known else 1
        self._passes += 1
        used = nullcontext() if threads is None else computing_threads(threads)
        with self._fitting(), self._tensors.kept(), torch.no_grad(), canonical_settings(self._device), used:
            yield

    def _fitting(self) -> AbstractContextManager[None]:
        """Context of passes that fewer images would give other bits."""
        return holding(f"a compute batch of {COMPUTE_BATCH} images in float32", self._device)

    def check(self, images: Tensor) -> Bits:
        """Find out what the layers' bits depend on, by passes of at most `COMPUTE_BATCH` images and of noise.

        The noise tells threads and slots apart where the images are all black, or alike.
        """

        def run(batch: Tensor, read: ReadMap) -> None:
            with self._tensors.kept(), torch.no_grad():
                self._hooks.run(compute_batch(batch), read)  # a copy: a model may overwrite its input

        with self._fitting(), canonical_settings(self._device):
            with torch.inference_mode():
                batch = self._compute_batch(_beside_noise(images))
            found = examine_bits(self._names, run, batch)
        if self.bits.layers >= found.layers:  # for another number of threads
            self.bits.threads |= found.threads
        else:
            vars(self.bits).update(vars(found))
        return found

    def _compute_batch(self, images: Tensor) -> Tensor:
        batch = model_input(images, self._transform, self._device, self._channels)
        normalised_here = images.dtype == torch.uint8  # and so in channels-last memory that nobody else holds
        return batch if normalised_here and len(images) == COMPUTE_BATCH else compute_batch(batch)


def _beside_noise(images: Tensor) -> Tensor:
    """`COMPUTE_BATCH` images: half of them the given ones, over again where they are too few, and then noise."""
    noise = torch.randn((COMPUTE_BATCH, *images.shape[1:]), generator=torch.Generator().manual_seed(0), device="cpu")
    noise = (noise * 64 + 128).clamp(0, 255).byte() if images.dtype == torch.uint8 else noise.to(images.dtype)
    batch, half = noise.to(images.device), COMPUTE_BATCH // 2
    batch[:half] = images[torch.arange(half, device=images.device) % len(images)]
    return batch


def model_input(images: Tensor, transform: Transform | None, device: torch.device, channels: int) -> Tensor:
    """float32 [N, C, H, W] on a device, from uint8 [N, H, W, 3], which is normalised, or from normalised floats.

    channels: of the input that is made of pixels, see `Transform.normalize`.
    """
    if images.dtype == torch.uint8 and transform is not None:
        return transform.normalize(images.to(device), channels=channels)
    return images.to(device, torch.float32)


def compute_batch(images: Tensor) -> Tensor:
    """A copy of at most `COMPUTE_BATCH` images [n, C, H, W]: float32, channels last, padded with zeros."""
    shape, layout = (COMPUTE_BATCH, *images.shape[1:]), torch.channels_last
    batch = torch.empty(shape, dtype=torch.float32, device=images.device, memory_format=layout)
    batch[: len(images)] = images
    batch[len(images) :] = 0
    return batch
