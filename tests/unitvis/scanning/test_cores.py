"""How decoding and computing share the processor's cores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import unitvis
from unitvis.sources.encoded import EncodedSource


@pytest.mark.parametrize(("rate", "threads"), [(2_000.0, 1), (100.0, 3)], ids=["small", "large"])
def test_a_small_network_computes_on_one_thread_beside_decoding(
    rate: float, threads: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    class Seeing(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_num_threads())
            return super().forward(x)

    def scan(images: object) -> None:
        model = nn.Sequential(Seeing(3, 2, 3))
        unitvis.scan(model, images, transform=unitvis.Transform(), batch_size=16, progress=False)

    pause_decoding, waits = EncodedSource.pause_decoding, []
    monkeypatch.setattr(EncodedSource, "pause_decoding", lambda self: waits.append(self) or pause_decoding(self))
    monkeypatch.setattr("unitvis.scanning.cores.compute_rate", lambda *_: rate)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        scan(folder)
        assert torch.get_num_threads() == 3
        assert seen.count(threads) >= 2
        assert len(waits) == (1 if rate > 1000 else -(-70 // 16))  # decoding waits for all threads, not for one
        assert set(seen) == {3, 1}  # one thread also checks the bits of all
        seen.clear()  # in memory nothing is decoded
        scan(np.zeros((64, 12, 12, 3), np.uint8))
        assert seen.count(3) >= 4  # a compute batch each; one thread checks bits and describes the network
    finally:
        torch.set_num_threads(before)
