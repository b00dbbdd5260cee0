"""The settings under which canonical responses are computed: IEEE float32, deterministic, eager, in eval mode.

Together with the fixed compute batch of `forward.CanonicalPass` they make the bits of a response reproducible.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# On a CPU a product of few rows and many columns is split over the threads along the sum, so its bits depend on their
# number; with one thread they do not. Products of more rows are split along the rows and keep their speed.
_MATRIX_PRODUCTS = {
    F.linear, torch.addmm, torch.mm, torch.matmul, Tensor.addmm, Tensor.mm, Tensor.matmul, Tensor.__matmul__
}  # fmt: skip
_MAX_SMALL_ROWS = 64  # rows of the left operand up to which a product runs on one thread


class _OneThreadForSmallProducts(TorchFunctionMode):
    """Runs matrix products of at most `_MAX_SMALL_ROWS` rows on one thread."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        left = args[1] if func in (torch.addmm, Tensor.addmm) and len(args) > 1 else args[0] if args else None
        small = (
            func in _MATRIX_PRODUCTS and isinstance(left, Tensor) and left.numel() <= _MAX_SMALL_ROWS * left.shape[-1]
        )
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
# (owner, attribute, value while canonical responses are computed); the caller's values are restored afterwards
_SETTINGS: list[tuple[Any, str, Any]] = [
    (_cudnn, "benchmark", False),
    (_cudnn, "deterministic", True),
    (_cudnn, "allow_tf32", False),  # the older name of the settings below, which must not contradict them
    (_cudnn.conv, "fp32_precision", "ieee"),
    (_cudnn.rnn, "fp32_precision", "ieee"),
    (torch.backends.cuda.matmul, "fp32_precision", "ieee"),
    (_mkldnn.conv, "fp32_precision", "ieee"),
    (_mkldnn.rnn, "fp32_precision", "ieee"),
    (_mkldnn.matmul, "fp32_precision", "ieee"),
    (torch.utils.deterministic, "fill_uninitialized_memory", False),
]


def _read_setting(setting: Callable[[], Any]) -> Any:
    """Read a setting; None where PyTorch raises because its older and newer names contradict each other."""
    try:
        return setting()
    except RuntimeError:
        return None


class _ProcessSettings:
    """Context manager for process-wide settings: the first thread to enter applies them, the last restores them."""

    def __init__(self) -> None:
        self._lock, self._entered = threading.Lock(), 0  # entered: threads inside

    def __enter__(self) -> None:
        with self._lock:
            self._entered += 1
            if self._entered > 1:
                return
            self._matmul_precision = _read_setting(torch.get_float32_matmul_precision) or "highest"
            found = [(setting, _read_setting(partial(getattr, *setting[:2]))) for setting in _SETTINGS]
            self._saved = [(setting, value) for setting, value in found if value is not None]
            self._deterministic = torch.are_deterministic_algorithms_enabled()
            self._warns = torch.is_deterministic_algorithms_warn_only_enabled()
            if self._matmul_precision != "highest":
                torch.set_float32_matmul_precision("highest")
            for (owner, name, value), _ in self._saved:
                setattr(owner, name, value)
            torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._entered -= 1
            if self._entered:
                return
            torch.use_deterministic_algorithms(self._deterministic, warn_only=self._warns)
            if self._matmul_precision != "highest":
                torch.set_float32_matmul_precision(self._matmul_precision)
            for (owner, name, _), value in self._saved:
                setattr(owner, name, value)


_process_settings = _ProcessSettings()


@contextmanager
def canonical_settings(device: torch.device) -> Iterator[None]:
    """Compute in IEEE float32 with deterministic algorithms for a `with` block: no TF32, autocast or algorithm search.

    The caller's settings are restored afterwards.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cpu":
            stack.enter_context(_OneThreadForSmallProducts())
        stack.enter_context(_process_settings)
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode, and a compiled one into eager mode, for a `with` block.

    Each module's training flag is restored afterwards.
    """
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
