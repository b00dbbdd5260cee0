"""Small networks and images, and scans of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import unitvis
from unitvis.ranking.recorder import Recorder
from unitvis.run import Run
from unitvis.sources import open_source


def small_net(seed: int = 0) -> nn.Sequential:
    """Four layers to rank (LAYERS), with pooling, BatchNorm and saturating activations, for images of 28 x 28."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(8, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU6(inplace=True),
        nn.Conv2d(12, 10, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(10 * 4 * 4, 7),
    ).eval()


LAYERS = ["0", "4", "6", "9"]


def images(count: int = 45, size: int = 28, seed: int = 1) -> Tensor:
    """Noise, float32 [count, 3, size, size]."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def two_convolutions(seed: int = 0) -> nn.Sequential:
    """11 units in two convolutions, for images of any size; `support.commands` has it as a file."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3)).eval()


def scan(model: nn.Module, pixels: object, layers: object = None, k: int = 9, **options: object) -> unitvis.Run:
    return unitvis.scan(model, pixels, layers, k, progress=False, **options)


def arrays(run: unitvis.Run) -> dict[str, bytes]:
    """The bytes of every array of a run."""
    return {
        f"{name}/{key}": getattr(top, key).tobytes()
        for name, top in run.tops.items()
        for key in ("values", "images", "positions", "boxes", "status")
    }


class Constant(nn.Module):
    """A network whose responses are its images."""

    def __init__(self) -> None:
        super().__init__()
        self.tap = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.tap(x * 1.0)


def planted(values: list[float]) -> Tensor:
    """Images [n, 3, 2, 2] whose three channels all hold the value at row 1, column 0, and less elsewhere."""
    pixels = torch.full((len(values), 3, 2, 2), -math.inf)
    pixels[:, :, 1, 0] = torch.tensor(values)[:, None]
    return pixels


def recorded(pixels: Tensor, k: int) -> unitvis.Run:
    """What a Recorder finds where the responses are the images."""
    with Recorder(Constant(), ["tap"], k) as recorder:
        recorder(pixels)
    return recorder.result()


def pictures(count: int, side: int = 20, seed: int = 0) -> Tensor:
    """Blocks of 4 x 4 equal pixels, each image with a contrast of its own, float32 [count, 3, side, side]."""
    g = torch.Generator().manual_seed(seed)
    small = torch.randn(count, 3, side // 4, side // 4, generator=g)
    return torch.nn.functional.interpolate(small, size=(side, side)) * torch.rand(count, 1, 1, 1, generator=g)


def tiny_net(seed: int = 0) -> nn.Sequential:
    """52 units in three convolutions, for images of 20 x 20."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 5, 2, 2), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(16, 24, 3, padding=1),
        nn.BatchNorm2d(24), nn.ReLU(inplace=True), nn.Conv2d(24, 12, 3), nn.Flatten(), nn.Linear(108, 7),
    ).eval()  # fmt: skip


def by_half(model: nn.Module, images: Tensor, precision: str = "fp16", k: int = 9, **options: object) -> Run:
    """A scan in half precision whose candidates are re-ranked in float32."""
    source = open_source(images, None)
    with Recorder(model, k=k, precision=precision, **options) as recorder:
        for batch in source.batches(64):
            recorder(batch.pixels, batch.ids)
    return recorder.result(source)
