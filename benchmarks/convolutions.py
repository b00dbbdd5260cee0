"""Measure convolutions on this GPU and fill kernels/unitvis_kernels/measured.json.

Each convolution of AlexNet, VGG16 and ResNet-50 at 224 x 224 is timed through `conv_argmax` (fused), through cuDNN
followed by `epilogue` (separate) and, for comparison, through cuDNN's convolution with ReLU and `spatial_argmax`
(rival). If one of the first two is wrong, nothing is written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unitvis_kernels as uk
from benchmarks import machine, results
from benchmarks.naive import network
from benchmarks.timing import copies, rotating
from unitvis.bench.bench import synchronise
from unitvis.half_precision.parts import Chain, Taps
from unitvis.half_precision.rewrite import rewritten
from unitvis.network.network import Network
from unitvis_kernels.choice import layer_key

NETWORKS, SIDE, BATCH, CALLS, ROUNDS = ("alexnet", "vgg16", "resnet50"), 224, 128, 8, 30
TABLE = machine.ROOT / "kernels" / "unitvis_kernels" / "measured.json"


class Layer(NamedTuple):
    """Convolution with the size (H, W) of its input."""

    conv: nn.Conv2d
    size: tuple[int, int]

    def key(self, dtype: torch.dtype) -> str:
        """Key of the layer in measured.json."""
        conv = self.conv
        around = zip(self.size, conv.padding, conv.dilation, conv.kernel_size, conv.stride, strict=True)
        height, width = ((size + 2 * int(p) - d * (k - 1) - 1) // s + 1 for size, p, d, k, s in around)
        shape = conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.groups
        return layer_key(*shape, (height, width), dtype)  # type: ignore[arg-type]


def layers(model: nn.Module, side: int) -> dict[str, Layer]:
    """Find the different convolutions for which a scan chooses between fused and separate, by their float16 keys."""
    examined = Network(model)
    examined.examine((3, side, side))
    copied = rewritten(model, {layer.name: slice(0) for layer in examined.layers}, Taps(), one_pass=False)
    found: dict[str, Layer] = {}

    def see(chain: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(chain, Chain)
        if chain.pool is None:  # a map that is pooled at once is never stored, so there is no choice
            one = Layer(chain.conv, tuple(inputs[0].shape[2:]))
            found.setdefault(one.key(torch.float16), one)

    for module in copied.modules():
        if isinstance(module, Chain):
            module.register_forward_pre_hook(see)
    with torch.inference_mode():
        copied(torch.zeros(1, 3, side, side))
    return found


def measure(layer: Layer, batch: int, dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, float]:
    """Measure median microseconds of each way to compute one layer, after checking that they agree."""
    conv = layer.conv
    weight = conv.weight.detach().to(device, dtype, memory_format=torch.channels_last)
    bias = torch.zeros(conv.out_channels, device=device, dtype=dtype) if conv.bias is None else conv.bias.detach()
    bias = bias.to(device, dtype)
    g = torch.Generator(device).manual_seed(0)
    x = torch.empty(
        (batch, conv.in_channels, *layer.size), dtype=dtype, device=device, memory_format=torch.channels_last
    ).normal_(generator=g)
    geometry: tuple[Any, ...] = (conv.stride, conv.padding, conv.dilation, conv.groups)

    def rival(x: Tensor) -> Any:
        y = torch.cudnn_convolution_relu(x, weight, bias, *geometry)
        return uk.spatial_argmax(y), y

    ways: dict[str, Callable[[Tensor], Any]] = {
        "fused_us": lambda x: uk.conv_argmax(x, weight, bias, *geometry, activation="relu"),
        "separate_us": lambda x: uk.epilogue(F.conv2d(x, weight, None, *geometry), bias, "relu"),
    }
    if device.type == "cuda":
        ways["rival_us"] = rival
    want = F.conv2d(x.float(), weight.float(), bias.float(), *geometry).relu()
    for name, way in list(ways.items()):
        keys, y = way(x)
        wrong = float((y.float() - want).norm() / want.norm())
        values, positions = uk.unpack(keys)
        stored = y.flatten(2).gather(2, positions[..., None])[..., 0].float()
        if not wrong < 8 * torch.finfo(dtype).eps or not torch.equal(values.clamp_min(0), stored):
            verdict = f"{layer.key(dtype)}: {name} is wrong (relative error {wrong:.2g})"
            if way is not rival:
                raise SystemExit(f"{verdict}; nothing is written")
            print(f"{verdict} and left out", flush=True)  # it is cuDNN's kernel, and no choice depends on it
            del ways[name]

    times: dict[str, list[float]] = {name: [] for name in ways}
    operands = copies([x], CALLS)
    runs = {name: rotating(way, operands, device) for name, way in ways.items()}
    for number in range(rounds + 1):
        for name, (run, calls) in runs.items():
            synchronise(device)
            start = time.perf_counter()
            run()
            synchronise(device)
            if number:
                times[name].append((time.perf_counter() - start) / calls)
    return {name: round(statistics.median(found) * 1e6, 2) for name, found in times.items()}


def fill(table: Path, architecture: str, measured: dict[str, dict[str, float]]) -> None:
    """Write the times measured on an architecture into the table, in place of earlier ones of the same layers."""
    known = json.loads(table.read_text())
    own = known["layers"].setdefault(architecture, {})
    own |= {layer: {name: times[name] for name in ("fused_us", "separate_us")} for layer, times in measured.items()}
    known["format"] = known["format"].replace(" Empty: nothing has been measured yet.", "")
    table.write_text(json.dumps(known, indent=2) + "\n")


def main() -> int:
    """Measure all layers and write the table; returns 0, or 2 without a GPU."""
    argparse.ArgumentParser(prog="python -m benchmarks.convolutions", description=__doc__).parse_args()
    if not torch.cuda.is_available():
        print("a GPU is needed: measured.json says what is fastest on one", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "ieee"  # for the reference
    described = machine.describe(device)
    found = {key: one for name in NETWORKS for key, one in layers(network(name).model, SIDE).items()}
    measured: dict[str, dict[str, float]] = {}
    for one in found.values():
        for dtype in (torch.float16, torch.bfloat16):
            times = measured[one.key(dtype)] = measure(one, BATCH, dtype, device, ROUNDS)
            times_text = ", ".join(f"{name.removesuffix('_us')} {value:.1f}" for name, value in times.items())
            print(f"{one.key(dtype):<44} us: {times_text}", flush=True)
    fill(TABLE, described["architecture"], measured)
    rows = [{"layer": layer, "batch": BATCH} | times for layer, times in measured.items()]
    target = results.RESULTS / machine.file_name(described["name"])
    results.write(target, convolutions={"machine": described, "rows": rows})
    wins = sum(times["fused_us"] < times["separate_us"] for times in measured.values())
    print(f"conv_argmax is the faster way for {wins} of {len(measured)} layers; {TABLE} and {target} are written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
