"""What a run's manifest says of a model, and what it warns of."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from unitvis.run import LayerTop


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Its class, its number of parameters, and a hash of all its tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    parameters = sum(p.numel() for p in model.parameters())
    return {"class": type(model).__name__, "parameters": parameters, "weights": digest.hexdigest()}


def saturation(top: LayerTop) -> str | None:
    """A warning where a layer that takes a convolution's output reaches one same largest value again and again."""
    full = top.fired.all(axis=1)
    if top.info["fed_by"] is None or top.values.shape[1] < 2 or not full.any():
        return None
    flat = top.values[full, 0] == top.values[full, -1]
    if flat.mean() < 0.1:
        return None
    return (
        f"layer {top.name!r} saturates: in {flat.mean():.0%} of its units all {top.values.shape[1]} winners have the "
        f"same value (up to {top.values[full, 0][flat].max():g}); rank what goes into it: layer {top.info['fed_by']!r}"
    )
