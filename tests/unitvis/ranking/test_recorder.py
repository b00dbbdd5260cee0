"""The Recorder: batches of any size with ids, ties, blanks, and what is refused."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import Tensor

from support.scans import LAYERS, arrays, images, planted, recorded, scan, small_net, two_convolutions
from unitvis import Recorder, UnitvisError


def test_recorder_counts_ids_up_and_mixes_batch_sizes() -> None:
    model, pixels = small_net(), images(41)
    with Recorder(model, LAYERS) as recorder:
        for part in torch.split(pixels, [3, 1, 30, 7]):
            recorder(part)
    assert arrays(recorder.result()) == arrays(scan(model, pixels, LAYERS))


def test_ties_go_to_the_lower_id_and_are_named() -> None:
    run = recorded(planted([1, 5, 5, 0, 5, 2]), 2)
    assert run["tap"].images.tolist() == [[1, 2]] * 3
    assert run["tap"].status.tolist() == ["tied"] * 3
    assert not run["tap"].separated.any()
    assert recorded(planted([1, 5, 5, 0, 5, 2]), 3)["tap"].status.tolist() == ["separated"] * 3
    assert recorded(planted([1, 5, 5, 0, 5, 5]), 6)["tap"].status.tolist() == ["separated"] * 3
    assert recorded(planted([-0.0, 0.0, 0.0]), 2)["tap"].images.tolist() == [[0, 1]] * 3


def test_blanks_stay_blank() -> None:
    top = recorded(planted([3, 4]), 4)["tap"]
    assert top.images.tolist() == [[1, 0, -1, -1]] * 3
    assert np.isnan(top.values[:, 2:]).all()
    assert (top.positions[:, 2:] == -1).all()
    assert (top.positions[:, :2] == [1, 0]).all()


def test_recorder_refuses_what_is_no_batch() -> None:
    with Recorder(small_net()) as recorder:
        recorder(images(2))
        with pytest.raises(UnitvisError, match="2 images came with ids of shape"):
            recorder(images(2), [1, 2, 3])
        with pytest.raises(UnitvisError, match="came with the id -1; ids are whole numbers from 0"):
            recorder(images(2), [3, -1])
        with pytest.raises(UnitvisError, match="ndarray"):
            recorder(np.zeros((2, 3, 28, 28)))
    with pytest.raises(UnitvisError, match="inside its block"):
        Recorder(small_net())(images(2))
    with pytest.raises(UnitvisError, match="no image was recorded"), Recorder(small_net()) as recorder:
        recorder.result()


def test_images_of_another_size_are_refused() -> None:
    with Recorder(small_net(), ["0"]) as recorder:
        for count in (5, 16):
            recorder(images(count, 28))
            with pytest.raises(UnitvisError, match=r"\[3, 30, 28\].*\[3, 28, 28\]"):
                recorder(torch.zeros(16, 3, 30, 28))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loop_in_inference_mode_changes_nothing(precision: str) -> None:
    model, pixels = small_net(), images(40)
    results = []
    for inference in (False, True):
        with Recorder(model, LAYERS, precision=precision) as recorder:
            for part in pixels.split(12):
                with torch.inference_mode(inference):
                    recorder(part.clone())
        with torch.inference_mode(inference):
            results.append(arrays(recorder.result(pixels)))
    assert results[0] == results[1]


def test_ids_are_kept_as_they_came_and_are_one_an_image() -> None:
    model, pixels = small_net(), images(40)
    want = arrays(scan(model, pixels, LAYERS))
    buffer = torch.empty(7, dtype=torch.int64)
    with Recorder(model, LAYERS) as recorder:
        for start in range(0, 40, 7):
            part = pixels[start : start + 7]
            buffer[: len(part)] = torch.arange(start, start + len(part))
            recorder(part, buffer[: len(part)])
    assert arrays(recorder.result()) == want
    with Recorder(model, LAYERS) as recorder:
        recorder(pixels, torch.arange(40) % 4)  # labels
    with pytest.raises(UnitvisError, match="40 images were recorded under 4 known ids; give each image one"):
        recorder.result()
    for ids, said in ((torch.rand(40), "not float32"), ([True] * 40, "not bool"), (["a"] * 40, "from 0")):
        with Recorder(model, LAYERS) as recorder, pytest.raises(UnitvisError, match=f"ids are whole numbers.*{said}"):
            recorder(pixels, ids)


def test_a_loop_may_train_the_model_meanwhile() -> None:
    model, pixels = small_net(), images(40)
    want = arrays(scan(model, pixels, LAYERS))
    mean = model[4].running_mean.clone()
    with Recorder(model, LAYERS) as recorder:
        for part in pixels.split(13):
            model.train()
            recorder(part)
            assert all(module.training for module in model.modules())
    assert arrays(recorder.result()) == want
    assert torch.equal(model[4].running_mean, mean)


class Interruption(BaseException):
    """What Ctrl-C raises, as far as a test can have it."""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_exception_in_the_block_costs_the_images_that_wait_and_says_so(precision: str) -> None:
    model, pixels = two_convolutions(), images(60, 12)
    recorder = Recorder(model, ["0", "2"], 4, precision=precision, batch_size=16)
    with suppress(Interruption), recorder:
        recorder(pixels[:25], range(100, 125))
        raise Interruption
    with pytest.warns(UserWarning, match="ended the recorder's block, and the last 9 images that it was given are not"):
        run = recorder.result()
    assert run.manifest["coverage"] == [[100, 116]]
    assert recorder.partial().partial.coverage.ranges.tolist() == [[100, 116]]
    with recorder:  # a second time
        recorder(pixels[16:], range(116, 160))
        with pytest.raises(UnitvisError, match="block is open already; leave it before"), recorder:
            pass
    with Recorder(two_convolutions(), ["0", "2"], 4, precision=precision, batch_size=16) as other:
        other(pixels, range(100, 160))
    assert arrays(recorder.result()) == arrays(other.result())


def test_an_exception_while_images_are_computed_leaves_what_was_ranked() -> None:
    model, pixels = two_convolutions(), images(60, 12)
    recorder, computed = Recorder(model, ["0", "2"], 4), []
    real = recorder._rank

    def rank(batch: Tensor, ids: Tensor) -> None:
        if len(computed) == 2:
            raise Interruption
        computed.append(len(batch))
        real(batch, ids)

    recorder._rank = rank
    with suppress(Interruption), recorder:
        recorder(pixels[:10])
        recorder(pixels[10:])
    with pytest.warns(UserWarning, match="the last 28 images"):
        run = recorder.result()
    with Recorder(two_convolutions(), ["0", "2"], 4) as other:
        other(pixels[:32])
    assert run.manifest["coverage"] == [[0, 32]]
    assert arrays(run) == arrays(other.result())
