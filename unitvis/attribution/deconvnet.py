"""Projections of responses to pixels, by the deconvnet or by guided backpropagation.

One neuron of a layer's map is set to 1 and all others to 0. This signal goes back through transposed filters and the
switches of max-pooling. At each ReLU the deconvnet (Zeiler & Fergus 2013, arXiv:1311.2901, section 2.1) drops the
negative part of the signal, whatever the sign of the ReLU's input was in the forward pass; guided backpropagation
(Springenberg et al. 2014, arXiv:1412.6806, section 3.4) also drops the signal where that input was not positive. All
but the ReLUs is ordinary back-propagation; they are changed by hooks on the nodes of the autograd graph, so that
modules, functions, in-place and reused ReLUs are all treated alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

import unitvis_kernels as uk
from unitvis import models
from unitvis.choices import PROJECTIONS
from unitvis.decoding.cutting import Box, cut
from unitvis.drawing.colours import GREY, signed
from unitvis.drawing.notebook import png
from unitvis.drawing.patches import crop_of, default_crop, drawn_box
from unitvis.errors import UnitvisError, check_unit, first_line
from unitvis.network.canonical import canonical_settings
from unitvis.network.forward import COMPUTE_BATCH, compute_batch
from unitvis.network.network import Network
from unitvis.network.receptive_fields.fields import receptive_field
from unitvis.network.receptive_fields.receptive_field import ReceptiveField
from unitvis.results.arrays import LayerArrays
from unitvis.results.data import RunData
from unitvis.sources import Source, open_source
from unitvis.sources.transform import Transform

BACKWARD_PASSES_PER_FORWARD = 8
CONTRAST = 99.0  # percentile of the magnitudes in a picture that is drawn black or white
_WINNERS_TOGETHER = 9 * COMPUTE_BATCH  # of a layer, about: those of one image among them share its forward pass
_NOTEBOOK_SIZE = 224  # pixels of the picture in a notebook
Neuron = tuple[int, int, int]  # channel, row, column


@dataclass(frozen=True, eq=False)
class Projection:
    """One response projected back to the pixels; a notebook shows its picture."""

    layer: str
    unit: int
    rank: int | None  # the winner's rank in the run; None where images were given instead of a run
    image: int  # id
    neuron: Neuron
    box: Box  # in model-input pixels: what a patch of this response shows if no crop is asked for
    signal: NDArray[np.float32] = field(repr=False)  # [C, H, W] of the model's input; 0: the pixel contributed nothing
    method: str  # "deconvnet" or "guided backpropagation", with any exception for this network in words

    def picture(self, box: Box | None = None, size: int = 96, *, percentile: float = CONTRAST) -> Image.Image:
        """Draw the signal inside a box in model-input pixels (None: `self.box`) as `size` x `size` pixels.

        0 is grey, and the given percentile of the magnitudes inside the box that are not 0, and all above it, is black
        or white (100: the largest alone): one symmetric scale for all colours of a picture, another for every picture.
        """
        if not 0 < percentile <= 100:
            raise UnitvisError(f"percentile={percentile}; it must be above 0 and at most 100, the largest magnitude")
        height, width = self.signal.shape[1:]
        left, upper, right, lower = box = box or self.box
        inside = np.abs(self.signal[:, max(upper, 0) : max(lower, 0), max(left, 0) : max(right, 0)])
        signals = inside[inside > 0]
        scale = float(np.percentile(signals, percentile, method="higher")) if len(signals) else 0.0
        return cut(signed(self.signal, scale), lambda inner: inner, box, (height, width), size, fill=GREY)

    def _repr_png_(self) -> bytes:
        return png(self.picture(size=_NOTEBOOK_SIZE))


def project(
    model: nn.Module | str | models.Loaded,
    images: object,
    layers: Sequence[str] | str | None = None,
    units: Mapping[str, Iterable[int]] | Iterable[int] | int | None = None,
    *,
    method: str = "deconvnet",
    transform: Transform | None = None,
    device: torch.device | str | None = None,
) -> Iterator[Projection]:
    """Yield projections, computed in batches as the iterator advances.

    model: may be a spec such as "torchvision:alexnet", which brings its transform. images: a run, to project its
    winners that fired, unit by unit and those of a unit by rank; or any images that `scan` takes, to project each
    unit's strongest response to each image. layers: names; None: all of the run's, or those that `units` names.
    units: a number, numbers, or {layer: numbers}; None: all. method: "deconvnet" or "guided". ReLU6 and a clamp from 0
    count as ReLU, without their upper bound: the signal starts at 1, whatever the response was. Any other activation
    has its ordinary gradient, and `Projection.method` says so. Raises UnitvisError for a layer or unit that does not
    exist, a network without gradients, and a run's images that have changed.
    """
    if method not in PROJECTIONS:
        raise UnitvisError(f"method must be one of {', '.join(PROJECTIONS)}, not {method!r}")
    model, own_transform, _ = models.resolved(model)
    if layers is None and isinstance(images, RunData) and not isinstance(units, Mapping):
        layers = images.layers
    wanted = _units_by_layer(layers, units)
    if isinstance(images, RunData):
        return _project_winners(model, images, wanted, method, device)
    return _project_images(model, open_source(images, transform or own_transform), wanted, method, device)


def _units_by_layer(
    layers: Sequence[str] | str | None, units: Mapping[str, Iterable[int]] | Iterable[int] | int | None
) -> dict[str, list[int] | None]:
    """The units of each layer, each once; None: all of the layer."""
    if isinstance(units, Mapping):
        if layers is not None:
            raise UnitvisError("units= names the layers already; leave out layers=")
        return {layer: [int(unit) for unit in dict.fromkeys(own)] for layer, own in units.items()}
    if layers is None:
        raise UnitvisError("name the layer to project from; only a run knows its layers")
    numbers = [units] if isinstance(units, int | np.integer) else units
    chosen = None if numbers is None else [int(unit) for unit in dict.fromkeys(numbers)]
    return dict.fromkeys([layers] if isinstance(layers, str) else layers, chosen)


def _project_winners(
    model: nn.Module,
    run: RunData,
    wanted: Mapping[str, list[int] | None],
    kind: str,
    device: torch.device | str | None,
) -> Iterator[Projection]:
    """Yield projections of a run's winners."""
    tops = {layer: run[layer] for layer in wanted}
    chosen = {layer: range(len(tops[layer])) if units is None else units for layer, units in wanted.items()}
    for layer, units in chosen.items():
        for unit in units:
            check_unit(layer, unit, len(tops[layer]))
    network = Network(model, device=device, transform=run.source.transform)
    network.channel_axes(list(tops), tuple(run.manifest["input"]))  # of all layers in one pass
    with network.evaluating():
        for layer, top in tops.items():
            crop = crop_of(run, layer, None)
            for winners in _groups(top, chosen[layer]):
                waiting: dict[_Winner, Projection] = {}  # computed before their turn
                due = iter(winners)
                following: _Winner | None = next(due)
                for winner, image, signal, method in _signals(network, run, layer, winners, kind):
                    box = drawn_box(top, winner.unit, winner.rank, crop, run.input_size)
                    waiting[winner] = Projection(
                        layer, winner.unit, winner.rank, image, winner.neuron, box, signal, method
                    )
                    while following is not None and following in waiting:
                        yield waiting.pop(following)
                        following = next(due, None)


def _groups(top: LayerArrays, units: Iterable[int]) -> Iterator[list[_Winner]]:
    """The winners of units that fired, in groups of whole units that are computed together."""
    group: list[_Winner] = []
    for unit in units:
        for rank in np.flatnonzero(top.fired[unit]).tolist():
            left, upper, right, lower = top.boxes[unit, rank].tolist()
            image = int(top.images[unit, rank])
            group.append(_Winner(unit, rank, image, neuron_of(top, unit, rank), (left, upper, right, lower)))
        if len(group) >= _WINNERS_TOGETHER:
            yield group
            group = []
    if group:
        yield group


def _signals(
    network: Network, run: RunData, layer: str, winners: Sequence[_Winner], kind: str
) -> Iterator[tuple[_Winner, int, NDArray[np.float32], str]]:
    """Yield (winner, image, signal, method in words), about in the order of the winners."""
    jobs = _jobs_by_image(winners)
    for start in range(0, len(jobs), COMPUTE_BATCH):
        batch_jobs = jobs[start : start + COMPUTE_BATCH]
        images = [image for image, _ in batch_jobs]
        for image in set(images) & run.records.keys():
            run.source.check(run.records[image])
        (batch,) = run.source.batches(COMPUTE_BATCH, ids=images)
        forward = _ForwardPass(network, layer, network.normalise(batch.pixels), kind)
        backward_passes = max(len(groups) for _, groups in batch_jobs)
        for number in range(backward_passes):
            active = [(slot, groups[number]) for slot, (_, groups) in enumerate(batch_jobs) if number < len(groups)]
            seeds = [(slot, winner.neuron) for slot, group in active for winner in group]
            signals = forward.signals(seeds, last=number + 1 == backward_passes)
            for slot, group in active:
                for winner in group:
                    signal = winner.own_part(signals[slot]) if len(group) > 1 else signals[slot].copy()
                    yield winner, images[slot], signal, forward.method


@dataclass(frozen=True)
class _Winner:
    """A winner to project."""

    unit: int
    rank: int
    image: int
    neuron: Neuron
    box: Box  # the receptive field

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


def _jobs_by_image(winners: Iterable[_Winner]) -> list[tuple[int, list[list[_Winner]]]]:
    """List (image, groups of winners): a group shares one backward pass, and the groups of a job one forward pass.

    In the order in which the winners need the images, so that the first winners are complete first.
    """
    groups: dict[int, list[list[_Winner]]] = {}
    for winner in winners:
        own_groups = groups.setdefault(winner.image, [])
        for group in own_groups:
            if all(map(winner.is_disjoint, group)):
                group.append(winner)
                break
        else:
            own_groups.append([winner])
    return [
        (image, own_groups[start : start + BACKWARD_PASSES_PER_FORWARD])
        for image, own_groups in groups.items()
        for start in range(0, len(own_groups), BACKWARD_PASSES_PER_FORWARD)
    ]


def _project_images(
    model: nn.Module,
    source: Source,
    wanted: Mapping[str, list[int] | None],
    kind: str,
    device: torch.device | str | None,
) -> Iterator[Projection]:
    """Yield projections of the strongest response of each unit to each image."""
    network = Network(model, device=device, transform=source.transform)
    with network.evaluating():
        for layer, units in wanted.items():
            seen: ReceptiveField | None = None  # found when the first batch shows the size of the images
            for batch in source.batches(COMPUTE_BATCH):
                ids = batch.ids.tolist()
                pixels = network.normalise(batch.pixels)
                forward = _ForwardPass(network, layer, pixels, kind)
                seen = seen or receptive_field(network.model, layer, network.input_shape_of(pixels))
                channels, _, width = forward.shape[1:]
                for unit in (chosen := range(channels) if units is None else units):
                    check_unit(layer, unit, channels)
                    positions = forward.strongest[: len(ids), unit].tolist()
                    neurons = [(unit, position // width, position % width) for position in positions]
                    signals = forward.signals(list(enumerate(neurons)), last=unit == chosen[-1])
                    for image, neuron, signal in zip(ids, neurons, signals, strict=False):  # the batch is padded
                        yield Projection(
                            layer, unit, None, image, neuron, _box_of(seen, neuron), signal.copy(), forward.method
                        )


def _box_of(seen: ReceptiveField, neuron: Neuron) -> Box:
    """The box that is drawn of a neuron where no run tells an effective box: its receptive field, or the image."""
    if default_crop({"receptive_field": {"size": seen.size}, "effective_box": None}, seen.input_size) == "rf":
        left, upper, right, lower = seen.boxes(*neuron)[0].tolist()
        return left, upper, right, lower
    return 0, 0, seen.input_size[1], seen.input_size[0]


def neuron_of(top: LayerArrays, unit: int, rank: int) -> Neuron:
    """Find the neuron (channel, row, column) of a winner."""
    row, column = top.positions[unit, rank].tolist()
    per_channel = top.info["height"] * top.info["width"] if top.info["unit"] == "neuron" else 1
    return unit // per_channel, row, column


class _ForwardPass:
    """One forward pass of at most `COMPUTE_BATCH` images up to a layer, kept for any number of backward passes.

    shape: [N, C, H, W] of the layer's maps. strongest: int64 [N, C], flattened positions of the largest responses.
    kind: one of `PROJECTIONS`. method: see `Projection`. Raises UnitvisError where no gradient leads from the layer to
    the images.
    """

    @torch.inference_mode(False)
    def __init__(self, network: Network, layer: str, images: Tensor, kind: str) -> None:
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
        self.method = _rectify_signals(self._edge.node, layer, kind)

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
# Attributes in which a ReLU's node keeps its input or its output, which are positive in the same places.
_SAVED_ATTRIBUTES = ("_saved_self", "_saved_result")
NOTHING_OF_THE_IMAGE = "no max-pooling lies below, so the same for every image"  # of a `method`
# Autograd nodes besides max-pooling whose gradient depends on the image, such as products in squeeze-and-excitation.
_IMAGE_DEPENDENT = frozenset(("Mul", "Div", "Bmm", "Mm", "Amax", "Max"))


def _rectify_signals(top: Node, layer: str, kind: str) -> str:
    """Make every ReLU below an autograd node drop signals as the method does; returns the `method` of a `Projection`.

    kind: one of `PROJECTIONS`.
    """
    waiting, known = [top], {top}
    relus, others, image_dependent = 0, set(), kind == "guided"
    while waiting:
        node = waiting.pop()
        name = re.sub(r"Backward\d*$", "", node.name())
        if "CompiledFunction" in name:
            raise UnitvisError(
                f"what lies below layer {layer!r} is compiled, so its ReLUs are out of reach; give the model that "
                f"torch.compile was given"
            )
        if name == "Relu" or _clamps_at_zero(node, name):
            node.register_hook(_rectify if kind == "deconvnet" else _guide(node))
            relus += 1
        elif name in _NONLINEAR or isinstance(node, BackwardCFunction):  # BackwardCFunction: written in Python
            others.add(name)
        image_dependent |= "MaxPool" in name or name in _IMAGE_DEPENDENT
        for below, _ in node.next_functions:
            if below is not None and below not in known:
                known.add(below)
                waiting.append(below)
    words = "deconvnet" if kind == "deconvnet" else "guided backpropagation"
    if not others:
        if not relus:
            return f"{words} (no ReLU lies below)"
        return words if image_dependent else f"{words} ({NOTHING_OF_THE_IMAGE})"
    through = f"the ordinary gradient through {', '.join(sorted(others))}"
    return f"{words}, but {through}" if relus else through


def _clamps_at_zero(node: Node, name: str) -> bool:
    """True for a clamp, hardtanh or threshold node with a lower bound of 0."""
    lower = getattr(node, _LOWER_BOUND_ATTRIBUTES.get(name, ""), None)
    return isinstance(lower, int | float) and lower == 0


_Gradients = tuple[Tensor | None, ...]


def _rectify(inputs: _Gradients, outputs: _Gradients) -> _Gradients:
    """Autograd hook (gradients of the inputs, of the outputs): pass on the positive part of the signal.

    The sign of the forward pass's input, which the ordinary gradient depends on, plays no part.
    """
    signal = outputs[0]
    return (None if signal is None else signal.clamp(min=0), *inputs[1:])


def _guide(node: Node) -> Callable[[_Gradients, _Gradients], _Gradients]:
    """Autograd hook of a ReLU's node: pass on the positive part of the signal where the ReLU's input was positive."""

    def guide(inputs: _Gradients, outputs: _Gradients) -> _Gradients:
        signal = outputs[0]
        if signal is None:
            return inputs
        kept = next(value for name in _SAVED_ATTRIBUTES if (value := getattr(node, name, None)) is not None)
        return (signal.clamp(min=0) * (kept > 0), *inputs[1:])

    return guide
