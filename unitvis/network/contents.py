"""What an attribute of a module holds, told by a text and by numbers that are the same in every process."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import math
import numbers
import re
import sys
import types
from argparse import Namespace
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unitvis.state.noise_numbers import encoded

# Texts that name a place, which may be another one for the same network: paths, devices.
_PLACE = re.compile(r".*[/\\].*|(cpu|cuda|mps|xpu|meta)(:\d+)?", re.DOTALL)
_LONGEST = 200  # characters of a text; of a longer one there is the hash
_UNSEEN = "..."  # in the place of what has no text: functions, paths, locks, modules that are described elsewhere
_DEEPEST = 6  # containers inside one another that are looked into
_MOST_ITEMS = 10_000  # of an attribute, with all that it holds; larger ones are left out
_MOST_NUMBERS = 1 << 25  # in the arrays of a model; of those that come after there is the shape alone
_FEW = 16  # whole numbers of an array that are written out
_PARTS = 256  # of a float array, each with a number; a smaller array has its own numbers
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
_FOREIGN = frozenset([*sys.stdlib_module_names, "numpy", "torch"])  # packages whose objects may hold anything
_OF_PYTORCH = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules"}


class Contents(NamedTuple):
    """Of an attribute: a text, and the numbers of each float array inside it, see `array_numbers`, by its place."""

    text: str
    arrays: dict[str, str]


class _TooLargeError(Exception):
    """An attribute holds more than is looked through."""


def is_plain(value: object) -> bool:
    """Whether a value is a number, a text that names no place, a boolean, None, or a tuple of these."""
    if isinstance(value, str):
        return type(value) is str and not _PLACE.fullmatch(value)
    if isinstance(value, tuple):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float)


def class_values(own: type) -> dict[str, Any]:
    """What a class written by a user, and the classes that it extends, bind to public names, without functions."""
    values: dict[str, Any] = {}
    for base in reversed(own.__mro__):
        if not _is_foreign(base):
            values |= {name: value for name, value in vars(base).items() if not name.startswith("_")}
    described_elsewhere = (types.FunctionType, staticmethod, classmethod, property, type, types.MemberDescriptorType)
    return {name: value for name, value in values.items() if not isinstance(value, described_elsewhere)}


def _is_foreign(own: type) -> bool:
    return own.__module__.partition(".")[0] in _FOREIGN and own.__module__ != "__main__"


class Describer:
    """Describes attributes of one model. elsewhere: ids of its modules and tensors, which are described apart."""

    def __init__(self, elsewhere: Collection[int]) -> None:
        self._elsewhere = elsewhere
        self._numbers = 0  # in the arrays so far
        self._known: dict[int, tuple[object, str, str | None]] = {}  # arrays that were described, by id
        self._arrays: dict[str, str] = {}
        self._items = 0
        self._open: set[int] = set()  # ids of what is being described, which may hold itself
        self._in_object = False  # of a class that is neither a data class nor a namespace

    def contents(self, value: object) -> Contents | None:
        """Describe what an attribute is bound to; None where nothing of it can be described, or it holds too much."""
        if is_plain(value):
            # Python orders a set of texts anew in each process, and so a tuple that was made of one.
            if isinstance(value, tuple) and any(isinstance(item, str) for item in value):
                value = tuple(sorted(value, key=repr))
            return Contents(_short(repr(value)), {})
        self._arrays, self._items, self._open, self._in_object = {}, 0, set(), False
        try:
            text = self._text(value, "", 0)
        except Exception:  # objects may raise whatever they like when they are looked at
            return None
        return None if text == _UNSEEN else Contents(_short(text), self._arrays)

    def buffer(self, tensor: Tensor) -> Contents | None:
        """Describe a buffer that the model's state leaves out."""
        self._arrays = {}
        try:
            return Contents(self._array(tensor, ""), self._arrays)
        except Exception:
            return None

    def _text(self, value: Any, where: str, depth: int) -> str:
        self._items += 1
        if self._items > _MOST_ITEMS:
            raise _TooLargeError
        if (simple := _simple(value)) is not None:
            return simple
        if depth > _DEEPEST or id(value) in self._open or id(value) in self._elsewhere:
            return _UNSEEN
        if isinstance(value, (Tensor, np.ndarray)):
            return self._array(value, where)
        self._open.add(id(value))
        try:
            return self._inside(value, where, depth + 1)
        finally:
            self._open.remove(id(value))

    def _inside(self, value: Any, where: str, depth: int) -> str:
        """The text of what holds other objects."""
        if isinstance(value, enum.Enum):
            return f"{type(value).__name__}({self._text(value.value, where, depth)})"
        if isinstance(value, (tuple, list, deque)):
            items = [self._text(item, f"{where}[{number}]", depth) for number, item in enumerate(value)]
            items = sorted(items) if any(isinstance(item, str) for item in value) else items
            return f"({', '.join(items)})" if isinstance(value, tuple) else f"[{', '.join(items)}]"
        if isinstance(value, (set, frozenset)):
            return "{" + ", ".join(sorted(map(_key, value))) + "}"
        if isinstance(value, (dict, types.MappingProxyType)):
            return self._of_names({_key(key): item for key, item in value.items()}, where, depth)
        if isinstance(value, functools.partial):
            return f"partial({self._text([*value.args, value.keywords], where, depth)})"
        return self._object(value, where, depth)

    def _of_names(self, items: Mapping[str, Any], where: str, depth: int) -> str:
        """The text of items by name, whose order does not count."""
        texts = [f"{key}: {self._text(items[key], f'{where}[{key}]', depth)}" for key in sorted(items)]
        return "{" + ", ".join(texts) + "}"

    def _object(self, value: Any, where: str, depth: int) -> str:
        """The text of an object or a class: data classes, namespaces, modules in lists, and others of a user's own.

        Of others only public attributes count, and objects like them inside are left out: those may be trainers,
        loggers or clocks.
        """
        own = value if isinstance(value, type) else type(value)
        if isinstance(value, torch.jit.ScriptModule):
            return _UNSEEN
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            held = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
        elif isinstance(value, (types.SimpleNamespace, Namespace)):
            held = vars(value)
        elif isinstance(value, nn.Module):
            held = {name: item for name, item in vars(value).items() if name not in _OF_PYTORCH}
        elif _is_foreign(own) or self._in_object or not hasattr(value, "__dict__"):
            return _UNSEEN
        else:
            bound = {} if isinstance(value, type) else vars(value)
            held = class_values(own) | {name: item for name, item in bound.items() if not name.startswith("_")}
            self._in_object = True
            text = self._of_names(held, where, depth)
            self._in_object = False
            return f"{own.__name__}{text}"
        return f"{own.__name__}{self._of_names(held, where, depth)}"

    def _array(self, array: Tensor | NDArray[Any], where: str) -> str:
        """The text of an array; the numbers of one of floats go into `_arrays`."""
        if id(array) not in self._known:
            self._known[id(array)] = (array, *self._described(array))
        _, text, in_text = self._known[id(array)]
        if in_text is not None:
            self._arrays[where] = in_text
        return text

    def _described(self, array: Tensor | NDArray[Any]) -> tuple[str, str | None]:
        shape = list(array.shape)
        size = math.prod(shape)
        if self._numbers + size > _MOST_NUMBERS or (isinstance(array, Tensor) and array.is_meta):
            return f"array {shape}", None
        self._numbers += size
        values = _numpy(array) if isinstance(array, Tensor) else np.ascontiguousarray(array).ravel()
        if values.dtype.kind in "biu":
            whole = values.astype("<i8")
            told = str(whole.tolist()) if size <= _FEW else hashlib.blake2b(whole.data, digest_size=16).hexdigest()
            return f"array {shape} {told}", None
        if values.dtype.kind == "c":
            values = np.stack([values.real, values.imag]).ravel()
        if values.dtype.kind != "f":
            return f"array {shape}", None
        odd = np.where(np.isfinite(values), 0, np.where(np.isnan(values), 1, np.sign(values) * 2)).astype("i1")
        told = f" {hashlib.blake2b(odd.data, digest_size=8).hexdigest()}" if odd.any() else ""
        return f"array {shape}{told}", array_numbers(np.where(odd == 0, values, 0).astype(np.float64))


def _simple(value: Any) -> str | None:
    """The text of a value that holds no other: of numbers of all types, and of those that extend them, their value."""
    if value is None or isinstance(value, (bytes, range)):
        return repr(value)
    if isinstance(value, str):
        return None if isinstance(value, enum.Enum) else _UNSEEN if _PLACE.fullmatch(value) else repr(str(value))
    if isinstance(value, (bool, np.bool_)):
        return repr(bool(value))
    if isinstance(value, enum.Enum):
        return None
    if isinstance(value, numbers.Integral):
        return repr(int(value))
    if isinstance(value, numbers.Real):
        return repr(float(value))
    return repr(complex(value)) if isinstance(value, numbers.Complex) else None


def _key(value: Any) -> str:
    return _simple(value) or (repr(value) if is_plain(value) else _UNSEEN)


def flat(tensor: Tensor) -> Tensor:
    """A tensor's values on the CPU, flat; of quantised and sparse ones those that they stand for."""
    tensor = tensor.detach().cpu()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    return (tensor.to_dense() if tensor.layout != torch.strided else tensor).contiguous().flatten()


def _numpy(tensor: Tensor) -> NDArray[Any]:
    values = flat(tensor)
    return (values.double() if values.is_floating_point() else values.resolve_conj().resolve_neg()).numpy()


def array_numbers(values: NDArray[np.float64]) -> str:
    """The numbers of an array, float64 [n], as `noise_numbers.encoded` writes float32; of a large one those of parts.

    A part's number is the mean of its magnitudes, in which negative values count half, so that a change of sign shows,
    and places by pseudo-random weights in 0.5..1.5.
    """
    if len(values) <= _PARTS:
        return encoded(values.astype(np.float32))
    parts = np.zeros((_PARTS, -(-len(values) // _PARTS)))
    parts.reshape(-1)[: len(values)] = np.maximum(values, -0.5 * values)
    weights = (np.arange(parts.shape[1]) ** 2 * _GOLDEN_RATIO) % 1 + 0.5
    return encoded((parts @ weights / weights.sum()).astype(np.float32))


def _short(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=16).hexdigest()
