"""scan: a source, a Recorder and the second pass."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from unitvis import models
from unitvis.attribution.effective_boxes import effective_boxes
from unitvis.errors import UnitvisError
from unitvis.half_precision.step import HALF
from unitvis.network.forward import COMPUTE_BATCH
from unitvis.ranking.recorder import Recorder
from unitvis.results.folder import check_output
from unitvis.results.nonfinite import refuse_odd_responses
from unitvis.run import Run, load
from unitvis.scanning.cores import Threads
from unitvis.scanning.precision import Plan, plan
from unitvis.scanning.progress import Progress
from unitvis.scanning.verify import verify
from unitvis.sources import Source, open_source
from unitvis.sources.transform import Transform
from unitvis.state.checkpoints import CHECKPOINT_SECONDS
from unitvis.state.shards import parse_shard

logger = logging.getLogger("unitvis")
PRECISIONS = ("exact", "fp32", *HALF)


@torch.inference_mode(False)  # the caller may be in it, and effective boxes need gradients
def scan(
    model: nn.Module | str | models.Loaded,
    images: object,
    layers: Sequence[str] | str | None = None,
    k: int = 9,
    *,
    out: str | Path | None = None,
    transform: Transform | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    precision: str = "exact",
    unit: str = "channel",
    shard: tuple[int, int] | str | None = None,
    on_error: str = "skip",
    max_failures: int | None = None,
    decoder: str = "pillow",
    scaled: bool = False,
    allow_truncated: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    every: float = CHECKPOINT_SECONDS,
    progress: bool = True,
    workers: int | None = None,
) -> Run:
    """Find, for every unit of the layers, the k images and positions that excite it most.

    model: a module, a spec such as "torchvision:alexnet" or "file.py:function", or what `models.load` makes of one.
    transform: how pictures become the model's input; None is the spec's own.
    images: a folder, a text list, tar archives, a uint8 .npy or array [N, H, W, 3], a float tensor [N, C, H, W] already
    normalised, a Dataset, a DataLoader or an iterable of batches; see `open_source`. layers, k, unit, device: as for
    `Recorder`. out: a folder for the run. precision: "exact" decides by canonical float32 responses, "fp32" computes
    nothing else, "fp16" and "bf16" rank what half precision gives. batch_size: images read and scanned at once, which
    does not change a float32 result. on_error: "skip" lists an
    unreadable image in the manifest and counts NaN and infinite responses there, "raise" stops; max_failures: more
    unreadable images stop the scan. decoder, scaled, allow_truncated: how files are decoded, see `Decoding`. workers:
    threads that decode. shard: (i, n) or "i/n", from 1: scan that part of the images into a run that holds what
    `merge` needs. every: seconds between checkpoints into `out`; SIGINT and SIGTERM write one and raise `Interrupted`;
    resume: go on from there. Raises UnitvisError for whatever the caller can mend.
    """
    if precision not in PRECISIONS:
        raise UnitvisError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    batch_size = 4 * COMPUTE_BATCH if batch_size is None else batch_size
    if batch_size < 1:
        raise UnitvisError(f"batch_size must be at least 1, not {batch_size}")
    share = parse_shard(shard)
    folder = None if out is None else check_output(out, overwrite=overwrite, resume=resume)
    if resume and folder is None:
        raise UnitvisError("resume needs out, the folder of the scan to go on with")
    place: dict[str, Any] = {"spec": None}
    if isinstance(model, str):
        model = models.load(model)
    if isinstance(model, models.Loaded):
        place = model.origin()
        transform, model = transform or model.transform, model.model
    source = open_source(
        images,
        transform,
        on_error=on_error,
        max_failures=max_failures,
        decoder=decoder,
        scaled=scaled,
        allow_truncated=allow_truncated,
    )

    recorder = Recorder(model, layers, k, unit=unit, device=device, transform=source.transform)
    with Progress(folder, recorder, source, share, every) as watch:
        with recorder:
            if folder is not None and not resume:
                watch.forget()
            if precision != "exact":
                recorder.set_precision(precision, batch_size)
            if folder is not None and resume and watch.resume(batch_size if precision == "exact" else None):
                return load(folder, source)
            batches = source.batches(batch_size, workers=workers, ids=watch.left())
            first = [batch for batch in [next(batches, None)] if batch is not None]
            chosen = Plan(recorder.precision, "as it began" if recorder.images else "as asked")
            if precision == "exact" and first and not recorder.images:
                chosen = _plan(recorder, source, first[0].pixels, k)
                recorder.set_precision(chosen.precision, batch_size)
            silent = None if progress else True  # None: a bar on a terminal, nothing in a log
            bar = tqdm(
                total=source.length if watch.ids is None else len(watch.ids),
                initial=recorder.images,
                desc="scan",
                unit=" images",
                disable=silent,
                leave=False,
            )
            with bar, Threads(recorder, source) as threads:
                for batch in chain(first, batches):
                    with threads.computing():
                        recorder(batch.pixels, batch.ids)
                    threads.choose(batch.pixels)
                    watch.after_batch()
                    bar.update(len(batch.ids))
            watch.finish()
            seconds = {"scan": watch.seconds, "checkpoints": watch.writing}
            failures = [asdict(failure) for failure in source.failures]
            if share is not None:
                about = {"source": source.describe(), "shard": str(share), "failures": failures}
                run = recorder.partial(watch.seconds, **about)
                run.attach(source)
            else:
                run = recorder.result(source if precision == "exact" else None)
                if precision != "exact":
                    run.attach(source)
                run.manifest["failures"] = failures
        run.manifest |= {"precision": precision, "plan": chosen.line}
        run.manifest["model"] |= place
        run.manifest["seconds"] |= seconds
        if share is None:
            complete(run, source, model, device, on_error)
        if folder is not None:
            run.write(folder)
            watch.forget()
    return run


def _plan(recorder: Recorder, source: Source, pixels: Tensor, k: int) -> Plan:
    network = recorder.network
    recorder.prepare(network.input_shape_of(pixels))
    channels = network.unit == "channel"
    chosen = plan(source.length, network.units, k, network.device, rereadable=source.rereadable, channels=channels)
    logger.info("%s", chosen.line)
    return chosen


def complete(
    run: Run, source: Source, model: nn.Module, device: torch.device | str | None, on_error: str = "skip"
) -> None:
    """What follows once all images are in, whoever scanned them: the second pass, and what is to be said."""
    start = time.perf_counter()
    if on_error == "raise":
        refuse_odd_responses(run)
    if source.rereadable:
        _second_pass(run, model, device)
    run.manifest["seconds"]["second_pass"] = time.perf_counter() - start
    for message in run.manifest["warnings"]:
        warnings.warn(message)


def _second_pass(run: Run, model: nn.Module, device: torch.device | str | None) -> None:
    """Effective boxes; and where the winners are few beside the images, every one of them computed again."""
    if run.manifest["scan"]["precision"] == "fp32" and 2 * len(run.winners) <= run.manifest["images"]:
        found = verify(run, model, device)
        if found["wrong"]:
            raise UnitvisError(
                f"{found['wrong']} of {found['winners']} winners came out otherwise when their images were read again "
                f"({found['first_wrong']}); the images or the model changed meanwhile, or are random (augmentation?)"
            )
    for name, side in effective_boxes(model, run, device).items():
        run.set_effective_box(name, side)
