"""Identity of a model, for a manifest."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Describe a model as {"class": name, "parameters": number, "weights": hexadecimal hash of the state dict}."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    parameters = sum(p.numel() for p in model.parameters())
    return {"class": type(model).__name__, "parameters": parameters, "weights": digest.hexdigest()}
