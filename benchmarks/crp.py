"""Compare a scan with zennit-crp's search for the strongest images, on the same images in memory.

    pip install zennit-crp
    python -m benchmarks.crp

AlexNet's five convolutions, 500 images of 224 x 224, both as their users call them: `FeatureVisualization.run` with
`max_target="max"` (which also ranks relevance, and has no way to leave that out) and `unitvis.scan`. Values must agree
before anything is timed. The result goes into benchmarks/results/<device>.json.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks import machine, results
from benchmarks.naive import network
from unitvis.bench.bench import synthetic_images
from unitvis.scanning.scan import scan
from unitvis.sources.transform import Transform

IMAGES, SIDE, K = 500, 224, 9
RELATIVE_TOLERANCE = 1e-4  # of a layer's largest response


class Normalised(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Dataset of normalised float images [3, H, W] with a label, as zennit-crp needs it."""

    def __init__(self, pixels: NDArray[np.uint8], transform: Transform) -> None:
        self._pixels, self._transform = pixels, transform

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return self._transform.normalize(torch.from_numpy(self._pixels[number][None]))[0], 0


def by_crp(
    model: nn.Module, layers: list[str], pixels: NDArray[np.uint8], transform: Transform
) -> tuple[dict[str, NDArray[np.float32]], float]:
    """Run zennit-crp's search; returns (layer -> the K largest values [units, K], seconds)."""
    from crp.attribution import CondAttribution
    from crp.concepts import ChannelConcept
    from crp.visualization import FeatureVisualization
    from zennit.composites import EpsilonPlusFlat

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        search = FeatureVisualization(
            CondAttribution(model),
            Normalised(pixels, transform),
            {name: ChannelConcept() for name in layers},
            max_target="max",
            abs_norm=False,
            path=folder,
        )
        start = time.perf_counter()
        search.run(EpsilonPlusFlat(), 0, len(pixels), batch_size=32, checkpoint=len(pixels))
        seconds = time.perf_counter() - start
        files = Path(folder) / "ActMax_max_unnormed"
        return {name: np.load(files / f"{name}_rel.npy")[:K].T for name in layers}, seconds


def compared(count: int, side: int) -> dict[str, Any]:
    """Time both, and check that their values agree."""
    loaded = network("alexnet")
    model, transform = loaded.model, loaded.transform
    assert transform is not None
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # zennit's rules need the input of a ReLU
    pixels = synthetic_images(count, (side, side))
    own = Transform(mean=transform.mean, std=transform.std)
    start = time.perf_counter()
    run = scan(model, pixels, k=K, transform=own, progress=False)
    ours = time.perf_counter() - start
    model.requires_grad_(True)
    found, theirs = by_crp(model, run.layers, pixels, own)
    for name, values in found.items():
        slack = RELATIVE_TOLERANCE * float(np.abs(run[name].values).max())
        np.testing.assert_allclose(values, run[name].values, rtol=0, atol=slack, err_msg=name)
    return {"images": count, "seconds": {"zennit-crp": round(theirs, 1), "unitvis": round(ours, 1)}} | {
        "times_as_fast": round(theirs / ours, 2)
    }


def main() -> int:
    """Run the comparison and write its result; returns 0, or 2 if zennit-crp is not installed."""
    argparse.ArgumentParser(prog="python -m benchmarks.crp", description=__doc__).parse_args()
    try:
        import crp.visualization  # noqa: F401
    except ImportError as error:
        print(f"zennit-crp is needed ({error}): pip install zennit-crp", file=sys.stderr)
        return 2
    found = compared(IMAGES, SIDE)
    print(json.dumps(found, indent=1))
    described = machine.describe(torch.device("cpu"))
    results.write(results.RESULTS / machine.file_name(described["name"]), crp={"machine": described, "found": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
