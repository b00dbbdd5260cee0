"""Identity of a model, for a manifest."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn


def describe_model(model: nn.Module) -> dict[str, Any]:
    """{"class": name, "parameters": their number, "weights": hexadecimal BLAKE2b hash of the state dict}."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    parameters = sum(p.numel() for p in model.parameters())
    return {"class": type(model).__name__, "parameters": parameters, "weights": digest.hexdigest()}
