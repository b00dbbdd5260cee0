"""Attributes of a model's modules, put back after a forward pass that changes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_CONTAINERS = (list, dict, set, deque)
# What PyTorch keeps in a module for itself; of that, a forward pass may change what `_OWN` names.
_OWN = frozenset(["training", "_modules", "_non_persistent_buffers_set"])
_OF_PYTORCH = frozenset(vars(nn.Module())) - _OWN


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
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.jit.ScriptModule):  # its attributes are not Python's
            continue
        if isinstance(value, nn.Module):
            held = {name: one for name, one in vars(value).items() if name not in _OF_PYTORCH}
            modules.append((vars(value), held))
            inside: Any = held.values()
        elif isinstance(value, tuple):
            inside = value
        else:
            containers.append((value, _contents(value)))
            inside = value.values() if isinstance(value, dict) else value
        left.extend(one for one in inside if isinstance(one, (nn.Module, tuple, *_CONTAINERS)))
    try:
        yield
    finally:
        for attributes, held in modules:
            for name in attributes.keys() - held.keys() - _OF_PYTORCH:
                del attributes[name]
            for name, one in held.items():
                if name not in attributes or attributes[name] is not one:
                    attributes[name] = one
        for container, contents in containers:
            now = _contents(container)
            if len(now) != len(contents) or any(one is not other for one, other in zip(now, contents, strict=True)):
                _fill(container, contents)


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
