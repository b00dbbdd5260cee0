"""The step of a scan in half precision: pixels in, candidates out; float32 decides between them later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import unitvis_kernels as uk
from unitvis.half_precision.capture import Replay
from unitvis.half_precision.rewrite import Chain, NotRewrittenError, Threshold, rewritten
from unitvis.network.canonical import canonical_settings
from unitvis.network.device import copied
from unitvis.network.forward import COMPUTE_BATCH, Hooks, compute_batch
from unitvis.network.network import Network
from unitvis.sources.transform import Transform
from unitvis.state.topk import TopK

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
INFINITY_KEY = int(uk.pack(torch.tensor(torch.inf), torch.tensor(0)))
MINUS_INFINITY_HIGH_WORD = int(uk.pack(torch.tensor(-torch.inf), torch.tensor(0))) >> 32
REWRITING_TOLERANCE = 1e-4  # of a layer's largest response: what rewriting the model may change in float32


class Step:
    """Folds batches of at most `size` images into a top-k, computed by a rewritten copy of the model.

    model: in eval mode, and the step's to keep. layers: names, in the order of the forward pass, and the units of
    each in `topk`. sample: float32 images [N, C, H, W], and `responses`, float32 [N, units], the canonical ones of
    them: what the copy is checked against, in float32, before it is trusted. `how` says what became of it.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, slice],
        topk: TopK,
        *,
        dtype: torch.dtype,
        size: int,
        transform: Transform | None,
        neurons: bool,
        sample: Tensor,
        responses: Tensor,
    ) -> None:
        self.topk, self.size = topk, size
        self.how: dict[str, Any] = {}
        self._layers, self._neurons = layers, neurons
        self._dtype, self._transform, self._device = dtype, transform, sample.device
        self._threshold = Threshold()
        self.model = model  # until it is rewritten
        self._keys = self._copy(model, sample, responses)
        self._replay: Replay | None = None

    @classmethod
    def of(cls, network: Network, topk: TopK, images: Tensor, *, precision: str, size: int) -> Self:
        """The step of a network whose layers are known; some images as they were read are what it is checked with."""
        model, images = copied(network.model), images[:COMPUTE_BATCH]
        with network.reading() as canonical:
            keys = network.check_independence(canonical, images)
        return cls(
            model,
            dict(zip((layer.name for layer in network.layers), network.columns, strict=True)),
            topk,
            dtype=HALF[precision],
            size=size,
            transform=network.transform,
            neurons=network.unit == "neuron",
            sample=compute_batch(network.normalise(images))[: len(images)],
            responses=uk.unpack(keys)[0],
        )

    def __call__(self, images: Tensor, ids: Tensor) -> None:
        """Fold uint8 [N, H, W, 3], for the transform to normalise, or float [N, C, H, W], with ids int64 [N]."""
        if self._device.type != "cuda":
            return self._fold(*self._padded(images, ids))
        if self._replay is None:
            self._replay = Replay(self._fold, self.size, images, self._device)
            self.how["captured"] = self._replay.eager_because or True
            fused = [chain.fused for chain in self.model.modules() if isinstance(chain, Chain) and chain.fused]
            self.how["conv_argmax"] = {known: fused.count(known) for known in set(fused)}
        return self._replay(images, ids)

    def _fold(self, images: Tensor, ids: Tensor) -> None:
        if self._device.type == "cpu":  # positions are looked for only where a response can enter
            self._threshold.values = self.topk.threshold()
        with torch.inference_mode(), torch.autocast(self._device.type, enabled=False):
            keys = self._keys(self._input(images))
            # What half precision cannot hold is a candidate ahead of all others: float32 must see it.
            not_finite = (keys == uk.NAN_KEY) | ((keys >> 32) == MINUS_INFINITY_HIGH_WORD)
            self.topk.merge(keys.masked_fill_(not_finite, INFINITY_KEY), ids)

    def responses(self, images: Tensor) -> NDArray[np.float64]:
        """float64 [N, units]: what half precision gives for images as they were read."""
        return uk.unpack(self.keys(images))[0].cpu().double().numpy()

    def keys(self, images: Tensor) -> Tensor:
        """Keys int64 [N, units] of images as they are given to the step, N at most its size."""
        images, _ = self._padded(images.to(self._device), torch.arange(count := len(images)))
        self._threshold.values = None
        with torch.inference_mode(), torch.autocast(self._device.type, enabled=False):
            return self._keys(self._input(images))[:count]

    def _input(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8 and self._transform is not None:
            return self._transform.normalize(images, self._dtype)
        return images.to(self._dtype, memory_format=torch.channels_last)

    def _padded(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Another batch size may choose another algorithm, and with it other last bits."""
        missing = self.size - len(ids)
        if not missing:
            return images, ids
        return torch.cat([images, images.new_zeros((missing, *images.shape[1:]))]), torch.cat(
            [ids, ids.new_full((missing,), -1)]
        )

    def _copy(self, model: nn.Module, sample: Tensor, responses: Tensor) -> Callable[[Tensor], Tensor]:
        """The model's copy in the scan's precision, as a function from its input to keys [N, units]."""
        try:
            if self._neurons:
                raise NotRewrittenError("neurons are ranked")
            copied = rewritten(model, self._layers, self._threshold, one_pass=self._device.type == "cuda")
            if layer := self._differs(copied, sample, responses):
                raise NotRewrittenError(f"rewritten, layer {layer!r} gives other responses")
        except NotRewrittenError as reason:
            self.how["rewritten"] = f"no: {reason}"
            return self._hooked(model)
        chains = sum(isinstance(module, Chain) for module in copied.modules())
        self.how["rewritten"] = f"{chains} chains of a convolution and what follows it"
        self.model = copied.to(self._dtype)
        return lambda batch: torch.cat(copied(batch), dim=1)

    def _differs(self, copied: nn.Module, sample: Tensor, responses: Tensor) -> str | None:
        """The first layer whose responses the copy changes by more than rounding."""
        with torch.inference_mode(), canonical_settings(self._device):
            found = _channels_last(copied)(sample)
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
        """The model as it is, in the scan's precision, read by hooks."""
        self.model = _channels_last(model).to(self._dtype)
        hooks = Hooks(self.model, list(self._layers)).__enter__()  # for good: the model is nobody else's
        units = list(self._layers.values())
        return lambda batch: hooks.keys(batch, units, self._threshold.values, neurons=self._neurons)


def _channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def overflowing_layer(network: Network, topk: TopK, images: int) -> str | None:
    """After a first batch of so many images: a layer with a unit that half of them overflow; None without one."""
    values = topk.threshold(min(topk.places, (images + 1) // 2) - 1)
    both = zip(network.layers, network.columns, strict=True)
    return next((layer.name for layer, units in both if values[units].isinf().any()), None)
