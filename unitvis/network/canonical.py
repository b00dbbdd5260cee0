"""Canonical responses: the one way of computing a response whose bits can be asked for again.

The model as given, in eval mode, eager, IEEE float32, channels-last input, in compute batches of exactly `BATCH`
images. Convolution and matrix libraries choose another algorithm for another shape, and with it other last bits; at
one fixed shape an image's responses do not depend on its neighbours, its slot or the number of threads.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import unitvis_kernels as uk
from unitvis.errors import UnitvisError

BATCH = 16

# On a CPU a product of few rows and many columns is split over the threads along the sum, so its bits depend on their
# number; with one thread they do not. Products of more rows are split along the rows and keep their speed.
_PRODUCTS = {F.linear, torch.addmm, torch.mm, torch.matmul, Tensor.addmm, Tensor.mm, Tensor.matmul, Tensor.__matmul__}
_FEW_ROWS = 4 * BATCH


class _OneThreadForSmallProducts(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        left = args[1] if func in (torch.addmm, Tensor.addmm) and len(args) > 1 else args[0] if args else None
        small = func in _PRODUCTS and isinstance(left, Tensor) and left.numel() <= _FEW_ROWS * left.shape[-1]
        threads = torch.get_num_threads()
        if not small or threads == 1:
            return func(*args, **kwargs)
        torch.set_num_threads(1)
        try:
            return func(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)


_cudnn: Any = torch.backends.cudnn
_mkldnn: Any = torch.backends.mkldnn
# (owner, attribute, value while responses are computed); the caller's values come back afterwards
_SETTINGS: list[tuple[Any, str, Any]] = [
    (_cudnn, "benchmark", False),
    (_cudnn, "deterministic", True),
    (_cudnn, "allow_tf32", False),  # the older way of saying what the next ones say, which must not contradict them
    (_cudnn.conv, "fp32_precision", "ieee"),
    (_cudnn.rnn, "fp32_precision", "ieee"),
    (torch.backends.cuda.matmul, "fp32_precision", "ieee"),
    (_mkldnn.conv, "fp32_precision", "ieee"),
    (_mkldnn.rnn, "fp32_precision", "ieee"),
    (_mkldnn.matmul, "fp32_precision", "ieee"),
    (torch.utils.deterministic, "fill_uninitialized_memory", False),
]


def _said(setting: Callable[[], Any]) -> Any:
    """A setting; None where PyTorch's older and newer ways of saying it contradict each other, so that it raises."""
    try:
        return setting()
    except RuntimeError:
        return None


class _Process:
    """Settings of the process while any of its threads computes: the last one puts back what the first one found."""

    def __init__(self) -> None:
        self._lock, self._computing = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            self._computing += 1
            if self._computing > 1:
                return
            self._products = _said(torch.get_float32_matmul_precision) or "highest"
            found = [(one, _said(partial(getattr, *one[:2]))) for one in _SETTINGS]
            self._found = [(one, value) for one, value in found if value is not None]
            self._deterministic = torch.are_deterministic_algorithms_enabled()
            self._warns = torch.is_deterministic_algorithms_warn_only_enabled()
            if self._products != "highest":
                torch.set_float32_matmul_precision("highest")
            for (owner, name, value), _ in self._found:
                setattr(owner, name, value)
            torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._computing -= 1
            if self._computing:
                return
            torch.use_deterministic_algorithms(self._deterministic, warn_only=self._warns)
            if self._products != "highest":
                torch.set_float32_matmul_precision(self._products)
            for (owner, name, _), value in self._found:
                setattr(owner, name, value)


_process = _Process()


@contextmanager
def canonical_settings(device: torch.device) -> Iterator[None]:
    """Eager IEEE float32 with deterministic algorithms: no TF32, no autocast, no algorithm search."""
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cpu":
            stack.enter_context(_OneThreadForSmallProducts())
        stack.enter_context(_process)
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and eager where it was compiled; each module's own flag comes back afterwards."""
    modules = list(model.modules())
    training = [module for module in modules if module.training]
    if training:
        model.eval()
    compiled = any(module._compiled_call_impl or type(module).__name__ == "OptimizedModule" for module in modules)
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for module in training:
            module.training = True


def compute_batch(images: Tensor) -> Tensor:
    """At most `BATCH` float images [n, C, H, W] as a compute batch: float32, channels last, padded with zeros."""
    shape, layout = (BATCH, *images.shape[1:]), torch.channels_last
    batch = torch.empty(shape, dtype=torch.float32, device=images.device, memory_format=layout)
    batch[: len(images)] = images
    batch[len(images) :] = 0
    return batch


def check_independence(keys: Tensor, again: Tensor, layers: Mapping[str, slice]) -> None:
    """Keys [N, units] of images, and of the same ones in another order: what differs is no response to an image.

    UnitvisError names the first layer whose values differ by more than rounding; a warning tells of less.
    """
    if torch.equal(keys, again):
        return
    first, second = uk.unpack(keys)[0], uk.unpack(again)[0]
    for name, units in layers.items():
        a, b = first[:, units], second[:, units]
        if not torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(a.nan_to_num(0, 0, 0).abs().max()), equal_nan=True):
            raise UnitvisError(
                f"layer {name!r} gives other responses when the same images come in another order: something "
                f"in the model mixes the images of a batch or draws at random (BatchNorm without running "
                f"statistics, active dropout); such responses cannot be ranked"
            )
    warnings.warn("on this device the last bits of responses depend on an image's place in its batch")
