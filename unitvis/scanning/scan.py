"""Scan a data set: read a source, record its batches, re-rank candidates and check the winners."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from unitvis import models
from unitvis.attribution.effective_boxes import effective_boxes
from unitvis.bars import bar, no_bars
from unitvis.choices import CHECKPOINT_SECONDS, PRECISIONS
from unitvis.errors import UnitvisError, whole_number
from unitvis.files import only_writer
from unitvis.half_precision.suitability import NAMES
from unitvis.models.labels import labels_from
from unitvis.network.device import default_batch
from unitvis.network.network import Network
from unitvis.ranking.recorder import Recorder
from unitvis.ranking.winners import keep_sample
from unitvis.results.classes import name_classes, warn_of_idle_labels
from unitvis.results.drawn_files import refuse_scanned_pictures
from unitvis.results.folder import check_output, refuse_unreadable
from unitvis.results.nonfinite import refuse_odd_responses
from unitvis.run import Run
from unitvis.scanning.cores import CoreSharing
from unitvis.scanning.precision import Plan, judged_images, plan
from unitvis.scanning.progress import Progress
from unitvis.scanning.verify import compare_winners, layers_by_slot
from unitvis.schema import MAX_BATCH_SIZE
from unitvis.sources import Source, open_source
from unitvis.sources.base import checked_workers
from unitvis.sources.transform import Transform
from unitvis.state.shards import parse_shard

logger = logging.getLogger("unitvis")


@torch.inference_mode(False)  # the caller may be in it, and effective boxes need gradients
def scan(
    model: nn.Module | str | models.Loaded,
    images: object,
    layers: Sequence[str] | str | None = None,
    k: int = 9,
    *,
    exclude: Sequence[str] | str = (),
    out: str | Path | None = None,
    transform: Transform | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    precision: str = "exact",
    unit: str = "channel",
    inside: bool = False,
    shard: tuple[int, int] | str | None = None,
    on_error: str = "skip",
    max_failures: int | None = None,
    decoder: str = "pillow",
    scaled: bool = False,
    allow_truncated: bool = False,
    images_ending: str | Sequence[str] | None = None,
    entry: str | int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    every: float = CHECKPOINT_SECONDS,
    progress: bool = True,
    workers: int | None = None,
    labels: Sequence[str] | str | Path | None = None,
) -> Run:
    """Find, for every unit of the layers, the k images and positions with the strongest responses.

    Args:
        model: a module, a spec such as "torchvision:alexnet" or "file.py:function", or a model of `models.load`.
        images: a folder, a text list, tar archives, a uint8 .npy file or array [N, H, W, 3], a float tensor
            [N, C, H, W] already normalised, a Dataset, a DataLoader or an iterable of batches; see `open_source`.
        layers: names or shell patterns; None: every convolution, after the BatchNorm that directly follows it.
        k: winners a unit.
        exclude: names or shell patterns of layers to leave out.
        out: folder to write the run and its checkpoints into; None: the run is only returned.
        transform: turns images into the model's input; None: the preprocessing of the spec's weights.
        batch_size: images read, and in half precision computed, at once (None: 64, on a GPU 256), halved where memory
            runs out; it does not change a float32 result.
        device: where the model runs; None: the model's own device.
        precision: "exact" may find candidates in half precision and decides by canonical float32 responses, "fp32"
            computes only those, "fp16" and "bf16" rank responses in half precision.
        unit: "channel" ranks the largest response over positions, "neuron" every element of the map.
        inside: rank only positions that read no padding, see `rank_inside`. For channels.
        shard: (i, n) or "i/n", counted from 1: scan that part of the images; `merge` makes a run of all shards.
        on_error: "skip" lists unreadable images in the manifest and counts NaN and infinite responses there, "raise"
            raises UnitvisError.
        max_failures: number of images that may be unreadable; one more raises UnitvisError. None: any number.
        decoder, scaled, allow_truncated: how files are decoded, see `Decoding`.
        images_ending: which files of a folder or of archives are images, as ".jpg"; see `open_source`.
        entry: key or number of the image in the items of a dataset or the batches of a loop; None: it is found.
        overwrite: replace a run in `out`.
        resume: continue from the checkpoint in `out`; a finished run is returned as it is, after some winners were
            computed again.
        every: seconds between checkpoints; SIGINT and SIGTERM write one and raise `Interrupted`.
        progress: show a progress bar on a terminal.
        workers: processes that read and decode image files, or threads where there are few; None: one a core, at
            most four a core, or 64.
        labels: names of the network's classes, in the order of its head's units, or the path of a file of them; None:
            those of the spec's weights. See `Run.set_labels`.

    Returns the run. Raises UnitvisError for errors that the user can fix.
    """
    if precision not in PRECISIONS:
        raise UnitvisError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    if batch_size is not None:
        batch_size = whole_number("batch_size", batch_size, 1, MAX_BATCH_SIZE)
    workers = checked_workers(workers)
    own_shard = parse_shard(shard)
    folder = None if out is None else check_output(out, overwrite=overwrite, resume=resume)
    if resume and folder is None:
        raise UnitvisError("resume needs out, the folder of the scan to resume")
    given_labels = None if labels is None else labels_from(labels)
    model = models.load(model) if isinstance(model, str) else model
    own_labels = models.known_labels(model)
    model, own_transform, origin = models.resolved(model)
    transform = transform or own_transform
    source = open_source(
        images,
        transform,
        on_error=on_error,
        max_failures=max_failures,
        decoder=decoder,
        scaled=scaled,
        allow_truncated=allow_truncated,
        images_ending=images_ending,
        entry=entry,
    )

    recorder = Recorder(
        model, layers, k, exclude=exclude, unit=unit, inside=inside, device=device, transform=source.transform
    )
    recorder.labels = given_labels or own_labels
    bars = nullcontext() if progress else no_bars()
    with bars, only_writer(folder), Progress(folder, recorder, source, own_shard, every) as tracker:
        if folder is not None:  # another command may have written there while the model was loaded
            check_output(folder, overwrite=overwrite, resume=resume)
            refuse_scanned_pictures(folder, source)
        with recorder:
            if precision != "exact":
                recorder.set_precision(precision, batch_size)
            if folder is not None and resume:
                finished = tracker.resume(batch_size, precision)
                if finished is not None:  # and not "if finished": the run of a shard has no layers
                    if given_labels is not None:
                        name_classes(finished, given_labels)
                    return finished
            together, gpu = batch_size or default_batch(recorder.network.device), recorder.network.device.type == "cuda"
            batches = source.batches(together, workers=workers, ids=tracker.unread_ids(), pinned=gpu)
            first = [batch for batch in [next(batches, None)] if batch is not None]
            chosen_plan = Plan(recorder.precision, "as the scan began" if recorder.images else "as asked")
            if precision == "exact" and first and not recorder.images:
                chosen_plan = _choose_plan(recorder, source, first[0].pixels, k, shard=own_shard is not None)
                recorder.set_precision(chosen_plan.precision, batch_size)
            if recorder.precision != "fp32" and first and not recorder.images:
                chosen_plan = _settled(recorder, source, first[0].pixels, chosen_plan, asked=precision)
            if first:  # the run is written hours later
                if not recorder.network.layers:
                    recorder.prepare(recorder.network.input_shape_of(first[0].pixels))
                refuse_unreadable(recorder.about() | {"source": source.describe(), "precision": precision})
            total = source.length if tracker.ids is None else len(tracker.ids)
            counted = bar(total, "scan", initial=recorder.images, delay=0)
            with closing(batches), counted, CoreSharing(recorder, source) as core_sharing:
                for batch in chain(first, batches):
                    with core_sharing.computing():
                        recorder(batch.pixels, batch.ids)
                    core_sharing.choose(batch.pixels)
                    tracker.after_batch()
                    counted.update(len(batch.ids))
            tracker.finish()
            seconds = {"scan": tracker.seconds, "checkpoints": tracker.checkpoint_seconds}
            failures = [asdict(failure) for failure in source.failures]
            if own_shard is not None:
                about = {"source": source.describe(), "shard": str(own_shard), "failures": failures}
                run = recorder.partial(tracker.seconds, source, **about)
                run.attach(source)
            else:
                run = recorder.ranked(source if precision == "exact" else None)
                run.attach(source)
                run.manifest["failures"] = failures
        run.manifest |= {"precision": precision, "plan": chosen_plan.line}
        run.manifest["model"] |= origin
        run.manifest["seconds"] |= seconds
        if tracker.witness is not None:
            run.manifest["witness"] = tracker.witness
        if own_shard is None:
            finish_run(run, source, recorder.network, on_error)
            if given_labels is not None:
                warn_of_idle_labels(run)
        if folder is not None:
            run.write(folder)
    return run


def _choose_plan(recorder: Recorder, source: Source, pixels: Tensor, k: int, *, shard: bool) -> Plan:
    """Choose the precision of an exact scan, and log it; pixels: the first batch."""
    network = recorder.network
    recorder.prepare(network.input_shape_of(pixels))
    kind = {"rereadable": source.rereadable, "channels": network.unit == "channel", "shard": shard}
    chosen_plan = plan(source.length, network.units, k, network.device, **kind)
    logger.info("%s", chosen_plan.line)
    return chosen_plan


def _settled(recorder: Recorder, source: Source, pixels: Tensor, chosen_plan: Plan, *, asked: str) -> Plan:
    """The plan, or in its place a wider precision where the one planned or asked for does not suit the network.

    pixels: the first batch, which judges that of a source that is read once. A warning tells who asked for it.
    """
    reason = recorder.settle_precision(images if (images := judged_images(source, pixels)) is not None else pixels)
    if reason is None:
        return chosen_plan
    line = f"{NAMES[recorder.precision]}: {reason}"
    if asked != "exact":
        warnings.warn(f"{reason}; the images are scanned in {NAMES[recorder.precision]}")
    logger.info("%s", line)
    return Plan(recorder.precision, line)


def finish_run(run: Run, source: Source, network: Network, on_error: str = "skip") -> None:
    """Finish a run whose images are all ranked, by one scan or by many: second pass, sample, and its warnings."""
    start = time.perf_counter()
    if on_error == "raise":
        refuse_odd_responses(run)
    if source.rereadable:
        _second_pass(run, network)
    if by_slot := layers_by_slot(run, network):
        run.manifest["scan"]["by_slot"] = by_slot
    for message in run.manifest["warnings"]:
        warnings.warn(message)
    if source.rereadable:
        keep_sample(run, network, source)
    run.manifest["seconds"]["second_pass"] = time.perf_counter() - start


def _second_pass(run: Run, network: Network) -> None:
    """Find effective boxes; after a float32 scan with few winners also verify that they reproduce."""
    if run.manifest["scan"]["precision"] == "fp32" and 2 * len(run.winners) <= run.manifest["images"]:
        found = compare_winners(run, network)
        if found["wrong"]:
            raise UnitvisError(
                f"{found['wrong']} of {found['winners']} winners differ when their images are read again "
                f"({found['first_wrong']}); the images or the model changed during the scan, or are augmented at "
                "random"
            )
    for name, side in effective_boxes(network, run).items():
        run.set_effective_box(name, side)
