"""Share the cores of a CPU between what decodes, threads or processes, and the threads that compute."""

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

# Images/s that one thread must compute for the scan to compute on one thread; a core decodes about 300 photographs, or
# 1,000 small images, a second.
MIN_RATE_ON_ONE_THREAD = 1000


class CoreSharing:
    """Context of a scan's loop on a CPU: decoding pauses while a batch is computed, or one thread computes beside it.

    All threads of a parallel operation wait for the slowest; if decoding holds that one's core, they wait for a time
    slice of the scheduler, milliseconds. So a large network gets all cores for each batch, while files are only read.
    A small network computes on one thread if that is faster than the other cores decode, and so does one whose bits are
    canonical on one thread only. The bits of canonical responses do not depend on the number of threads, and the
    caller's number is restored on exit. On a GPU, for sources
    without files and with one thread nothing is changed.
    """

    def __init__(self, recorder: Recorder, source: Source) -> None:
        self._recorder, self._caller_threads = recorder, torch.get_num_threads()
        shared = recorder.network.device.type == "cpu" and self._caller_threads > 1
        # the source whose decoding pauses for each batch; None: it does not pause
        self._pausable = source if shared and isinstance(source, EncodedSource) else None
        self._undecided = self._pausable is not None and recorder.precision == "fp32"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if torch.get_num_threads() != self._caller_threads:
            torch.set_num_threads(self._caller_threads)

    def computing(self) -> AbstractContextManager[None]:
        """Context for computing one batch: pauses decoding, unless one thread computes."""
        return self._pausable.pause_decoding() if self._pausable is not None else nullcontext()

    def choose(self, images: Tensor) -> None:
        """Measure, once, after the first batch was recorded, whether one thread is fast enough; images: that batch."""
        if not self._undecided or not self._recorder.images:
            return
        self._undecided = False
        if self._recorder.network.bits.threads.get(self._caller_threads) == 1:
            self._pausable = None
            return
        torch.set_num_threads(1)
        rate = compute_rate(self._recorder, images)
        if rate > MIN_RATE_ON_ONE_THREAD / 4:  # near the limit: other processes may have slowed the first measurement
            rate = max(rate, *(compute_rate(self._recorder, images) for _ in range(2)))
        if rate < MIN_RATE_ON_ONE_THREAD:
            torch.set_num_threads(self._caller_threads)
        else:
            self._pausable = None


def compute_rate(recorder: Recorder, images: Tensor) -> float:
    """Measure images/s of the canonical pass on one compute batch; nothing is recorded."""
    with recorder.network.evaluating(), recorder.network.reading() as canonical:
        start = time.perf_counter()
        canonical.keys(images[:COMPUTE_BATCH], recorder.topk.threshold())
        return COMPUTE_BATCH / (time.perf_counter() - start)
