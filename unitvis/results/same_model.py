"""Is a model the one whose responses a run holds?"""

from __future__ import annotations

import torch
from torch import nn

from unitvis.network.network import Network
from unitvis.results.data import RunData
from unitvis.state.partial import refuse_another_model

ANOTHER_MODEL = "the model is not the one that was scanned (then and now)"


def checked_network(run: RunData, model: nn.Module, device: torch.device | str | None) -> Network:
    """The network of a model; UnitvisError for another than was scanned: other tensors, modules, or responses."""
    network = Network(model, device=device, transform=run.source.transform)
    then = run.manifest["model"]
    refuse_another_model(ANOTHER_MODEL, then, network.description)
    channels, height, width = run.manifest["input"]
    network.examine((channels, height, width), run.layers, run.manifest["unit"])
    now = dict(network.description)
    if run.manifest["fingerprint"]["torch"] != torch.__version__:
        del now["modules"], now["attributes"]  # PyTorch may print them in other words, and add attributes
    refuse_another_model(ANOTHER_MODEL, then, now)
    return network
