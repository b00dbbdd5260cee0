"""Half precision on a CPU without it, in float32's time: weights and every layer's output rounded, sums in float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from unitvis.half_precision.step import Step
from unitvis.ranking.recorder import Recorder


class Rounded(Step):
    """As a GPU computes it: products are summed in float32, what is stored is half."""

    def _copy(self, model: nn.Module, sample: Tensor, responses: Tensor) -> Callable[[Tensor], Tensor]:
        self._half, self._dtype = self._dtype, torch.float32
        run = super()._copy(model, sample, responses)
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            if tensor.is_floating_point():
                tensor.data.copy_(tensor.data.to(self._half))
        for module in self.model.modules():
            if not list(module.children()):
                module.register_forward_hook(self._round)
        return run

    def _round(self, module: nn.Module, args: object, output: object) -> object:
        floating = isinstance(output, Tensor) and output.is_floating_point()
        return output.to(self._half).to(torch.float32) if floating else output

    def _input(self, images: Tensor) -> Tensor:
        return super()._input(images).to(self._half).to(torch.float32)


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorders make this step."""
    monkeypatch.setattr(Recorder, "make_step", Rounded.of)
