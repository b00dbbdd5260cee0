"""scan: a source, a Recorder and the second pass."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from unitvis import models
from unitvis.canonical import BATCH
from unitvis.errors import UnitvisError
from unitvis.recorder import Recorder
from unitvis.rescore import effective_boxes, verify
from unitvis.responses import refuse_odd_responses
from unitvis.run import Run, check_output
from unitvis.sources import open_source
from unitvis.transform import Transform

PRECISIONS = ("exact", "fp32")


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
    on_error: str = "skip",
    max_failures: int | None = None,
    decoder: str = "pillow",
    scaled: bool = False,
    allow_truncated: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    workers: int | None = None,
) -> Run:
    """Find, for every unit of the layers, the k images and positions that excite it most.

    model: a module, a spec such as "torchvision:alexnet" or "file.py:function", or what `models.load` makes of one.
    transform: how pictures become the model's input; None is the spec's own.
    images: a folder, a text list, tar archives, a uint8 .npy or array [N, H, W, 3], a float tensor [N, C, H, W] already
    normalised, a Dataset, a DataLoader or an iterable of batches; see `open_source`. layers, k, unit, device: as for
    `Recorder`. out: a folder for the run. precision: "exact" decides by canonical float32 responses, "fp32" computes
    nothing else. batch_size: images read at once, which does not change the result. on_error: "skip" lists an
    unreadable image in the manifest and counts NaN and infinite responses there, "raise" stops; max_failures: more
    unreadable images stop the scan. decoder, scaled, allow_truncated: how files are decoded, see `Decoding`. workers:
    threads that decode. Raises UnitvisError for whatever the caller can mend.
    """
    if precision not in PRECISIONS:
        raise UnitvisError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    batch_size = 4 * BATCH if batch_size is None else batch_size
    if batch_size < 1:
        raise UnitvisError(f"batch_size must be at least 1, not {batch_size}")
    folder = None if out is None else check_output(out, overwrite=overwrite)
    spec = None
    if isinstance(model, str):
        model = models.load(model)
    if isinstance(model, models.Loaded):
        spec, model, own = model
        transform = transform or own
    source = open_source(
        images,
        transform,
        on_error=on_error,
        max_failures=max_failures,
        decoder=decoder,
        scaled=scaled,
        allow_truncated=allow_truncated,
    )

    start = time.perf_counter()
    with Recorder(model, layers, k, unit=unit, device=device, transform=source.transform) as recorder:
        silent = None if progress else True  # None: a bar on a terminal, nothing in a log
        with tqdm(total=source.length, desc="scan", unit=" images", disable=silent, leave=False) as bar:
            for batch in source.batches(batch_size, workers=workers):
                recorder(batch.pixels, batch.ids)
                bar.update(len(batch.ids))
        run = recorder.result(source)
    if on_error == "raise":
        refuse_odd_responses(run)
    scanned = time.perf_counter()

    run.manifest["model"]["spec"] = spec
    run.manifest["failures"] = [asdict(failure) for failure in source.failures]
    if source.rereadable:
        _second_pass(run, model, device)
    run.manifest["seconds"]["scan"] = scanned - start - recorder.preparation
    run.manifest["seconds"]["second_pass"] = time.perf_counter() - scanned
    for message in run.manifest["warnings"]:
        warnings.warn(message)
    if folder is not None:
        run.write(folder)
    return run


def _second_pass(run: Run, model: nn.Module, device: torch.device | str | None) -> None:
    """Effective boxes; and where the winners are few beside the images, every one of them computed again."""
    if 2 * len(run.winners) <= run.manifest["images"]:
        found = verify(run, model, device)
        if found["wrong"]:
            raise UnitvisError(
                f"{found['wrong']} of {found['winners']} winners came out otherwise when their images were read again "
                f"({found['first_wrong']}); the images or the model changed meanwhile, or are random (augmentation?)"
            )
    for name, side in effective_boxes(model, run, device).items():
        run.set_effective_box(name, side)
