"""Scan with several processes that torchrun started: each scans a shard on its GPU, the first one merges."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed, nn

from unitvis import models
from unitvis.errors import UnitvisError
from unitvis.results.folder import check_output, remove_run
from unitvis.run import Run
from unitvis.scanning.merge import merge
from unitvis.scanning.scan import scan

_Value = TypeVar("_Value")
_SHARD = re.compile(r"\d+-of-\d+")  # the name of a shard's folder
_TIMEOUT = datetime.timedelta(days=30)  # shards take different times; a process that dies ends the wait anyway


def processes() -> int:
    """Number of processes that torchrun started for this scan; 1 outside of torchrun."""
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
    """Scan with the arguments of `scan`, the same in every process; returns the run in the first, None in the others.

    Runs of shards are kept in OUT.shards, beside `out`, until they are merged; all processes must see that folder. A
    process that torchrun restarted resumes from its checkpoint, as with `resume`.
    """
    folder = Path(out)
    with _process_group() as (rank, size):
        shards = folder.with_name(f"{folder.name}.shards")
        started_over = overwrite and _attempt() == 0
        resume = resume or (_attempt() > 0 and not overwrite)
        if resume and (folder / "manifest.json").exists():
            options |= {"out": folder, "device": device, "resume": True}
            return _in_every_process(lambda: scan(model, images, layers, k, **options) if rank == 0 else None)
        _in_every_process(lambda: _check_folders(folder, shards, overwrite, resume) if rank == 0 else None)
        if device is not None and torch.device(device).type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        paths = [shards / f"{number + 1}-of-{size}" for number in range(size)]
        own: dict[str, Any] = {"out": paths[rank], "shard": (rank + 1, size), "device": device}
        own |= {"resume": resume or (overwrite and not started_over), "overwrite": started_over}
        own["progress"] = options.pop("progress", True) and rank == 0
        _in_every_process(lambda: scan(model, images, layers, k, **own, **options))

        def merged() -> Run:
            run = merge(paths, model, images=images, device=device, on_error=options.get("on_error", "skip"))
            run.write(folder)
            for path in _shards_in(shards):
                remove_run(path)
            with suppress(OSError):  # it holds other files
                shards.rmdir()
            return run

        return _in_every_process(lambda: merged() if rank == 0 else None)  # the others wait, and do not take its cores


def _check_folders(folder: Path, shards: Path, overwrite: bool, resume: bool) -> None:
    """Check the folders of the run and of its shards; those of an earlier scan stay until theirs are written."""
    check_output(folder, overwrite=overwrite, resume=resume)
    if _shards_in(shards) and not resume and not overwrite:
        raise UnitvisError(
            f"{shards} holds a scan that is not finished; resume it (--resume) or start again (--overwrite)"
        )


def _shards_in(folder: Path) -> list[Path]:
    """The folders of shards in a folder, as `scan_together` names them."""
    return [path for path in sorted(folder.glob("*-of-*")) if _SHARD.fullmatch(path.name) and path.is_dir()]


def _attempt() -> int:
    """Number of times that torchrun restarted the processes."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@contextmanager
def _process_group() -> Iterator[tuple[int, int]]:
    """Connect the processes over the CPU (gloo); yields (rank, number of processes)."""
    store, rank, size = next(iter(distributed.rendezvous("env://", timeout=_TIMEOUT)))  # type: ignore[attr-defined]
    # All attempts share one store; the prefix keeps restarted processes from the addresses of dead ones.
    store = distributed.PrefixStore(f"unitvis {_attempt()}", store)  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    try:
        yield rank, size
    finally:
        distributed.destroy_process_group()


def _in_every_process(action: Callable[[], _Value]) -> _Value:
    """Call `action` in every process and wait for the others; if it fails in one, UnitvisError in all."""
    error, failed = None, torch.zeros(1)
    try:
        value = action()
    except UnitvisError as own_error:
        error = own_error
        failed += 1
    distributed.all_reduce(failed)
    if error is not None:
        raise error
    if failed.item():
        raise UnitvisError("another process failed and says why")
    return value
