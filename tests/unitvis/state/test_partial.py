"""The state of a scan of some of the images, as a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import unitvis
from support.scans import two_convolutions
from unitvis import UnitvisError
from unitvis.state.checkpoints import Checkpoints
from unitvis.state.partial import PARTIAL_ARRAYS, SEEN, Partial, joined_seen, read_partial


def seen(ids: tuple[int, ...] = (2, 7), digest: bytes = bytes(range(16))) -> np.ndarray:
    """Table of some images, all with one digest."""
    return np.array([(id, np.void(digest), 640, 480) for id in ids], SEEN)


def test_state_and_coverage_are_read_as_they_were_written(tmp_path: Path) -> None:
    images = torch.zeros(12, 3, 12, 12)
    part = unitvis.scan(two_convolutions(), images, precision="fp16", shard="1/3", progress=False).partial
    sizes = frozenset({16, 64})
    part = Partial(
        part.identity, part.topk, part.largest_inputs, sizes, part.coverage, {3: "x", 9: "y", 1: "x"}, 2.5, seen((0, 3))
    )
    part.write(tmp_path / "a.npz")
    again = read_partial(tmp_path / "a.npz")
    assert again.identity == part.identity
    assert torch.equal(again.topk.tensor, part.topk.tensor)
    assert again.seen.tobytes() == part.seen.tobytes()
    assert (again.failures, again.seconds, again.coverage) == (part.failures, 2.5, part.coverage)
    assert again.batch_sizes == sizes


def test_state_of_an_older_version_is_refused(tmp_path: Path) -> None:
    arrays = unitvis.scan(two_convolutions(), torch.zeros(12, 3, 12, 12), shard="1/3", progress=False).partial.arrays()
    about = json.loads(arrays["about"].tobytes())
    del about["format"], arrays["seen"]
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UnitvisError, match=r"a.npz has format 1, and this version of unitvis reads format 3$"):
        read_partial(tmp_path / "a.npz")
    with pytest.raises(UnitvisError, match=r"a.npz has format 1, .* reads format 3; start again with --overwrite"):
        Checkpoints(tmp_path / "a.npz").read(Partial.from_arrays, PARTIAL_ARRAYS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"failed": [5000], "reason": [0]}, "image 5000 is said to have failed, of 12"),
        ({"failed": [-1], "reason": [0]}, "image -1 is said to have failed, of 12"),
        ({"coverage": [[0, 4], [6, 2**61]]}, f"the coverage ends at image {2**61 - 1}, of 12"),
        ({"coverage": [[0, 13]]}, "the coverage ends at image 12, of 12"),
        ({"coverage": [[1, 12]]}, "image 0 holds a place, or a line in the table of images, and was not scanned"),
        ({"seen": seen((0, 10**9))}, "image 1000000000 holds a place, or a line in the table"),
        ({"seen": seen((3, 0))}, "the table of images is not in order"),
        ({"seconds": 1e308}, "seconds is 1e.308, not a number of seconds"),
    ],
)
def test_a_state_that_contradicts_itself_is_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    images = torch.rand(12, 3, 12, 12)
    arrays = unitvis.scan(two_convolutions(), images, shard="1/3", progress=False).partial.arrays()
    about = json.loads(arrays["about"].tobytes()) | {"reasons": ["x"]}
    for name, value in changes.items():
        if name == "seconds":
            about[name] = value
        else:
            arrays[name] = value if name == "seen" else np.array(value, np.int64)
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UnitvisError, match=rf"a.npz is damaged \({message}"):
        read_partial(tmp_path / "a.npz")


def test_tables_of_images_join_unless_they_contradict_each_other() -> None:
    both = joined_seen(seen((7, 9)), seen((2, 7)))
    assert both["id"].tolist() == [2, 7, 9]
    with pytest.raises(UnitvisError, match="image 7 had another content in each"):
        joined_seen(both, seen((7,), bytes(16)))
