"""Forward hooks that a model came with and that return nothing: they may collect what they see."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def silent_hooks(model: nn.Module) -> Iterator[Counter[str]]:
    """Context of one forward pass; gives a count, by module name, of hooks that ran in it and returned None each time.

    Hooks that return something change what the network computes, and so are a part of it. Not counted are PyTorch's
    own, such as those of pruning, and methods of the model's modules and of objects that these hold.
    """
    ran: dict[tuple[str, int], bool] = {}  # whether a hook returned nothing
    replaced: list[tuple[dict[int, Any], int, Any]] = []

    def observed(hook: Callable[..., object], key: tuple[str, int]) -> Callable[..., object]:
        def observing(*args: object, **kwargs: object) -> object:
            result = hook(*args, **kwargs)
            ran[key] = ran.get(key, True) and result is None
            return result

        return observing

    held = {id(value) for module in model.modules() for value in (module, *vars(module).values())}
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in list(hooks.items()):
                if not _is_part(hook, held):
                    replaced.append((hooks, number, hook))
                    hooks[number] = observed(hook, (name, number))
    silent: Counter[str] = Counter()
    try:
        yield silent
    finally:
        for hooks, number, hook in replaced:
            if number in hooks:  # the pass may have removed it
                hooks[number] = hook
        silent.update(name for (name, _), nothing in ran.items() if nothing)


def _is_part(hook: object, held: Collection[int]) -> bool:
    """Whether a hook is PyTorch's or unitvis's, or belongs to an object of which `held` has the id."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    owner = getattr(hook, "__self__", hook)
    package = str(getattr(hook, "__module__", None) or type(owner).__module__).partition(".")[0]
    return id(owner) in held or package in ("torch", "unitvis")
