"""Which torch functions a model's code calls: whether a trace of it shows what it does when it runs."""

# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Functions by which numbers leave PyTorch; of a tensor that is traced they tell whatever its memory holds.
READ_OUTSIDE = ("numpy", "tolist", "__array__", "__dlpack__", "to_dlpack")


def _has_no_values(leaf: object) -> bool:
    """Whether this is a tensor of a trace."""
    return isinstance(leaf, FakeTensor) or (
        isinstance(leaf, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(leaf)
    )


def _stands_for_a_value(leaf: object) -> bool:
    """Whether this is a number that a trace does not know, or a tensor whose shape has such numbers."""
    numbers = leaf.shape if isinstance(leaf, Tensor) else (leaf,)
    return any(isinstance(number, torch.SymInt | torch.SymFloat | torch.SymBool) for number in numbers)


class _Inside(TorchDispatchMode):
    """Pauses a record while an operator is computed: under a tracer, by Python code that calls torch functions itself.

    Those would be recorded for operators that are called from C++, as TorchScript does.
    """

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        with self._calls.paused():
            return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Records the torch functions that are called under it, by name and in order, and the exceptions that they raise.

    What a tracer cannot do, such as to tell a value, raises; code that catches the exception does something else when
    it is traced, and so does code that asks whether it is.

    names: of the functions. errors: of those that raised, by their number; and of those whose results depend on values
    that are traced, such as the number of images that a mask picks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.errors: dict[int, Exception] = {}
        self._paused = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context in which calls are recorded."""
        with self, _Inside(self):
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context in which nothing is recorded."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def first_difference(self, other: Calls) -> int | None:
        """The number of the first call that is another one there, or raises in one of the two alone; None if none."""
        one, two = ([(name, n in c.errors) for n, name in enumerate(c.names)] for c in (self, other))
        if one == two:
            return None
        alike = (number for number, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
        return next(alike, min(len(one), len(two)))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._paused:
            return func(*args, **(kwargs or {}))
        number = len(self.names)
        self.names.append(getattr(func, "__name__", str(func)))
        try:
            if self.names[number] in READ_OUTSIDE and any(_has_no_values(one) for one in tree_leaves((args, kwargs))):
                raise RuntimeError(f"data-dependent: {self.names[number]} of a tensor that is traced")
            result = func(*args, **(kwargs or {}))
        except Exception as error:
            self.errors[number] = error
            raise
        if any(map(_stands_for_a_value, tree_leaves(result))):
            self.errors[number] = RuntimeError(f"data-dependent: the result of {self.names[number]}")
        return result
