"""How decoding threads and computing threads share the cores of a CPU."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Self

import torch
from torch import Tensor

from unitvis.network.forward import COMPUTE_BATCH
from unitvis.ranking.recorder import Recorder
from unitvis.sources import Source
from unitvis.sources.encoded import EncodedSource

# images/s of one computing thread; a core decodes three hundred photographs, or some thousand small pictures, a second
FAST_ON_ONE_THREAD = 1000


class Threads:
    """Around the loop of a scan: decoding waits while all threads compute, or a single thread computes beside it.

    At the end of every parallel operation all threads wait for the last one. Where decoding holds its core, that takes
    a time slice of the scheduler, milliseconds. So a large network has all cores to itself for a batch, while files are
    read ahead; a small one, whose operations take microseconds, computes on one thread where that is more than the
    other cores decode. The bits of canonical responses do not depend on the number of threads; the caller's comes back
    afterwards.
    """

    def __init__(self, recorder: Recorder, source: Source) -> None:
        self._recorder, self._before = recorder, torch.get_num_threads()
        shared = recorder.network.device.type == "cpu" and self._before > 1
        self._encoded = source if shared and isinstance(source, EncodedSource) else None
        self._undecided = self._encoded is not None and recorder.precision == "fp32"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if torch.get_num_threads() != self._before:
            torch.set_num_threads(self._before)

    def computing(self) -> AbstractContextManager[None]:
        """Around what computes a batch."""
        return self._encoded.pause_decoding() if self._encoded is not None else nullcontext()

    def choose(self, images: Tensor) -> None:
        """Decide, by some images that were recorded; once."""
        if not self._undecided or not self._recorder.images:
            return
        self._undecided = False
        torch.set_num_threads(1)
        rate = compute_rate(self._recorder, images)
        if rate > FAST_ON_ONE_THREAD / 4:  # not far below: what else runs may have slowed it down
            rate = max(rate, *(compute_rate(self._recorder, images) for _ in range(2)))
        if rate < FAST_ON_ONE_THREAD:
            torch.set_num_threads(self._before)
        else:
            self._encoded = None


def compute_rate(recorder: Recorder, images: Tensor) -> float:
    """Canonical images/s, by one compute batch of images like those that were recorded; it records nothing."""
    with recorder.network.reading() as canonical:
        start = time.perf_counter()
        canonical.keys(images[:COMPUTE_BATCH], recorder.topk.threshold())
        return COMPUTE_BATCH / (time.perf_counter() - start)
