"""The recipe for Ray Data in docs/large-data-sets.md, with a real local Ray."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import unitvis
from support.scans import two_convolutions

ray = pytest.importorskip("ray")

ROOT = Path(__file__).parents[3]
TRANSFORM = unitvis.Transform(mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))


class Scanner:
    """One of several; what it has recorded so far lies in a folder of its own after every batch."""

    def __init__(self, out: str) -> None:
        self.recorder = unitvis.Recorder(two_convolutions(), transform=TRANSFORM)
        self.recorder.__enter__()
        self.folder = f"{out}/{ray.get_runtime_context().get_actor_id()}"

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.recorder(torch.tensor(batch["image"]), torch.tensor(batch["id"]))
        self.recorder.partial().save(self.folder, overwrite=True)
        return {"images": np.array([len(batch["id"])])}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_map_batches_with_a_recorder_is_one_scan(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (150, 12, 12, 3), np.uint8)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), *sys.path])
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    try:
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        data = ray.data.from_items([{"id": id, "image": image} for id, image in enumerate(pixels)])
        compute = ray.data.ActorPoolStrategy(size=2)
        counts = data.map_batches(Scanner, fn_constructor_args=[str(tmp_path)], batch_size=20, compute=compute)
        assert counts.sum("images") == 150
    finally:
        ray.shutdown()
    run = unitvis.merge(sorted(tmp_path.iterdir()), two_convolutions(), images=pixels)
    whole = unitvis.scan(two_convolutions(), pixels, transform=TRANSFORM, progress=False)
    for name in whole:
        for key in ("values", "images", "positions", "boxes", "status"):
            assert getattr(run[name], key).tobytes() == getattr(whole[name], key).tobytes()
    assert run.manifest["coverage"] == [[0, 150]]
