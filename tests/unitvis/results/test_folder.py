"""A run that is there stays there until the new one is on the disk."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import unitvis
from unitvis import UnitvisError


def scanned(seed: int) -> unitvis.Run:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU()).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 9, 3), np.uint8)
    return unitvis.scan(model, pixels, transform=unitvis.Transform(), progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("writer", ["numpy.savez_compressed", "pathlib.Path.write_text"])
def test_a_full_disk_does_not_cost_the_run_that_was_there(
    writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = scanned(0).save(tmp_path / "run")
    (folder / "index.html").write_text("pages")
    before = contents(folder)
    with monkeypatch.context() as patch:

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(writer, full)
        with pytest.raises(UnitvisError, match=r"could not be written into .*: No space left on device"):
            scanned(1).save(folder, overwrite=True)
    assert contents(folder) == before
    other = scanned(1)
    other.save(folder, overwrite=True)
    assert set(contents(folder)) == {"manifest.json", "top.npz", "images.jsonl"}  # pictures of the old run are gone
    assert unitvis.load(folder)["0"].values.tobytes() == other["0"].values.tobytes()
