"""The demo's network: five convolutions in the manner of AlexNet and of Zeiler and Fergus (2013, arXiv:1311.2901)."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from unitvis.demo.pictures import CLASSES
from unitvis.errors import UnitvisError

WEIGHTS = Path(__file__).with_name("network.safetensors")
RECORD = Path(__file__).with_name("network.json")  # a record of the training: seed, accuracy, versions
MEAN = (0.45, 0.45, 0.45)
STD = (0.25, 0.25, 0.25)
LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5")
_RETRAIN_HINT = "install unitvis again or, in a checkout, make it again with `python -m unitvis.demo.train`"


def build(normalise: bool = False) -> nn.Sequential:
    """Build the network with random weights: [N, 3, 96, 96] to logits [N, classes].

    normalise: add batch normalisation and dropout for training; `train.fold` removes them. The classifier gets only
    each last-layer unit's largest response, the value by which a scan ranks images.
    """
    modules: OrderedDict[str, nn.Module] = OrderedDict()

    def convolution(n: int, inputs: int, outputs: int, size: int, stride: int = 1) -> None:
        modules[f"conv{n}"] = nn.Conv2d(inputs, outputs, size, stride, size // 2)
        if normalise:
            modules[f"norm{n}"] = nn.BatchNorm2d(outputs)
        modules[f"relu{n}"] = nn.ReLU()

    convolution(1, 3, 48, 7, 2)
    modules["pool1"] = nn.MaxPool2d(3, 2, 1)
    convolution(2, 48, 64, 5)
    modules["pool2"] = nn.MaxPool2d(3, 2, 1)
    convolution(3, 64, 128, 3)
    convolution(4, 128, 128, 3)
    convolution(5, 128, 96, 3)
    modules["pool5"] = nn.AdaptiveMaxPool2d(1)
    modules["flatten"] = nn.Flatten()
    if normalise:
        modules["dropout"] = nn.Dropout(0.4)
    modules["classify"] = nn.Linear(96, len(CLASSES))
    return nn.Sequential(modules)


def load(weights: Path = WEIGHTS) -> nn.Sequential:
    """Load the trained network, float32, in eval mode; raises UnitvisError where the weights cannot be read."""
    if not weights.is_file():
        raise UnitvisError(f"the demo's weights are missing: no file {weights}; {_RETRAIN_HINT}")
    network = build()
    try:
        network.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UnitvisError(f"the demo's weights in {weights} cannot be used ({reason}); {_RETRAIN_HINT}") from error
    return network.eval()


def record() -> dict[str, Any]:
    """Read the record of the training; raises UnitvisError where it cannot be read."""
    try:
        return json.loads(RECORD.read_text())
    except (OSError, ValueError) as error:
        raise UnitvisError(
            f"the record of the demo's training cannot be read from {RECORD}; {_RETRAIN_HINT}"
        ) from error
