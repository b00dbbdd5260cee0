"""Time one step of a scan beside the bare forward pass, captured and compiled: minutes on one GPU.

    python -m benchmarks.steps FILE [NETWORK ...]

Every convolution is read, in float16, batches of 256, random weights. First the step's responses are compared with
those of hooks on the model. All contenders then take turns. FILE gets the figures as JSON, again after each network.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import unitvis_kernels as uk
from benchmarks import stream
from benchmarks.naive import DeviceHook, Forward, cut, network
from benchmarks.timing import captured
from unitvis.bench.bench import synthetic_images
from unitvis.ranking.recorder import Recorder
from unitvis.state.topk import TopK

NETWORKS, BATCH, SIDE, ROUNDS, CALLS = ("alexnet", "resnet50", "vgg16"), 256, 224, 15, 8
UNITVIS, CAPTURED, COMPILED = "unitvis", "bare forward, captured", "bare forward, torch.compile"


class Prepared(NamedTuple):
    """A network ready for its contenders."""

    model: torch.nn.Module  # float16, channels last
    layers: list[str]
    batch: Tensor  # float16 [BATCH, 3, SIDE, SIDE], channels last
    ids: Tensor
    recorder: Recorder


def half(name: str) -> tuple[torch.nn.Module, Tensor]:
    """(the network, a batch of images as its input), both float16 in channels last on the GPU."""
    loaded = network(name)
    pixels = torch.from_numpy(synthetic_images(BATCH, (SIDE, SIDE))).cuda()
    batch = loaded.transform.normalize(pixels, torch.float16)
    return copy.deepcopy(loaded.model).to("cuda", torch.float16, memory_format=torch.channels_last), batch


def prepare(name: str) -> Prepared:
    """Prepare a network and record its batch once."""
    model, batch = half(name)
    ids = torch.arange(BATCH, device="cuda")
    recorder = Recorder(network(name).model.cuda(), precision="fp16", batch_size=BATCH).__enter__()
    recorder.prepare((3, SIDE, SIDE))
    recorder(batch, ids)
    recorder.flush()
    return Prepared(model, [layer.name for layer in recorder.network.layers], batch, ids, recorder)


def check(ready: Prepared) -> dict[str, float]:
    """Compare the step with hooks, and what it merges under thresholds with what it gives without any.

    Returns the largest difference of a response, as a share of its layer's largest. Raises AssertionError.
    """
    step = ready.recorder._step
    found, start, worst = uk.unpack(step.keys(ready.batch))[0], 0, 0.0
    with DeviceHook(ready.model, ready.layers) as hooks:
        hooks(ready.batch, ready.ids)
    for values, images in hooks.tops.values():
        own = found[:, start : start + len(values)].T.gather(1, images[:, :9])
        worst = max(worst, float((own - values[:, :9].float()).abs().max() / values[:, :9].abs().max().float()))
        start += len(values)
    assert worst < 16 * torch.finfo(torch.float16).eps, worst
    topk = ready.recorder.topk
    topk.tensor.copy_(uk.topk_state(topk.units, topk.places, "cuda"))
    want = TopK.empty(topk.units, topk.places, topk.tensor.device)
    for turn in range(4):  # the first batches fill the places, in the later ones most responses lie below
        images = ready.batch.roll(turn, 2).flip(turn % 3 + 1 if turn else 0) * (1 - turn / 8)
        ready.recorder(images.contiguous(memory_format=torch.channels_last), ready.ids + turn * BATCH)
        ready.recorder.flush()
        want.merge(step.keys(images), ready.ids + turn * BATCH, overflows=True)
        assert torch.equal(topk.tensor, want.tensor), f"batch {turn}: other candidates under thresholds"
    return {"worst_relative_error": worst}


def compiled(model: torch.nn.Module, last: str, batch: Tensor) -> Callable[[], object]:
    """The forward pass up to a layer through torch.compile, compiled already."""
    ahead = torch.compile(cut(model, [last]), dynamic=False)

    def run() -> None:
        with torch.inference_mode():
            ahead(batch)

    run()
    return run


def contenders(ready: Prepared) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Name -> (one step, what to do before it untimed)."""
    topk, largest = ready.recorder.topk, ready.recorder.largest_inputs.tensor
    # As in a long stream: images whose inputs are larger than those of the batch hold all places.
    places = (largest.shape[1] - 2) // 2
    high = uk.pack(torch.full((places,), 1e30), torch.zeros(places, dtype=torch.int64)).to(largest)
    state = TopK.empty(topk.units, topk.places, topk.tensor.device).tensor
    stream.fill(state, ready.recorder._step.keys(ready.batch))
    hooks = Forward(ready.model, ready.layers)

    def bare() -> None:
        with hooks:
            hooks(ready.batch, ready.ids)

    def unitvis() -> None:
        ready.recorder(ready.batch, ready.ids)
        ready.recorder.flush()

    def as_in_a_long_stream() -> None:
        topk.tensor.copy_(state)
        largest[:, :places], largest[:, places : 2 * places] = high, 10**9 + torch.arange(places).to(largest)

    def nothing() -> None:
        pass

    made: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {UNITVIS: (unitvis, as_in_a_long_stream)}
    for name, make in (
        (CAPTURED, lambda: captured(bare, topk.tensor.device)),
        (COMPILED, lambda: compiled(ready.model, ready.layers[-1], ready.batch)),
    ):
        try:
            made[name] = make(), nothing
        except Exception as error:  # one contender less; the others count
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return made


def timed(
    runs: Mapping[str, tuple[Callable[[], object], Callable[[], object]]], rounds: int = ROUNDS
) -> dict[str, dict[str, float]]:
    """Median milliseconds of each contender, taking turns: of one call, and of a call among `CALLS` in a row."""
    flushed = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    single: dict[str, list[float]] = {name: [] for name in runs}
    row: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name, (run, before) in runs.items():
            before()
            flushed.zero_()
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            once = (time.perf_counter() - start) * 1e3
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            for _ in range(CALLS):
                run()
            last.record()
            torch.cuda.synchronize()
            if number >= 2:
                single[name].append(once)
                row[name].append(first.elapsed_time(last) / CALLS)
    return {
        name: {"ms": round(statistics.median(single[name]), 4), "ms_in_a_row": round(statistics.median(row[name]), 4)}
        for name in runs
    }


def measure(name: str) -> dict[str, Any]:
    """Check and time one network."""
    ready = prepare(name)
    how = {key: value for key, value in ready.recorder.about()["scan"].items() if key != "candidates"}
    return {"network": name, "images": BATCH, "how": how} | check(ready) | {"times": timed(contenders(ready))}


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A short table of rows: milliseconds, and the step's share of the others' time."""
    found = []
    for row in rows:
        times = {name: one["ms"] for name, one in row.get("times", {}).items()}
        shares = "".join(
            f" | {name} {ms:.3f} ({times[UNITVIS] / ms:.3f})" for name, ms in times.items() if name != UNITVIS
        )
        found.append(f"{row['network']}: unitvis {times[UNITVIS]:.3f} ms{shares}" if times else f"{row}")
    return found


def main() -> int:
    """Measure the networks; returns 0, or 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in given.networks:
        try:
            rows.append(measure(name))
        except Exception as error:  # the other networks count
            rows.append({"network": name, "error": f"{type(error).__name__}: {error}"[:2000]})
        given.file.write_text(json.dumps(rows, indent=1))
        print(lines(rows[-1:])[0], flush=True)
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
