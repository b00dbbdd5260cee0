"""Batches that a loop hands over, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from unitvis.errors import UnitvisError, first_line
from unitvis.schema import MAX_ID
from unitvis.sources.arrays import is_pixels
from unitvis.sources.transform import Transform
from unitvis.state.interval_set import IntervalSet


def checked_images(batch: object, like: Tensor | None, transform: Transform | None) -> Tensor:
    """A batch that can be computed: float [N, C, H, W], or (where there is a transform) uint8 [N, H, W, 3].

    like: images before it, with their shape and type; None for the first batch. Pixels are normalised by the transform,
    but neither resized nor cropped, and so must have a size that it gives.
    """
    if not isinstance(batch, Tensor):
        raise UnitvisError(f"a batch must be a tensor, not {type(batch).__name__}")
    pixels = batch.dtype == torch.uint8 and transform is not None
    if not pixels and (batch.ndim != 4 or not batch.is_floating_point()):
        raise UnitvisError(
            f"a batch must be float images [N, C, H, W], already normalised, not {batch.dtype} {list(batch.shape)}"
        )
    if like is not None and batch.shape[1:] != like.shape[1:]:
        raise UnitvisError(
            f"images of {list(batch.shape[1:])} came after images of {list(like.shape[1:])}; give them one size"
        )
    if like is not None and (batch.dtype == torch.uint8) != (like.dtype == torch.uint8):
        kinds = [str(one.dtype).removeprefix("torch.") for one in (batch, like)]
        raise UnitvisError(
            f"{kinds[0]} images came after {kinds[1]} ones; give all as uint8 pixels or all as normalised floats"
        )
    if pixels and transform is not None:
        _refuse_other_size(batch, transform)
    return batch


def _refuse_other_size(pixels: Tensor, transform: Transform) -> None:
    """UnitvisError for uint8 [N, H, W, 3] of a size that the resize and crop of the transform do not give."""
    if not is_pixels(pixels, 4):  # refused where they are normalised
        return
    height, width = pixels.shape[1:3]
    size = transform.crop or transform.resize
    if isinstance(size, int) and transform.crop is None:
        wanted, fits = f"a shorter side of {size}", min(height, width) == size
    elif size is not None:
        tall, wide = size if isinstance(size, tuple) else (size, size)
        wanted, fits = f"{wide} x {tall}", (tall, wide) == (height, width)
    else:
        return
    if not fits:
        raise UnitvisError(
            f"uint8 images of {width} x {height} pixels came, and the transform (resize={transform.resize}, "
            f"crop={transform.crop}) gives {wanted}; a Recorder only normalises: resize and crop before, or give a "
            f"Transform without them"
        )


def some_values(batch: Tensor) -> Tensor:
    """About 4,096 values of the first image, on the CPU, by which a batch, or its first part, is known again."""
    values = batch[:1].flatten()
    return values[:: max(1, len(values) // 4096)].cpu().clone()


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
    if ids.device.type == "cpu" and images and (last := int(ids.max())) > MAX_ID:
        raise UnitvisError(f"an image came with the id {last}; ids go up to {MAX_ID}")
    return ids


def check_coverage(coverage: IntervalSet, images: int) -> None:
    """UnitvisError where the known ids are not one for each image that was recorded."""
    if len(coverage) != images:
        raise UnitvisError(
            f"{images} images were recorded under {len(coverage)} known ids; give each image one of its own, on the "
            "CPU (what comes after the images is taken for ids, not labels), and drop a Recorder that raised"
        )
