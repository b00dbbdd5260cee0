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
RECORD = Path(__file__).with_name("network.json")  # how the weights came about: seed, accuracy, versions
MEAN = (0.45, 0.45, 0.45)
STD = (0.25, 0.25, 0.25)
LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5")
_MAKE = "install unitvis again or, in a checkout, make it again with `python -m unitvis.demo.train`"


def build(normalise: bool = False) -> nn.Sequential:
    """The network with random weights, for [N, 3, 96, 96]; logits [N, classes].

    `normalise` adds batch normalisation for training; `train.fold` takes it out again.
    A unit of the last layer votes with its largest response alone, so that what is ranked is what decides.
    """
    parts: OrderedDict[str, nn.Module] = OrderedDict()

    def convolution(n: int, inputs: int, outputs: int, size: int, stride: int = 1) -> None:
        parts[f"conv{n}"] = nn.Conv2d(inputs, outputs, size, stride, size // 2)
        if normalise:
            parts[f"norm{n}"] = nn.BatchNorm2d(outputs)
        parts[f"relu{n}"] = nn.ReLU()

    convolution(1, 3, 48, 7, 2)
    parts["pool1"] = nn.MaxPool2d(3, 2, 1)
    convolution(2, 48, 64, 5)
    parts["pool2"] = nn.MaxPool2d(3, 2, 1)
    convolution(3, 64, 128, 3)
    convolution(4, 128, 128, 3)
    convolution(5, 128, 96, 3)
    parts["pool5"] = nn.AdaptiveMaxPool2d(1)
    parts["flatten"] = nn.Flatten()
    if normalise:
        parts["dropout"] = nn.Dropout(0.4)
    parts["classify"] = nn.Linear(96, len(CLASSES))
    return nn.Sequential(parts)


def load(weights: Path = WEIGHTS) -> nn.Sequential:
    """The trained network, float32, in eval mode."""
    if not weights.is_file():
        raise UnitvisError(f"the demo's weights are missing: no file {weights}; {_MAKE}")
    network = build()
    try:
        network.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UnitvisError(f"the demo's weights in {weights} cannot be used ({reason}); {_MAKE}") from error
    return network.eval()


def record() -> dict[str, Any]:
    """What the training wrote beside the weights."""
    try:
        return json.loads(RECORD.read_text())
    except (OSError, ValueError) as error:
        raise UnitvisError(f"the record of the demo's training cannot be read from {RECORD}; {_MAKE}") from error
