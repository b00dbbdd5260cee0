"""Memory that runs out: how it shows in exceptions, and how it is told."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from unitvis.errors import UnitvisError, first_line

# In messages of RuntimeErrors: of PyTorch's allocators and of CUDA, of C++, of cuBLAS and cuDNN.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "std::bad_alloc", "_ALLOC_FAILED", "_ALLOCATION_FAILED")
# PyTorch says so where no algorithm of cuDNN worked: each may have lacked memory, but they may fail for other reasons.
_NO_ALGORITHM = "unable to find an engine to execute this computation"


class TooLargeError(UnitvisError, MemoryError):
    """What does not fit into memory, and cannot be computed in smaller parts."""


def shortage(error: BaseException | None) -> BaseException | None:
    """Of an exception and those that it came of, the first that says that memory ran out; None if none does."""
    while error is not None:
        said = isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
        if said or isinstance(error, torch.OutOfMemoryError | MemoryError):
            return error
        error = error.__cause__ or error.__context__
    return None


def may_fit_in_parts(error: BaseException | None) -> bool:
    """Whether what raised an exception may succeed for fewer images: memory ran out, or may have run out."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, TooLargeError):
            return False
        if isinstance(cause, RuntimeError) and _NO_ALGORITHM in str(cause):
            return True
        cause = cause.__cause__ or cause.__context__
    return shortage(error) is not None


def too_large(what: str, device: torch.device, cause: BaseException) -> TooLargeError:
    """The error that says that `what` does not fit; cause: what `shortage` gave."""
    return TooLargeError(
        f"{what} does not fit into {place(device)} ({first_line(cause)[:100]}); free memory there, give smaller images "
        "(--crop), or compute on another device (--device)"
    )


def place(device: torch.device) -> str:
    """The memory of a device, in words."""
    return "memory" if device.type == "cpu" else f"the memory of {device}"


@contextmanager
def holding(what: str, device: torch.device) -> Iterator[None]:
    """Raise TooLargeError where memory runs out in a `with` block. what: must fit, as the subject of a sentence."""
    try:
        yield
    except TooLargeError:
        raise
    except Exception as error:
        if (cause := shortage(error)) is None:
            raise
        raise too_large(what, device, cause) from error


def let_go(device: torch.device) -> None:
    """Give memory that nothing holds any more back to a GPU; nothing on a CPU."""
    gc.collect()  # exceptions and the frames that they came through hold each other, and tensors
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
