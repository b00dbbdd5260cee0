"""Reading images again that were scanned before: each must still be there."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from unitvis.bars import bar
from unitvis.errors import UnitvisError
from unitvis.network.forward import COMPUTE_BATCH
from unitvis.sources import Batch, Source


def read_again(source: Source, ids: NDArray[np.int64]) -> Iterator[Batch]:
    """Read images that were scanned, in the order of their ids [n], in compute batches.

    Raises UnitvisError that names an image that is absent or cannot be read: without it nothing would be exact.
    """
    read: list[int] = []
    with bar(len(ids), "again") as counted:
        for batch in source.batches(COMPUTE_BATCH, ids=ids.tolist()):
            read += batch.ids.tolist()
            yield batch
            counted.update(len(batch.ids))
    for id in np.setdiff1d(ids, read).tolist():
        raise UnitvisError(
            f"{source.name(id)!r} was scanned and cannot be read now ({source.failure_reasons.get(id, 'no reason')}); "
            "restore it, or scan again"
        )
