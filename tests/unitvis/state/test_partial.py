"""The state of a scan of some of the images, as a file."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import unitvis
from support.scans import two_convolutions
from unitvis import UnitvisError
from unitvis.state.checkpoints import Checkpoints
from unitvis.state.partial import PARTIAL_ARRAYS, SEEN, Partial, joined_seen, read_partial
from unitvis_kernels.keys import BLANK, NAN_KEY


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


@functools.cache
def half_precision() -> Partial:
    """Twelve images, with the magnitudes of their inputs."""
    images = torch.rand(12, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with unitvis.Recorder(two_convolutions(), k=2, precision="fp16") as recorder:
        recorder(images)
    return recorder.partial().partial


def swapped(state: NDArray[np.int64]) -> None:
    """Exchange the first two places of the last unit."""
    places = (state.shape[1] - 2) // 2
    for start in (0, places):
        state[-1, start : start + 2] = state[-1, start : start + 2][::-1].copy()


def by_descending_ids(state: NDArray[np.int64]) -> None:
    """Give all places of a unit one value, and the larger ids first."""
    places = (state.shape[1] - 2) // 2
    state[0, :places], state[0, places:-2] = state[0, 0], np.sort(state[0, places:-2])[::-1]


def first_blank(state: NDArray[np.int64]) -> None:
    state[1, 0], state[1, (state.shape[1] - 2) // 2] = BLANK, -1


def without_an_image(state: NDArray[np.int64]) -> None:
    state[1, -3] = -1


def with_an_image_twice(state: NDArray[np.int64]) -> None:
    state[1, -3] = state[1, (state.shape[1] - 2) // 2]


def with_a_nan(state: NDArray[np.int64]) -> None:
    state[1, 0] = NAN_KEY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swapped, "the places of a unit are not in order"),
        (by_descending_ids, "the places of a unit are not in order"),
        (first_blank, "the places of a unit are not in order"),
        (without_an_image, "a place has a value and no image, or an image and no value"),
        (with_a_nan, "a place has a value and no image, or an image and no value"),
        (with_an_image_twice, "a unit has an image twice"),
        (lambda state: state[:, -2].fill(-1), "a unit counts -1 images with NaN, of 12"),
        (lambda state: state[:, -2].fill(13), "a unit counts 13 images with NaN, of 12"),
    ],
)
@pytest.mark.parametrize("name", ["state", "largest_inputs"])
def test_places_that_no_images_lead_to_are_refused(
    name: str, change: Callable[[NDArray[np.int64]], None], message: str, tmp_path: Path
) -> None:
    arrays = dict(half_precision().arrays())
    state = arrays[name] = arrays[name].copy()
    places = (state.shape[1] - 2) // 2
    filled = min(12, places)  # by twelve images
    kept = [*range(filled), *range(places, places + filled), -2, -1]
    part = state[:, kept]
    change(part)
    state[:, kept] = part
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UnitvisError, match=rf"a.npz is damaged \({name}: {message}"):
        read_partial(tmp_path / "a.npz")


def test_tables_of_images_join_unless_they_contradict_each_other() -> None:
    both = joined_seen(seen((7, 9)), seen((2, 7)))
    assert both["id"].tolist() == [2, 7, 9]
    with pytest.raises(UnitvisError, match="image 7 had another content in each"):
        joined_seen(both, seen((7,), bytes(16)))
