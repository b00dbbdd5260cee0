"""Attributes of a model's modules: put back after a forward pass that changes them, and named in its description."""

from __future__ import annotations

import hashlib
import operator
import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_LOOKED_INTO = (nn.Module, list, dict, set, deque, tuple)
_PLAIN = frozenset([bool, int, float, str, type(None), torch.Tensor, nn.Parameter])  # the usual rest, told apart fast
# What PyTorch keeps in a module for itself (`_ALL`); of that, a forward pass may change what `_OWN` names.
_OWN = frozenset(["training", "_modules", "_non_persistent_buffers_set"])
_ALL = frozenset(vars(nn.Module()))
_OF_PYTORCH = _ALL - _OWN


# Texts that name a place, which may be another one for the same network: paths, devices.
_PLACE = re.compile(r".*[/\\].*|(cpu|cuda|mps|xpu|meta)(:\d+)?", re.DOTALL)
_LONGEST = 200  # characters of an attribute in a description

Attribute = tuple[int, str]  # id of a module's `vars`, and the name of one of its attributes


def plain_attributes(model: nn.Module, changing: Collection[Attribute] = ()) -> dict[str, str]:
    """What Python prints of each attribute that is a number, a text, a boolean, None or a tuple of these, by full name.

    changing: those that a forward pass changes, such as counters, which are left out, as are texts that name a path or
    a device. Tuples with texts are sorted. Modules of PyTorch that print themselves, as `Conv2d`, are left out whole.
    """
    found = {}
    for path, module in model.named_modules():
        own = type(module)
        printed = own.__module__.startswith("torch.nn.modules.") and own.extra_repr is not nn.Module.extra_repr
        if printed or isinstance(module, torch.jit.ScriptModule):
            continue
        attributes = vars(module)
        for name in sorted(attributes.keys() - _ALL):
            if _is_plain(attributes[name]) and (id(attributes), name) not in changing:
                value = attributes[name]
                # Python orders a set of texts anew in each process, and so a tuple that was made of one.
                mixed = isinstance(value, tuple) and any(isinstance(item, str) for item in value)
                text = repr(tuple(sorted(value, key=repr)) if mixed else value)
                if len(text) > _LONGEST:
                    text = hashlib.blake2b(text.encode(errors="replace"), digest_size=16).hexdigest()
                found[f"{path}.{name}" if path else name] = text
    return found


def _is_plain(value: object) -> bool:
    if isinstance(value, str):
        return type(value) is str and not _PLACE.fullmatch(value)
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float)


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
