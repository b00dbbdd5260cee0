"""A network: the model on its device, what turns pixels into its input, and the layers that are read."""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import unitvis_kernels as uk
from unitvis.errors import UnitvisError, abridged
from unitvis.network.bits import Bits, close, computing_threads
from unitvis.network.borrowing import Tensors, evaluating, turn
from unitvis.network.canonical import canonical_settings, refuse_other_arithmetic
from unitvis.network.channels import channel_axes
from unitvis.network.device import free_memory, on_device, unwrapped
from unitvis.network.forward import CanonicalPass, Hooks, Rectangle, model_input
from unitvis.network.identity import LOUD, channel_numbers, describe_model, noise, numbers_of, outline
from unitvis.network.inputs import input_channels, refuse_channels_last
from unitvis.network.layers import Examination, Layer, maps_of_two
from unitvis.network.receptive_fields.fields import followed_fields
from unitvis.network.receptive_fields.receptive_field import ReceptiveField
from unitvis.network.user_hooks import silent_hooks
from unitvis.sources.transform import Transform

Shape = tuple[int, int, int]  # channels, height, width


class Network:
    """A model on a device with its transform and, once `examine` has seen them, its layers and their units.

    model: left as it was found; copied where it is on another device or not in float32. device: None is the model's
    own. transform: turns uint8 pixels into the model's input; None where images come as normalised floats.
    """

    def __init__(
        self, model: nn.Module, *, device: torch.device | str | None = None, transform: Transform | None = None
    ) -> None:
        given = unwrapped(model)
        floats = {t.dtype for t in (*given.parameters(), *given.buffers()) if t.is_floating_point()}
        self._mixed_types = sorted(str(one).removeprefix("torch.") for one in floats) if len(floats) > 1 else []
        self.model, self.device = on_device(given, device)
        self.transform = transform
        self.input_shape: Shape = (0, 0, 0)  # [C, H, W] of the model's input
        self.unit = "channel"
        self.layers: list[Layer] = []  # in the order of the forward pass
        self.head: str | None = None  # the layer whose units are a classifier's outputs, see `Examination.head`
        self.columns: list[slice] = []  # each layer's units among those of all
        self.fields: dict[str, ReceptiveField] = {}
        self.drawn_sides: dict[str, int] = {}  # of the drawn boxes of layers that are ranked inside of them
        self.followed = True  # whether its trace is that of any image, to the end of the forward pass; see `fields`
        self._channel_axes: dict[str, int | None] = {}  # of the modules whose outputs were looked at so far
        self._description: dict[str, Any] | None = None  # once it was asked for after `examine`
        self._channels: int | None = None  # of the model's input; None: not looked at yet
        self.bits = Bits()  # what is known of them
        self._tensors = Tensors(self.model)
        self.silent_hooks: Counter[str] = Counter()  # of the model's own, by module, that return nothing
        self.preparation = 0.0  # seconds that finding layers and receptive fields took

    @torch.inference_mode(False)
    def examine(
        self,
        shape: Shape,
        layers: Sequence[str] | str | None = None,
        unit: str = "channel",
        exclude: Sequence[str] | str = (),
    ) -> None:
        """Find the layers and their units by one forward pass of an input [C, H, W].

        layers: names or shell patterns; None: every convolution, after the BatchNorm that directly follows it. unit:
        "channel", or "neuron" for every element of the maps. exclude: layers left out. UnitvisError for a layer that
        was named and cannot be ranked; see `Examination.chosen`.
        """
        start = time.perf_counter()
        try:
            settings = canonical_settings(self.device)
            with self.evaluating(), self._tensors.kept(), settings, silent_hooks(self.model) as self.silent_hooks:
                examination = Examination(self.model, self._blank_image(shape))
        except UnitvisError as error:
            if not self._mixed_types:
                raise
            raise UnitvisError(
                f"the model mixes {' and '.join(self._mixed_types)}, and does not run converted to float32, in which "
                f"responses are computed ({error}); give model.float() whose code casts to no other type"
            ) from error
        of_two = None
        if layers is None:
            with self.evaluating(), self._tensors.kept(), canonical_settings(self.device):
                of_two = maps_of_two(self.model, self._blank_image(shape))
        self._channel_axes |= examination.axes
        self.layers, self.head = examination.chosen(layers, exclude, of_two), examination.head
        counts = [layer.channels * (layer.height * layer.width if unit == "neuron" else 1) for layer in self.layers]
        ends = np.cumsum(counts).tolist()
        self.columns = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
        self.input_shape, self.unit, self.fields, self.drawn_sides, self._description = shape, unit, {}, {}, None
        self.preparation = time.perf_counter() - start

    def _blank_image(self, shape: Shape) -> Tensor:
        """Zeros [1, C, H, W]; UnitvisError where memory does not hold them."""
        need, free = 4 * math.prod(shape), free_memory(self.device)
        if 2 * need > free:  # the first layer's maps are larger still
            raise UnitvisError(
                f"an input of {shape[2]} x {shape[1]} pixels takes {need / 2**30:,.0f} GiB, and {free / 2**30:.1f} GiB "
                f"are free; give a smaller size"
            )
        return torch.zeros(1, *shape, dtype=torch.float32, device=self.device)

    @torch.inference_mode(False)
    def find_receptive_fields(self) -> None:
        """Fill in `fields` and `followed`; UnitvisError for a layer that has none, see `receptive_fields`."""
        start = time.perf_counter()
        with self.evaluating(), Tensors(self.model).kept():  # the copy that is traced shares the parameters
            self.fields, self.followed = followed_fields(self.model, self._layer_axes(), self.input_shape)
        self.preparation += time.perf_counter() - start

    @property
    def units(self) -> int:
        """The number of units of all layers together."""
        return self.columns[-1].stop

    @property
    def layer_of(self) -> NDArray[np.int64]:
        """int64 [units]: the number of each unit's layer."""
        return np.repeat(np.arange(len(self.layers)), [own.stop - own.start for own in self.columns])

    @property
    def layer_names(self) -> list[str]:
        """The names of the layers, in the order of the forward pass and of the units."""
        return [layer.name for layer in self.layers]

    @property
    def map_shapes(self) -> list[Shape]:
        """[C, H, W] of each layer's map."""
        return [(layer.channels, layer.height, layer.width) for layer in self.layers]

    @property
    def inside(self) -> list[Rectangle | None]:
        """The positions of each layer that alone are ranked; None: all of the map."""
        whole = [(0, layer.height, 0, layer.width) for layer in self.layers]
        return [None if layer.inside == own else layer.inside for layer, own in zip(self.layers, whole, strict=True)]

    def evaluating(self) -> AbstractContextManager[None]:
        """The model in eval mode, and eager where it was compiled, for the length of a `with` block."""
        return evaluating(self.model)

    def turn(self) -> AbstractContextManager[object]:
        """Context in which no other thread computes with the model, or copies it, through unitvis."""
        return turn(self.model)

    def normalise(self, images: Tensor) -> Tensor:
        """The model's input, float32 [N, C, H, W] on the device, of images as they were read."""
        channels = self.input_shape_of(images)[0]
        return model_input(images, self.transform, self.device, channels)

    def input_shape_of(self, images: Tensor) -> Shape:
        """[C, H, W] of the model's input for images as they were read: uint8 [N, H, W, 3] or float [N, C, H, W].

        Pixels become as many channels as the model takes: colours, or grey. UnitvisError for floats with their channels
        last.
        """
        if images.dtype == torch.uint8:
            _, height, width, _ = images.shape
            return self.input_channels(height, width), height, width
        _, channels, height, width = images.shape
        refuse_channels_last(self.model, (channels, height, width))
        return channels, height, width

    def input_channels(self, height: int, width: int) -> int:
        """Number of channels of the model's input, see `inputs.input_channels`; found once."""
        if self._channels is None:
            self._channels = input_channels(self.model, height, width, self.device)
        return self._channels

    def reading(self, first: int = 0, last: int | None = None) -> CanonicalPass:
        """Canonical passes that read the layers first <= number < last (None: all) of those that were found."""
        own, start = self.columns[first:last], self.columns[first].start
        columns = [slice(one.start - start, one.stop - start) for one in own]
        axes = self._layer_axes(first, last)
        of_layers: dict[str, Any] = {"shapes": self.map_shapes[first:last], "inside": self.inside[first:last]}
        return self._passes(axes, columns, channels=self.input_shape[0], neurons=self.unit == "neuron", **of_layers)

    def _layer_axes(self, first: int = 0, last: int | None = None) -> dict[str, int | None]:
        return {layer.name: self._channel_axes[layer.name] for layer in self.layers[first:last]}

    def channel_axes(self, layers: Sequence[str], shape: Shape) -> dict[str, int | None]:
        """Names of layers with the axis of their channels; found by a pass of an input [C, H, W] if not known."""
        if new := [name for name in layers if name not in self._channel_axes]:
            with self.evaluating(), self._tensors.kept(), canonical_settings(self.device):
                self._channel_axes |= channel_axes(self.model, new, self._blank_image(shape))
        return {name: self._channel_axes[name] for name in layers}

    def reading_maps(self, layers: Sequence[str], shape: Shape) -> CanonicalPass:
        """Canonical passes that read the maps of layers by name, of inputs [C, H, W], whether examined or not."""
        return self._passes(self.channel_axes(layers, shape), channels=shape[0])

    def _passes(self, layers: Mapping[str, int | None], columns: Sequence[slice] = (), **options: Any) -> CanonicalPass:
        shared: dict[str, Any] = {"tensors": self._tensors, "bits": self.bits, "to_end": not self.followed}
        return CanonicalPass(self.model, self.device, self.transform, layers, columns, **shared, **options)

    def check_independence(self, canonical: CanonicalPass, images: Tensor) -> None:
        """See that responses of the layers can be ranked, and what their bits depend on, by `CanonicalPass.check`.

        canonical: an open pass over all layers. images: at most `COMPUTE_BATCH`. UnitvisError names the first layer
        whose values change by more than rounding when the images change places (BatchNorm without running statistics,
        active dropout); a warning names layers that change by less.
        """
        found = canonical.check(images)
        if found.mixed is not None:
            raise UnitvisError(
                f"layer {found.mixed!r} gives other responses when the same images come in another order, beside "
                f"others: something in the model mixes the images of a batch or draws at random (BatchNorm without "
                f"running statistics, active dropout); such responses cannot be ranked"
            )
        if found.by_slot:
            warnings.warn(
                f"the last bits of responses depend on an image's place in its compute batch, in "
                f"{len(found.by_slot)} of {len(self.layers)} layers ({abridged(found.by_slot)}); such responses are "
                f"compared to rounding"
            )

    @property
    def unfollowed(self) -> str | None:
        """The first layer that is computed by code which may treat the images of some batches otherwise; None if none.

        It is the first whose receptive field is unknown: the model's code branches on values, picks images or positions
        by them, or could not be traced.
        """
        return next((field.layer for field in self.fields.values() if field.note), None)

    def check_alone(self, canonical: CanonicalPass, images: Tensor, keys: Tensor) -> None:
        """See that the images of a compute batch have the responses that each has alone.

        canonical: an open pass over all layers. images: as they were read. keys: theirs, int64 [n, units]. UnitvisError
        names the first layer where they differ by more than rounding.
        """
        together = uk.unpack(keys)[0]
        differing = self._differing_layers(together, canonical.alone(images))
        if not differing:
            return
        rows = torch.stack(list(differing.values())).any(0).nonzero()[:, 0]
        # Code that branches on values may take another branch after another rounding: that is no mixing.
        alone = canonical.alone(images[rows.to(images.device)], rows.tolist())
        differing = self._differing_layers(together[rows], alone)
        if differing:
            raise UnitvisError(
                f"layer {next(iter(differing))!r} gives other responses when an image is computed alone than beside "
                f"others: the model's code mixes or reorders the images of some batches; such responses cannot be "
                f"ranked, rank the layers before it"
            )

    def _differing_layers(self, found: Tensor, other: Tensor) -> dict[str, Tensor]:
        """Names of layers with, bool [n], the images whose responses [n, units of all] differ beyond rounding."""
        rows = {
            layer.name: ~close(found[:, own], other[:, own]).all(1)
            for layer, own in zip(self.layers, self.columns, strict=True)
        }
        return {name: differ for name, differ in rows.items() if differ.any()}

    @property
    def description(self) -> dict[str, Any]:
        """The model in the manifest: class and number of parameters, and once it was examined what identifies it.

        See `describe_model` and `responses_to_noise`. Buffers that a pass changes do not count.
        """
        if self._description is None:
            if not self.layers:
                return outline(self.model)
            responses = self.responses_to_noise()  # first: it shows tensors that a pass changes
            with self.evaluating():  # which may merge weights
                self._description = describe_model(
                    self.model, self._tensors.changing, self._tensors.changing_attributes
                )
            self._description |= responses
        return self._description

    @torch.inference_mode(False)
    def responses_to_noise(self) -> dict[str, dict[str, Any]]:
        """What the model computes now from fixed noise, on one thread of a CPU, whose rounding is always the same.

        Returns {"responses": {layer: five numbers, see `numbers_of`}, "channels": {layer: see `channel_numbers`}}, and
        the same under "loud_responses" and "loud_channels" from the noise times `LOUD`, unless the model raises there.
        """
        refuse_other_arithmetic(self.device)  # or else the network would seem to be another one
        names = self.layer_names
        found: dict[str, dict[str, Any]] = {}
        hooks = Hooks(self.model, self._layer_axes(), self.map_shapes)
        one_thread = computing_threads(1) if self.device.type == "cpu" else nullcontext()
        settings = canonical_settings(self.device)
        with torch.no_grad(), self.evaluating(), settings, one_thread, hooks:
            for prefix, factor in (("", 1), ("loud_", LOUD)):
                numbers: dict[str, Any] = {}
                channels: dict[str, Any] = {}

                def read(index: int, maps: Tensor, numbers: Any = numbers, channels: Any = channels) -> None:
                    numbers[names[index]], channels[names[index]] = numbers_of(maps), channel_numbers(maps)

                with self._tensors.kept():
                    try:
                        hooks.run((factor * noise(self.input_shape)).to(self.device), read)
                    except UnitvisError:
                        if factor == 1:
                            raise
                        continue  # a model may refuse inputs that are no images
                found |= {f"{prefix}responses": numbers, f"{prefix}channels": channels}
        return found
