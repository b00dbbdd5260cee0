"""The Recorder: batches of any size with ids, ties, blanks, and what is refused."""

from __future__ import annotations

import sys
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from support import brute
from support.scans import LAYERS, arrays, images, planted, recorded, scan, small_net, two_convolutions
from unitvis import Recorder, Run, Transform, UnitvisError
from unitvis.state.topk import TopK


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


@pytest.mark.filterwarnings("ignore:a call raised and took none of its")
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
def test_pixels_do_not_join_floats(precision: str) -> None:
    pixels = torch.randint(0, 256, (20, 3, 3, 3), dtype=torch.uint8)
    for first, second, said in ((pixels, pixels.float(), "float32 images"), (pixels.float(), pixels, "uint8 images")):
        with Recorder(two_convolutions()[:1], transform=Transform(), precision=precision) as recorder:
            recorder(first)
            with pytest.raises(UnitvisError, match=f"{said} came after .*; give all as uint8 pixels or all as normal"):
                recorder(second)
    with Recorder(two_convolutions()[:1], transform=Transform(), precision=precision) as recorder:
        recorder(pixels.half())
        recorder((255 - pixels).double())
    assert recorder.result().manifest["images"] == 40


@pytest.mark.filterwarnings("ignore:a call raised and took none of its")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("transform", "said"),
    [
        (Transform(resize=20, crop=16), "16 x 16"),
        (Transform(crop=(12, 18)), "18 x 12"),
        (Transform(resize=(14, 20)), "20 x 14"),
        (Transform(resize=20), "a shorter side of 20"),
    ],
)
def test_pixels_that_the_transform_would_resize_or_crop_are_refused(
    transform: Transform, said: str, precision: str
) -> None:
    pixels = torch.randint(0, 256, (20, 40, 62, 3), dtype=torch.uint8)
    made = torch.stack([torch.from_numpy(transform(Image.fromarray(one.numpy()))) for one in pixels])
    with Recorder(two_convolutions(), transform=transform, precision=precision) as recorder:
        with pytest.raises(UnitvisError, match=rf"uint8 images of 62 x 40 pixels came.* gives {said}; a Recorder only"):
            recorder(pixels)
        recorder(made)
    run = recorder.result(pixels)
    assert run.manifest["input"] == [3, *made.shape[1:3]]
    assert run.manifest["witness"]["images"] == 16


class FailingMerge:
    """`TopK.merge`, which raises once, half way through the images, after `left` calls that went well."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.left, self.raised = error, sys.maxsize, 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = TopK.merge

        def merge(topk: TopK, keys: Tensor, ids: Tensor, **options: bool) -> None:
            if self.left == 0:
                self.left, self.raised = sys.maxsize, self.raised + 1
                real(topk, keys[: len(keys) // 2], ids[: len(keys) // 2], **options)
                raise self.error
            self.left -= 1
            real(topk, keys, ids, **options)

        monkeypatch.setattr(TopK, "merge", merge)


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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_exception_while_images_are_computed_leaves_what_earlier_calls_ranked(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, merge = images(60, 12), FailingMerge(Interruption())
    merge.install(monkeypatch)
    recorder = Recorder(two_convolutions(), ["0", "2"], 4, precision=precision, batch_size=16)
    with suppress(Interruption), recorder:
        recorder(pixels[:10])
        recorder(pixels[10:25])
        merge.left = 1
        recorder(pixels[25:])
    with pytest.warns(UserWarning, match="the last 44 images"):
        run = recorder.result()
    with Recorder(two_convolutions(), ["0", "2"], 4, precision=precision, batch_size=16) as other:
        other(pixels[:16])
    assert run.manifest["coverage"] == [[0, 16]]
    assert arrays(run) == arrays(other.result())


def check_recorded(run: Run, ids: Tensor, pixels: Tensor) -> None:
    """Every image is ranked once, under its id, as one forward pass an image ranks it."""
    assert run.manifest["coverage"] == [[int(ids.min()), int(ids.max()) + 1]]
    assert run.manifest["images"] == len(ids)
    found = brute.responses(two_convolutions(), ["0", "2"], pixels, brute.plain_batches(pixels, 1))
    for name, (values, _) in found.items():
        assert (run[name].images == brute.top(values, 4, ids.numpy())[0]).all()
        np.testing.assert_allclose(run[name].values, -np.sort(-values, axis=0)[:4].T, rtol=1e-5)


@pytest.mark.parametrize(("precision", "weights"), [("fp32", "fixed"), ("fp32", "moving"), ("bf16", "fixed")])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("left", [0, 1])
def test_a_call_that_raised_may_be_made_again(
    precision: str, weights: str, given: bool, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a loop does that catches an error."""
    pixels, merge = images(90, 12), FailingMerge(OSError())
    ids = 200 - torch.arange(90) if given else torch.arange(90)
    merge.install(monkeypatch)
    with Recorder(two_convolutions(), ["0", "2"], 4, precision=precision, batch_size=16, weights=weights) as recorder:
        for part in torch.arange(90).split(40):
            merge.left = left
            for _ in range(2):
                with suppress(OSError):
                    recorder(pixels[part], *((ids[part],) if given else ()))
                    break
        merge.left = 0
        with suppress(OSError):
            recorder.flush()
        merge.left = sys.maxsize
    assert merge.raised >= 2
    by_id = torch.zeros(int(ids.max()) + 1, *pixels.shape[1:])
    by_id[ids] = pixels
    check_recorded(recorder.result(by_id), ids, pixels)


class Flaky(nn.Sequential):
    """`two_convolutions`, which raise once where they are armed, after they wrote to a buffer."""

    armed = False  # of the class, as attributes of a model are put back

    def __init__(self) -> None:
        super().__init__(*two_convolutions())
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if Flaky.armed:
            Flaky.armed = False
            raise OSError
        return super().forward(x)


@pytest.mark.filterwarnings("ignore:the model's code could not be followed", "ignore:the receptive fields of")
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("failing", [3, 4])
def test_a_batch_on_which_the_model_raised_may_be_given_again(given: bool, failing: int) -> None:
    model, pixels, raised = Flaky().eval(), images(60, 12), 0
    with Recorder(model, ["0", "2"], 4) as recorder:
        for number, part in enumerate(torch.arange(60).split(10)):
            Flaky.armed = number == failing
            for _ in range(2):
                try:
                    recorder(pixels[part], *((part,) if given else ()))
                    break
                except UnitvisError:
                    raised += 1
    assert raised == 1
    check_recorded(recorder.result(), torch.arange(60), pixels)


@pytest.mark.filterwarnings("ignore:the model's code could not be followed", "ignore:the receptive fields of")
@pytest.mark.parametrize("given", [True, False])
def test_images_that_a_loop_without_ids_leaves_out_are_told(given: bool) -> None:
    model, pixels = Flaky().eval(), images(64, 12)
    ids = [*range(16), *range(32, 64)]
    with Recorder(model, ["0", "2"], 4) as recorder:
        recorder(pixels[:16], *((range(16),) if given else ()))
        Flaky.armed = True
        with pytest.raises(UnitvisError, match="the model raised OSError"):
            recorder(pixels[16:32], *((range(16, 32),) if given else ()))
        if given:
            recorder(pixels[32:], range(32, 64))
        else:
            said = "took none of its 16 images, and others came next; they are counted on from 16, so a loop"
            with pytest.warns(UserWarning, match=said):
                recorder(pixels[32:48])
            recorder(pixels[48:])
    want = torch.tensor(ids) if given else torch.arange(48)
    run = recorder.result()
    assert run.manifest["images"] == 48
    found = brute.responses(two_convolutions(), ["0"], pixels[ids], brute.plain_batches(pixels[ids], 1))
    assert (run["0"].images == brute.top(found["0"][0], 4, want.numpy())[0]).all()


def test_a_call_that_raised_leaves_no_trace_of_its_images() -> None:
    model, pixels = two_convolutions(), images(40, 12)
    with Recorder(model, ["0", "2"], 4) as recorder:
        with pytest.raises(UnitvisError, match="16 images came with ids of shape"):
            recorder(images(16, 14), [1, 2])
        with pytest.raises(UnitvisError, match="the model raised RuntimeError"):
            recorder(torch.zeros(16, 4, 20, 20), range(16))
        with pytest.raises(UnitvisError, match="the model raised RuntimeError"):
            recorder(torch.zeros(16, 3, 2, 2), range(16))
        recorder(pixels)
    check_recorded(recorder.result(), torch.arange(40), pixels)
