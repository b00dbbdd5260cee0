"""topk_merge_: fold the keys of a batch, or another state, into the k strongest responses of every channel."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unitvis_kernels import reference
from unitvis_kernels._triton import HAS_TRITON, Launch, jit, next_power_of_2, tl
from unitvis_kernels.keys import BLANK, unpack

NO_ID = torch.iinfo(torch.int64).max  # "no image yet" where the smallest id is kept

# A program folds all N keys of a few neighbouring channels into their k places. The filter reads them once; in a long
# stream nearly no program gets past it. Where the best newcomer enters, it is put over the weakest place (or over the
# same image), then the next best, until none enters; at the end the places are put in order.


@jit
def _high(keys):
    return (keys >> 32).to(tl.int32)


@jit
def _load(p_keys, p_ids, m_c, keys_n, ids_n, N, n, BN: tl.constexpr):
    o_n = n + tl.arange(0, BN)[:, None]  # [BN, 1]
    id = tl.load(p_ids + o_n.to(tl.int64) * ids_n, mask=o_n < N, other=-1)  # [BN, 1 or BC]
    m = (o_n < N) & (id >= 0) & m_c
    return id, tl.load(p_keys + o_n.to(tl.int64) * keys_n, mask=m, other=-0x8000000000000000)  # [BN, BC]


@jit
def _filter(p_keys, p_ids, m_c, keys_n, ids_n, N, BN: tl.constexpr, BC: tl.constexpr):
    """(value, id) of each channel's best newcomer, as the ordered 32 bits; a NaN is ahead of every value."""
    best = tl.full([BN, BC], -0x80000000, tl.int32)
    best_id = tl.full([BN, BC], 0x7FFFFFFFFFFFFFFF, tl.int64)
    for n in range(0, N, BN):
        id, key = _load(p_keys, p_ids, m_c, keys_n, ids_n, N, n, BN)
        high = _high(key)
        take = (high > best) | ((high == best) & (id < best_id) & (key != -0x8000000000000000))
        best, best_id = tl.where(take, high, best), tl.where(take, id, best_id)
    first = tl.max(best, axis=0)
    return first, tl.min(tl.where(best == first[None, :], best_id, 0x7FFFFFFFFFFFFFFF), axis=0)


@jit
def _nan(p_keys, p_ids, m_c, keys_n, ids_n, N, BN: tl.constexpr, BC: tl.constexpr):
    """The number of each channel's NaN, and their smallest id."""
    count = tl.zeros([BN, BC], tl.int32)
    smallest = tl.full([BN, BC], 0x7FFFFFFFFFFFFFFF, tl.int64)
    for n in range(0, N, BN):
        id, key = _load(p_keys, p_ids, m_c, keys_n, ids_n, N, n, BN)
        is_nan = key == 0x7FFFFFFF7FFFFFFF
        count += is_nan.to(tl.int32)
        smallest = tl.minimum(smallest, tl.where(is_nan, id, 0x7FFFFFFFFFFFFFFF))
    return tl.sum(count, axis=0), tl.min(smallest, axis=0)


@jit
def _next(p_keys, p_ids, m_c, keys_n, ids_n, N, bar_id, bar_key, BN: tl.constexpr, BC: tl.constexpr):
    """(id, key) of each channel's best newcomer behind the bar. Of one image's two keys the larger comes first."""
    best = tl.full([BN, BC], -0x8000000000000000, tl.int64)
    best_id = tl.full([BN, BC], 0x7FFFFFFFFFFFFFFF, tl.int64)
    bar = _high(bar_key)[None, :]
    for n in range(0, N, BN):
        id, key = _load(p_keys, p_ids, m_c, keys_n, ids_n, N, n, BN)
        high, best_high = _high(key), _high(best)
        behind = (id > bar_id[None, :]) | ((id == bar_id[None, :]) & (key < bar_key[None, :]))
        ahead = (id < best_id) | ((id == best_id) & (key > best))
        behind = (high < bar) | ((high == bar) & behind)
        ahead = (high > best_high) | ((high == best_high) & ahead & (key != -0x8000000000000000))
        best, best_id = tl.where(behind & ahead, key, best), tl.where(behind & ahead, id, best_id)
    first = _high(best) == tl.max(_high(best), axis=0)[None, :]
    id = tl.min(tl.where(first, best_id, 0x7FFFFFFFFFFFFFFF), axis=0)
    first = first & (best_id == id[None, :])
    return id, tl.max(tl.where(first, best, -0x8000000000000000), axis=0)


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
    BN: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    MAX: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    o_c = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)  # [BC]
    m = o_c < C
    m_c = m[None, :]  # [1, BC]
    p_state = state + o_c * state_c
    p_keys = keys + (o_c * keys_c)[None, :]
    p_ids = ids + (tl.zeros([1, 1], tl.int64) if ID_PER_IMAGE else (tl.minimum(o_c, C - 1) * ids_c)[None, :])

    low = _high(tl.load(p_state + (k - 1), mask=m, other=MAX))  # the last place
    low_id = tl.load(p_state + (2 * k - 1), mask=m, other=-2)
    high, id = _filter(p_keys, p_ids, m_c, keys_n, ids_n, N, BN, BC)
    enters = (high > low) | ((high == low) & (id <= low_id))
    if tl.max(enters.to(tl.int32), axis=0) > 0:
        if tl.max(high, axis=0) == 0x7FFFFFFF:
            count, smallest = _nan(p_keys, p_ids, m_c, keys_n, ids_n, N, BN, BC)
            count += tl.load(p_state + 2 * k, mask=m, other=0)
            smallest = tl.minimum(smallest, tl.load(p_state + 2 * k + 1, mask=m, other=MAX))
            tl.debug_barrier()  # every thread that holds a copy has read before one writes
            tl.store(p_state + 2 * k, count, mask=m)
            tl.store(p_state + 2 * k + 1, smallest, mask=m)

        o_k = tl.arange(0, BK)[None, :]  # [1, BK]
        m_k = m[:, None] & (o_k < k)
        p_places = p_state[:, None] + o_k  # [BC, BK]
        places = tl.load(p_places, mask=m_k, other=MAX)  # what is no place is ahead of all, and never the weakest
        place_ids = tl.load(p_places + k, mask=m_k, other=-2)
        id = tl.full([BC], MAX, tl.int64)
        key = tl.full([BC], MAX, tl.int64)  # behind it is every value, but no NaN
        # `enters` must be read in the body too: Triton 3.7 fails on a while loop's flag that only the condition reads.
        while tl.max(enters.to(tl.int32), axis=0) > 0:
            id, key = _next(p_keys, p_ids, m_c, keys_n, ids_n, N, id, key, BN, BC)
            enters = enters & ((_high(key) > low) | ((_high(key) == low) & (id <= low_id)))
            own = place_ids == id[:, None]
            weakest = (_high(places) == low[:, None]) & (place_ids == low_id[:, None])
            chosen = tl.where(tl.max(own.to(tl.int32), axis=1)[:, None] > 0, own, weakest)
            chosen = o_k == tl.min(tl.where(chosen, o_k, BK), axis=1)[:, None]  # one of several blanks
            chosen = chosen & enters[:, None] & (~own | (key[:, None] > places))
            places = tl.where(chosen, key[:, None], places)
            place_ids = tl.where(chosen, id[:, None], place_ids)
            low = tl.min(_high(places), axis=1)
            low_id = tl.max(tl.where(_high(places) == low[:, None], place_ids, -2), axis=1)

        values = _high(places)
        rank = tl.zeros([BC, BK], tl.int32)
        for j in range(k):
            other = tl.max(tl.where(o_k == j, values, -0x80000000), axis=1)[:, None]
            other_id = tl.max(tl.where(o_k == j, place_ids, -2), axis=1)[:, None]
            earlier = (other_id < place_ids) | ((other_id == place_ids) & (o_k > j))
            rank += ((other > values) | ((other == values) & earlier)).to(tl.int32)
        tl.debug_barrier()
        tl.store(p_state[:, None] + rank, places, mask=m_k)
        tl.store(p_state[:, None] + k + rank, place_ids, mask=m_k)


def plan(state: Tensor, keys: Tensor, ids: Tensor) -> Launch | None:
    """The launch that folds `keys` into `state`; None for what has no kernel."""
    (N, C), k = keys.shape, (state.shape[1] - 2) // 2
    if k > 1024 or state.stride(1) != 1 or not C:
        return None
    BK = next_power_of_2(k)
    BC = max(1, min(16, 1024 // BK))
    BN = 16 if N <= 16 else 64
    strides = (state.stride(0), *keys.stride(), ids.stride(0), ids.stride(1) if ids.ndim == 2 else 0)
    options: dict[str, Any] = {"k": k, "ID_PER_IMAGE": ids.ndim == 1, "BN": BN, "BC": BC, "BK": BK}
    options |= {"num_warps": 8 if N > 16 else 4, "num_stages": 1}
    if not torch.version.hip:
        options["maxnreg"] = 128  # left to itself ptxas spills a few registers for an occupancy that is of no use here
    return Launch(_topk_merge_kernel, (-(-C // BC),), (state, keys, ids, C, N, *strides), options)


@torch.library.custom_op("unitvis::topk_merge_", mutates_args=("state",))
def _topk_merge_(state: Tensor, keys: Tensor, ids: Tensor) -> None:
    reference.topk_merge_(state, keys, ids)


@_topk_merge_.register_fake
def _(state: Tensor, keys: Tensor, ids: Tensor) -> None:
    return None


def launch(state: Tensor, keys: Tensor, ids: Tensor) -> None:
    planned = plan(state, keys, ids)
    if planned is None:
        reference.topk_merge_(state, keys, ids)
    else:
        planned.run()


if HAS_TRITON:
    _topk_merge_.register_kernel("cuda")(launch)


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
