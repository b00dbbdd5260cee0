"""Reading images again that were scanned before: each must still be there."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

import unitvis_kernels as uk
from unitvis.bars import bar
from unitvis.errors import UnitvisError
from unitvis.network.forward import COMPUTE_BATCH
from unitvis.network.network import Network
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


def responses_again(network: Network, source: Source, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Canonical responses, float32 [n, units], of images [n, at least one] that were scanned.

    network: its layers known. Raises UnitvisError as `read_again` does.
    """
    # No position is looked for.
    never = torch.full((network.units,), torch.inf, dtype=torch.float32, device=network.device)
    with network.evaluating(), network.reading() as canonical:
        keys = [canonical.keys(batch.pixels, never).cpu() for batch in read_again(source, ids)]
    return np.asarray(uk.unpack(torch.cat(keys))[0].numpy())
