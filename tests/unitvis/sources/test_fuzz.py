"""Thousands of broken image files in one folder: the scan ends, in bounded memory, and every good image is ranked."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import unitvis
from support.encoded import png_chunk
from support.memory import Peak

GOOD = 40
TRANSFORM = unitvis.Transform(resize=(16, 16))
SAVED = [
    ("jpg", "JPEG", {}),
    ("jpg", "JPEG", {"progressive": True}),
    ("png", "PNG", {}),
    ("webp", "WEBP", {}),
    ("bmp", "BMP", {}),
    ("gif", "GIF", {}),
    ("tif", "TIFF", {}),
    ("tif", "TIFF", {"compression": "tiff_lzw"}),
    ("tif", "TIFF", {"compression": "tiff_deflate"}),
    ("ppm", "PPM", {}),
    ("avif", "AVIF", {}),
]


def picture(seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (6, 8, 3), np.uint8)).resize((40, 30), Image.Resampling.BICUBIC)


def png_of_zeros(width: int, height: int) -> bytes:
    """A whole PNG that is small as a file and large in memory."""
    squeeze = zlib.compressobj(9)
    rows = b"".join(squeeze.compress(bytes(3 * width + 1)) for _ in range(height)) + squeeze.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def mutated(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """(ending, bytes): bit flips, cuts, other formats' headers, absurd sizes, repeated, lost and foreign pieces."""
    random = np.random.default_rng(seed)
    whole = []
    for number, (ending, kind, options) in enumerate(SAVED):
        file = io.BytesIO()
        picture(1000 + number).save(file, kind, **options)
        whole.append((ending, file.getvalue()))
    for number in range(count):
        ending, data = whole[number % len(whole)]
        data = bytearray(data)
        at = int(random.integers(0, len(data)))
        how = number // len(whole) % 7
        if how == 0:
            for place in random.integers(0, len(data), 1 + number % 5):
                data[place] ^= 1 << random.integers(0, 8)
        elif how == 1:
            del data[at:]
        elif how == 2:
            data[: min(at, 64)] = whole[int(random.integers(0, len(whole)))][1][: min(at, 64)]
        elif how == 3:  # where headers keep sizes
            place = int(random.integers(2, min(200, len(data) - 4)))
            data[place : place + 4] = [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\x00\x00"][number % 3]
        elif how == 4:
            data[at:at] = data[: int(random.integers(0, len(data)))] * 3
        elif how == 5:
            data[at : at + int(random.integers(1, 100))] = b""
        else:
            data[at : at + 50] = random.integers(0, 256, 50, np.uint8).tobytes()
        yield ending, bytes(data)


def fill(folder: Path, count: int, seed: int) -> None:
    for number in range(GOOD):
        picture(number).save(folder / f"{number * count // GOOD:06}-good.png")
    for number, (ending, data) in enumerate(mutated(count, seed)):
        (folder / f"{number:06}.{ending}").write_bytes(data)
    large = png_of_zeros(6000, 6000)
    absurd = large[:20] + struct.pack(">I", 65_535) + large[24:]
    for copy in range(max(2, count // 2_000)):  # together they would not fit
        (folder / f"{count // 2:06}-large{copy}.png").write_bytes(large)
        (folder / f"{count // 2:06}-absurd{copy}.png").write_bytes(absurd)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(3, 4, 5)


def check(folder: Path, count: int, seed: int, **options: object) -> int:
    """Scan the folder; the number of failures."""
    fill(folder, count, seed)
    names = sorted(path.name for path in folder.iterdir())
    good = [id for id, name in enumerate(names) if name.endswith("good.png")]
    with Peak() as peak:
        run = unitvis.scan(
            nn.Sequential(network()), folder, "0", len(names), transform=TRANSFORM, progress=False, workers=4, **options
        )
    assert peak.added < 512 * 2**20
    failed = {failure["id"] for failure in run.manifest["failures"]}
    ranked = set(run["0"].images[0].tolist()) - {-1}
    assert failed | ranked == set(range(len(names)))
    assert not failed & ranked
    alone = [np.asarray(Image.open(folder / names[id]).resize((16, 16), Image.Resampling.BILINEAR)) for id in good]
    want = unitvis.scan(nn.Sequential(network()), np.stack(alone), "0", GOOD, transform=TRANSFORM, progress=False)
    of_good = np.isin(run["0"].images, good)
    for unit in range(4):
        assert run["0"].images[unit][of_good[unit]].tolist() == [good[id] for id in want["0"].images[unit]]
        assert (run["0"].values[unit][of_good[unit]] == want["0"].values[unit]).all()
    return len(failed)


@pytest.mark.filterwarnings("ignore")
def test_two_thousand_broken_files(tmp_path: Path) -> None:
    assert 500 < check(tmp_path, 2_000, 0) < 2_000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"allow_truncated": True}, {"decoder": "simplejpeg", "scaled": True}], ids=str)
def test_twenty_thousand_broken_files(options: dict[str, object], tmp_path: Path) -> None:
    if options.get("decoder"):
        pytest.importorskip("simplejpeg")
    assert 5_000 < check(tmp_path, 20_000, 1, **options) < 20_000
