"""Projections: what in an image a response came from, by the deconvnet of Zeiler & Fergus (2013, arXiv:1311.2901, 2.1).

Everything in a layer's map but one neuron is set to zero and that neuron to 1; the signal goes back through transposed
filters and the switches of max-pooling, and at each ReLU what is negative of *it* is dropped, whatever the sign was on
the way up. Back-propagation does all of that but the last, which is changed here where gradients are computed: on the
nodes that the forward pass leaves behind, so that modules, functions, in-place and reused ReLUs are one and the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

import unitvis_kernels as uk
from unitvis.drawing.colours import GREY, signed
from unitvis.drawing.patches import Box, cut
from unitvis.errors import UnitvisError, check_unit, first_line
from unitvis.network.canonical import canonical_settings
from unitvis.network.forward import COMPUTE_BATCH, compute_batch
from unitvis.network.network import Network
from unitvis.results.arrays import LayerArrays
from unitvis.results.data import RunData
from unitvis.sources import Source, open_source
from unitvis.sources.transform import Transform

ROUNDS = 8  # ways back that share a forward pass
Neuron = tuple[int, int, int]  # channel, row, column


@dataclass(frozen=True, eq=False)
class Projection:
    """One response carried back to the pixels."""

    layer: str
    unit: int
    rank: int | None  # of the run's winner; None where the images were given without a run
    image: int  # id
    neuron: Neuron
    signal: NDArray[np.float32]  # [C, H, W], as large as the model's input; 0 where nothing came from
    method: str  # "deconvnet", and what of it does not hold for this network

    def picture(self, box: Box | None = None, size: int = 96) -> Image.Image:
        """`size` x `size` pixels of a box in model-input pixels (None: all); 0 is grey, and the largest magnitude
        inside the box is black or white: one symmetric scale for all colours, and another for every picture.
        """
        height, width = self.signal.shape[1:]
        left, upper, right, lower = box = box or (0, 0, width, height)
        seen = self.signal[:, max(upper, 0) : max(lower, 0), max(left, 0) : max(right, 0)]
        picture = signed(self.signal, float(np.abs(seen).max(initial=0)))
        return cut(picture, lambda inner: inner, box, (height, width), size, fill=GREY)


def project(
    model: nn.Module,
    images: object,
    layers: Sequence[str] | str | None = None,
    units: Iterable[int] | int | None = None,
    *,
    transform: Transform | None = None,
    device: torch.device | str | None = None,
) -> Iterator[Projection]:
    """Projections, one after the other, in any order; computed in batches, and only as far as they are asked for.

    images: a run, whose winners are projected (those that fired), or whatever `scan` takes, and then of each image
    the strongest response of each unit. layers: names; None is all of the run's. units: a number or numbers; None is
    all. ReLU6 and a clamp from 0 count as ReLU, without their upper bound: the signal starts at 1, whatever the
    response was. Any other activation has its ordinary gradient, which `method` says. Raises UnitvisError for a
    layer or unit that is not there, and for a network whose gradients cannot be had.
    """
    if isinstance(units, int | np.integer):
        units = [int(units)]
    chosen = None if units is None else list(units)
    if isinstance(images, RunData):
        run = images
        names = [layers] if isinstance(layers, str) else run.layers if layers is None else list(layers)
        return _of_run(model, run, names, chosen, device)
    if layers is None:
        raise UnitvisError("name the layer to project from; only a run knows its layers")
    source = open_source(images, transform)
    return _of_images(model, source, [layers] if isinstance(layers, str) else list(layers), chosen, device)


def _of_run(
    model: nn.Module, run: RunData, layers: list[str], units: list[int] | None, device: torch.device | str | None
) -> Iterator[Projection]:
    network = Network(model, device=device, transform=run.source.transform)
    with network.evaluating():
        for layer in layers:
            jobs = _jobs(run[layer], units)
            for start in range(0, len(jobs), COMPUTE_BATCH):
                part = jobs[start : start + COMPUTE_BATCH]
                (batch,) = run.source.batches(COMPUTE_BATCH, ids=[image for image, _ in part])
                passed = _Pass(network, layer, network.normalise(batch.pixels))
                rounds = len(part[0][1])
                for turn in range(rounds):
                    now = [(slot, groups[turn]) for slot, (_, groups) in enumerate(part) if turn < len(groups)]
                    seeds = [(slot, winner.neuron) for slot, group in now for winner in group]
                    signals = passed.signals(seeds, last=turn + 1 == rounds)
                    for slot, group in now:
                        for winner in group:
                            signal = winner.alone(signals[slot]) if len(group) > 1 else signals[slot].copy()
                            image = part[slot][0]
                            yield Projection(
                                layer, winner.unit, winner.rank, image, winner.neuron, signal, passed.method
                            )


@dataclass(frozen=True)
class _Winner:
    unit: int
    rank: int
    neuron: Neuron
    box: Box

    def apart(self, other: _Winner) -> bool:
        """No pixel is in both boxes, so on the way back their signals never meet."""
        a, b = self.box, other.box
        return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]

    def alone(self, signal: NDArray[np.float32]) -> NDArray[np.float32]:
        left, upper, right, lower = (max(0, side) for side in self.box)
        own = np.zeros_like(signal)
        own[:, upper:lower, left:right] = signal[:, upper:lower, left:right]
        return own


def _jobs(top: LayerArrays, units: list[int] | None) -> list[tuple[int, list[list[_Winner]]]]:
    """(image, groups of winners): a group goes back at once, the groups of a job one after the other.

    Longest jobs first, so that those of a batch, which share a forward pass, are about as long.
    """
    groups: dict[int, list[list[_Winner]]] = {}
    for unit in range(len(top)) if units is None else units:
        check_unit(top.name, unit, len(top))
        for rank in np.flatnonzero(top.fired[unit]).tolist():
            left, upper, right, lower = top.boxes[unit, rank].tolist()
            winner = _Winner(unit, rank, neuron_of(top, unit, rank), (left, upper, right, lower))
            among = groups.setdefault(int(top.images[unit, rank]), [])
            for group in among:
                if all(map(winner.apart, group)):
                    group.append(winner)
                    break
            else:
                among.append([winner])
    jobs = [
        (image, among[start : start + ROUNDS])
        for image, among in sorted(groups.items())
        for start in range(0, len(among), ROUNDS)
    ]
    return sorted(jobs, key=lambda job: -len(job[1]))


def _of_images(
    model: nn.Module, source: Source, layers: list[str], units: list[int] | None, device: torch.device | str | None
) -> Iterator[Projection]:
    network = Network(model, device=device, transform=source.transform)
    with network.evaluating():
        for layer in layers:
            for batch in source.batches(COMPUTE_BATCH):
                ids = batch.ids.tolist()
                passed = _Pass(network, layer, network.normalise(batch.pixels))
                channels, _, width = passed.shape[1:]
                for unit in (every := range(channels) if units is None else units):
                    check_unit(layer, unit, channels)
                    flat = passed.strongest[: len(ids), unit].tolist()
                    neurons = [(unit, place // width, place % width) for place in flat]
                    signals = passed.signals(list(enumerate(neurons)), last=unit == every[-1])
                    for image, neuron, signal in zip(ids, neurons, signals, strict=False):  # the batch is padded
                        yield Projection(layer, unit, None, image, neuron, signal, passed.method)


def neuron_of(top: LayerArrays, unit: int, rank: int) -> Neuron:
    """Channel, row and column of a winner's neuron."""
    row, column = top.positions[unit, rank].tolist()
    per_channel = top.info["height"] * top.info["width"] if top.info["unit"] == "neuron" else 1
    return unit // per_channel, row, column


class _Pass:
    """One forward pass of at most `COMPUTE_BATCH` images up to a layer, kept for any number of ways back."""

    @torch.inference_mode(False)
    def __init__(self, network: Network, layer: str, images: Tensor) -> None:
        self._layer, self._device = layer, network.device
        self._pixels = compute_batch(images).requires_grad_()
        edges: list[GradientEdge] = []

        def read(_: int, maps: Tensor) -> None:
            if not maps.requires_grad:
                raise UnitvisError(f"no gradient leads from layer {layer!r} to the image (detach, or no_grad?)")
            edges.append(get_gradient_edge(maps))  # now: an in-place activation may overwrite the map next
            self.shape, self._dtype = maps.shape, maps.dtype
            self.strongest = uk.unpack(uk.spatial_argmax(maps.detach()))[1]  # [COMPUTE_BATCH, C]

        with network.reading_maps([layer]) as canonical:
            canonical.differentiable_maps(self._pixels, read)
        self._edge = edges[0]
        self.method = _rectify_signals(self._edge.node, layer)

    def signals(self, seeds: Sequence[tuple[int, Neuron]], *, last: bool) -> NDArray[np.float32]:
        """[COMPUTE_BATCH, C, H, W]: the signal of 1 in these neurons, each in an image's slot; last: of this pass."""
        seed = torch.zeros(self.shape, dtype=self._dtype, device=self._device)
        slots, channels, rows, columns = zip(*((slot, *neuron) for slot, neuron in seeds), strict=True)
        seed[slots, channels, rows, columns] = 1
        try:
            with canonical_settings(self._device):
                (signal,) = torch.autograd.grad(self._edge, self._pixels, seed, retain_graph=not last)
        except RuntimeError as error:
            raise UnitvisError(
                f"the signal cannot be carried back from layer {self._layer!r}: {first_line(error)}"
            ) from error
        return signal.cpu().numpy()


# Attributes in which a node keeps its lower bound: 0 makes it a ReLU, with or without an upper bound.
_LOWER = {
    "Clamp": "_saved_min",
    "ClampMin": "_saved_min",
    "Hardtanh": "_saved_min_val",
    "Threshold": "_saved_threshold",
}
# What bends the signal on the way up and is left with its ordinary gradient.
_OTHER = frozenset(
    """Celu Clamp ClampMax ClampMin Elu Gelu Hardshrink Hardsigmoid Hardswish Hardtanh LeakyRelu LogSigmoid Maximum
    Minimum Mish PreluKernel RreluWithNoise Sigmoid Silu Softmax Softplus Softshrink Tanh Threshold Where""".split()  # noqa: SIM905
)
# Besides max-pooling, through which what comes back depends on the image: products such as of squeeze-and-excitation.
_CHOOSE = frozenset(("Mul", "Div", "Bmm", "Mm", "Amax", "Max"))


def _rectify_signals(top: Node, layer: str) -> str:
    """Change every ReLU below a node so that it rectifies the signal that comes back; the method, in words."""
    waiting, known = [top], {top}
    rectified, others, chooses = 0, set(), False
    while waiting:
        node = waiting.pop()
        name = re.sub(r"Backward\d*$", "", node.name())
        if "CompiledFunction" in name:
            raise UnitvisError(
                f"what lies below layer {layer!r} is compiled, so its ReLUs are out of reach; give the model that "
                f"torch.compile was given"
            )
        if name == "Relu" or _clamps_at_zero(node, name):
            node.register_hook(_rectified)
            rectified += 1
        elif name in _OTHER or isinstance(node, BackwardCFunction):  # the latter written in Python by whoever
            others.add(name)
        chooses |= "MaxPool" in name or name in _CHOOSE
        for below, _ in node.next_functions:
            if below is not None and below not in known:
                known.add(below)
                waiting.append(below)
    if not others:
        if not rectified:
            return "deconvnet (no ReLU lies below)"
        return "deconvnet" if chooses else "deconvnet (no max-pooling lies below, so the same for every image)"
    through = f"the ordinary gradient through {', '.join(sorted(others))}"
    return f"deconvnet, but {through}" if rectified else through


def _clamps_at_zero(node: Node, name: str) -> bool:
    lower = getattr(node, _LOWER.get(name, ""), None)
    return isinstance(lower, int | float) and lower == 0


def _rectified(inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    signal = outputs[0]
    return (None if signal is None else signal.clamp(min=0), *inputs[1:])
