"""Batches that a loop hands over, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from unitvis.errors import UnitvisError, first_line


def checked_images(batch: object, *, uint8: bool) -> Tensor:
    """A batch that can be computed: float [N, C, H, W], or (uint8: there is a transform for it) uint8 [N, H, W, 3]."""
    if not isinstance(batch, Tensor):
        raise UnitvisError(f"a batch must be a tensor, not {type(batch).__name__}")
    if batch.dtype == torch.uint8 and uint8:
        return batch
    if batch.ndim != 4 or not batch.is_floating_point():
        raise UnitvisError(
            f"a batch must be float images [N, C, H, W], already normalised, not {batch.dtype} {list(batch.shape)}"
        )
    return batch


def checked_ids(ids: Tensor | Sequence[int], images: int) -> Tensor:
    """Ids as int64 [images], whole numbers from 0, on the device where they came."""
    try:
        given = ids if isinstance(ids, Tensor) else torch.from_numpy(np.asarray(ids))
        if given.dtype == torch.bool or given.is_floating_point():
            raise UnitvisError(f"ids are whole numbers from 0, not {str(given.dtype).removeprefix('torch.')}")
        ids = given.to(torch.int64)
    except (TypeError, OverflowError) as error:
        raise UnitvisError(f"ids are whole numbers from 0: {first_line(error)}") from error
    if ids.shape != (images,):
        raise UnitvisError(f"{images} images came with ids of shape {list(ids.shape)}")
    if ids.device.type == "cpu" and images and int(ids.min()) < 0:  # on a GPU a look would wait for it
        raise UnitvisError(f"an image came with the id {int(ids.min())}; ids are whole numbers from 0")
    return ids
