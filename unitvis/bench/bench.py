"""unitvis bench: a scan against what one would write without it, on the same images; checked equal, then timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from unitvis.bench.baselines import DeviceHook, Forward, HostHook
from unitvis.errors import UnitvisError
from unitvis.half_precision.step import HALF
from unitvis.network.canonical import canonical_settings
from unitvis.network.forward import COMPUTE_BATCH, compute_batch
from unitvis.network.network import Network
from unitvis.ranking.recorder import Recorder
from unitvis.results.arrays import UNSEPARATED
from unitvis.run import Run
from unitvis.scanning.precision import plan, speed
from unitvis.sources.transform import Transform

K, READ = 9, 4 * COMPUTE_BATCH
SECONDS = 45.0  # what all passes over the images together may take
MOST, FEWEST, ROUNDS = 2048, 2 * COMPUTE_BATCH, 3
HOST, DEVICE, BARE, FLOAT = "naive host hook", "amax + topk hook", "bare forward", "unitvis, float32"
BASELINES: dict[str, type[Forward]] = {HOST: HostHook, DEVICE: DeviceHook, BARE: Forward}
TENSOR_FLOAT = "; where PyTorch is left to choose, float32 convolutions of the others are in TensorFloat-32"
CLOSE = 1e-4  # of a layer's largest response: what another compute batch may change

Pixels = NDArray[np.uint8]
Contender = Callable[[], Callable[[], object]]  # prepares, and gives what is to be timed


def bench(
    model: nn.Module, transform: Transform, device: torch.device | str | None = None, count: int | None = None
) -> str:
    """How fast a scan and the baselines are, in lines to print; every one of them was first found to be right.

    transform: what the model was trained with; its crop is the size of the images (224 without one). count: images;
    None: as many as a minute allows. Raises UnitvisError where two disagree.
    """
    if count is not None and count < 1:
        raise UnitvisError(f"the number of images must be at least 1, not {count}")
    crop = transform.crop or 224
    size = crop if isinstance(crop, tuple) else (crop, crop)
    network = Network(model, device=device, transform=transform)
    network.examine((3, *size))
    network.find_receptive_fields()
    with network.evaluating():
        one = Bench(network)
        if count is None:
            count = one.affordable(pictures(2 * COMPUTE_BATCH, size))
        images = pictures(count, size)
        said = one.check(images)
        rounds = ROUNDS if count > FEWEST else 1
        seconds = interleaved(one.contenders(images), rounds, network.device)
        plans = [plan(n, network.units, K, network.device, rereadable=True).line for n in (count, 10**6)]
    return "\n".join([
        f"{count:,} images of {size[0]} x {size[1]} in memory, {network.units:,} units of {len(network.layers)} "
        f"layers, {network.device}; equal: {said}",
        *table(seconds, count),
        f"medians of {rounds} rounds in which all took turns, each up to the last of the layers; the amax + topk hook "
        f"finds no positions{TENSOR_FLOAT if network.device.type == 'cuda' else ''}",
        f"what scan does with these images: {plans[0]}",
        f"with a million: {plans[1]}",
    ])  # fmt: skip


class Bench:
    """The contenders for one network whose layers are known."""

    def __init__(self, network: Network) -> None:
        self.model, self.device = network.model, network.device
        # What the images are is what the model gets, so nothing is resized or cropped.
        self.transform = replace(network.transform or Transform(), resize=None, crop=None)
        self.shape = network.input_shape
        self.layers = [layer.name for layer in network.layers]
        self.half = fastest_half(self.device)

    def contenders(self, images: Pixels) -> dict[str, Contender]:
        """Name -> what prepares a pass over the images."""

        def baseline(kind: type[Forward]) -> Contender:
            return lambda: lambda: self.baseline(kind, images)

        def unitvis(precision: str) -> Contender:
            def prepared() -> Callable[[], object]:
                recorder = self._recorder(precision)  # layers and receptive fields are found once a model
                return lambda: self._scan(recorder, images)

            return prepared

        found = {name: baseline(kind) for name, kind in BASELINES.items()} | {FLOAT: unitvis("fp32")}
        return found | ({f"unitvis, exact by {self.half}": unitvis(self.half)} if self.half else {})

    def baseline(self, kind: type[Forward], images: Pixels, *, canonical: bool = False) -> Forward:
        """A baseline after a pass over the images, in batches as a user reads them or as canonical responses need."""
        with torch.inference_mode(), kind(self.model, self.layers, K) as hooks:
            for start, pixels in batches(images, COMPUTE_BATCH if canonical else READ):
                batch = self.transform.normalize(pixels.to(self.device))
                ids = torch.arange(start, start + len(batch), device=self.device)
                if canonical:
                    with canonical_settings(self.device):
                        hooks(compute_batch(batch), ids)
                else:
                    hooks(batch, ids)
        return hooks

    def scan(self, images: Pixels, precision: str = "fp32") -> Run:
        """The run of the images, exact in either way."""
        recorder = self._recorder(precision)
        found = self._scan(recorder, images)
        return recorder.result() if found is None else found

    def _recorder(self, precision: str) -> Recorder:
        recorder = Recorder(self.model, self.layers, K, transform=self.transform, precision=precision, batch_size=READ)
        recorder.prepare(self.shape)
        return recorder

    def _scan(self, recorder: Recorder, images: Pixels) -> Run | None:
        """Scan; after half precision also compute again what can win, which gives the run."""
        with recorder:
            for start, pixels in batches(images, READ):
                recorder(pixels, torch.arange(start, start + len(pixels)))
        return None if recorder.precision == "fp32" else recorder.result(images)

    def affordable(self, few: Pixels) -> int:
        """How many images the passes over them leave time for."""
        self.baseline(Forward, few)
        start = time.perf_counter()
        self.baseline(Forward, few)
        synchronise(self.device)
        seconds = (time.perf_counter() - start) / len(few)
        passes = 4 + (len(BASELINES) + (2 if self.half else 1)) * ROUNDS
        return min(MOST, max(FEWEST, int(SECONDS / passes / seconds) // COMPUTE_BATCH * COMPUTE_BATCH))

    def check(self, images: Pixels) -> str:
        """Compare all contenders; UnitvisError where two disagree. Says what was compared and how closely."""
        run = self.scan(images)
        host = self.baseline(HostHook, images, canonical=True)
        with canonical_settings(self.device):  # PyTorch's own for a GPU are TensorFloat-32
            timed, strong = self.baseline(HostHook, images), self.baseline(DeviceHook, images)
        assert isinstance(host, HostHook) and isinstance(timed, HostHook)  # noqa: S101, PT018
        assert isinstance(strong, DeviceHook)  # noqa: S101
        for index, name in enumerate(self.layers):
            if len(wrong := units_apart(run, name, host.tops[index])):
                raise UnitvisError(f"unit {wrong[0]} of layer {name!r}: the scan and the naive hook disagree")
            values = host.tops[index][0]
            largest = float(values[values.isfinite()].abs().max())
            for other in (timed.tops[index][0], strong.tops[index][0].cpu()):
                if not torch.allclose(other, values, rtol=CLOSE, atol=CLOSE * largest):
                    raise UnitvisError(f"layer {name!r}: a baseline has other values than canonical batches give")
        said = "scan and naive hook, bit for bit in canonical batches; all values to rounding"
        if self.half is None:
            return said
        exact = self.scan(images, self.half)
        decided = 0
        for name, top in exact.tops.items():
            sure = top.status != UNSEPARATED
            decided += int(sure.sum())
            same = (top.images == run[name].images) & (top.positions == run[name].positions).all(axis=2)
            if not (same & (top.values == run[name].values))[sure].all():
                raise UnitvisError(f"layer {name!r}: the exact scan by way of {self.half} has other winners")
        again = exact.manifest["rescored"]["images"]
        return f"{said}; by way of {self.half} {decided:,} units are decided and equal, {again:,} images computed twice"


def units_apart(run: Run, layer: str, top: tuple[Tensor, Tensor, Tensor]) -> NDArray[np.int64]:
    """Units of a layer whose winners are not, bit for bit, a hook's (values, ids, positions), each [units, k]."""
    found = run[layer]
    values, ids, positions = (part.cpu().numpy() for part in top)
    flat = found.positions[..., 0].astype(np.int64) * found.info["width"] + found.positions[..., 1]
    same = (found.values == values) & (found.images == ids) & (flat == positions)
    return np.flatnonzero(~(same | ((ids < 0) & (found.images < 0))).all(axis=1))


def fastest_half(device: torch.device) -> str | None:
    """The half precision that a scan would choose, if it is faster than float32 on this device."""
    speeds = {precision: speed(device, precision) for precision in HALF}
    best = "fp16" if speeds["fp16"] >= 0.7 * speeds["bf16"] else "bf16"
    return best if speeds[best] > 1 else None


def pictures(count: int, size: tuple[int, int]) -> Pixels:
    """Something to look at, uint8 [count, H, W, 3]: blots of colour under fine noise, the same every time."""
    g = torch.Generator().manual_seed(0)
    drawn = np.empty((count, *size, 3), np.uint8)
    for start in range(0, count, READ):
        some = min(READ, count - start)
        blots = F.interpolate(torch.rand(some, 3, 8, 8, generator=g), size, mode="bilinear")
        mixed = blots * 200 + torch.rand(some, 3, *size, generator=g) * 55
        drawn[start : start + some] = mixed.byte().permute(0, 2, 3, 1).numpy()
    return drawn


def batches(images: Pixels, size: int) -> Iterator[tuple[int, Tensor]]:
    """(ordinal of the first, uint8 [at most `size`, H, W, 3])."""
    for start in range(0, len(images), size):
        yield start, torch.from_numpy(images[start : start + size])


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(contenders: Mapping[str, Contender], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each; they take turns, so that what slows the machine slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, prepare in contenders.items():
            run = prepare()
            synchronise(device)
            start = time.perf_counter()
            run()
            synchronise(device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def table(seconds: Mapping[str, float], count: int) -> Sequence[str]:
    """Lines: images a second, and how many times as fast as each of the baselines."""
    lines = [f"{'':<26} {'images/s':>9} {'x ' + HOST:>18} {'x ' + DEVICE:>19} {'x ' + BARE:>15}"]
    for name, own in seconds.items():
        host, device, bare = (seconds[other] / own for other in (HOST, DEVICE, BARE))
        lines.append(f"{name:<26} {count / own:>9,.0f} {host:>18.2f} {device:>19.2f} {bare:>15.2f}")
    return lines
