"""Half precision emulated on a CPU: float32 arithmetic whose weights and layer outputs are rounded to half."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from unitvis.half_precision.step import Step


class Rounded(Step):
    """The step as a GPU computes it: sums of products in float32, what a layer stores rounded to half precision.

    A CPU without half-precision arithmetic computes this as fast as float32.
    """

    def _prepare(self, model: nn.Module, sample: Tensor, responses: Tensor) -> Callable[[Tensor], Tensor]:
        self._half, self._dtype = self._dtype, torch.float32
        run = super()._prepare(model, sample, responses)
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
