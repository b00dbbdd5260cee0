"""The hot path: batches in, the strongest responses of every unit out. `scan` is a source and one of these."""

from __future__ import annotations

import copy
import hashlib
import platform
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

import unitvis_kernels as uk
from unitvis.canonical import BATCH, canonical_settings, compute_batch, evaluating
from unitvis.coverage import Coverage
from unitvis.errors import UnitvisError
from unitvis.partial import Identity, Partial, identity
from unitvis.receptive_field import ReceptiveField, receptive_fields
from unitvis.responses import infinite_info
from unitvis.run import FORMAT, SEPARATED, TIED, LayerTop, Run
from unitvis.sources import open_source
from unitvis.taps import Examination, Layer, Taps
from unitvis.transform import Transform


class Recorder:
    """Ranks units inside a loop of your own::

        with unitvis.Recorder(model, ["features.10"]) as recorder:
            for images, labels in loader:
                recorder(images)
        run = recorder.result()

    layers: names or shell patterns; None: every convolution, after the BatchNorm that directly follows it. unit:
    "channel" ranks the largest response over positions, "neuron" every element of the map. device: None is the
    model's own. Responses are canonical (float32, compute batches of 16). State on the device is O(units x k); nothing
    is copied to the host before `result`. The model is left as it was found.
    """

    precision = "fp32"

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str] | str | None = None,
        k: int = 9,
        *,
        unit: str = "channel",
        device: torch.device | str | None = None,
        transform: Transform | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise UnitvisError(f"the model must be a torch.nn.Module, not {type(model).__name__}")
        if not isinstance(k, int) or k < 1:
            raise UnitvisError(f"k must be a whole number of at least 1, not {k!r}")
        if unit not in ("channel", "neuron"):
            raise UnitvisError(f"unit must be 'channel' or 'neuron', not {unit!r}")
        self.model, self.device = _on_device(model, device)
        self.k, self.unit, self.transform = k, unit, transform
        self.images = 0
        self.coverage = Coverage()  # the ids given; after `flush` all of them are in the state
        self.layers: list[Layer] = []
        self.fields: dict[str, ReceptiveField] = {}
        self._patterns = layers
        self._shape: list[int] = []  # [C, H, W] of the first image
        self._next_id = 0
        self._waiting: list[tuple[Tensor, Tensor]] = []  # fewer than a compute batch: (float images, ids)
        self._stack = ExitStack()
        self._open = False
        self.preparation = 0.0  # seconds, once a model

    def __enter__(self) -> Self:
        self._stack.enter_context(evaluating(self.model))
        self._open = True
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        with self._stack:
            if error is None:
                self.flush()
            self._open = False

    def __call__(self, batch: Tensor, ids: Tensor | Sequence[int] | None = None) -> None:
        """Take a batch: float [N, C, H, W], already normalised, or uint8 [N, H, W, 3] where a transform was given.

        ids: whole numbers from 0, one an image, each used once; None counts up.
        """
        if not self._open:
            raise UnitvisError("a Recorder records inside its block: with unitvis.Recorder(...) as recorder: ...")
        images = self.as_images(batch)
        if ids is None:
            ids = torch.arange(self._next_id, self._next_id + len(images))
        ids = torch.as_tensor(ids, dtype=torch.int64)
        if ids.shape != images.shape[:1]:
            raise UnitvisError(f"{len(images)} images came with ids of shape {list(ids.shape)}")
        if ids.device.type == "cpu" and len(ids) and int(ids.min()) < 0:  # on a GPU a look would wait for it
            raise UnitvisError(f"an image came with the id {int(ids.min())}; ids are whole numbers from 0")
        known = ids.numpy().copy() if ids.device.type == "cpu" else ()  # ids that came on a GPU stay unknown
        ids = ids.to(self.device)
        self._shape = self._shape or list(images.shape[1:])
        if list(images.shape[1:]) != self._shape:
            raise UnitvisError(
                f"images of {list(images.shape[1:])} came after images of {self._shape}; give them one size"
            )
        self._next_id += len(images)
        if self._waiting:
            waiting = self._waiting.pop()
            images, ids = torch.cat([waiting[0], images]), torch.cat([waiting[1], ids])
        whole = len(images) - len(images) % BATCH
        for start in range(0, whole, BATCH):
            self._compute(images[start : start + BATCH], ids[start : start + BATCH])
        if whole < len(images):
            self._waiting.append((images[whole:].clone(), ids[whole:]))
        self.coverage.add(np.asarray(known, np.int64))

    def flush(self) -> None:
        """Compute what waits for a whole compute batch, padded."""
        if self._waiting:
            self._compute(*self._waiting.pop())

    def as_images(self, batch: Tensor) -> Tensor:
        if not isinstance(batch, Tensor):
            raise UnitvisError(f"a batch must be a tensor, not {type(batch).__name__}")
        if batch.dtype == torch.uint8 and self.transform is not None:
            return self.transform.normalize(batch.to(self.device))
        if batch.ndim != 4 or not batch.is_floating_point():
            raise UnitvisError(
                f"a batch must be float images [N, C, H, W], already normalised, not {batch.dtype} {list(batch.shape)}"
            )
        return batch.to(self.device, torch.float32)

    def _compute(self, images: Tensor, ids: Tensor) -> None:
        batch = compute_batch(images)
        if not self.layers:
            channels, height, width = batch.shape[1:]
            self.prepare((channels, height, width))
        keys = self._keys(batch)
        if self.images == 0:
            self._check_independence(batch, keys)
        self._take(keys[: len(ids)], ids)
        self.images += len(ids)

    def _floor(self) -> Tensor | None:
        """float32 [units]: what a response must reach to enter the top-k; NaN where there is room. None: all count."""
        return uk.unpack(self.state[:, self.k])[0]

    def _take(self, keys: Tensor, ids: Tensor) -> None:
        uk.topk_merge_(self.state, keys, ids)

    def _keys(self, batch: Tensor) -> Tensor:
        """Keys [BATCH, units of all layers] of a compute batch."""
        keys = torch.empty(len(batch), self._starts[-1], dtype=torch.int64, device=self.device)
        floor = self._floor()

        def read(index: int, maps: Tensor) -> None:
            if self.unit == "neuron":
                maps = maps.flatten(1)[:, :, None, None]
            units = slice(self._starts[index], self._starts[index + 1])
            keys[:, units] = uk.spatial_argmax(maps, None if floor is None else floor[units])

        with torch.inference_mode(), canonical_settings(self.device):
            self._taps.run(batch, read)
        return keys

    def prepare(self, shape: tuple[int, int, int]) -> None:
        """For inputs [C, H, W]: which layers, how large, what their neurons see; and an empty state for them."""
        start = time.perf_counter()
        self._shape = list(shape)
        with canonical_settings(self.device):
            examination = Examination(self.model, torch.zeros(1, *shape, device=self.device))
        self.layers = [examination.layer(name) for name in examination.select(self._patterns)]
        units = [_units(layer, self.unit) for layer in self.layers]
        self._starts = np.concatenate([[0], np.cumsum(units)]).tolist()
        self._refuse_what_does_not_fit()
        names = [layer.name for layer in self.layers]
        self.fields = receptive_fields(self.model, names, shape)
        for layer in self.layers:
            if self.fields[layer.name].channels_last:
                raise UnitvisError(
                    f"layer {layer.name!r} puts its channels last, [N, H, W, C] = [N, {layer.channels}, "
                    f"{layer.height}, {layer.width}]; name a Linear, LayerNorm or convolution beside it"
                )
        self.state = uk.topk_state(self._starts[-1], self.k + 1, self.device)  # one more than k: is the k-th tied?
        self._taps = self._stack.enter_context(Taps(self.model, names))
        self.preparation = time.perf_counter() - start

    def _refuse_what_does_not_fit(self) -> None:
        units = self._starts[-1]
        need = units * 8 * 6 * (self.k + 1 + BATCH)  # the first merge sorts that many keys and ids a unit, thrice
        free = _free_memory(self.device)
        if need > free:
            raise UnitvisError(
                f"the state of {units:,} units needs {need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; "
                f"name fewer layers, or rank channels instead of neurons"
            )

    def _check_independence(self, batch: Tensor, keys: Tensor) -> None:
        """The first compute batch again, reversed: what does not come out the same is no response to an image."""
        again = self._keys(batch.flip(0).contiguous(memory_format=torch.channels_last)).flip(0)
        if torch.equal(keys, again):
            return
        first, second = uk.unpack(keys)[0], uk.unpack(again)[0]
        for layer, start, stop in zip(self.layers, self._starts, self._starts[1:], strict=False):
            a, b = first[:, start:stop], second[:, start:stop]
            if not torch.allclose(
                a, b, rtol=1e-4, atol=1e-4 * float(a.nan_to_num(0, 0, 0).abs().max()), equal_nan=True
            ):
                raise UnitvisError(
                    f"layer {layer.name!r} gives other responses when the same images come in another order: something "
                    f"in the model mixes the images of a batch or draws at random (BatchNorm without running "
                    f"statistics, active dropout); such responses cannot be ranked"
                )
        warnings.warn("on this device the last bits of responses depend on an image's place in its batch")

    def result(self, images: object = None) -> Run:
        """The run so far: float32 values, images, positions and boxes of the k winners of every unit.

        images: whatever `scan` takes and can be read again by id, to cut patches from.
        """
        self.flush()
        if self.images == 0:
            raise UnitvisError("no image was recorded, so there is nothing to rank")
        values, ids, positions = (part.cpu().numpy() for part in uk.topk_read(self.state))
        nan = self.state[:, -2:].cpu().numpy()
        tops = {}
        for layer, start, stop in zip(self.layers, self._starts, self._starts[1:], strict=False):
            part = slice(start, stop)
            info = asdict(layer) | {"unit": self.unit, "units": stop - start}
            info |= {"receptive_field": _field_info(self.fields[layer.name]), "effective_box": None}
            info["nan"], info["infinite"] = _nan_info(nan[part]), infinite_info(values[part], ids[part])
            tops[layer.name] = self._top(layer, values[part], ids[part], positions[part], info)
        run = Run(tops, self._manifest(tops), {})
        if images is not None:
            run.attach(open_source(images, self.transform))
        return run

    def _top(self, layer: Layer, values: Any, ids: Any, flat: Any, info: dict[str, Any]) -> LayerTop:
        k = self.k
        tied = (ids[:, k] >= 0) & (values[:, k] == values[:, k - 1])
        values, ids, flat = values[:, :k], ids[:, :k], flat[:, :k]
        channels = np.arange(len(ids))[:, None]
        if self.unit == "neuron":  # the unit is the position
            channels, flat = channels // (layer.height * layer.width), channels % (layer.height * layer.width)
        channels, flat, blank = np.broadcast_arrays(channels, flat, ids < 0)
        positions = np.stack([flat // layer.width, flat % layer.width], axis=-1).astype(np.int32)
        positions[blank] = -1
        boxes = np.zeros((*ids.shape, 4), np.int32)
        live = ~blank
        boxes[live] = self.fields[layer.name].boxes(channels[live], positions[live][:, 0], positions[live][:, 1])
        status = np.where(tied, TIED, SEPARATED)
        return LayerTop(layer.name, values, ids, positions, boxes, status, info)

    @cached_property
    def _described(self) -> dict[str, Any]:
        return describe_model(self.model)  # which takes a hash of all weights

    def about(self) -> dict[str, Any]:
        """What is recorded and how, for a manifest."""
        return {
            "format": FORMAT,
            "model": dict(self._described),
            "input": self._shape,
            "layers": {layer.name: asdict(layer) for layer in self.layers},
            "k": self.k,
            "unit": self.unit,
            "precision": self.precision,
            "source": {"kind": "recorder"},
            "transform": self.transform.to_json() if self.transform else None,
            "fingerprint": fingerprint(self.device),
        }

    def _manifest(self, tops: dict[str, LayerTop]) -> dict[str, Any]:
        return {
            **self.about(),
            "layers": {name: top.info for name, top in tops.items()},
            "images": self.images,
            "coverage": self.coverage.ranges.tolist(),
            "failures": [],
            "seconds": {"preparation": self.preparation},
            "warnings": [w for top in tops.values() if (w := _saturation(top))],
        }

    def partial(self, seconds: float = 0.0, **entries: Any) -> Run:
        """What was recorded so far as a run that holds what `merge` needs, and no winners yet; its ids must be known.

        seconds: of scanning. entries: of the manifest, in place of a recorder's own.
        """
        manifest = self.about() | {"partial": True, "shard": None, "failures": []} | entries
        failures = {failure["id"]: failure["reason"] for failure in manifest["failures"]}
        part = self.part(identity(manifest), failures, seconds)
        counted = {"images": self.images, "coverage": part.coverage.ranges.tolist()}
        return Run({}, manifest | counted | {"seconds": {"preparation": self.preparation}}, {}, partial=part)

    def part(self, identity: Identity, failures: Mapping[int, str], seconds: float) -> Partial:
        """All that was recorded so far, taken at once: one copy from the device."""
        self.flush()
        if len(self.coverage) != self.images:
            raise UnitvisError(
                f"{self.images} images were recorded under {len(self.coverage)} known ids, so what is recorded cannot "
                "be told; give each image one id, on the CPU, and drop a Recorder that raised"
            )
        return Partial(identity, self.state.to("cpu", copy=True), self.coverage.copy(), failures, seconds)

    def go_on(self, part: Partial) -> None:
        """Take over what `part` gave; only in place of nothing, after `prepare`."""
        self.state.copy_(part.state)
        self.coverage = part.coverage.copy()
        self.images = len(self.coverage)


def _on_device(model: nn.Module, device: torch.device | str | None) -> tuple[nn.Module, torch.device]:
    """The model where it is to run, in float32: itself where it is so already, else a copy."""
    tensors = [*model.parameters(), *model.buffers()]
    own = tensors[0].device if tensors else torch.device("cpu")
    try:
        wanted = own if device is None else torch.device(device)
    except RuntimeError:
        raise UnitvisError(f"device {device!r} is unknown; give cpu, cuda or cuda:1") from None
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise UnitvisError(f"device {str(device)!r} is not there ({torch.cuda.device_count()} GPUs); give cpu, or none")
    if wanted.type == "cuda" and wanted.index is None:
        wanted = torch.device("cuda", torch.cuda.current_device())
    foreign = any(t.device != wanted or (t.is_floating_point() and t.dtype != torch.float32) for t in tensors)
    return (copy.deepcopy(model).to(wanted, torch.float32) if foreign else model), wanted


def _free_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except OSError:  # only Linux tells; elsewhere the allocation itself has to
        return float("inf")


def _units(layer: Layer, unit: str) -> int:
    return layer.channels * (layer.height * layer.width if unit == "neuron" else 1)


def _field_info(field: ReceptiveField) -> dict[str, Any]:
    return {
        "size": list(field.size),
        "stride": list(field.stride) if field.stride else None,
        "whole_image": field.whole_image,
        "method": field.method,
        "note": field.note,
    }


def _nan_info(nan: Any) -> dict[str, int] | None:
    """How many responses were NaN, of how many units, and the first image with one; nan: [units, 2]."""
    if not nan[:, 0].any():
        return None
    return {"responses": int(nan[:, 0].sum()), "units": int((nan[:, 0] > 0).sum()), "first_image": int(nan[:, 1].min())}


def _saturation(top: LayerTop) -> str | None:
    """A warning where a layer that takes a convolution's output reaches one same largest value again and again."""
    full = top.fired.all(axis=1)
    if top.info["fed_by"] is None or top.values.shape[1] < 2 or not full.any():
        return None
    flat = top.values[full, 0] == top.values[full, -1]
    if flat.mean() < 0.1:
        return None
    return (
        f"layer {top.name!r} saturates: in {flat.mean():.0%} of its units all {top.values.shape[1]} winners have the "
        f"same value (up to {top.values[full, 0][flat].max():g}); rank what goes into it: layer {top.info['fed_by']!r}"
    )


def describe_model(model: nn.Module) -> dict[str, Any]:
    """What the manifest says of a model: its class, its number of parameters, and a hash of all its tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    parameters = sum(p.numel() for p in model.parameters())
    return {"class": type(model).__name__, "parameters": parameters, "weights": digest.hexdigest()}


def fingerprint(device: torch.device) -> dict[str, str]:
    """What the last bits of a response depend on besides model and image."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {"device": device.type, "hardware": hardware, "torch": torch.__version__, "layout": "channels_last"}
