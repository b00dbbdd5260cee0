"""Batches that do not fit into memory: nothing is lost, and half precision computes smaller ones."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import unitvis
from support import brute
from support.mutations import changed, read, write
from support.scans import arrays, pictures, two_convolutions
from support.short_of_memory import SHORTAGES, Short
from unitvis import Recorder, UnitvisError
from unitvis.network.device import default_batch
from unitvis.network.memory import TooLargeError, may_fit_in_parts, shortage
from unitvis.scanning.merge import merge_partials
from unitvis.sources import open_source
from unitvis.state.magnitudes import SCALES

IMAGES = 310  # more than the sample


def taken(recorder: Recorder, images: Tensor, size: int = 64, *, first: int = 0) -> None:
    """Give a recorder all images from the first on, so many in each call."""
    for ids in torch.arange(first, len(images)).split(size):
        recorder(images[ids], ids)
    recorder.flush()


@pytest.mark.parametrize("kind", SHORTAGES)
def test_what_says_that_memory_ran_out(kind: str) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        SHORTAGES[kind]()
    assert may_fit_in_parts(caught.value)
    assert (shortage(caught.value) is None) == (kind == "no algorithm of cuDNN")
    wrapped = UnitvisError("the model raised it")
    wrapped.__cause__ = caught.value
    assert may_fit_in_parts(wrapped)
    assert not may_fit_in_parts(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_default_batches() -> None:
    assert (default_batch(torch.device("cpu")), default_batch(torch.device("cuda", 1))) == (64, 256)


@pytest.mark.parametrize(
    ("after", "merging", "kind", "limit", "sizes"),
    [
        (0, False, "allocator of a GPU", 15, [8]),  # the first batch
        (0, False, "no algorithm of cuDNN", 16, [16]),
        (2, False, "allocator of the CPU", 16, [16, 32]),  # in the middle
        (2, True, "cuDNN", 15, [8, 32]),  # after it was merged, which is taken back
        (4, True, "Python", 16, [16, 32]),  # the ragged one
    ],
)
def test_a_batch_that_does_not_fit_is_computed_in_halves(
    after: int, merging: bool, kind: str, limit: int, sizes: list[int], short_of_memory: type[Short]
) -> None:
    images = pictures(150, 12)  # the last batch of 32 is ragged
    short_of_memory.after, short_of_memory.merging, short_of_memory.raising = after, merging, SHORTAGES[kind]
    with Recorder(two_convolutions(), precision="fp16", batch_size=32) as recorder:
        recorder(images[:16], range(16))  # fewer than are computed at once: they wait
        short_of_memory.limit = limit
        with pytest.warns(UserWarning, match=rf"^batch 32 did not fit on cpu, went on with {sizes[0]}$"):
            taken(recorder, images, 32, first=16)
    assert set(short_of_memory.sizes) == set(sizes)
    part = recorder.partial()
    assert part.partial is not None
    assert part.partial.batch_sizes == set(sizes)
    assert part.manifest["scan"].get("batch_sizes", [part.manifest["scan"]["batch_size"]]) == sizes
    assert (recorder.images, part.manifest["coverage"]) == (150, [[0, 150]])
    # Those computed in halves have the responses and magnitudes of those, and each image holds one place.
    responses = recorder.scanned.responses(images, sizes[0])
    magnitudes = recorder.scanned.magnitudes(images, sizes[0])
    for topk, want in ((recorder.topk, responses), (recorder.largest_inputs, magnitudes)):
        held = topk.read()
        assert all(len(own) == len(np.unique(own)) for own in (row[row >= 0] for row in held.images))
        row, place = np.nonzero(held.images >= 32 * after)
        assert len(row)
        np.testing.assert_allclose(held.values[row, place], want[held.images[row, place], row], rtol=1e-2)
    assert (recorder.largest_inputs.read().images >= 0).sum(axis=1).tolist() == [150] * 3 * SCALES


def test_a_default_batch_is_halved_without_a_warning(
    short_of_memory: type[Short], caplog: pytest.LogCaptureFixture
) -> None:
    short_of_memory.limit = 32
    with warnings.catch_warnings(), caplog.at_level(logging.INFO, logger="unitvis"):
        warnings.simplefilter("error")
        with Recorder(two_convolutions(), precision="fp16") as recorder:
            taken(recorder, pictures(70, 12))
    assert "batch 64 did not fit on cpu, went on with 32" in caplog.text
    assert set(short_of_memory.sizes) == {32}


def test_a_scan_reads_each_image_once_and_halves_what_it_computes(
    short_of_memory: type[Short], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = two_convolutions(), pictures(130, 12)
    read: list[int] = []
    short_of_memory.after, short_of_memory.limit = 2, 16
    recorded = Recorder.__call__

    def counted(self: Recorder, batch: Tensor, ids: Tensor) -> None:
        read.extend(ids.tolist())
        recorded(self, batch, ids)

    monkeypatch.setattr(Recorder, "__call__", counted)
    with pytest.warns(UserWarning, match="batch 40 did not fit on cpu, went on with 10"):
        run = unitvis.scan(model, images, precision="fp16", batch_size=40, progress=False)
    assert read == list(range(130))
    assert run.manifest["scan"]["batch_sizes"] == [10, 40]


def test_not_even_one_image_fits(short_of_memory: type[Short]) -> None:
    short_of_memory.limit = 0
    with Recorder(two_convolutions(), precision="fp16", batch_size=8) as recorder:
        with pytest.raises(TooLargeError) as caught:
            recorder(pictures(8, 12))
        short_of_memory.limit = 8
        recorder(pictures(8, 12))  # none of them was taken
    assert str(caught.value) == (
        "one image in float16 does not fit into memory (CUDA out of memory. Tried to allocate 2.00 GiB.); "
        "free memory there, give smaller images (--crop), or compute on another device (--device)"
    )
    assert recorder.images == 8


class Erring(Short):
    """Half precision that in batches of 64 halves the responses of every seventh image or so."""

    def _input(self, images: Tensor) -> Tensor:
        taken = super()._input(images)
        if len(images) != 64:
            return taken
        wrong = torch.sin(1e4 * taken.sum(dim=(1, 2, 3), keepdim=True)) > 0.9
        return torch.where(wrong, taken / 2, taken)


def test_errors_of_the_batches_before_the_halving_count(
    short_of_memory: type[Short], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most images were computed in batches whose half precision errs more than that of the smaller ones."""
    monkeypatch.setattr(Recorder, "make_step", Erring.of)
    model, images = two_convolutions(), pictures(700, 12, seed=3)
    short_of_memory.after = 9
    with Recorder(model, precision="fp16", batch_size=64, k=3) as recorder:
        short_of_memory.limit = 32
        with pytest.warns(UserWarning, match="went on with 32"):
            taken(recorder, images)
    short_of_memory.limit = 64
    source = open_source(images, None)
    run = recorder.ranked(source)
    assert brute.wrong(run, model, images) == 0
    assert np.mean(np.concatenate([top.separated for top in run.tops.values()])) > 0.5
    part = merge_partials({"whole": recorder.partial().partial})
    with Recorder(model, precision="fp16", batch_size=32, k=3) as other:  # one that goes on from a checkpoint
        other.prepare((3, 12, 12))
        other.restore(part)
        assert brute.wrong(other.ranked(source), model, images) == 0


def test_a_second_pass_in_which_the_batch_of_the_scan_does_not_fit(short_of_memory: type[Short]) -> None:
    """Its errors cannot be measured, so float32 computes all images."""
    model, images = two_convolutions(), pictures(IMAGES, 12)
    with Recorder(model, precision="fp16", batch_size=64) as recorder:
        taken(recorder, images)
    source = open_source(images, None)
    short_of_memory.limit = 64
    recorder.check_witness(source)
    short_of_memory.limit = 32
    said = "batch 64 fitted on cpu in the scan and does not now, so its errors in half precision cannot be measured"
    with pytest.warns(UserWarning, match=said):
        run = recorder.ranked(source)
    want = unitvis.scan(model, images, precision="fp32", progress=False)
    assert run.manifest["rescored"]["images"] == IMAGES
    assert arrays(run) == arrays(want)


class Wide(nn.Sequential):
    """`two_convolutions`, for which memory runs out over more than `limit` images."""

    limit = 10**6  # of the class, as attributes of a model are put back

    def __init__(self) -> None:
        super().__init__(*two_convolutions())
        self[0].register_forward_pre_hook(self._allocate)

    @staticmethod
    def _allocate(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if len(args[0]) > Wide.limit:
            SHORTAGES["allocator of a GPU"]()


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda limit: monkeypatch.setattr(Wide, "limit", limit)


@pytest.mark.filterwarnings("ignore:the model has forward hooks that return nothing")
def test_a_compute_batch_in_float32_is_never_halved(wide: Callable[[int], None]) -> None:
    """Fewer images would have other bits: it is refused, nothing is lost, and it may be given again."""
    torch.manual_seed(0)
    model, images = Wide().eval(), pictures(50, 12)
    said = (
        "a compute batch of 16 images in float32 does not fit into memory (CUDA out of memory. Tried to allocate 2.00 "
        "GiB.); free memory there, give smaller images (--crop), or compute on another device (--device)"
    )
    with Recorder(model, k=4) as recorder:
        wide(8)
        with pytest.raises(TooLargeError) as caught:
            recorder(images[:20], range(20))
        assert str(caught.value) == said
        wide(16)
        recorder(images[:20], range(20))
        wide(8)
        with pytest.raises(MemoryError):
            recorder(images[20:], range(20, 50))
        wide(16)
        recorder(images[20:], range(20, 50))
    run = recorder.result()
    assert run.manifest["scan"]["batch_size"] == 16
    brute.check(run, brute.responses(model, run.layers, images, brute.canonical_batches(images)))


class Heavy(Tensor):
    """Images of which a device holds no more than sixteen at once."""

    def to(self, *args: object, **options: object) -> Tensor:
        if len(self) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().to(*args, **options).as_subclass(Tensor)


def test_images_of_a_large_batch_in_float32_are_moved_a_compute_batch_at_a_time() -> None:
    model, images = two_convolutions(), pictures(90, 12)
    with Recorder(model, k=4) as recorder:
        for ids in torch.arange(90).split(41):
            recorder(images[ids].as_subclass(Heavy), ids)
    run = recorder.result()
    brute.check(run, brute.responses(model, run.layers, images, brute.canonical_batches(images)))


def test_merged_parts_were_computed_in_the_batches_of_all(short_of_memory: type[Short], tmp_path: Path) -> None:
    model, images, runs = two_convolutions(), pictures(64, 12), []
    for size, ids in ((16, range(32)), (8, range(32, 64))):
        with Recorder(model, precision="fp16", batch_size=size) as recorder:
            recorder(images[ids.start : ids.stop], ids)
        runs.append(recorder.partial())
    assert runs[0].manifest["scan"].keys().isdisjoint({"batch_sizes"})
    merged = unitvis.merge(runs, model, partial=True)
    assert merged.partial is not None
    assert merged.partial.batch_sizes == {8, 16}
    assert merged.manifest["scan"]["batch_sizes"] == [8, 16]
    (tmp_path / "run").mkdir()
    merged.write(tmp_path / "run")
    assert unitvis.load(tmp_path / "run").partial.batch_sizes == {8, 16}
    manifest = read(tmp_path / "run" / "manifest.json")
    write(tmp_path / "run" / "manifest.json", changed(manifest, ("scan", "batch_sizes"), [16]))
    with pytest.raises(UnitvisError, match=r"its batch sizes are \[8, 16\], and those of the run \[16\]"):
        unitvis.load(tmp_path / "run")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_whose_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The captured step is captured again for smaller batches, and no memory of the larger ones is left."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 32, 3)).cuda()
    images, many = pictures(1500, 64), pictures(4096, 64)
    device = torch.device("cuda", torch.cuda.current_device())
    want = unitvis.scan(model, images, precision="fp32", progress=False)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + 2**30) / total, device)
    try:
        with Recorder(model, precision="fp16", batch_size=4096) as recorder:
            with pytest.warns(UserWarning, match=rf"^batch 4096 did not fit on {device}, went on with \d+$"):
                recorder(many, range(4096))
            assert recorder.about()["scan"]["captured"] is True
        exact = unitvis.scan(model, images, precision="fp32", batch_size=1500, progress=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    for name, top in exact.tops.items():  # where memory is short cuDNN takes algorithms that need less, with other bits
        np.testing.assert_allclose(top.values, want[name].values, rtol=1e-4)
    run = recorder.ranked(open_source(many, None))
    first = unitvis.scan(model, many, precision="fp32", progress=False)
    for name, top in run.tops.items():
        assert (top.images == first[name].images)[top.separated].all()
        assert (top.values == first[name].values)[top.separated].all()
