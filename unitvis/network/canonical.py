"""The settings under which canonical responses are computed: IEEE float32, deterministic, eager, in eval mode.

Together with the fixed compute batch of `forward.CanonicalPass` they make the bits of a response reproducible.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from unitvis.errors import UnitvisError

# On a CPU a product of few rows and many columns is split over the threads along the sum, so its bits depend on their
# number. With one thread they are canonical; where these products alone are computed so, the rest of a network keeps
# all threads. What is written in other ways is found by `CanonicalPass.check`.
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
_cuda: Any = torch.backends.cuda
_nnpack: Any = torch.backends.nnpack
_jit: Any = torch.jit
# (owner, attribute, value while canonical responses are computed); the caller's values are restored afterwards
_SETTINGS: list[tuple[Any, str, Any]] = [
    (_cudnn, "benchmark", False),
    (_cudnn, "deterministic", True),
    (_cudnn, "allow_tf32", False),  # the older name of the settings below, which must not contradict them
    (_cudnn.conv, "fp32_precision", "ieee"),
    (_cudnn.rnn, "fp32_precision", "ieee"),
    (_cuda.matmul, "fp32_precision", "ieee"),
    (_mkldnn, "enabled", True),
    (_mkldnn, "deterministic", False),  # PyTorch's default
    (_mkldnn.conv, "fp32_precision", "ieee"),
    (_mkldnn.rnn, "fp32_precision", "ieee"),
    (_mkldnn.matmul, "fp32_precision", "ieee"),
    (torch.utils.deterministic, "fill_uninitialized_memory", False),
    (torch.backends.opt_einsum, "enabled", False),  # from left to right, whether or not that package is installed
]
# (what tells a switch, what sets it, its value while canonical responses are computed)
_SWITCHES: list[tuple[Callable[[], bool], Callable[[bool], object], bool]] = [
    (_cuda.flash_sdp_enabled, _cuda.enable_flash_sdp, True),  # also of a CPU
    (_cuda.mem_efficient_sdp_enabled, _cuda.enable_mem_efficient_sdp, True),
    (_cuda.math_sdp_enabled, _cuda.enable_math_sdp, True),
    (_cuda.cudnn_sdp_enabled, _cuda.enable_cudnn_sdp, True),
    # The fast path of TransformerEncoderLayer calls none of the modules inside, so they could not be read.
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False),
]
DENORMAL = 71362  # the bits of 1e-40, which float32 holds only as a denormal number


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
            self._switches = [(put, was) for get, put, value in _SWITCHES if (was := get()) != value]
            for _, put, value in _SWITCHES:
                put(value)
            (self._nnpack,) = _nnpack.set_flags(True)
            torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._entered -= 1
            if self._entered:
                return
            torch.use_deterministic_algorithms(self._deterministic, warn_only=self._warns)
            _nnpack.set_flags(self._nnpack)
            for put, was in self._switches:
                put(was)
            if self._matmul_precision != "highest":
                torch.set_float32_matmul_precision(self._matmul_precision)
            for (owner, name, _), value in self._saved:
                setattr(owner, name, value)


_process_settings = _ProcessSettings()


@contextmanager
def canonical_settings(device: torch.device) -> Iterator[None]:
    """Compute in IEEE float32 with deterministic algorithms for a `with` block: no TF32, autocast or algorithm search.

    Denormal numbers are kept in this thread, scripted functions are run as they are written, and backends that the
    caller switched off are on. The caller's settings are restored afterwards.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cpu":
            stack.enter_context(_OneThreadForSmallProducts())
        stack.enter_context(_process_settings)
        stack.enter_context(_jit.optimized_execution(False))
        if flushes_denormals(1):
            torch.set_flush_denormal(False)
            stack.callback(torch.set_flush_denormal, True)
        yield


def flushes_denormals(numbers: int) -> bool:
    """Whether a denormal number times 2 is 0 for any of so many numbers, which one thread or all compute."""
    bits = torch.full((numbers,), DENORMAL, dtype=torch.int32, device="cpu")
    return bool(((bits.view(torch.float32) * 2).view(torch.int32) == 0).any())


def refuse_other_arithmetic(device: torch.device) -> None:
    """Raise UnitvisError where no setting of PyTorch keeps float32 from being rounded to fewer bits.

    oneDNN does so where a variable of the environment asks for it, and NVIDIA's libraries may.
    """
    named = {name: os.environ[name] for name in _ARITHMETIC_VARIABLES if name in os.environ}
    asked = [
        name for name, value in named.items() if name.endswith("FPMATH_MODE") and value.upper() not in ("", "STRICT")
    ]
    if asked or _rounds_operands(device):
        said = ", ".join(f"{name}={value}" for name, value in named.items()) or "for an unknown reason"
        raise UnitvisError(
            f"float32 is computed with operands rounded to fewer bits here ({said}), so responses would not be exact; "
            f"unset {', '.join(asked or named) or 'what asks for it'} and start again"
        )


_ARITHMETIC_VARIABLES = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE", "NVIDIA_TF32_OVERRIDE")


@functools.cache
def _rounds_operands(device: torch.device) -> bool:
    """Whether a convolution or a product rounds its operands to less than 21 bits; small ones may be computed exactly.

    All numbers are 1 + 2^-20 or a power of two, and each result is a sum of equal products.
    """
    with torch.inference_mode(), canonical_settings(device):
        number = 1 + 2**-20
        image = torch.full((16, 64, 28, 28), number, device=device).to(memory_format=torch.channels_last)
        convolved = F.conv2d(image, torch.full((64, 64, 3, 3), 2.0**-9, device=device))  # 576 products
        product = torch.full((256, 256), number, device=device) @ torch.eye(256, device=device)
        return bool((convolved == convolved.new_tensor(576 / 512)).any()) or bool((product == 1).any())
