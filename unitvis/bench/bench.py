"""Compare a scan with baselines on the same images: first check that their results are equal, then time them."""

from __future__ import annotations

import math
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
from unitvis.decoding.memory import available_memory
from unitvis.errors import UnitvisError, whole_number
from unitvis.half_precision.step import HALF
from unitvis.network.canonical import canonical_settings
from unitvis.network.forward import COMPUTE_BATCH, compute_batch
from unitvis.network.network import Network
from unitvis.ranking.recorder import Recorder
from unitvis.results.arrays import UNSEPARATED
from unitvis.run import Run
from unitvis.scanning.precision import plan, speed
from unitvis.sources.transform import Transform

K = 9
READ_BATCH = 4 * COMPUTE_BATCH  # images read at once, as `scan` does by default
MAX_SECONDS = 45.0  # of all passes over the images together
MAX_IMAGES, MIN_IMAGES = 2048, 2 * COMPUTE_BATCH
ROUNDS = 3  # how often each contender is timed
# names of contenders, also in results files
NAIVE_HOOK, DEVICE_HOOK, BARE_FORWARD = "naive host hook", "amax + topk hook", "bare forward"
SCAN_FLOAT32 = "unitvis, float32"
BASELINES: dict[str, type[Forward]] = {NAIVE_HOOK: HostHook, DEVICE_HOOK: DeviceHook, BARE_FORWARD: Forward}
TENSORFLOAT_NOTE = "; by default PyTorch computes float32 convolutions of the baselines in TensorFloat-32"
RELATIVE_TOLERANCE = 1e-4  # of a layer's largest response, between batches of different sizes

Pixels = NDArray[np.uint8]
Contender = Callable[[], Callable[[], object]]  # prepares a pass, and returns the callable that is timed


def bench(
    model: nn.Module, transform: Transform, device: torch.device | str | None = None, count: int | None = None
) -> str:
    """Measure the speed of a scan and of the baselines, after checking that all are right; returns lines to print.

    transform: the model's preprocessing; its crop is the size of the images (224 without one). count: number of images;
    None: as many as a minute allows. Raises UnitvisError if two contenders disagree.
    """
    crop = transform.crop or 224
    size = crop if isinstance(crop, tuple) else (crop, crop)
    if count is not None:
        count = whole_number("the number of images", count, 1)
        need, free = count * 3 * math.prod(size), available_memory()
        if need > free / 2:
            raise UnitvisError(
                f"{count:,} images of {size[0]} x {size[1]} take {need / 2**30:,.0f} GiB, more than half of the "
                f"{free / 2**30:.1f} GiB that are free; give a smaller --count"
            )
    network = Network(model, device=device, transform=transform)
    network.examine((network.input_channels(*size), *size))
    network.find_receptive_fields()
    with network.evaluating():
        contenders = Bench(network)
        if count is None:
            count = contenders.affordable_images(synthetic_images(2 * COMPUTE_BATCH, size))
        images = synthetic_images(count, size)
        agreement = contenders.check(images)
        rounds = ROUNDS if count > MIN_IMAGES else 1
        seconds = interleaved(contenders.contenders(images), rounds, network.device)
        plans = [plan(n, network.units, K, network.device, rereadable=True).line for n in (count, 10**6)]
    return "\n".join([
        f"{count:,} images of {size[0]} x {size[1]} in memory, {network.units:,} units of {len(network.layers)} "
        f"layers, {network.device}; equal: {agreement}",
        *table(seconds, count),
        f"medians of {rounds} rounds in which all took turns, each up to the last of the layers; the amax + topk hook "
        f"finds no positions{TENSORFLOAT_NOTE if network.device.type == 'cuda' else ''}",
        f"what scan does with these images: {plans[0]}",
        f"with a million: {plans[1]}",
    ])  # fmt: skip


class Bench:
    """Contenders for one network whose layers are known: scans and baselines."""

    def __init__(self, network: Network) -> None:
        self.model, self.device = network.model, network.device
        # The images have the size of the model's input, so nothing is resized or cropped.
        self.transform = replace(network.transform or Transform(), resize=None, crop=None)
        self.shape = network.input_shape  # [C, H, W]
        self.layers = [layer.name for layer in network.layers]
        self.half = fastest_half(self.device)

    def contenders(self, images: Pixels) -> dict[str, Contender]:
        """Name of each contender -> function that prepares a pass over the images."""

        def baseline(kind: type[Forward]) -> Contender:
            return lambda: lambda: self.baseline(kind, images)

        def unitvis(precision: str) -> Contender:
            def prepared() -> Callable[[], object]:
                recorder = self._recorder(precision)  # untimed: layers and receptive fields are found once a model
                return lambda: self._scan(recorder, images)

            return prepared

        found = {name: baseline(kind) for name, kind in BASELINES.items()} | {SCAN_FLOAT32: unitvis("fp32")}
        return found | ({f"unitvis, exact by {self.half}": unitvis(self.half)} if self.half else {})

    def baseline(self, kind: type[Forward], images: Pixels, *, canonical: bool = False) -> Forward:
        """Run a baseline over the images, in batches of 64; canonical: of 16, with canonical settings."""
        with torch.inference_mode(), kind(self.model, self.layers, K) as hooks:
            for start, pixels in batches(images, COMPUTE_BATCH if canonical else READ_BATCH):
                batch = self.transform.normalize(pixels.to(self.device), channels=self.shape[0])
                ids = torch.arange(start, start + len(batch), device=self.device)
                if canonical:
                    with canonical_settings(self.device):
                        hooks(compute_batch(batch), ids)
                else:
                    hooks(batch, ids)
        return hooks

    def scan(self, images: Pixels, precision: str = "fp32") -> Run:
        """Scan the images; exact, in float32 or by way of half precision."""
        recorder = self._recorder(precision)
        found = self._scan(recorder, images)
        return recorder.result() if found is None else found

    def _recorder(self, precision: str) -> Recorder:
        """Make a Recorder whose layers and receptive fields are known."""
        recorder = Recorder(
            self.model, self.layers, K, transform=self.transform, precision=precision, batch_size=READ_BATCH
        )
        recorder.prepare(self.shape)
        return recorder

    def _scan(self, recorder: Recorder, images: Pixels) -> Run | None:
        """Record all images; after half precision also re-rank, and return the run."""
        with recorder:
            for start, pixels in batches(images, READ_BATCH):
                recorder(pixels, torch.arange(start, start + len(pixels)))
        return None if recorder.precision == "fp32" else recorder.result(images)

    def affordable_images(self, sample: Pixels) -> int:
        """Number of images, MIN_IMAGES to MAX_IMAGES, that all passes can read in MAX_SECONDS; sample: to measure."""
        self.baseline(Forward, sample)
        start = time.perf_counter()
        self.baseline(Forward, sample)
        synchronise(self.device)
        seconds = (time.perf_counter() - start) / len(sample)
        passes = 4 + (len(BASELINES) + (2 if self.half else 1)) * ROUNDS
        return min(MAX_IMAGES, max(MIN_IMAGES, int(MAX_SECONDS / passes / seconds) // COMPUTE_BATCH * COMPUTE_BATCH))

    def check(self, images: Pixels) -> str:
        """Compare the results of all contenders; returns what was compared. UnitvisError if two disagree."""
        run = self.scan(images)
        host = self.baseline(HostHook, images, canonical=True)
        with canonical_settings(self.device):  # PyTorch's default on a GPU is TensorFloat-32
            timed, strong = self.baseline(HostHook, images), self.baseline(DeviceHook, images)
        assert isinstance(host, HostHook) and isinstance(timed, HostHook)  # noqa: S101, PT018
        assert isinstance(strong, DeviceHook)  # noqa: S101
        for index, name in enumerate(self.layers):
            if len(wrong := differing_units(run, name, host.tops[index])):
                raise UnitvisError(f"unit {wrong[0]} of layer {name!r}: the scan and the naive hook disagree")
            values = host.tops[index][0]
            largest = float(values[values.isfinite()].abs().max())
            for other in (timed.tops[index][0], strong.tops[index][0].cpu()):
                if not torch.allclose(other, values, rtol=RELATIVE_TOLERANCE, atol=RELATIVE_TOLERANCE * largest):
                    raise UnitvisError(f"layer {name!r}: a baseline has other values than canonical batches give")
        agreement = "scan and naive hook, bit for bit in canonical batches; all values to rounding"
        if self.half is None:
            return agreement
        exact = self.scan(images, self.half)
        decided = 0
        for name, top in exact.tops.items():
            sure = top.status != UNSEPARATED
            decided += int(sure.sum())
            same = (top.images == run[name].images) & (top.positions == run[name].positions).all(axis=2)
            if not (same & (top.values == run[name].values))[sure].all():
                raise UnitvisError(f"layer {name!r}: the exact scan by way of {self.half} has other winners")
        recomputed = exact.manifest["rescored"]["images"]
        return (
            f"{agreement}; by way of {self.half} {decided:,} units are decided and equal, {recomputed:,} images are "
            "computed again in float32"
        )


def differing_units(run: Run, layer: str, top: tuple[Tensor, Tensor, Tensor]) -> NDArray[np.int64]:
    """Units of a layer whose winners are not bit-equal to a hook's (values, ids, positions), each [units, k]."""
    found = run[layer]
    values, ids, positions = (part.cpu().numpy() for part in top)
    flat = found.positions[..., 0].astype(np.int64) * found.info["width"] + found.positions[..., 1]
    same = (found.values == values) & (found.images == ids) & (flat == positions)
    return np.flatnonzero(~(same | ((ids < 0) & (found.images < 0))).all(axis=1))


def fastest_half(device: torch.device) -> str | None:
    """Half precision ("fp16" or "bf16") that a scan would choose; None if float32 is faster on this device."""
    speeds = {precision: speed(device, precision) for precision in HALF}
    best = "fp16" if speeds["fp16"] >= 0.7 * speeds["bf16"] else "bf16"
    return best if speeds[best] > 1 else None


def synthetic_images(count: int, size: tuple[int, int]) -> Pixels:
    """Make images, uint8 [count, H, W, 3], of coloured blots and fine noise, the same every time."""
    g = torch.Generator().manual_seed(0)
    drawn = np.empty((count, *size, 3), np.uint8)
    for start in range(0, count, READ_BATCH):
        n = min(READ_BATCH, count - start)
        blots = F.interpolate(torch.rand(n, 3, 8, 8, generator=g), size, mode="bilinear")
        mixed = blots * 200 + torch.rand(n, 3, *size, generator=g) * 55
        drawn[start : start + n] = mixed.byte().permute(0, 2, 3, 1).numpy()
    return drawn


def batches(images: Pixels, size: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (ordinal of the first image, uint8 [at most `size`, H, W, 3])."""
    for start in range(0, len(images), size):
        yield start, torch.from_numpy(images[start : start + size])


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(contenders: Mapping[str, Contender], rounds: int, device: torch.device) -> dict[str, float]:
    """Measure median seconds of each contender, in turns, so that a slow moment of the machine slows all of them."""
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
    """Lines of a table: images a second of each contender, and how many times as fast as each baseline it is."""
    lines = [f"{'':<26} {'images/s':>9} {'x ' + NAIVE_HOOK:>18} {'x ' + DEVICE_HOOK:>19} {'x ' + BARE_FORWARD:>15}"]
    for name, own in seconds.items():
        host, device, bare = (seconds[other] / own for other in (NAIVE_HOOK, DEVICE_HOOK, BARE_FORWARD))
        lines.append(f"{name:<26} {count / own:>9,.0f} {host:>18.2f} {device:>19.2f} {bare:>15.2f}")
    return lines
