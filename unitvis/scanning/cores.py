"""Who has the cores where the same ones decode and compute."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Self

import torch
from torch import Tensor

from unitvis.ranking.recorder import Recorder
from unitvis.sources import Source
from unitvis.sources.encoded import EncodedSource

ENOUGH = 1000  # images/s of one thread; a core decodes three hundred photographs, or some thousand small pictures


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
        shared = recorder.device.type == "cpu" and self._before > 1
        self._encoded = source if shared and isinstance(source, EncodedSource) else None
        self._undecided = self._encoded is not None and recorder.precision == "fp32"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if torch.get_num_threads() != self._before:
            torch.set_num_threads(self._before)

    def computing(self) -> AbstractContextManager[None]:
        """Around what computes a batch."""
        return self._encoded.undecoded() if self._encoded is not None else nullcontext()

    def choose(self, images: Tensor) -> None:
        """Decide, by some images that were recorded; once."""
        if not self._undecided or not self._recorder.started:
            return
        self._undecided = False
        torch.set_num_threads(1)
        rate = self._recorder.rate(images)
        if rate > ENOUGH / 4:  # not far below: what else runs may have slowed it down
            rate = max(rate, *(self._recorder.rate(images) for _ in range(2)))
        if rate < ENOUGH:
            torch.set_num_threads(self._before)
        else:
            self._encoded = None
