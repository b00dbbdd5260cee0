"""Pictures to pack, and packs and scans of them."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn

import unitvis
from unitvis import pack as pack_function
from unitvis.results.arrays import ARRAYS
from unitvis.sources import PackSource

COUNT = 70
BROKEN = (0, 31, 32, 69)
TRANSFORM = unitvis.Transform(20, 16, (0.5, 0.4, 0.3), (0.2, 0.2, 0.3), "bicubic")
NORMAL = unitvis.Transform(mean=TRANSFORM.mean, std=TRANSFORM.std)
NET = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 5, 3))
"""


def net() -> nn.Sequential:
    """The network whose file is NET."""
    space: dict[str, Callable[[], nn.Sequential]] = {}
    exec(NET, space)  # noqa: S102
    return space["net"]().eval()


def originals(root: Path) -> Path:
    """Write COUNT pictures of many sizes into new folders; those with the ids in BROKEN cannot be read."""
    for id in range(COUNT):
        rng = np.random.default_rng(id)
        small = rng.integers(0, 256, (5, 6, 3), np.uint8)
        picture = Image.fromarray(small).resize(rng.integers(20, 60, 2).tolist(), Image.Resampling.NEAREST)
        path = root / f"{id // 20}" / f"{id:02}é.{'jpg' if id % 2 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[274] = 1 + id % 8
        picture.save(path, exif=exif)
        if id in BROKEN:
            path.write_bytes(b"" if id == 31 else path.read_bytes()[:60])
    return root


def pack(images: object, path: Path, **options: object) -> PackSource:
    """Pack with TRANSFORM, or another one that is given."""
    return pack_function(images, path, options.pop("transform", TRANSFORM), progress=False, **options)


def scan(images: object, **options: object) -> unitvis.Run:
    """Scan `net` over a pack, or with a transform over its originals."""
    return unitvis.scan(net(), images, transform=options.pop("transform", NORMAL), progress=False, **options)


def as_kind(kind: str, folder: Path) -> Path:
    """A folder of pictures as it is, as a list of its files or as three tar archives."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
    if kind == "list":
        listing = folder / "list.txt"
        listing.write_text("\n".join(reversed(names)))
        return listing
    if kind == "tar":
        for number in range(3):
            with tarfile.open(folder.parent / f"shard-{number}.tar", "w") as archive:
                for name in names[number::3]:
                    archive.add(folder / name, name)
        return folder.parent / "shard-{0..2}.tar"
    return folder


def same(one: unitvis.Run, other: unitvis.Run) -> None:
    """Fail unless two runs hold the same bytes, records and facts about their images."""
    for name in other.layers:
        for key in ARRAYS:
            assert getattr(one[name], key).tobytes() == getattr(other[name], key).tobytes(), (name, key)
    for key in ("images", "coverage", "failures", "layers", "input"):
        assert one.manifest[key] == other.manifest[key], key
    assert one.records == other.records
