"""The step of a scan in half precision: it merges one batch into the top-k of candidates, which re-ranking decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import unitvis_kernels as uk
from unitvis.half_precision.capture import Replay
from unitvis.half_precision.parts import Blocked, Chain, Residual, Taps
from unitvis.half_precision.rewrite import NotRewrittenError, rewritten
from unitvis.network.attributes import kept_attributes
from unitvis.network.canonical import canonical_settings
from unitvis.network.copies import copied
from unitvis.network.forward import COMPUTE_BATCH, Hooks, Rectangle, compute_batch
from unitvis.network.memory import let_go
from unitvis.network.network import Network
from unitvis.sources.transform import Transform
from unitvis.state.magnitudes import merge_magnitudes
from unitvis.state.topk import TopK

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}  # half precisions by their names in options and manifests
REWRITING_TOLERANCE = 1e-4  # share of a layer's largest response by which rewriting may change a response in float32


class Step:
    """Merges batches of at most `size` images into a top-k, computed by a rewritten copy of the model.

    model: in eval mode; the step changes and keeps it. layers: names, in the order of the forward pass, and the units
    of each in `topk`. largest_inputs: see `ranked_magnitudes`, merged into as well. shapes, inside, to_end: see
    `Hooks`. channels: of the model's input. sample: model inputs, float32 [N, C, H, W], with their canonical
    `responses`, float32 [N, units]: a rewritten copy that gives others in float32 is not used.
    how: manifest entries that say whether the model was rewritten and captured.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, slice],
        topk: TopK,
        largest_inputs: TopK,
        *,
        axes: Mapping[str, int | None],
        shapes: Sequence[tuple[int, int, int]] = (),
        inside: Sequence[Rectangle | None] = (),
        dtype: torch.dtype,
        size: int,
        transform: Transform | None,
        neurons: bool,
        sample: Tensor,
        responses: Tensor,
        channels: int = 3,
        to_end: bool = False,
    ) -> None:
        self.topk, self.largest_inputs, self.size = topk, largest_inputs, size
        self.how: dict[str, Any] = {}
        self._layers, self._axes, self._shapes, self._neurons, self._to_end = layers, axes, shapes, neurons, to_end
        self._inside = inside or [None] * len(layers)
        self._dtype, self._transform, self._channels, self._device = dtype, transform, channels, sample.device
        self._taps = Taps()
        self._written: Tensor | None = None  # keys, int64 [size, units], that one step writes and clears
        self._blocked: Blocked | None = None  # of a first convolution that was rewritten to read blocks
        self.model = model  # replaced by the copy that computes the keys
        self._keys = self._prepare(model, sample, responses)
        self._replay: Replay | None = None
        self._second_stream: torch.cuda.Stream | None = None  # made for the first batch on a GPU

    @classmethod
    def of(
        cls, network: Network, topk: TopK, largest_inputs: TopK, images: Tensor, *, precision: str, size: int
    ) -> Self:
        """Make the step of a network whose layers are known; up to 16 of the images, as they were read, check it."""
        model, images = copied(network.model), images[:COMPUTE_BATCH]
        with network.reading() as canonical:
            network.check_independence(canonical, images)
            keys = canonical.keys(images)
        return cls(
            model,
            dict(zip(network.layer_names, network.columns, strict=True)),
            topk,
            largest_inputs,
            axes=network.channel_axes(network.layer_names, network.input_shape),
            shapes=network.map_shapes,
            inside=network.inside,
            dtype=HALF[precision],
            size=size,
            transform=network.transform,
            channels=network.input_shape[0],
            neurons=network.unit == "neuron",
            to_end=not network.followed,
            sample=compute_batch(network.normalise(images))[: len(images)],
            responses=uk.unpack(keys)[0],
        )

    def __call__(self, images: Tensor, ids: Tensor) -> None:
        """Merge images into the top-k: uint8 [N, H, W, 3] or normalised float [N, C, H, W], with ids int64 [N]."""
        if self._device.type != "cuda":
            return self._merge(*self._padded(images, ids))
        if self._replay is None:
            self._second_stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._replay = Replay(self._merge, self.size, images, self._device)
            self.how["captured"] = self._replay.capture_error or True
            fused = [chain.fused for chain in self.model.modules() if isinstance(chain, Chain) and chain.fused]
            self.how["conv_argmax"] = {source: fused.count(source) for source in set(fused)}
        return self._replay(images, ids)

    def _merge(self, images: Tensor, ids: Tensor) -> None:
        """Compute the keys of exactly `size` images and merge them; the part that a CUDA graph captures."""
        if self._written is None:
            shape = self.size, self.topk.units
            self._written = torch.full(shape, uk.BLANK, dtype=torch.int64, device=self._device)
        self._taps.thresholds, self._taps.keys = self.topk.threshold(), self._written  # of others no position is found
        try:
            with (
                torch.no_grad(),
                torch.autocast(self._device.type, enabled=False),
                self._beside(lambda: merge_magnitudes(self.largest_inputs, self._magnitudes(images), ids)),
            ):
                # NaN and overflow rank first among the candidates, so that they are computed again in float32.
                self.topk.merge(self._keys(self._input(images)), ids, overflows=True, clear=True)
        except BaseException:
            self._written = None  # it may hold keys of this batch
            raise
        finally:
            self._taps.thresholds = self._taps.keys = None

    @contextmanager
    def _beside(self, work: Callable[[], None]) -> Iterator[None]:
        """Do small work while the block is computed: on a GPU in a second stream, which the first waits for."""
        if self._second_stream is None:
            work()
            yield
            return
        first, second = torch.cuda.current_stream(self._device), self._second_stream
        second.wait_stream(first)
        with torch.cuda.stream(second):
            work()
        try:
            yield
        finally:
            first.wait_stream(second)

    def resize(self, size: int) -> None:
        """Merge batches of at most another number of images from now on; buffers and graphs are made anew for it."""
        self.size = size
        self.release()

    def release(self) -> None:
        """Give the memory of buffers and graphs back to a GPU; the next batch makes them again."""
        if self._replay is not None:
            torch.cuda.synchronize(self._device)  # a graph may still be running
        self._replay = self._written = None
        let_go(self._device)

    def responses(self, images: Tensor, size: int | None = None) -> NDArray[np.float64]:
        """Responses in half precision, float64 [N, units], of images as they were read; size: see `keys`."""
        return uk.unpack(self.keys(images, size))[0].cpu().double().numpy()

    def magnitudes(self, images: Tensor) -> NDArray[np.float64]:
        """How large the inputs are, float64 [N, C * SCALES], of images as they were read; see `uk.magnitudes`."""
        with torch.no_grad():
            return self._magnitudes(images.to(self._device)).flatten(1).cpu().double().numpy()

    def keys(self, images: Tensor, size: int | None = None) -> Tensor:
        """Keys, int64 [N, units], of images as they are given to the step; nothing is merged.

        size: as how many images they are computed, with zeros for those that are missing; None: the step's own.
        """
        images, _ = self._padded(images.to(self._device), torch.arange(count := len(images)), size)
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            return self._keys(self._input(images))[:count]

    def _input(self, images: Tensor) -> Tensor:
        """The model's input in half precision, channels last: [N, C, H, W], or in the blocks that the model reads."""
        if images.dtype == torch.uint8 and self._transform is not None:
            blocks = None if self._blocked is None else self._blocked.blocks(images.shape[1:3])
            return self._transform.normalize(images, self._dtype, channels=self._channels, blocks=blocks)
        if self._blocked is not None:
            return uk.arrange(images, self._blocked.blocks(images.shape[2:]), self._dtype)
        return images.to(self._dtype, memory_format=torch.channels_last, copy=True)  # a model may overwrite it

    def _magnitudes(self, images: Tensor) -> Tensor:
        """How large the inputs are, float32 [N, C, SCALES], before they are rounded to half precision."""
        if images.dtype == torch.uint8 and self._transform is not None:
            return self._transform.magnitudes(images, channels=self._channels)
        return uk.magnitudes(images)

    def _padded(self, images: Tensor, ids: Tensor, size: int | None = None) -> tuple[Tensor, Tensor]:
        """Pad a batch to `size` images with zeros and ids of -1: another batch size may give other last bits."""
        missing = (self.size if size is None else size) - len(ids)
        if not missing:
            return images, ids
        return torch.cat([images, images.new_zeros((missing, *images.shape[1:]))]), torch.cat(
            [ids, ids.new_full((missing,), -1)]
        )

    def _prepare(self, model: nn.Module, sample: Tensor, responses: Tensor) -> Callable[[Tensor], Tensor]:
        """The model in the scan's precision, rewritten if possible, as a function from its input to keys [N, units]."""
        try:
            if self._neurons:
                raise NotRewrittenError("neurons are ranked")
            if self._to_end:
                raise NotRewrittenError("the model's code asks for values, or cannot be traced")
            fast = rewritten(
                model,
                self._layers,
                self._taps,
                one_pass=self._device.type == "cuda",
                axes=self._axes,
                inside=dict(zip(self._layers, self._inside, strict=True)),
            )
            if layer := self._differing_layer(fast, sample, responses):
                raise NotRewrittenError(f"rewritten, layer {layer!r} gives other responses")
        except NotRewrittenError as reason:
            self.how["rewritten"] = f"no: {reason}"
            return self._hooked(model)
        chains, sums = (sum(isinstance(module, kind) for module in fast.modules()) for kind in (Chain, Residual))
        self.how["rewritten"] = f"{chains} chains of a convolution and what follows it" + (
            f", {sums} sums with a shortcut" if sums else ""
        )
        self._blocked = next((module for module in fast.modules() if isinstance(module, Blocked)), None)
        self.model = fast.to(self._dtype)

        def keys(batch: Tensor) -> Tensor:
            found = fast(batch)
            return torch.cat(found, dim=1) if self._taps.keys is None else self._taps.keys

        return keys

    def _differing_layer(self, fast: nn.Module, sample: Tensor, responses: Tensor) -> str | None:
        """The first layer whose responses the rewritten model changes by more than rounding; None without any."""
        with torch.no_grad(), canonical_settings(self._device):
            found = _channels_last(fast)(sample)
        for (name, units), keys in zip(self._layers.items(), found, strict=True):
            want, got = responses[:, units], uk.unpack(keys)[0]
            finite = want[want.isfinite()]
            slack = REWRITING_TOLERANCE * float(finite.abs().max()) if len(finite) else 0.0
            close = got.shape == want.shape and torch.allclose(
                got, want, rtol=REWRITING_TOLERANCE, atol=slack, equal_nan=True
            )
            if not close:
                return name
        return None

    def _hooked(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """The model as given, in the scan's precision, as a function from its input to keys that hooks compute."""
        self.model = _channels_last(model).to(self._dtype)
        hooks = Hooks(self.model, self._axes, self._shapes, inside=self._inside, to_end=self._to_end)
        hooks.__enter__()  # never removed: only the step uses this model
        units = list(self._layers.values())

        def keys(batch: Tensor) -> Tensor:
            with kept_attributes(self.model):  # the pass ends after the last layer
                return hooks.keys(batch, units, self._taps.thresholds, neurons=self._neurons)

        return keys


def _channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
