"""Attributes of a model's modules: put back after a forward pass that changes them, and named in its description."""

from __future__ import annotations

import operator
import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from unitvis.network.contents import Contents, Describer, class_values, is_plain

_LOOKED_INTO = (nn.Module, list, dict, set, deque, tuple)
_PLAIN = frozenset([bool, int, float, str, type(None), torch.Tensor, nn.Parameter])  # the usual rest, told apart fast
# What PyTorch keeps in a module for itself (`_ALL`); of that, a forward pass may change what `_OWN` names.
_OWN = frozenset(["training", "_modules", "_non_persistent_buffers_set"])
_ALL = frozenset(vars(nn.Module()))
_OF_PYTORCH = _ALL - _OWN

# Of modules of PyTorch that print themselves, what follows from the class or cannot be changed without an error.
_FIXED = frozenset(["transposed", "return_indices"])

Attribute = tuple[int, str]  # id of a module's `vars`, and the name of one of its attributes


def described_attributes(
    model: nn.Module, counters: Collection[str] = (), changing: Collection[Attribute] = ()
) -> tuple[dict[str, str], dict[str, str]]:
    """What a model's attributes hold: texts by full name, and numbers of the float arrays inside, by name and place.

    counters, changing: buffers, by name, and attributes that a forward pass changes, which are left out. Told are
    numbers, texts, booleans, None, arrays, and containers, data classes and namespaces of these (see `Describer`) in
    attributes of modules and of their classes (`class Block.expansion`), and buffers that the state leaves out. Of
    PyTorch's modules that print themselves, as `Conv2d`, those attributes are left out that they print.
    """
    found: dict[str, str] = {}
    arrays: dict[str, str] = {}
    for key, name, contents in _contents_of_attributes(model):
        if name not in counters and key not in changing:
            found[name] = contents.text
            arrays |= {name + place: numbers for place, numbers in contents.arrays.items()}
    return found, arrays


def contents_of(model: nn.Module) -> dict[Attribute, Contents]:
    """What a model's attributes hold, to see afterwards which of them a forward pass changed in place."""
    return {key: contents for key, _, contents in _contents_of_attributes(model)}


def _contents_of_attributes(model: nn.Module) -> Iterator[tuple[Attribute, str, Contents]]:
    modules = [pair for pair in model.named_modules() if not isinstance(pair[1], torch.jit.ScriptModule)]
    tensors = (*model.parameters(), *model.buffers())
    describer = Describer({id(one) for one in (*model.modules(), *tensors)})
    classes = set()
    for path, module in modules:
        own, attributes, prefix = type(module), vars(module), f"{path}." if path else ""
        pytorch, printed = own.__module__.startswith("torch."), _printed(own)
        for name in sorted(attributes.keys() - _ALL - printed):
            if pytorch and name.startswith("_") and (printed or not is_plain(attributes[name])):
                continue  # what PyTorch keeps for itself
            if contents := describer.contents(attributes[name]):
                yield (id(attributes), name), prefix + name, contents
        for name, buffer in module._buffers.items():
            unsaved = buffer is not None and name in module._non_persistent_buffers_set
            if unsaved and (contents := describer.buffer(buffer)):
                yield (id(attributes), name), prefix + name, contents
        if own in classes:
            continue
        classes.add(own)
        for name, value in class_values(own).items():
            if contents := describer.contents(value):
                yield (id(own), name), f"class {own.__name__}.{name}", contents


def _printed(own: type[nn.Module]) -> frozenset[str]:
    """The attributes that a module of PyTorch's that prints itself tells by that, and `_FIXED`."""
    if not own.__module__.startswith("torch.nn.modules.") or own.extra_repr is nn.Module.extra_repr:
        return frozenset()
    code = own.extra_repr.__code__
    formats = " ".join(text for text in code.co_consts if isinstance(text, str))
    return frozenset([*code.co_names, *re.findall(r"\{(\w+)", formats)]) | _FIXED


@contextmanager
def kept_attributes(model: nn.Module) -> Iterator[set[Attribute]]:
    """Context of a forward pass, after which every module has the attributes that it had before.

    Flags, counters and whatever else an attribute was bound to; lists, dicts, sets and deques in attributes, and those
    inside them, get back what they held. Objects of other classes are not looked into, and the values of tensors stay
    as they are. Gives a set, which holds afterwards what attributes were bound to something else.
    """
    changed: set[Attribute] = set()
    modules: list[tuple[dict[str, Any], dict[str, Any]]] = []
    containers: list[tuple[Any, list[Any]]] = []
    seen: set[int] = set()
    left: list[Any] = [model]
    inside: Iterable[Any]
    while left:
        value = left.pop()
        if id(value) in seen or isinstance(value, torch.jit.ScriptModule):  # whose attributes are not Python's
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            attributes = vars(value)
            modules.append((attributes, attributes.copy()))
            # PyTorch's own modules leave their children alone, which saves half the time of large models.
            skipped = _ALL if type(value).__module__.startswith("torch.nn.modules.") else _OF_PYTORCH
            inside = [*value._modules.values(), *(attributes[name] for name in attributes.keys() - skipped)]
        elif isinstance(value, tuple):
            inside = value
        else:
            inside = _contents(value)
            containers.append((value, inside))
        left.extend(one for one in inside if type(one) not in _PLAIN and isinstance(one, _LOOKED_INTO))
    try:
        yield changed
    finally:
        for attributes, held in modules:
            if attributes.keys() != held.keys() or not _same(attributes.values(), held.values()):
                names = attributes.keys() | held.keys()
                changed.update((id(attributes), n) for n in names if attributes.get(n, held) is not held.get(n, held))
                for name in attributes.keys() - held.keys() - _OF_PYTORCH:
                    del attributes[name]
                attributes.update((name, held[name]) for name in held.keys() - _OF_PYTORCH)
        for container, contents in containers:
            now = _contents(container)
            if len(now) != len(contents) or not _same(now, contents):
                _fill(container, contents)


def _same(some: Iterable[object], others: Iterable[object]) -> bool:
    """Whether the objects of two iterables of one length are the same, one by one."""
    return all(map(operator.is_, some, others))


def _contents(container: Any) -> list[Any]:
    """What a container holds, in its order; of a dict the keys and then the values."""
    return [*container, *container.values()] if isinstance(container, dict) else [*container]


def _fill(container: Any, contents: list[Any]) -> None:
    """Give a container other contents, as `_contents` tells them."""
    container.clear()
    if isinstance(container, dict):
        keys, values = contents[: len(contents) // 2], contents[len(contents) // 2 :]
        container.update(zip(keys, values, strict=True))
    elif isinstance(container, set):
        container.update(contents)
    else:
        container.extend(contents)
