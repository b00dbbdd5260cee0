"""Triton where it is installed. Without it no operator has a kernel, and every device runs the functions of `cpu`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
    jit: Callable[..., Callable[..., Any]] = triton.jit

    def constexpr(value: int) -> Any:
        """A global that kernels can read. Interpreted kernels read plain numbers: `constexpr - tensor` fails there."""
        return value if triton.knobs.runtime.interpret else tl.constexpr(value)
except ModuleNotFoundError:  # macOS, Windows: the kernels below stay plain functions that nothing calls
    HAS_TRITON = False
    tl: Any = None  # type: ignore[no-redef]

    def jit(kernel: Any = None, **options: Any) -> Callable[..., Any]:
        return kernel or jit

    def constexpr(value: int) -> Any:
        return value


TARGET_PROGRAMS = 2048  # about two full waves on the largest chips; a reduction with fewer programs is split

__all__ = ["HAS_TRITON", "TARGET_PROGRAMS", "Launch", "constexpr", "jit", "next_power_of_2", "tl"]


class Launch(NamedTuple):
    """A kernel with its grid, arguments and options, chosen from shapes alone.

    The operators run it; the tests interpret and compile the same one.
    """

    kernel: Any
    grid: tuple[int]
    args: tuple[Any, ...]
    options: dict[str, Any]  # constexprs, num_warps, num_stages

    def run(self) -> None:
        with torch.cuda.device_of(self.args[0]):  # type: ignore[no-untyped-call]  # Triton launches on the current device, not on the tensors'
            self.kernel[self.grid](*self.args, **self.options)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
