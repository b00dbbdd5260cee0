"""The state of a scan of some of the images, as a file."""

from __future__ import annotations

from pathlib import Path

import torch

import unitvis
from support.scans import two_convolutions
from unitvis.state.partial import Partial, read_partial


def test_state_and_coverage_are_read_as_they_were_written(tmp_path: Path) -> None:
    images = torch.zeros(12, 3, 12, 12)
    part = unitvis.scan(two_convolutions(), images, shard="1/3", progress=False).partial
    part = Partial(part.identity, part.topk, part.coverage, {3: "x", 9: "y", 1: "x"}, 2.5)
    part.write(tmp_path / "a.npz")
    again = read_partial(tmp_path / "a.npz")
    assert again.identity == part.identity
    assert torch.equal(again.topk.tensor, part.topk.tensor)
    assert (again.failures, again.seconds, again.coverage) == (part.failures, 2.5, part.coverage)
