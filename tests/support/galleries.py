"""Runs whose galleries hold every case: dead and constant units, odd names, a hostile file name."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import unitvis

# The name of a file that would run a script if a page showed it as HTML
HOSTILE = "<img src=x onerror=alert(1)>&\"'#%?.png"
ODD = "<i>#\"&'/slash"  # PyTorch allows this name for a module


def network() -> nn.Sequential:
    """Two layers, the second with an odd name; unit 4 of the first is dead, unit 0 of the second constant."""
    torch.manual_seed(3)
    model = nn.Sequential(
        OrderedDict({"first": nn.Conv2d(3, 12, 5, 2), "relu": nn.ReLU(), ODD: nn.Conv2d(12, 6, 3, padding=1)})
    ).eval()
    model.first.bias.data[4] = -50.0
    model.get_submodule(ODD).weight.data[0] = 0.0
    model.get_submodule(ODD).bias.data[0] = 1.0
    return model


def photographs(folder: Path, count: int = 12) -> Path:
    """Write small coloured pictures into a new folder, the first with a hostile name."""
    folder.mkdir()
    for number in range(count):
        random = np.random.default_rng(number)
        coarse = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        name = HOSTILE if number == 0 else f"{number}.png"
        Image.fromarray(coarse).resize((60, 44), Image.Resampling.BICUBIC).save(folder / name)
    return folder


def scanned(folder: Path) -> unitvis.Run:
    """The run of `network` over twelve photographs."""
    transform = unitvis.Transform(resize=(33, 45), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return unitvis.scan(network(), photographs(folder / "photos"), transform=transform, progress=False)


def data(path: Path) -> dict:
    """The object that a gallery's script hands to the page."""
    call = re.fullmatch(r"unitvis\.(index|layer)\((.*)\);\n", path.read_text(), re.DOTALL)
    assert call
    return json.loads(call[2])


def twelve_images(folder: Path) -> tuple[nn.Module, unitvis.Run]:
    """A network and its run of an array of twelve images; unit 2 of the first layer is dead."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 5), nn.ReLU(), nn.Conv2d(12, 10, 3)).eval()
    model[0].bias.data[2] = -100.0
    images = np.random.default_rng(0).integers(0, 256, (12, 6, 6, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
    np.save(folder / "images.npy", images)
    return model, unitvis.scan(model, folder / "images.npy", transform=unitvis.Transform(), progress=False)


def contrast(one: str, other: str) -> float:
    """WCAG 2.1's contrast ratio of two colours #rgb or #rrggbb."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
