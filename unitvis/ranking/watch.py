"""Notices weights that move while responses are recorded, without a look at the device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from unitvis.errors import UnitvisError


class WeightsWatch:
    """Watches the parameters and buffers of a model for changes between the passes of a Recorder.

    `look` goes before each pass and `settle` after it: they compare the tensors' version counters, which PyTorch keeps
    on the host and raises with each write. What a pass itself writes (a counter of calls) does not count. Writes that
    bypass the counters (`parameter.data`) are found by `refuse`, by a hash.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # Tensors made in inference mode have no version counter.
        self._tensors = {name: tensor for name, tensor in _tensors(model) if not tensor.is_inference()}
        self._versions = self._now()
        self._hashes = _hashes(model)
        self._moved: str | None = None  # name of a tensor
        self.own: set[str] = set()  # names of the tensors that a pass writes

    def look(self) -> None:
        """Note a tensor that was written to since the last pass."""
        if self._moved is None and self._changed():
            self._moved = min(self._changed())

    def settle(self) -> None:
        """Count what was written to since `look` as the passes' own."""
        self.own |= self._changed()
        self._versions = self._now()

    def refuse(self, *, hashes: bool) -> None:
        """Raise UnitvisError that names a tensor that moved, if one did. hashes: compare contents, too."""
        self.look()
        if hashes and self._moved is None:
            now = _hashes(self._model)
            names = {name for name in {**self._hashes, **now} if self._hashes.get(name) != now.get(name)}
            self._moved = min(names - self.own, default=None)
        if self._moved is not None:
            raise UnitvisError(
                f"the weights moved while images were recorded ({self._moved!r} was written to), so the responses are "
                "those of different networks; record with one set of weights, or with Recorder(weights='moving'), "
                "whose units are unseparated"
            )

    def _now(self) -> list[int]:
        return [tensor._version for tensor in self._tensors.values()]

    def _changed(self) -> set[str]:
        now = self._now()
        if now == self._versions:
            return set()
        return {
            name
            for name, before, after in zip(self._tensors, self._versions, now, strict=True)
            if before != after and name not in self.own
        }


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


def _hashes(model: nn.Module) -> dict[str, bytes]:
    """Hash of each tensor's bytes, by name; of those that have plain bytes (sparse and quantised ones have none)."""
    return {
        name: hashlib.blake2b(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data).digest()
        for name, tensor in _tensors(model)
        if tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
    }
