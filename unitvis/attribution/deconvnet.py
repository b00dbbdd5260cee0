"""Projections of responses to pixels by the deconvnet of Zeiler & Fergus (2013, arXiv:1311.2901, section 2.1).

One neuron of a layer's map is set to 1 and all others to 0. This signal goes back through transposed filters and the
switches of max-pooling, and each ReLU drops the negative part of the signal, whatever the sign of its input was in the
forward pass. All but the last is ordinary back-propagation; the ReLUs are changed by hooks on the nodes of the autograd
graph, so that modules, functions, in-place and reused ReLUs are all treated alike.
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
from unitvis import models
from unitvis.decoding.cutting import Box, cut
from unitvis.drawing.colours import GREY, signed
from unitvis.errors import UnitvisError, check_unit, first_line
from unitvis.network.canonical import canonical_settings
from unitvis.network.forward import COMPUTE_BATCH, compute_batch
from unitvis.network.network import Network
from unitvis.results.arrays import LayerArrays
from unitvis.results.data import RunData
from unitvis.sources import Source, open_source
from unitvis.sources.transform import Transform

BACKWARD_PASSES_PER_FORWARD = 8
Neuron = tuple[int, int, int]  # channel, row, column


@dataclass(frozen=True, eq=False)
class Projection:
    """One response projected back to the pixels."""

    layer: str
    unit: int
    rank: int | None  # the winner's rank in the run; None where images were given instead of a run
    image: int  # id
    neuron: Neuron
    signal: NDArray[np.float32]  # [C, H, W] of the model's input; 0 where a pixel contributed nothing
    method: str  # "deconvnet", with any exception for this network in words

    def picture(self, box: Box | None = None, size: int = 96) -> Image.Image:
        """Draw the signal inside a box in model-input pixels (None: all) as `size` x `size` pixels.

        0 is grey, and the largest magnitude inside the box is black or white: one symmetric scale for all colours of a
        picture, and another for every picture.
        """
        height, width = self.signal.shape[1:]
        left, upper, right, lower = box = box or (0, 0, width, height)
        inside = self.signal[:, max(upper, 0) : max(lower, 0), max(left, 0) : max(right, 0)]
        picture = signed(self.signal, float(np.abs(inside).max(initial=0)))
        return cut(picture, lambda inner: inner, box, (height, width), size, fill=GREY)


def project(
    model: nn.Module | str | models.Loaded,
    images: object,
    layers: Sequence[str] | str | None = None,
    units: Iterable[int] | int | None = None,
    *,
    transform: Transform | None = None,
    device: torch.device | str | None = None,
) -> Iterator[Projection]:
    """Yield projections in any order, computed in batches as the iterator advances.

    model: may be a spec such as "torchvision:alexnet", which brings its transform. images: a run, to project its
    winners that fired; or any images that `scan` takes, to project each unit's strongest response to each image.
    layers: names; None: all of the run's. units: a number or numbers; None: all. ReLU6 and a clamp from 0 count as
    ReLU, without their upper bound: the signal starts at 1, whatever the response was. Any other activation has its
    ordinary gradient, and `method` says so. Raises UnitvisError for a layer or unit that does not exist, and for a
    network without gradients.
    """
    if isinstance(units, int | np.integer):
        units = [int(units)]
    chosen = None if units is None else list(units)
    model, own_transform, _ = models.resolved(model)
    if isinstance(images, RunData):
        run = images
        names = [layers] if isinstance(layers, str) else run.layers if layers is None else list(layers)
        return _project_winners(model, run, names, chosen, device)
    if layers is None:
        raise UnitvisError("name the layer to project from; only a run knows its layers")
    source = open_source(images, transform or own_transform)
    return _project_images(model, source, [layers] if isinstance(layers, str) else list(layers), chosen, device)


def _project_winners(
    model: nn.Module, run: RunData, layers: list[str], units: list[int] | None, device: torch.device | str | None
) -> Iterator[Projection]:
    """Yield projections of a run's winners."""
    network = Network(model, device=device, transform=run.source.transform)
    network.channel_axes(layers, tuple(run.manifest["input"]))  # of all layers in one pass
    with network.evaluating():
        for layer in layers:
            jobs = _jobs_by_image(run[layer], units)
            for start in range(0, len(jobs), COMPUTE_BATCH):
                batch_jobs = jobs[start : start + COMPUTE_BATCH]
                (batch,) = run.source.batches(COMPUTE_BATCH, ids=[image for image, _ in batch_jobs])
                forward = _ForwardPass(network, layer, network.normalise(batch.pixels))
                backward_passes = len(batch_jobs[0][1])  # of the longest job, which stands first
                for number in range(backward_passes):
                    active = [(s, groups[number]) for s, (_, groups) in enumerate(batch_jobs) if number < len(groups)]
                    seeds = [(slot, winner.neuron) for slot, group in active for winner in group]
                    signals = forward.signals(seeds, last=number + 1 == backward_passes)
                    for slot, group in active:
                        for winner in group:
                            signal = winner.own_part(signals[slot]) if len(group) > 1 else signals[slot].copy()
                            image = batch_jobs[slot][0]
                            yield Projection(
                                layer, winner.unit, winner.rank, image, winner.neuron, signal, forward.method
                            )


@dataclass(frozen=True)
class _Winner:
    """A winner to project."""

    unit: int
    rank: int
    neuron: Neuron
    box: Box

    def is_disjoint(self, other: _Winner) -> bool:
        """True where the boxes share no pixel, so that both signals can go back in one pass without meeting."""
        a, b = self.box, other.box
        return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]

    def own_part(self, signal: NDArray[np.float32]) -> NDArray[np.float32]:
        """Copy a signal [C, H, W] with zeros outside the winner's box."""
        left, upper, right, lower = (max(0, side) for side in self.box)
        own = np.zeros_like(signal)
        own[:, upper:lower, left:right] = signal[:, upper:lower, left:right]
        return own


def _jobs_by_image(top: LayerArrays, units: list[int] | None) -> list[tuple[int, list[list[_Winner]]]]:
    """List (image, groups of winners): a group shares one backward pass, and the groups of a job one forward pass.

    Longest jobs first, so that the jobs of a batch are about equally long.
    """
    groups: dict[int, list[list[_Winner]]] = {}
    for unit in range(len(top)) if units is None else units:
        check_unit(top.name, unit, len(top))
        for rank in np.flatnonzero(top.fired[unit]).tolist():
            left, upper, right, lower = top.boxes[unit, rank].tolist()
            winner = _Winner(unit, rank, neuron_of(top, unit, rank), (left, upper, right, lower))
            own_groups = groups.setdefault(int(top.images[unit, rank]), [])
            for group in own_groups:
                if all(map(winner.is_disjoint, group)):
                    group.append(winner)
                    break
            else:
                own_groups.append([winner])
    jobs = [
        (image, own_groups[start : start + BACKWARD_PASSES_PER_FORWARD])
        for image, own_groups in sorted(groups.items())
        for start in range(0, len(own_groups), BACKWARD_PASSES_PER_FORWARD)
    ]
    return sorted(jobs, key=lambda job: -len(job[1]))


def _project_images(
    model: nn.Module, source: Source, layers: list[str], units: list[int] | None, device: torch.device | str | None
) -> Iterator[Projection]:
    """Yield projections of the strongest response of each unit to each image."""
    network = Network(model, device=device, transform=source.transform)
    with network.evaluating():
        for layer in layers:
            for batch in source.batches(COMPUTE_BATCH):
                ids = batch.ids.tolist()
                forward = _ForwardPass(network, layer, network.normalise(batch.pixels))
                channels, _, width = forward.shape[1:]
                for unit in (chosen := range(channels) if units is None else units):
                    check_unit(layer, unit, channels)
                    positions = forward.strongest[: len(ids), unit].tolist()
                    neurons = [(unit, position // width, position % width) for position in positions]
                    signals = forward.signals(list(enumerate(neurons)), last=unit == chosen[-1])
                    for image, neuron, signal in zip(ids, neurons, signals, strict=False):  # the batch is padded
                        yield Projection(layer, unit, None, image, neuron, signal, forward.method)


def neuron_of(top: LayerArrays, unit: int, rank: int) -> Neuron:
    """Find the neuron (channel, row, column) of a winner."""
    row, column = top.positions[unit, rank].tolist()
    per_channel = top.info["height"] * top.info["width"] if top.info["unit"] == "neuron" else 1
    return unit // per_channel, row, column


class _ForwardPass:
    """One forward pass of at most `COMPUTE_BATCH` images up to a layer, kept for any number of backward passes.

    shape: [N, C, H, W] of the layer's maps. strongest: int64 [N, C], flattened positions of the largest responses.
    method: see `Projection`. Raises UnitvisError where no gradient leads from the layer to the images.
    """

    @torch.inference_mode(False)
    def __init__(self, network: Network, layer: str, images: Tensor) -> None:
        self._layer, self._device = layer, network.device
        self._pixels = compute_batch(images).requires_grad_()
        edges: list[GradientEdge] = []

        def read(_: int, maps: Tensor) -> None:
            if not maps.requires_grad:
                raise UnitvisError(f"no gradient leads from layer {layer!r} to the image (detach, or no_grad?)")
            edges.append(get_gradient_edge(maps))  # here, before an in-place activation overwrites the map
            self.shape, self._dtype = maps.shape, maps.dtype
            self.strongest = uk.unpack(uk.spatial_argmax(maps.detach()))[1]

        with network.reading_maps([layer], network.input_shape_of(images)) as canonical:
            canonical.differentiable_maps(self._pixels, read)
        self._edge = edges[0]
        self.method = _rectify_signals(self._edge.node, layer)

    def signals(self, seeds: Sequence[tuple[int, Neuron]], *, last: bool) -> NDArray[np.float32]:
        """Carry a signal of 1 in each of these neurons back to the pixels: float32 [COMPUTE_BATCH, C, H, W].

        seeds: (slot of the image in the batch, neuron). last: no other backward pass follows; the graph is freed.
        """
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


# Attributes in which an autograd node keeps its lower bound; with 0 the node is a ReLU, with or without upper bound.
_LOWER_BOUND_ATTRIBUTES = {
    "Clamp": "_saved_min",
    "ClampMin": "_saved_min",
    "Hardtanh": "_saved_min_val",
    "Threshold": "_saved_threshold",
}
# Autograd nodes of nonlinear operators that keep their ordinary gradient.
_NONLINEAR = frozenset(
    """Celu Clamp ClampMax ClampMin Elu Gelu Hardshrink Hardsigmoid Hardswish Hardtanh LeakyRelu LogSigmoid Maximum
    Minimum Mish PreluKernel RreluWithNoise Sigmoid Silu Softmax Softplus Softshrink Tanh Threshold Where""".split()  # noqa: SIM905
)
# Autograd nodes besides max-pooling whose gradient depends on the image, such as products in squeeze-and-excitation.
_IMAGE_DEPENDENT = frozenset(("Mul", "Div", "Bmm", "Mm", "Amax", "Max"))


def _rectify_signals(top: Node, layer: str) -> str:
    """Make every ReLU below an autograd node drop negative signals; returns the `method` of a `Projection`."""
    waiting, known = [top], {top}
    relus, others, image_dependent = 0, set(), False
    while waiting:
        node = waiting.pop()
        name = re.sub(r"Backward\d*$", "", node.name())
        if "CompiledFunction" in name:
            raise UnitvisError(
                f"what lies below layer {layer!r} is compiled, so its ReLUs are out of reach; give the model that "
                f"torch.compile was given"
            )
        if name == "Relu" or _clamps_at_zero(node, name):
            node.register_hook(_rectify)
            relus += 1
        elif name in _NONLINEAR or isinstance(node, BackwardCFunction):  # BackwardCFunction: written in Python
            others.add(name)
        image_dependent |= "MaxPool" in name or name in _IMAGE_DEPENDENT
        for below, _ in node.next_functions:
            if below is not None and below not in known:
                known.add(below)
                waiting.append(below)
    if not others:
        if not relus:
            return "deconvnet (no ReLU lies below)"
        return "deconvnet" if image_dependent else "deconvnet (no max-pooling lies below, so the same for every image)"
    through = f"the ordinary gradient through {', '.join(sorted(others))}"
    return f"deconvnet, but {through}" if relus else through


def _clamps_at_zero(node: Node, name: str) -> bool:
    """True for a clamp, hardtanh or threshold node with a lower bound of 0."""
    lower = getattr(node, _LOWER_BOUND_ATTRIBUTES.get(name, ""), None)
    return isinstance(lower, int | float) and lower == 0


def _rectify(inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Autograd hook (gradients of the inputs, of the outputs): pass on the positive part of the signal.

    The sign of the forward pass's input, which the ordinary gradient depends on, plays no part.
    """
    signal = outputs[0]
    return (None if signal is None else signal.clamp(min=0), *inputs[1:])
