"""Batches that a loop hands over, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from unitvis.errors import UnitvisError, first_line
from unitvis.state.interval_set import IntervalSet


def checked_images(batch: object, shape: torch.Size | None, *, uint8: bool) -> Tensor:
    """A batch that can be computed: float [N, C, H, W], or (uint8: there is a transform for it) uint8 [N, H, W, 3].

    shape: of every image before it; None for the first batch.
    """
    if not isinstance(batch, Tensor):
        raise UnitvisError(f"a batch must be a tensor, not {type(batch).__name__}")
    pixels = batch.dtype == torch.uint8 and uint8
    if not pixels and (batch.ndim != 4 or not batch.is_floating_point()):
        raise UnitvisError(
            f"a batch must be float images [N, C, H, W], already normalised, not {batch.dtype} {list(batch.shape)}"
        )
    if shape is not None and batch.shape[1:] != shape:
        raise UnitvisError(f"images of {list(batch.shape[1:])} came after images of {list(shape)}; give them one size")
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


def check_coverage(coverage: IntervalSet, images: int) -> None:
    """UnitvisError where the known ids are not one for each image that was recorded."""
    if len(coverage) != images:
        raise UnitvisError(
            f"{images} images were recorded under {len(coverage)} known ids; give each image one of its own, on the "
            "CPU (what comes after the images is taken for ids, not labels), and drop a Recorder that raised"
        )
