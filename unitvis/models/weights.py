"""Load weights from a file into a model: the file is never executed, and every key that does not fit is named."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from unitvis.errors import UnitvisError, abridged, error_text

_STATE_KEYS = ("state_dict", "model_state_dict", "model_state", "model", "net")  # where a state dict may lie
_MAX_EXPANDED = 2**26  # bytes that a tensor may claim beyond those that the file holds of it
_DEPTH = 2  # of dictionaries in an entry of a checkpoint that are searched for another network
_SHOWN = 200  # characters of a tensor's name in a message


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint into a model, in place.

    A last layer with another number of outputs is replaced by one of the checkpoint's shape. Raises UnitvisError that
    names every other tensor that is missing, unexpected or of another shape.
    """
    own = model.state_dict()
    state = _without_prefix(read_weights(Path(path), own), set(own))
    _resize_head(model, state)
    own = model.state_dict()
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {list(state[key].shape)} for {list(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ],
        "complex in place of real": [
            key for key in own if key in state and state[key].is_complex() and not own[key].is_complex()
        ],
        "whole numbers in place of real": [
            f"{key} {str(state[key].dtype).removeprefix('torch.')}"
            for key, _ in model.named_parameters()
            if key in state and _is_real(own[key]) and not _is_real(state[key])
        ],
    }
    if any(problems.values()):
        misfits = "; ".join(
            f"{kind}: {', '.join(key[:_SHOWN] for key in keys)}" for kind, keys in problems.items() if keys
        )
        raise UnitvisError(
            f"the weights in {path} do not fit the model ({misfits}); name a function that builds the network that was "
            f"trained: file.py:function"
        )
    try:
        model.load_state_dict(state)
    except Exception as error:  # a layer's own hook, or a dtype that cannot be converted
        raise UnitvisError(f"the weights in {path} cannot be loaded into the model ({error_text(error)})") from error


def read_weights(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, by name, on the CPU.

    Reads safetensors, or a state dict with `torch.load(weights_only=True)`, also inside the dictionary of a training
    loop (`_STATE_KEYS`). like: the state dict of the network; of what else in that dictionary fits it, such as averaged
    weights, a warning tells. Raises UnitvisError if the file cannot be read, or if two of `_STATE_KEYS` hold different
    networks that fit.
    """
    if not path.is_file():
        raise UnitvisError(f"there is no file {path} with weights")
    try:
        state: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:
        raise UnitvisError(
            f"the weights in {path} cannot be read ({error_text(error)}); give safetensors, "
            f"or a state dict saved with torch.save(model.state_dict(), ...)"
        ) from error
    outer: list[int] = []  # ids of the dictionaries around the state dict
    while isinstance(state, dict) and (inner := [k for k in _STATE_KEYS if isinstance(state.get(k), dict)]):
        if id(state) in outer:
            raise UnitvisError(f"{path} holds a dictionary that holds itself; save one state dict")
        outer.append(id(state))
        if others := _other_networks(state, inner[0], like):
            fitting = f"{path} holds several networks that fit, under {inner[0]!r}, {', '.join(map(repr, others))}"
            if not set(inner).isdisjoint(others):
                raise UnitvisError(f"{fitting}; save the one to load")
            warnings.warn(f"{fitting}: {inner[0]!r} is loaded; save another one alone to load it")
        state = state[inner[0]]
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise UnitvisError(f"{path} holds no state dict; save one with torch.save(model.state_dict(), ...)")
    for key, value in state.items():
        if wrong := _tensor_problem(value):
            raise UnitvisError(f"{key[:_SHOWN]!r} in {path} {wrong}; save plain tensors that hold all their values")
    return state


def _other_networks(entries: Mapping[Any, Any], chosen: str, like: Mapping[str, Tensor]) -> list[str]:
    """The entries of a checkpoint beside the chosen one that hold a network that fits, and another than that."""
    own = _networks(entries[chosen], like)
    if not own:  # what is loaded does not fit, which is told later
        return []
    others = {str(key): _networks(value, like) for key, value in entries.items() if key != chosen}
    return [key for key, found in others.items() if any(not _same(one, own[0]) for one in found)]


def _networks(entry: Any, like: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors of each dictionary in an entry of a checkpoint that fits a network, by the network's names.

    It fits where one prefix leads to all names, and to tensors of the same shapes but those of one layer, the last.
    """
    longest = max(map(len, like), default=0)
    searched = {id(entry): entry} if isinstance(entry, dict) else {}
    for _ in range(_DEPTH):
        searched |= {id(one): one for each in searched.values() for one in each.values() if isinstance(one, dict)}
    networks = []
    for each in searched.values():
        tensors = {
            key: one
            for key, one in each.items()
            if isinstance(key, str) and isinstance(one, Tensor) and _tensor_problem(one) is None
        }
        found = Counter(key.removesuffix(name) for key in tensors for name in _endings(key, longest) if name in like)
        for prefix in (prefix for prefix, count in found.items() if count == len(like)):
            own = {name: tensors[prefix + name] for name in like}
            if sum(own[name].shape != like[name].shape for name in like) <= 2:
                networks.append(own)
    return networks


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _tensor_problem(value: Tensor) -> str | None:
    """Why a tensor of a checkpoint is not loaded; None if it is a plain one that the file holds."""
    if value.device.type == "meta":
        return "is on the device meta, without values"
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        kind = "quantised" if value.is_quantized else "nested" if value.is_nested else "sparse"
        return f"is a {kind} tensor"
    claimed, held = value.numel() * value.element_size(), value.untyped_storage().nbytes()
    if claimed > held + _MAX_EXPANDED:
        return f"is {list(value.shape)}, {claimed:,} bytes, of which the file holds {held:,}"
    return None


def _without_prefix(state: dict[str, Tensor], own: set[str]) -> dict[str, Tensor]:
    """The tensors under the model's own names (`own`), without the prefix that a wrapper put before them.

    The prefix is the one under which most of the model's names are found. Tensors beside it, such as a loss's, are left
    out with a warning that names them. Raises UnitvisError where several prefixes hold as many names.
    """
    longest = max(map(len, own), default=0)
    found = Counter(key.removesuffix(name) for key in state for name in _endings(key, longest) if name in own)
    prefixes = [prefix for prefix, count in found.items() if count == max(found.values())]
    if "" in prefixes or not prefixes:
        return state
    if len(prefixes) > 1:
        raise UnitvisError(
            f"the weights hold several networks that fit, under {', '.join(map(repr, prefixes))}; save the one to load"
        )
    if beside := [key for key in state if not key.startswith(prefixes[0])]:
        warnings.warn(f"left out of the weights, because they belong to no layer: {abridged(beside)}")
    return {key.removeprefix(prefixes[0]): value for key, value in state.items() if key.startswith(prefixes[0])}


def _endings(key: str, longest: int) -> Iterator[str]:
    """What remains of a dotted name, at most `longest` characters, when parts are taken from its front, or none."""
    dot = len(key)
    while dot >= 0:
        dot = key.rfind(".", 0, dot)
        if len(key) - dot - 1 > longest:
            return
        yield key[dot + 1 :]


def _resize_head(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Replace the model's last layer, in place, if the checkpoint's differs only in its number of outputs."""
    name, head = [(n, m) for n, m in model.named_modules() if list(m.parameters(recurse=False))][-1]
    weight = state.get(f"{name}.weight")
    if not isinstance(head, nn.Linear | nn.Conv2d) or weight is None or weight.shape[1:] != head.weight.shape[1:]:
        return
    if weight.shape == head.weight.shape:
        return
    outputs, bias = weight.shape[0], f"{name}.bias" in state
    new: nn.Module
    if isinstance(head, nn.Linear):
        new = nn.Linear(head.in_features, outputs, bias)
    elif head.kernel_size == (1, 1) and head.groups == 1:
        new = nn.Conv2d(head.in_channels, outputs, 1, bias=bias)
    else:
        return
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new.train(head.training))
