"""topk_merge_: fold the keys of a batch, or another state, into the k strongest responses of every channel.

Order: value descending, then image id ascending. `cpu.py` and `naive.py` have the same order, and must change with it.

The state is int64 [C, 2k + 2], one row a channel:

    columns   0 .. k-1     k .. 2k-1    2k           2k+1
             +------------+------------+------------+--------------+
             |  k keys    |  k ids     |  NaN count | first NaN id |
             +------------+------------+------------+--------------+
    empty       BLANK        -1           0            2^63 - 1

    place      a key and its image's id, columns j and k + j; best first: the larger high word (the value, see `keys`),
               then the smaller id
    NaN count  the number of keys folded in that were NaN; first NaN id is the smallest id of their images
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unitvis_kernels import cpu
from unitvis_kernels._triton import HAS_TRITON, Launch, constexpr, jit, next_power_of_2, tl
from unitvis_kernels.arguments import require_tensors
from unitvis_kernels.keys import (
    BLANK,
    INF_KEY,
    MINUS_INF_HIGH,
    TL_BLANK,
    TL_BLANK_HIGH,
    TL_NAN_HIGH,
    TL_NAN_KEY,
    unpack,
)

NO_ID = 2**63 - 1  # the first NaN id where there is none; above every id

TL_NO_ID = constexpr(NO_ID)
TL_INF_KEY = constexpr(INF_KEY)
TL_MINUS_INF_HIGH = constexpr(MINUS_INF_HIGH)
TL_KEY_ABOVE_ALL = constexpr(2**63 - 1)  # above NAN_KEY
TL_ID_BELOW_ALL = constexpr(-2)  # below the -1 of a blank place

# A program folds all N keys of a few neighbouring channels into their k places. One pass over the keys finds each
# channel's best and how many reach the last place; in a long stream that is rarely one, and the program ends. Otherwise
# the best takes the last place (or the place of the same image), then the next best does, as often as keys reached it.
# Places stay where they lie in registers; their ranks, which say where they are stored at the end, make room instead.


@jit
def _high_word(keys):
    return (keys >> 32).to(tl.int32)


@jit
def _load_keys(p_keys, p_ids, m_c, keys_n, ids_n, N, n, OVERFLOWS: tl.constexpr, BN: tl.constexpr):
    o_n = n + tl.arange(0, BN)[:, None]  # [BN, 1]
    id = tl.load(p_ids + o_n.to(tl.int64) * ids_n, mask=o_n < N, other=-1)  # [BN, 1 or BC]
    m = (o_n < N) & (id >= 0) & m_c
    key = tl.load(p_keys + o_n.to(tl.int64) * keys_n, mask=m, other=TL_BLANK)  # [BN, BC]
    if OVERFLOWS:
        key = tl.where((key == TL_NAN_KEY) | (_high_word(key) == TL_MINUS_INF_HIGH), TL_INF_KEY, key)
    return id, key


@jit
def _best_key(
    p_keys, p_ids, m_c, keys_n, ids_n, N, low, low_id, OVERFLOWS: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr
):
    """(largest high word, number of keys but NaN that reach a last place (low, low_id)) of each channel."""
    best = tl.full([BN, BC], TL_BLANK_HIGH, tl.int32)
    count = tl.zeros([BN, BC], tl.int32)
    for n in range(0, N, BN):
        id, key = _load_keys(p_keys, p_ids, m_c, keys_n, ids_n, N, n, OVERFLOWS, BN)
        high = _high_word(key)
        reaches = (high > low[None, :]) | ((high == low[None, :]) & (id <= low_id[None, :]) & (key != TL_BLANK))
        best, count = tl.maximum(best, high), count + (reaches & (high < TL_NAN_HIGH)).to(tl.int32)
    return tl.max(best, axis=0), tl.sum(count, axis=0)


@jit
def _count_nan(p_keys, p_ids, m_c, keys_n, ids_n, N, OVERFLOWS: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr):
    """(number of NaN keys, their smallest id) of each channel."""
    count = tl.zeros([BN, BC], tl.int32)
    smallest = tl.full([BN, BC], TL_NO_ID, tl.int64)
    for n in range(0, N, BN):
        id, key = _load_keys(p_keys, p_ids, m_c, keys_n, ids_n, N, n, OVERFLOWS, BN)
        is_nan = key == TL_NAN_KEY
        count += is_nan.to(tl.int32)
        smallest = tl.minimum(smallest, tl.where(is_nan, id, TL_NO_ID))
    return tl.sum(count, axis=0), tl.min(smallest, axis=0)


@jit
def _next_best_key(
    p_keys, p_ids, m_c, keys_n, ids_n, N, last_id, last_key, OVERFLOWS: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr
):
    """(id, key) of each channel's best key that comes after the last one; an image's larger key comes first."""
    best = tl.full([BN, BC], TL_BLANK, tl.int64)
    best_id = tl.full([BN, BC], TL_NO_ID, tl.int64)
    last = _high_word(last_key)[None, :]
    for n in range(0, N, BN):
        id, key = _load_keys(p_keys, p_ids, m_c, keys_n, ids_n, N, n, OVERFLOWS, BN)
        high, best_high = _high_word(key), _high_word(best)
        behind = (id > last_id[None, :]) | ((id == last_id[None, :]) & (key < last_key[None, :]))
        ahead = (id < best_id) | ((id == best_id) & (key > best))
        behind = (high < last) | ((high == last) & behind)
        ahead = (high > best_high) | ((high == best_high) & ahead & (key != TL_BLANK))
        best, best_id = tl.where(behind & ahead, key, best), tl.where(behind & ahead, id, best_id)
    first = _high_word(best) == tl.max(_high_word(best), axis=0)[None, :]
    id = tl.min(tl.where(first, best_id, TL_NO_ID), axis=0)
    first = first & (best_id == id[None, :])
    return id, tl.max(tl.where(first, best, TL_BLANK), axis=0)


@jit(do_not_specialize=["N"])
def _topk_merge_kernel(
    state,  # [C, 2k + 2], int64; rows state_c apart
    keys,  # [N, C], int64, strides (keys_n, keys_c)
    ids,  # [N] or [N, C], int64, strides (ids_n, ids_c)
    C,
    N,
    state_c,
    keys_n,
    keys_c,
    ids_n,
    ids_c,
    k: tl.constexpr,
    ID_PER_IMAGE: tl.constexpr,
    OVERFLOWS: tl.constexpr,
    CLEAR: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    o_c = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)  # [BC]
    m = o_c < C
    m_c = m[None, :]  # [1, BC]
    p_state = state + o_c * state_c
    p_keys = keys + (o_c * keys_c)[None, :]
    p_ids = ids + (tl.zeros([1, 1], tl.int64) if ID_PER_IMAGE else (tl.minimum(o_c, C - 1) * ids_c)[None, :])

    low = _high_word(tl.load(p_state + (k - 1), mask=m, other=TL_KEY_ABOVE_ALL))  # the last place
    low_id = tl.load(p_state + (2 * k - 1), mask=m, other=TL_ID_BELOW_ALL)
    high, reach = _best_key(p_keys, p_ids, m_c, keys_n, ids_n, N, low, low_id, OVERFLOWS, BN, BC)
    rounds = tl.max(reach, axis=0)
    has_nan = tl.max(high, axis=0) == TL_NAN_HIGH
    if (rounds > 0) | has_nan:
        if has_nan:
            count, smallest = _count_nan(p_keys, p_ids, m_c, keys_n, ids_n, N, OVERFLOWS, BN, BC)
            count += tl.load(p_state + 2 * k, mask=m, other=0)
            smallest = tl.minimum(smallest, tl.load(p_state + 2 * k + 1, mask=m, other=TL_NO_ID))
            tl.debug_barrier()  # all threads that hold a copy read before one writes
            tl.store(p_state + 2 * k, count, mask=m)
            tl.store(p_state + 2 * k + 1, smallest, mask=m)

        o_k = tl.arange(0, BK)[None, :]  # [1, BK]
        m_k = m[:, None] & (o_k < k)
        p_places = p_state[:, None] + o_k  # [BC, BK]
        places = tl.load(p_places, mask=m_k, other=TL_BLANK)
        place_ids = tl.load(p_places + k, mask=m_k, other=TL_NO_ID)
        rank = tl.broadcast_to(o_k, [BC, BK])  # k and more: no place
        id = tl.full([BC], TL_NO_ID, tl.int64)
        key = tl.full([BC], TL_KEY_ABOVE_ALL, tl.int64)  # every value comes after it, but no NaN
        while rounds > 0:
            id, key = _next_best_key(p_keys, p_ids, m_c, keys_n, ids_n, N, id, key, OVERFLOWS, BN, BC)
            high, high_of_places = _high_word(key), _high_word(places)
            of_last = rank == k - 1
            low = tl.max(tl.where(of_last, high_of_places, TL_BLANK_HIGH), axis=1)
            low_id = tl.max(tl.where(of_last, place_ids, TL_ID_BELOW_ALL), axis=1)
            reaches = ((high > low) | ((high == low) & (id <= low_id))) & (key != TL_BLANK)
            rounds = tl.where(tl.max(reaches.to(tl.int32), axis=0) > 0, rounds - 1, 0)
            same_image = (place_ids == id[:, None]) & (rank < k)
            left = tl.min(tl.where(same_image, rank, k - 1), axis=1)  # rank of the place that the key takes
            taken = (rank == left[:, None]) & reaches[:, None] & (~same_image | (key[:, None] > places))
            enters = tl.max(taken.to(tl.int32), axis=1) > 0
            ahead = (high_of_places > high[:, None]) | (
                (high_of_places == high[:, None]) & (place_ids < id[:, None]) & (places != TL_BLANK)
            )
            ahead = ahead & (rank < k) & ~taken
            found = tl.sum(ahead.to(tl.int32), axis=1)  # rank that the key gets
            moves = enters[:, None] & (rank >= found[:, None]) & (rank < left[:, None])
            rank = tl.where(taken, found[:, None], tl.where(moves, rank + 1, rank))
            places = tl.where(taken, key[:, None], places)
            place_ids = tl.where(taken, id[:, None], place_ids)
        tl.debug_barrier()
        tl.store(p_state[:, None] + rank, places, mask=m_k)
        tl.store(p_state[:, None] + k + rank, place_ids, mask=m_k)
    if CLEAR:
        tl.debug_barrier()  # all threads have read the keys
        for n in range(0, N, BN):
            o_n = n + tl.arange(0, BN)[:, None]
            blank = tl.full([BN, BC], TL_BLANK, tl.int64)
            tl.store(p_keys + o_n.to(tl.int64) * keys_n, blank, mask=(o_n < N) & m_c)


def plan(state: Tensor, keys: Tensor, ids: Tensor, overflows: bool = False, clear: bool = False) -> Launch | None:
    """The launch that folds `keys` into `state`; None where there is no kernel for them."""
    (N, C), k = keys.shape, (state.shape[1] - 2) // 2
    if k > 1024 or state.stride(1) != 1 or not C:
        return None
    BK = next_power_of_2(k)
    BC = max(1, min(16, 1024 // BK))
    BN = 16 if N <= 16 else 64
    strides = (state.stride(0), *keys.stride(), ids.stride(0), ids.stride(1) if ids.ndim == 2 else 0)
    options: dict[str, Any] = {"k": k, "ID_PER_IMAGE": ids.ndim == 1, "BN": BN, "BC": BC, "BK": BK}
    options |= {"OVERFLOWS": overflows, "CLEAR": clear}
    options |= {"num_warps": 8 if N > 16 else 4, "num_stages": 1}
    if not torch.version.hip:
        options["maxnreg"] = 128  # without it ptxas spills registers to raise an occupancy that does not help here
    return Launch(_topk_merge_kernel, (-(-C // BC),), (state, keys, ids, C, N, *strides), options)


@torch.library.custom_op("unitvis::topk_merge_", mutates_args=("state", "keys"))
def _topk_merge_(state: Tensor, keys: Tensor, ids: Tensor, overflows: bool, clear: bool) -> None:
    cpu.topk_merge_(state, keys, ids, overflows, clear)


@_topk_merge_.register_fake
def _(state: Tensor, keys: Tensor, ids: Tensor, overflows: bool, clear: bool) -> None:
    return None


def launch(state: Tensor, keys: Tensor, ids: Tensor, overflows: bool = False, clear: bool = False) -> None:
    """Fold by the kernel; by `cpu.topk_merge_` where there is none."""
    planned = plan(state, keys, ids, overflows, clear)
    if planned is None:
        cpu.topk_merge_(state, keys, ids, overflows, clear)
    else:
        planned.run()


if HAS_TRITON:
    _topk_merge_.register_kernel("cuda")(launch)


def topk_state(channels: int, k: int, device: torch.device | str | None = None) -> Tensor:
    """An empty state, int64 [C, 2k + 2], for `topk_merge_`. Raises ValueError for k below 1.

    Columns: k keys, best first; their k image ids (-1 where blank); the number of images with a NaN; the smallest id
    of those (2^63 - 1 if none). A state is only this tensor, so it can be saved, copied and merged with another.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    state = torch.full((channels, 2 * k + 2), BLANK, dtype=torch.int64, device=device)
    state[:, k : 2 * k] = -1
    state[:, -2] = 0
    state[:, -1] = NO_ID
    return state


def topk_merge_(state: Tensor, keys: Tensor, ids: Tensor, *, overflows: bool = False, clear: bool = False) -> None:
    """Fold keys, int64 [N, C], of the images with ids, int64 [N] (or [N, C]), into the state, in place.

    Order: value descending, then id ascending. An id below 0 is padding and ignored; an id that is in the state
    already keeps its larger key, so that a repeated batch changes no place (its NaNs are counted again). A NaN takes
    no place and is counted; with `overflows` it is taken for +inf at position 0, and so is -inf: half precision gives
    both where float32 does not. With `clear` the keys hold `BLANK` afterwards. Does not synchronise a GPU. Raises
    ValueError for shapes or dtypes that do not fit.
    """
    require_tensors("topk_merge_", state=state, keys=keys, ids=ids)
    for name, tensor in (("state", state), ("keys", keys), ("ids", ids)):
        if tensor.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, not {tensor.dtype}")
    fits = keys.ndim == 2 and keys.shape[1] == state.shape[0] and ids.shape in (keys.shape[:1], keys.shape)
    if not fits or state.shape[1] < 4 or state.shape[1] % 2:
        shapes = [tuple(t.shape) for t in (state, keys, ids)]
        raise ValueError(f"state [C, 2k+2], keys [N, C] and ids [N] or [N, C] do not fit: {shapes}")
    if keys.shape[0]:
        _topk_merge_(state, keys, ids, overflows, clear)


def topk_merge_states_(state: Tensor, other: Tensor) -> None:
    """Fold another state of the same channels, int64 [C, 2m + 2], into the state, in place.

    An image that both states hold takes one place (see `topk_merge_`), but its NaNs are counted twice.
    """
    require_tensors("topk_merge_states_", state=state, other=other)
    m = (other.shape[1] - 2) // 2
    topk_merge_(state, other[:, :m].T, other[:, m : 2 * m].T)
    state[:, -2] += other[:, -2]
    torch.minimum(state[:, -1], other[:, -1], out=state[:, -1])


def topk_read(state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(values float32, ids int64, positions int64), each [C, k], best first; NaN, -1 and -1 where blank."""
    require_tensors("topk_read", state=state)
    k = (state.shape[1] - 2) // 2
    values, positions = unpack(state[:, :k])
    return values, state[:, k : 2 * k].clone(), positions
