"""Sizes of the benchmarks, so large that the device needs minutes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Sizes:
    """Networks, shapes and numbers of rounds of one form of the suite."""

    networks: tuple[str, ...]  # torchvision's
    side: int  # of the images, in pixels
    batches: tuple[int, ...]
    precisions: tuple[str, ...]  # of the steps
    maps: tuple[tuple[int, int, int, int], ...]  # [N, C, H, W] that operators read
    merged: tuple[tuple[int, int], ...]  # [images, units] of the keys that are merged
    convolutions: tuple[tuple[int, int, int, int, int], ...]  # images, input and output channels, kernel, map side
    product: int  # rows and columns of the matrix product that is the ceiling
    copied: int  # bytes that the copy that is the ceiling reads
    flushed: int  # bytes that are written between rounds to empty the cache
    host_images: int  # images of a scan from host memory
    ring: int  # bytes of the ring that holds them
    turns: int  # how often each contender of a step or scan is timed, in turns
    rounds: int  # timed rounds of a turn, or of an operator
    calls: int  # of an operator in one round, each on its own operands
    compiled: bool  # also time torch.compile


GPU = Sizes(
    networks=("alexnet", "vgg16", "resnet50"),
    side=224,
    batches=(64, 256),
    precisions=("fp16",),
    maps=((512, 64, 112, 112), (512, 256, 56, 56), (2048, 512, 13, 13), (256, 96, 55, 55)),
    merged=((256, 1152), (256, 26560)),
    convolutions=((256, 3, 64, 7, 112), (256, 64, 256, 1, 56), (256, 256, 1024, 1, 14), (256, 256, 256, 3, 13)),
    product=8192,
    copied=2**32,
    flushed=2**28,
    host_images=1_280_000,
    ring=2**33,
    turns=3,
    rounds=50,
    calls=8,
    compiled=True,
)
CPU = Sizes(
    networks=("alexnet", "resnet18"),
    side=224,
    batches=(16,),
    precisions=("fp32",),
    maps=((16, 64, 55, 55), (16, 256, 13, 13)),
    merged=((16, 1152), (64, 4800)),
    convolutions=((16, 64, 192, 5, 27),),
    product=1024,
    copied=2**27,
    flushed=2**26,
    host_images=512,
    ring=2**33,
    turns=5,
    rounds=5,
    calls=1,
    compiled=True,
)
TINY = replace(
    CPU,
    networks=("alexnet",),
    side=64,
    batches=(2,),
    maps=((2, 5, 8, 9),),
    merged=((4, 6),),
    convolutions=((2, 4, 8, 3, 6),),
    product=16,
    copied=2**12,
    flushed=2**12,
    host_images=100,
    ring=64 * 64 * 64 * 3,
    turns=1,
    rounds=1,
    compiled=False,
)
ALL = {"gpu": GPU, "cpu": CPU, "tiny": TINY}


def here() -> str:
    """Name of the form for this machine: "gpu" or "cpu"."""
    return "gpu" if torch.cuda.is_available() else "cpu"
