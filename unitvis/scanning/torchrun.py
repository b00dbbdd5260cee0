"""One scan by several processes that torchrun started: each takes its shard and its GPU, the first one merges."""

from __future__ import annotations

import datetime
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed, nn

from unitvis import models
from unitvis.errors import UnitvisError
from unitvis.results.folder import check_output
from unitvis.run import Run
from unitvis.scanning.merge import merge
from unitvis.scanning.scan import scan

_Value = TypeVar("_Value")
_PATIENCE = datetime.timedelta(days=30)  # shards may be uneven; one that dies ends the wait through its connection


def processes() -> int:
    """How many processes torchrun started for this scan; 1 outside of torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def scan_together(
    model: nn.Module | str | models.Loaded,
    images: object,
    layers: Sequence[str] | str | None = None,
    k: int = 9,
    *,
    out: str | Path,
    device: torch.device | str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    **options: Any,
) -> Run | None:
    """`scan`, with the same arguments, in each of the processes; the run in the first one, None in the others.

    Shards are kept beside `out`, which all processes must see, in OUT.shards until they are merged. A process that
    torchrun started again goes on from its checkpoint, as it does with `resume`.
    """
    folder = Path(out)
    with _group() as (rank, size):
        shards = folder.with_name(f"{folder.name}.shards")
        resume = resume or _attempt() > 0
        if resume and (folder / "manifest.json").exists():
            run = _all(lambda: scan(model, images, layers, k, out=folder, device=device, resume=True, **options))
            return run if rank == 0 else None
        _all(lambda: _start(folder, shards, overwrite, resume) if rank == 0 else None)
        if device is not None and torch.device(device).type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        paths = [shards / f"{number + 1}-of-{size}" for number in range(size)]
        own: dict[str, Any] = {"out": paths[rank], "shard": (rank + 1, size), "resume": resume, "device": device}
        own["progress"] = options.pop("progress", True) and rank == 0
        _all(lambda: scan(model, images, layers, k, **own, **options))

        def merged() -> Run:
            run = merge(paths, model, images=images, device=device, on_error=options.get("on_error", "skip"))
            run.write(folder)
            shutil.rmtree(shards)
            return run

        return _all(lambda: merged() if rank == 0 else None)  # the others end afterwards, and do not take its cores


def _start(folder: Path, shards: Path, overwrite: bool, resume: bool) -> None:
    check_output(folder, overwrite=overwrite, resume=resume)
    if shards.exists() and overwrite:
        shutil.rmtree(shards)
    if shards.exists() and not resume:
        raise UnitvisError(
            f"{shards} holds a scan that is not finished; go on with it (--resume) or start again (--overwrite)"
        )


def _attempt() -> int:
    """How often torchrun started the processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@contextmanager
def _group() -> Iterator[tuple[int, int]]:
    """(rank, number of processes), connected over the CPU."""
    store, rank, size = next(iter(distributed.rendezvous("env://", timeout=_PATIENCE)))  # type: ignore[attr-defined]
    # One store serves every attempt: processes that were started again must not meet the addresses of dead ones.
    store = distributed.PrefixStore(f"unitvis {_attempt()}", store)  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    try:
        yield rank, size
    finally:
        distributed.destroy_process_group()


def _all(action: Callable[[], _Value]) -> _Value:
    """Do something in every process, and wait for the others; where it fails in one, UnitvisError in all."""
    error, failed = None, torch.zeros(1)
    try:
        value = action()
    except UnitvisError as mistake:
        error = mistake
        failed += 1
    distributed.all_reduce(failed)
    if error is not None:
        raise error
    if failed.item():
        raise UnitvisError("another process failed and says why")
    return value
