"""A plain loop over image files with Pillow: read, hash, decode, resize, crop. What a core can do at most.

    python -m benchmarks.plain LIST

LIST: a file with one path a line. Prints images a second of this one process, microseconds an image in each stage, and
a hash of the pixels, as JSON. It imports nothing of unitvis, and no PyTorch.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

RESIZE, CROP = 256, 224  # pixels: of the shorter side, and of the square that is cut from the centre


def main() -> None:
    """Read all files of the list."""
    paths = Path(sys.argv[1]).read_text().splitlines()
    seconds = dict.fromkeys(("read", "hash", "decode", "resize and crop"), 0.0)
    pixels, found = np.empty((CROP, CROP, 3), np.uint8), hashlib.blake2b()
    begin = time.perf_counter()
    for path in paths:
        times = [time.process_time()]
        with open(path, "rb") as file:
            data = file.read()
        times.append(time.process_time())
        hashlib.blake2b(data, digest_size=16).digest()
        times.append(time.process_time())
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        times.append(time.process_time())
        pixels[:] = resized(picture)
        times.append(time.process_time())
        for stage, start, stop in zip(seconds, times, times[1:], strict=False):
            seconds[stage] += stop - start
    total = time.perf_counter() - begin
    for path in paths[:100]:
        with Image.open(path) as picture:
            found.update(resized(picture.convert("RGB")).tobytes())
    stages = {stage: round(value / len(paths) * 1e6, 1) for stage, value in seconds.items()}
    print(json.dumps({"images_s": len(paths) / total, "microseconds": stages, "pixels": found.hexdigest()}))


def resized(picture: Image.Image) -> NDArray[np.uint8]:
    """Resize the shorter side to `RESIZE` and cut the centre: uint8 [CROP, CROP, 3]."""
    width, height = picture.size
    size = (RESIZE, int(RESIZE * height / width)) if width <= height else (int(RESIZE * width / height), RESIZE)
    whole = np.asarray(picture.resize(size, Image.Resampling.BILINEAR))
    top, left = round((size[1] - CROP) / 2), round((size[0] - CROP) / 2)
    return whole[top : top + CROP, left : left + CROP]


if __name__ == "__main__":
    main()
