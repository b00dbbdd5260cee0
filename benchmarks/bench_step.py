"""Benchmark one step of a scan against the bare forward pass, the amax + topk hook and the naive hook.

Every convolution is read. All contenders take the same normalised batch, in the step's precision, from the device's
memory, and stop after the last layer that is read. The top-k is filled as in a long scan (`stream.py`).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

import unitvis_kernels as uk
from benchmarks import stream
from benchmarks.naive import DeviceHook, HostHook, cut, fold, network
from benchmarks.sizes import Sizes
from benchmarks.timing import Timer, captured
from unitvis.bench.bench import BARE_FORWARD, BASELINES, DEVICE_HOOK, NAIVE_HOOK, synthetic_images
from unitvis.half_precision.step import HALF
from unitvis.network.forward import COMPUTE_BATCH
from unitvis.ranking.recorder import Recorder
from unitvis.state.topk import TopK

UNITVIS, CAPTURED, COMPILED = "unitvis", ", captured", ", torch.compile"
HALF_OR_FULL = {"fp32": torch.float32} | HALF


def _contenders(form: Sizes, kind: str) -> list[str]:
    """Names of the contenders, in the order in which they take turns."""
    names = [BARE_FORWARD, UNITVIS, DEVICE_HOOK, NAIVE_HOOK]
    if kind == "cuda":
        names[1:1] = [BARE_FORWARD + CAPTURED]
        names.append(DEVICE_HOOK + CAPTURED)
    return names + ([BARE_FORWARD + COMPILED, DEVICE_HOOK + COMPILED] if form.compiled else [])


CASES: dict[str, Callable[[Sizes, str], list[tuple[Any, ...]]]] = {
    "test_step": lambda form, kind: [
        (contender, *shape, turn)
        for *shape, turn in itertools.product(form.networks, form.precisions, form.batches, range(form.turns))
        for contender in _contenders(form, kind)
    ]
}


@cache
def prepared(name: str, precision: str, size: int, side: int, device: torch.device) -> tuple[Any, ...]:
    """Prepare a network and check that all agree; returns (model in the precision, layers, batch, Recorder)."""
    loaded = network(name)
    model, transform = loaded.model.to(device), loaded.transform
    assert transform is not None
    pixels = torch.from_numpy(synthetic_images(size, (side, side))).to(device)
    dtype = HALF_OR_FULL[precision]
    recorder = Recorder(model, precision=precision, batch_size=size).__enter__()
    recorder.prepare((3, side, side))
    batch = transform.normalize(pixels, dtype)
    recorder(batch, torch.arange(size, device=device))
    recorder.flush()
    layers = [layer.name for layer in recorder.network.layers]
    own = model if precision == "fp32" else copy.deepcopy(model).to(device, dtype, memory_format=torch.channels_last)
    check(recorder, own, layers, batch)
    return own, layers, batch, recorder


def keys_of(recorder: Recorder, batch: Tensor) -> Tensor:
    """Compute the step's keys, int64 [N, units], of a batch."""
    if recorder.precision != "fp32":
        return recorder._step.keys(batch)
    with recorder.network.reading() as canonical:  # without a threshold, so that every position is found
        return torch.cat([canonical.keys(part) for part in batch.split(COMPUTE_BATCH)])


def check(recorder: Recorder, model: torch.nn.Module, layers: list[str], batch: Tensor) -> None:
    """Assert that the step's values and images are those of both hooks in the same precision, up to rounding.

    A rewritten copy of the model, or another batch, sums in another order; so images may differ only if their values
    are that close.
    """
    ids = torch.arange(len(batch), device=batch.device)
    own, _, _ = uk.topk_read(recorder.topk.tensor)
    found = uk.unpack(keys_of(recorder, batch))[0]  # [N, units]
    with DeviceHook(model, layers) as strong, HostHook(model, layers) as host:
        strong(batch, ids)
        host(batch, ids)
    start, k = 0, 9
    for index in range(len(layers)):
        values, places = strong.tops[index]
        units = slice(start, start + len(values))
        live = min(k, len(batch))
        slack = float(values[:, :live].abs().max()) * max(1e-4, 16 * torch.finfo(batch.dtype).eps)
        top = [found[:, units].T.topk(live).values, own[units, :live], host.tops[index][0][:, :live].to(batch.device)]
        top.append(found[:, units].T.gather(1, places[:, :live]))  # the step's values of the DeviceHook's images
        for one in top:
            torch.testing.assert_close(one.float(), values[:, :live].float(), rtol=0.0, atol=slack)
        start = units.stop


def compiled(
    maps: Callable[[Tensor], list[Tensor]], recorder: Recorder, batch: Tensor, ids: Tensor
) -> Callable[[], None]:
    """Compile the forward pass; if several layers are read, with amax and a running top-k of all of them at once."""
    found = uk.unpack(keys_of(recorder, batch))[0].to(batch.dtype)  # [N, units]
    best = found.new_full((found.shape[1], 9), -torch.inf)
    best_ids = ids.new_full(best.shape, -1)

    def ranked(batch: Tensor) -> None:
        fold(best, best_ids, torch.cat([one.amax((2, 3)) for one in maps(batch)], dim=1), ids)

    every = len(maps(batch)) > 1
    ahead = torch.compile(ranked if every else maps, dynamic=False)

    def run() -> None:
        with torch.inference_mode():
            ahead(batch)

    run()
    if every:
        live = min(best.shape[1], len(batch))
        slack = float(found.abs().max()) * max(1e-4, 16 * torch.finfo(batch.dtype).eps)
        torch.testing.assert_close(best[:, :live], found.T.topk(live).values, rtol=0.0, atol=slack)
    return run


@cache
def prepared_contender(
    contender: str, name: str, precision: str, size: int, side: int, device: torch.device
) -> tuple[Callable[[], None], Callable[[], object] | None, dict[str, Any]]:
    """Make a contender, warm, once for all its turns.

    Returns (a callable of one step, a callable to run before it untimed or None, further entries of its row).
    """
    model, layers, batch, recorder = prepared(name, precision, size, side, device)
    ids = torch.arange(size, device=device)
    if contender == UNITVIS:
        state = TopK.empty(recorder.topk.units, recorder.topk.places, device).tensor
        share = stream.fill(state, keys_of(recorder, batch))

        def run() -> None:
            recorder(batch, ids)
            recorder.flush()

        how = {key: value for key, value in recorder.about()["scan"].items() if key != "candidates"}
        return run, lambda: recorder.topk.tensor.copy_(state), {"entered": share, "how": how}
    if contender.endswith(COMPILED):
        maps = cut(model, layers if contender.startswith(DEVICE_HOOK) else layers[-1:])
        return compiled(maps, recorder, batch, ids), None, {}
    kind = BASELINES[contender.removesuffix(CAPTURED)]
    hooks = kind(model, layers)

    def hooked() -> None:
        with hooks:
            hooks(batch, ids)

    return captured(hooked, device) if contender.endswith(CAPTURED) else hooked, None, {}


def test_step(case: tuple[str, str, str, int, int], timer: Timer, form: Sizes, device: torch.device) -> None:
    contender, name, precision, size, turn = case
    run, setup, extra = prepared_contender(contender, name, precision, size, form.side, device)
    row = {"kind": "step", "network": name, "precision": precision, "images": size, "contender": contender}
    if device.type == "cpu" or contender == NAIVE_HOOK:  # they take seconds each
        timer.rounds = 1
    timer(run, setup=setup, warm=turn > 0, **row, **extra)
