"""How often each operator reads and writes each element of its tensors, counted in Triton's interpreter.

Run by `test_interpreted.py` in a process of its own. The least possible is one read of each element of an input and one
write of each element of an output; what is beyond that is named in `AGAIN`. State and floors are those of a long
stream: nothing enters, so that no position is looked for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

import unitvis_kernels as uk

assert os.environ.get("TRITON_INTERPRET") == "1"
argmax, topk, epilogue, residual, normalize, magnitudes, conv = (
    sys.modules[f"unitvis_kernels.{name}"]
    for name in ("spatial_argmax", "topk_merge", "epilogue", "residual", "normalize", "magnitudes", "conv_argmax")
)
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, about NaN and infinity
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # caused by Triton 3.6
]
SLACK = 1.05  # times the least possible
# Accesses an element where one does not do; all are to lines that the same program has just read or written.
AGAIN = {
    # Lanes of a row's last tile that lie beyond the row read its last position again.
    "epilogue: x": 1.06,
    "residual: x": 1.15,
    "residual: shortcut": 1.15,
    # Windows that overlap, and the row that two programs share; rows themselves are read once by a program.
    "epilogue, pool 2 2: x": 1.15,
    "epilogue, pool 3 2: x": 1.91,
    "epilogue, pool 3 2 1: x": 1.91,
    "epilogue, pool 3 1 1: x": 5.14,
    # The parts of a map raise its key one after the other.
    "spatial_argmax, channels_last: keys": 2,
    "epilogue, pool 2 2: keys": 3,
    "epilogue, pool 3 2: keys": 3,
    "epilogue, pool 3 2 1: keys": 3,
    "epilogue, pool 3 1 1: keys": 12,
}
HALF, CHANNELS_LAST = torch.float16, torch.channels_last
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Traffic:
    """Addresses of elements that kernels load, store and update."""

    def __init__(self) -> None:
        self.reads: list[np.ndarray] = []
        self.writes: list[np.ndarray] = []

    def of(self, tensor: Tensor, *, wide: int = 1) -> tuple[float, float, float, float]:
        """(reads, different reads, writes, different writes) for each number of the tensor.

        wide: numbers that one access takes.
        """
        start = tensor.untyped_storage().data_ptr()
        end, count = start + tensor.untyped_storage().nbytes(), tensor.numel() / wide
        found = []
        for accesses in (self.reads, self.writes):
            all_of = np.concatenate([np.zeros(0, np.int64), *accesses])
            own = all_of[(all_of >= start) & (all_of < end)]
            found += [len(own) / count, len(np.unique(own)) / count]
        return tuple(found)  # type: ignore[return-value]


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Traffic]:
    """Count the accesses of the kernels that are interpreted meanwhile."""
    traffic, builder = Traffic(), interpreter.InterpreterBuilder
    load, store, update = (getattr(builder, f"create_{name}") for name in ("masked_load", "masked_store", "atomic_rmw"))

    def note(accesses: list[np.ndarray], pointers: Any, mask: Any) -> None:
        addresses, taken = np.broadcast_arrays(pointers.data, mask.data)
        accesses.append(addresses[taken.astype(bool)].astype(np.int64).ravel())

    def loads(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        note(traffic.reads, pointers, mask)
        return load(self, pointers, mask, *rest)

    def stores(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note(traffic.writes, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def updates(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note(traffic.writes, pointers, mask)
        return update(self, operation, pointers, value, mask, *rest)

    with monkeypatch.context() as patched:
        for name, method in (("masked_load", loads), ("masked_store", stores), ("atomic_rmw", updates)):
            patched.setattr(builder, f"create_{name}", method)
        yield traffic


class Case(NamedTuple):
    """An operator's launch with the tensors that it reads and writes."""

    launch: Callable[[], object]
    reads: dict[str, Tensor]
    writes: dict[str, Tensor]
    wide: int = 1  # numbers of `reads` that one access takes


def maps(*shape: int, format: torch.memory_format = CHANNELS_LAST) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=g).to(HALF).contiguous(memory_format=format)


def blank(N: int, C: int) -> Tensor:
    return torch.full((N, C), uk.BLANK)


def high(C: int) -> Tensor:
    return torch.full((C,), 1e30)


def argmax_case(format: torch.memory_format) -> Case:
    x, keys = maps(2, 64, 27, 27, format=format), blank(2, 64)
    return Case(lambda: argmax.launch(x, high(64), None, keys), {"x": x}, {"keys": keys})


def argmax_inside_case() -> Case:
    x, keys = maps(2, 64, 27, 27), blank(2, 64)
    inside = x[:, :, 3:20, 2:21]
    return Case(lambda: argmax.launch(x, high(64), (3, 20, 2, 21), keys), {"inside": inside}, {"keys": keys})


def epilogue_case(pool: tuple[int, ...], size: int = 27) -> Case:
    x, keys = maps(1, 64, size, size), blank(1, 64)
    y = epilogue.new_map(x, pool)
    floor, bias = high(64), torch.zeros(64, dtype=HALF)
    return Case(lambda: epilogue.launch(x, bias, "relu", pool, False, floor, keys, y), {"x": x}, {"y": y, "keys": keys})


def residual_case() -> Case:
    x, shortcut, keys, y = maps(2, 64, 14, 14), maps(2, 64, 14, 14), blank(2, 64), maps(2, 64, 14, 14)
    floors = [high(64), None, None, None]
    bias = torch.zeros(64, dtype=HALF)
    return Case(
        lambda: residual.launch(x, shortcut, bias, None, "relu", floors, keys, None, None, None, y=y),
        {"x": x, "shortcut": shortcut},
        {"y": y, "keys": keys},
    )


def normalize_case(stride: int) -> Case:
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    blocks: tuple[int, ...] = ()
    y = torch.empty(2, 64, 64, 3, dtype=HALF)
    if stride:
        layout = uk.Blocks.of(3, (64, 64), (3 * stride - 1,) * 2, uk.ConvGeometry((stride, stride), (2, 2)))
        blocks, y = layout.as_ints(), torch.empty(2, *layout.size, layout.channels, dtype=HALF)
    return Case(lambda: normalize.launch(pixels, MEAN, STD, HALF, blocks, y), {"pixels": pixels}, {"y": y})


def topk_case(clear: bool) -> Case:
    keys, state = uk.pack(torch.randn(256, 32), torch.zeros(256, 32, dtype=torch.int64)), uk.topk_state(32, 64)
    state[:, :64], state[:, 64:128] = uk.pack(high(64), torch.zeros(64, dtype=torch.int64)), torch.arange(64)
    return Case(
        lambda: topk.launch(state, keys, torch.arange(256), overflows=True, clear=clear),
        {"keys": keys},
        {"keys": keys} if clear else {},
    )


def magnitudes_case(dtype: torch.dtype, width: int) -> Case:
    x = maps(2, 3, 8, width).to(dtype).contiguous(memory_format=CHANNELS_LAST)
    wide = 4 if width % 4 == 0 and dtype == HALF else 1
    return Case(lambda: magnitudes.launch(x, (), ()), {"x": x}, {}, wide)


CASES: dict[str, Callable[[], Case]] = {
    "spatial_argmax, channels_last": lambda: argmax_case(CHANNELS_LAST),
    "spatial_argmax, contiguous": lambda: argmax_case(torch.contiguous_format),
    "spatial_argmax, inside": argmax_inside_case,
    "epilogue": lambda: epilogue_case(()),
    "epilogue, pool 2 2": lambda: epilogue_case((2, 2, 0), 28),
    "epilogue, pool 3 2": lambda: epilogue_case((3, 2, 0)),
    "epilogue, pool 3 2 1": lambda: epilogue_case((3, 2, 1), 28),
    "epilogue, pool 3 1 1": lambda: epilogue_case((3, 1, 1)),
    "residual": residual_case,
    "normalize": lambda: normalize_case(0),
    "normalize into blocks of 4": lambda: normalize_case(4),
    "topk_merge_": lambda: topk_case(False),
    "topk_merge_, cleared": lambda: topk_case(True),
    "magnitudes, words": lambda: magnitudes_case(HALF, 20),
    "magnitudes, numbers": lambda: magnitudes_case(torch.float32, 21),
}


@pytest.mark.parametrize("name", CASES)
def test_addresses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]()
    with counted(monkeypatch) as traffic:
        case.launch()
    for tensor, value in case.reads.items():
        all_reads, different, *_ = traffic.of(value, wide=case.wide)
        assert different == 1, tensor  # each number once, and none beside them
        assert all_reads <= SLACK * AGAIN.get(f"{name}: {tensor}", 1), f"{tensor}: {all_reads:.3f}"
    for tensor, value in case.writes.items():
        *_, all_writes, different = traffic.of(value)
        assert different == 1, tensor
        assert all_writes <= SLACK * AGAIN.get(f"{name}: {tensor}", 1), f"{tensor}: {all_writes:.3f}"


def test_addresses_beyond_the_least_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    x, keys = maps(1, 8, 5, 5), blank(1, 8)
    with counted(monkeypatch) as traffic:
        for _ in range(2):
            argmax.launch(x, None, None, keys)
    assert traffic.of(x)[:2] == (2, 1)
    assert traffic.of(x[:, :, 1:])[0] != 2  # of another number of elements
