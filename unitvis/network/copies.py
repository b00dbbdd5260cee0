"""Copies of models, also of models that hold what cannot be copied."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def copied(model: nn.Module, tensors: Mapping[int, Tensor] | None = None) -> nn.Module:
    """Copy a model: its modules and everything that their attributes hold, except what cannot be copied.

    Such objects, for instance a lock or an open file, are shared with the original; the
    objects around them are copied. tensors: what takes the place of a tensor, by the tensor's id; others are copied.
    """
    return _copied(model, dict(tensors or {}))


def _copy_attributes(old: object, memo: dict[int, Any]) -> None:
    """Fill in the attributes of `memo[id(old)]`, an empty object of the same class."""
    state: Any = object.__getstate__(old)
    held, in_slots = state if isinstance(state, tuple) else (state, None)
    for name, value in {**(held or {}), **(in_slots or {})}.items():
        object.__setattr__(memo[id(old)], name, _copied(value, memo))


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """Deep copy of a value; where that fails, a copy of its parts, and the value itself where it has none."""
    tried = dict(memo)  # a copy that fails leaves half-made copies in its memo
    try:
        found = copy.deepcopy(value, tried)
    except Exception:
        return _copied_in_parts(value, memo)
    memo.setdefault(id(memo), []).extend(tried.pop(id(tried), []))  # what must live as long as its id is in the memo
    memo.update(tried)
    return found


def _copied_in_parts(value: Any, memo: dict[int, Any]) -> Any:
    new: Any
    if isinstance(value, Tensor):
        new = memo[id(value)] = value.detach().clone()  # one with a history; deepcopy takes no such tensors
    elif type(value) is list:
        new = memo[id(value)] = []
        new.extend(_copied(item, memo) for item in value)
    elif type(value) is dict:
        new = memo[id(value)] = {}
        new.update((key, _copied(item, memo)) for key, item in value.items())
    elif type(value) is tuple:
        new = memo[id(value)] = tuple(_copied(item, memo) for item in value)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        try:
            # A class written in Python, for instance a module, or another that has a way to be copied.
            plain = type(value).__new__ is object.__new__  # type: ignore[comparison-overlap]
            new = object.__new__(type(value)) if plain else copy.copy(value)
        except Exception:
            return value
        memo[id(value)] = new
        _copy_attributes(value, memo)
    else:
        return value
    return new
