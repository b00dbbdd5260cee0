"""How large inputs are at several scales, and the images where they are largest: the same however they came."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import unitvis
import unitvis_kernels as uk
from support.scans import two_convolutions
from unitvis import Recorder, UnitvisError
from unitvis.scanning.merge import merge_partials
from unitvis.state import magnitudes as module
from unitvis.state.magnitudes import KEPT, SCALES
from unitvis.state.partial import read_partial


def block_means(image: np.ndarray, side: int) -> np.ndarray:
    """Means of the blocks of [C, H, W], those at the border smaller."""
    rows, columns = (range(0, size, side) for size in image.shape[1:])
    found = [image[:, y : y + side, x : x + side].mean((1, 2)) for y, x in itertools.product(rows, columns)]
    return np.array(found).T.reshape(len(image), len(rows), len(columns))


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (20, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_magnitudes_are_the_largest_means_of_blocks(size: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = (3 * torch.randn(5, 3, *size, generator=torch.Generator().manual_seed(0))).to(dtype)
    want = []
    for image in inputs.double().abs().numpy():
        blocks, columns = image, [image.max((1, 2))]
        for _ in range(SCALES - 2):
            blocks = block_means(blocks, 4)
            columns.append(blocks.max((1, 2)))
        want.append(np.stack([*columns, blocks.mean((1, 2))], axis=1))
    found = uk.magnitudes(inputs.contiguous(memory_format=torch.channels_last))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, want, rtol=1e-6)  # sums in float32


def test_what_is_not_finite_is_largest() -> None:
    inputs = torch.zeros(3, 3, 8, 8)
    inputs[0, 0, 0, 0], inputs[1, 2, 7, 7] = math.nan, -math.inf
    want = torch.zeros(3, 3, SCALES)
    want[0, 0], want[1, 2] = math.inf, math.inf
    assert torch.equal(uk.magnitudes(inputs), want)


def images(count: int = 90) -> torch.Tensor:
    g = torch.Generator().manual_seed(4)
    return torch.randn(count, 3, 12, 12, generator=g) * torch.rand(count, 1, 1, 1, generator=g)


def recorded(ids: list[int], size: int = 16) -> Recorder:
    with Recorder(two_convolutions(), k=2, precision="fp16", batch_size=size) as recorder:
        for start in range(0, len(ids), 7):
            some = torch.tensor(ids[start : start + 7])
            recorder(images()[some], some)
    return recorder


def test_order_batches_and_parts_do_not_show(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "KEPT", 10)
    ids = list(range(90))
    whole = recorded(ids).largest_inputs
    want = uk.magnitudes(images()).flatten(1).sort(dim=0, descending=True, stable=True).indices[:10].T
    assert torch.equal(whole.tensor[:, 10:20], want)
    shuffled = torch.randperm(90, generator=torch.Generator().manual_seed(1)).tolist()
    assert torch.equal(recorded(shuffled, 33).largest_inputs.tensor, whole.tensor)

    parts = {str(n): recorded(ids[n::3]).partial().partial for n in range(3)}
    for order in itertools.permutations(parts):
        assert torch.equal(merge_partials({n: parts[n] for n in order}).largest_inputs.tensor, whole.tensor)
    parts["0"].write(tmp_path / "a.npz")
    again = read_partial(tmp_path / "a.npz")
    assert torch.equal(again.largest_inputs.tensor, parts["0"].largest_inputs.tensor)

    goes_on = Recorder(two_convolutions(), k=2, precision="fp16", batch_size=16)
    goes_on.prepare((3, 12, 12))
    goes_on.restore(again)
    with goes_on:
        rest = torch.tensor([id for id in ids if id % 3])
        goes_on(images()[rest], rest)
    assert torch.equal(goes_on.largest_inputs.tensor, whole.tensor)


def test_a_batch_that_raised_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with Recorder(two_convolutions(), k=2, precision="fp16", batch_size=16) as recorder:
        recorder(images()[:16])
        before = recorder.largest_inputs.tensor.clone()
        monkeypatch.setattr(recorder.topk, "merge", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            recorder(images()[16:32])
        monkeypatch.undo()
        assert torch.equal(recorder.largest_inputs.tensor, before)


def test_a_scan_in_float32_keeps_none() -> None:
    part = unitvis.scan(two_convolutions(), images(12), shard="1/3", progress=False).partial
    assert part.largest_inputs.tensor.shape == (0, 2 * KEPT + 2)
    arrays = part.arrays() | {"largest_inputs": np.zeros((1, 2), np.int64)}
    with pytest.raises(ValueError, match=r"largest_inputs is int64 \[1, 2\]"):
        type(part).from_arrays(arrays)


def test_images_that_were_not_scanned_hold_no_place(tmp_path: Path) -> None:
    arrays = recorded(list(range(20))).partial().partial.arrays()
    arrays["largest_inputs"][2, KEPT] = 5000
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UnitvisError, match=r"a.npz is damaged \(image 5000 holds a place"):
        read_partial(tmp_path / "a.npz")
