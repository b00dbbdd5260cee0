"""How many threads compute where the same cores also decode."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from unitvis.recorder import Recorder
from unitvis.sources import Source
from unitvis.sources.encoded import EncodedSource

ENOUGH = 1000  # images/s of one thread; a core decodes three hundred photographs, or some thousand small pictures


class Threads:
    """Around the loop of a scan: one thread computes where it computes more than the other cores decode.

    At the end of every parallel operation all threads wait for the last one. Where decoding holds its core, that takes
    a time slice of the scheduler, milliseconds, and a small network's operations take microseconds. The bits of
    canonical responses do not depend on the number of threads; the caller's comes back afterwards.
    """

    def __init__(self, recorder: Recorder, source: Source) -> None:
        self._recorder, self._before = recorder, torch.get_num_threads()
        shared = recorder.device.type == "cpu" and isinstance(source, EncodedSource)
        self._undecided = shared and self._before > 1 and recorder.precision == "fp32"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if torch.get_num_threads() != self._before:
            torch.set_num_threads(self._before)

    def choose(self, images: Tensor) -> None:
        """Decide, by some images that were recorded; once."""
        if not self._undecided or not self._recorder.started:
            return
        self._undecided = False
        torch.set_num_threads(1)
        if max(self._recorder.rate(images) for _ in range(3)) < ENOUGH:
            torch.set_num_threads(self._before)
