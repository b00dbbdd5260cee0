"""Attributes of a model's modules, put back after a forward pass that changes them."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterable, Iterator
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


@contextmanager
def kept_attributes(model: nn.Module) -> Iterator[None]:
    """Context of a forward pass, after which every module has the attributes that it had before.

    Flags, counters and whatever else an attribute was bound to; lists, dicts, sets and deques in attributes, and those
    inside them, get back what they held. Objects of other classes are not looked into, and the values of tensors stay
    as they are.
    """
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
        yield
    finally:
        for attributes, held in modules:
            if attributes.keys() != held.keys() or not _same(attributes.values(), held.values()):
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
