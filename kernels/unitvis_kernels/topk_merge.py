"""topk_merge_: fold the keys of a batch, or another state, into the k strongest responses of every channel."""

from __future__ import annotations

import torch
from torch import Tensor

from unitvis_kernels import reference
from unitvis_kernels.keys import BLANK, unpack

NO_ID = torch.iinfo(torch.int64).max  # "no image yet" where the smallest id is kept


@torch.library.custom_op("unitvis::topk_merge_", mutates_args=("state",))
def _topk_merge_(state: Tensor, keys: Tensor, ids: Tensor) -> None:
    reference.topk_merge_(state, keys, ids)


@_topk_merge_.register_fake
def _(state: Tensor, keys: Tensor, ids: Tensor) -> None:
    return None


def topk_state(channels: int, k: int, device: torch.device | str | None = None) -> Tensor:
    """An empty state, int64 [C, 2k + 2].

    Columns: k keys, best first; their k image ids (-1 where blank); the number of images with a NaN; the smallest id
    of those (2^63 - 1 if none). It is all there is: save it, copy it, merge it with another.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    state = torch.full((channels, 2 * k + 2), BLANK, dtype=torch.int64, device=device)
    state[:, k : 2 * k] = -1
    state[:, -2] = 0
    state[:, -1] = NO_ID
    return state


def topk_merge_(state: Tensor, keys: Tensor, ids: Tensor) -> None:
    """Fold keys, int64 [N, C], of the images with ids, int64 [N] (or [N, C]), into the state, in place.

    Order: value descending, then id ascending. An id below 0 is padding and ignored; an id that is in the state
    already keeps its larger key, so that a repeated batch changes no place (it does count its NaN again). A NaN takes
    no place and is counted. No synchronisation on a GPU. Raises ValueError for shapes or dtypes that do not fit.
    """
    for name, tensor in (("state", state), ("keys", keys), ("ids", ids)):
        if tensor.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, not {tensor.dtype}")
    fits = keys.ndim == 2 and keys.shape[1] == state.shape[0] and ids.shape in (keys.shape[:1], keys.shape)
    if not fits or state.shape[1] < 4 or state.shape[1] % 2:
        shapes = [tuple(t.shape) for t in (state, keys, ids)]
        raise ValueError(f"state [C, 2k+2], keys [N, C] and ids [N] or [N, C] do not fit: {shapes}")
    if keys.shape[0]:
        _topk_merge_(state, keys, ids)


def topk_merge_states_(state: Tensor, other: Tensor) -> None:
    """Fold another state of the same channels, int64 [C, 2m + 2], into the state, in place.

    The places of overlapping states come out right (see `topk_merge_`); their NaN counts add up.
    """
    m = (other.shape[1] - 2) // 2
    topk_merge_(state, other[:, :m].T, other[:, m : 2 * m].T)
    state[:, -2] += other[:, -2]
    torch.minimum(state[:, -1], other[:, -1], out=state[:, -1])


def topk_read(state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(values float32, ids int64, positions int64), each [C, k], best first; NaN, -1 and -1 where blank."""
    k = (state.shape[1] - 2) // 2
    values, positions = unpack(state[:, :k])
    return values, state[:, k : 2 * k].clone(), positions
