"""The hot path: batches in, the strongest responses of every unit out. `scan` is a source and one of these."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

import unitvis_kernels as uk
from unitvis.errors import UnitvisError, first_line
from unitvis.half_precision.step import HALF, Step
from unitvis.network.canonical import BATCH, canonical_settings, check_independence, compute_batch, evaluating
from unitvis.network.device import copied, fingerprint, on_device, refuse_state
from unitvis.network.layers import Examination, Layer, Taps
from unitvis.ranking.winners import Top, layer_top
from unitvis.receptive_fields.fields import ReceptiveField, receptive_fields
from unitvis.results.manifest import describe_model, saturation
from unitvis.run import FORMAT, SEPARATED, TIED, UNSEPARATED, LayerTop, Run
from unitvis.sources import open_source
from unitvis.sources.transform import Transform
from unitvis.state.intervals import Coverage
from unitvis.state.partial import Identity, Partial, identity
from unitvis.state.sampling import sample

SPARE = 55  # candidates beyond k that a scan in half precision keeps of every unit


class Recorder:
    """Ranks units inside a loop of your own::

        with unitvis.Recorder(model, ["features.10"]) as recorder:
            for images, labels in loader:
                recorder(images)
        run = recorder.result()

    layers: names or shell patterns; None: every convolution, after the BatchNorm that directly follows it. unit:
    "channel" ranks the largest response over positions, "neuron" every element of the map. device: None is the
    model's own. precision: "fp32" is canonical (compute batches of 16); "fp16" and "bf16" rank what a copy of the model
    gives in half precision, in batches of batch_size. State on the device is O(units x k); nothing is copied to the
    host before `result`. A GPU that scans in half precision fetches a pinned batch after the call: write into one only
    two calls later. The model is left as it was found.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str] | str | None = None,
        k: int = 9,
        *,
        unit: str = "channel",
        device: torch.device | str | None = None,
        transform: Transform | None = None,
        precision: str = "fp32",
        batch_size: int = 4 * BATCH,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise UnitvisError(f"the model must be a torch.nn.Module, not {type(model).__name__}")
        if not isinstance(k, int) or k < 1:
            raise UnitvisError(f"k must be a whole number of at least 1, not {k!r}")
        if unit not in ("channel", "neuron"):
            raise UnitvisError(f"unit must be 'channel' or 'neuron', not {unit!r}")
        # What torch.compile wraps has the layers under their own names.
        self.model, self.device = on_device(getattr(model, "_orig_mod", model), device)
        self.scan_in(precision, batch_size)
        self.k, self.unit, self.transform = k, unit, transform
        self.images = 0
        self.coverage = Coverage()  # the ids given; after `flush` all of them are in the state
        self.layers: list[Layer] = []
        self.state: Tensor
        self._units: list[slice]  # columns of each layer in the state
        self.fields: dict[str, ReceptiveField] = {}
        self._patterns = layers
        self._shape: list[int] = []  # [C, H, W] of the model's input
        self._first_shape: torch.Size | None = None  # of the first image as it came
        self._next_id = 0
        self._waiting: list[tuple[Tensor, Tensor]] = []  # fewer than are computed at once: (images, ids)
        self._step: Step | None = None  # in half precision
        self.started = False  # whether anything was computed
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

    def scan_in(self, precision: str, batch_size: int) -> None:
        """Choose how the images are computed, before the first one is."""
        if precision != "fp32" and precision not in HALF:
            raise UnitvisError(f"precision must be fp32, {' or '.join(HALF)}, not {precision!r}")
        self.precision, self._size = precision, BATCH if precision == "fp32" else batch_size

    @torch.inference_mode(False)  # a loop may be in it; the state outlives the loop
    def __call__(self, batch: Tensor, ids: Tensor | Sequence[int] | None = None) -> None:
        """Take a batch: float [N, C, H, W], already normalised, or uint8 [N, H, W, 3] where a transform was given.

        ids: whole numbers from 0, one an image, each used once; None counts up.
        """
        if not self._open:
            raise UnitvisError("a Recorder records inside its block: with unitvis.Recorder(...) as recorder: ...")
        images = self._as_given(batch)
        if self.precision == "fp32":
            images = images.to(self.device)
        if ids is None:
            ids = torch.arange(self._next_id, self._next_id + len(images), device="cpu")
        ids = _whole_numbers(ids)
        if ids.shape != images.shape[:1]:
            raise UnitvisError(f"{len(images)} images came with ids of shape {list(ids.shape)}")
        if ids.device.type == "cpu" and len(ids) and int(ids.min()) < 0:  # on a GPU a look would wait for it
            raise UnitvisError(f"an image came with the id {int(ids.min())}; ids are whole numbers from 0")
        known = ids.numpy().copy() if ids.device.type == "cpu" else ()  # ids that came on a GPU stay unknown
        if self._first_shape is None:
            self._first_shape = images.shape[1:]
        if images.shape[1:] != self._first_shape:
            raise UnitvisError(
                f"images of {list(images.shape[1:])} came after images of {list(self._first_shape)}; give them one size"
            )
        self._next_id += len(images)
        if self._waiting:
            waiting = self._waiting.pop()
            images, ids = torch.cat([waiting[0], images]), torch.cat([waiting[1], ids])
        whole = len(images) - len(images) % self._size
        for start in range(0, whole, self._size):
            self._compute(images[start : start + self._size], ids[start : start + self._size])
        if whole < len(images):
            self._waiting.append((images[whole:].clone(), ids[whole:].clone()))
        self.coverage.add(np.asarray(known, np.int64))

    @torch.inference_mode(False)
    def flush(self) -> None:
        """Compute what waits for a whole compute batch, padded."""
        if self._waiting:
            self._compute(*self._waiting.pop())

    def as_images(self, batch: Tensor) -> Tensor:
        batch = self._as_given(batch)
        if batch.dtype == torch.uint8 and self.transform is not None:
            return self.transform.normalize(batch.to(self.device))
        return batch.to(self.device, torch.float32)

    def input_shape(self, batch: Tensor) -> tuple[int, int, int]:
        """[C, H, W] of what the model gets of a batch."""
        shape = batch.shape[1:]
        return (shape[2], shape[0], shape[1]) if batch.dtype == torch.uint8 else (shape[0], shape[1], shape[2])

    @property
    def units(self) -> int:
        """Of all layers."""
        return self._units[-1].stop

    def _as_given(self, batch: Tensor) -> Tensor:
        """A batch that can be computed, where and in what type it came."""
        if not isinstance(batch, Tensor):
            raise UnitvisError(f"a batch must be a tensor, not {type(batch).__name__}")
        if batch.dtype == torch.uint8 and self.transform is not None:
            return batch
        if batch.ndim != 4 or not batch.is_floating_point():
            raise UnitvisError(
                f"a batch must be float images [N, C, H, W], already normalised, not {batch.dtype} {list(batch.shape)}"
            )
        return batch

    def _compute(self, images: Tensor, ids: Tensor) -> None:
        with evaluating(self.model):  # a loop may train it meanwhile
            if not self.started:
                self._start(images)
            if self._step is None:
                self._take(self._keys(self._compute_batch(images))[: len(ids)], ids.to(self.device))
            else:
                self._step(images, ids)
                if self.images == 0 and self._overflows(len(ids)):
                    self._start(images)
                    self._step(images, ids)
        self.images += len(ids)

    def _compute_batch(self, images: Tensor) -> Tensor:
        batch = self.as_images(images)
        whole = len(images) == BATCH and images.dtype == torch.uint8  # then it was made just now, and in that layout
        return batch if whole else compute_batch(batch)

    def _start(self, images: Tensor) -> None:
        """What the first images decide: the layers, and whether their responses can be ranked."""
        batch = self._compute_batch(images[:BATCH])
        if not self.layers:
            self.prepare(self.input_shape(images))
        if self.images == 0:
            self.state = self._empty()
        taps = Taps(self.model, [layer.name for layer in self.layers])
        if self.precision == "fp32":
            self._taps = self._stack.enter_context(taps)
            self._check_independence(batch)
        else:
            untapped = copied(self.model)
            with taps as self._taps:
                keys = self._check_independence(batch)
            self._step = self._fast(untapped, batch, uk.unpack(keys)[0])
        self.started = True

    def _overflows(self, images: int) -> bool:
        """After the first batch: where half of its images overflow a unit, another scan in bfloat16 begins."""
        last = uk.unpack(self.state[:, min(self.k + SPARE, (images + 1) // 2) - 1])[0]
        both = zip(self.layers, self._units, strict=True)
        layers = [layer.name for layer, units in both if last[units].isinf().any()]
        if not layers or self.precision == "bf16":
            return False
        warnings.warn(f"layer {layers[0]!r} overflows in float16; the images are scanned in bfloat16")
        self.precision = "bf16"
        return True

    def _fast(self, model: nn.Module, sample: Tensor, responses: Tensor) -> Step:
        return Step(
            model,
            {layer.name: units for layer, units in zip(self.layers, self._units, strict=True)},
            self.state,
            dtype=HALF[self.precision],
            size=self._size,
            transform=self.transform,
            neurons=self.unit == "neuron",
            sample=sample,
            responses=responses,
        )

    def _floor(self) -> Tensor | None:
        """float32 [units]: what a response must reach to enter the top-k; NaN where there is room. None: all count."""
        return uk.unpack(self.state[:, (self.state.shape[1] - 2) // 2 - 1])[0]

    def _take(self, keys: Tensor, ids: Tensor) -> None:
        uk.topk_merge_(self.state, keys, ids)

    def _keys(self, batch: Tensor) -> Tensor:
        """Keys [BATCH, units of all layers] of a compute batch."""
        with torch.inference_mode(), canonical_settings(self.device):
            return self._read(batch)

    def _read(self, batch: Tensor) -> Tensor:
        return self._taps.keys(batch, self._units, self._floor(), neurons=self.unit == "neuron")

    def rate(self, images: Tensor) -> float:
        """Canonical images/s, by one compute batch of images like those that were recorded; it records nothing."""
        start = time.perf_counter()
        self._keys(self._compute_batch(images[:BATCH]))
        return BATCH / (time.perf_counter() - start)

    def adopt(self, other: Recorder) -> None:
        """Rank the units of another Recorder, from an empty state, without examining the model again."""
        self.layers, self.fields, self._units = other.layers, other.fields, other._units
        self._shape, self.preparation, self.state = other._shape, other.preparation, self._empty()
        self.started = True

    @property
    def sample(self) -> Any:
        """int64 ids, ascending, of the images on which half precision is compared with float32."""
        if len(self.coverage) != self.images:
            raise UnitvisError("ids must come on the CPU, or nothing tells which images can be computed again")
        return sample(self.coverage.ranges)

    def half_responses(self, images: Tensor) -> Any:
        """float64 [N, units]: what half precision says of some images."""
        if self._step is None:  # the scan was another process's
            self._start(images)
        assert self._step is not None  # noqa: S101  # for mypy
        return uk.unpack(self._step.keys(images))[0].cpu().double().numpy()

    @property
    def how(self) -> dict[str, Any]:
        """How the images were computed, for the manifest."""
        how: dict[str, Any] = {"precision": self.precision, "batch_size": self._size}
        if self.precision != "fp32":
            how["candidates"] = self.k + SPARE
        return how | (self._step.how if self._step else {})

    @property
    def resolution(self) -> float:
        """The distance from 1 to the next number in the precision of the scan."""
        return torch.finfo(HALF[self.precision]).eps

    @torch.inference_mode(False)
    def prepare(self, shape: tuple[int, int, int]) -> None:
        """For inputs [C, H, W]: which layers, how large, what their neurons see; and an empty state for them."""
        start = time.perf_counter()
        self._shape = list(shape)
        with evaluating(self.model), canonical_settings(self.device):
            examination = Examination(self.model, torch.zeros(1, *shape, dtype=torch.float32, device=self.device))
        self.layers = [examination.layer(name) for name in examination.select(self._patterns)]
        units = [_units(layer, self.unit) for layer in self.layers]
        ends = np.cumsum(units).tolist()
        self._units = [slice(end - own, end) for end, own in zip(ends, units, strict=True)]
        refuse_state(self.units, self.k + 1, BATCH, self.device)
        names = [layer.name for layer in self.layers]
        self.fields = receptive_fields(self.model, names, shape)
        for layer in self.layers:
            if self.fields[layer.name].channels_last:
                raise UnitvisError(
                    f"layer {layer.name!r} puts its channels last, [N, H, W, C] = [N, {layer.channels}, "
                    f"{layer.height}, {layer.width}]; name a Linear, LayerNorm or convolution beside it"
                )
        self.preparation = time.perf_counter() - start

    def _empty(self) -> Tensor:
        # One more than k in float32: is the k-th tied? In half precision the candidates.
        return uk.topk_state(self._units[-1].stop, self.k + (1 if self.precision == "fp32" else SPARE), self.device)

    def _check_independence(self, batch: Tensor) -> Tensor:
        """Keys of a compute batch, which must be those of it reversed."""
        keys = self._keys(batch.clone())  # which a model may overwrite
        again = self._keys(batch.flip(0).contiguous(memory_format=torch.channels_last)).flip(0)
        check_independence(keys, again, dict(zip((layer.name for layer in self.layers), self._units, strict=True)))
        return keys

    @torch.inference_mode(False)
    def result(self, images: object = None) -> Run:
        """The run so far: float32 values, images, positions and boxes of the k winners of every unit.

        images: whatever `scan` takes and can be read again by id, to cut patches from; after half precision also to
        compute again what can win. Without them such a run ranks what half precision said, and nothing is separated.
        """
        self.flush()
        if self.images == 0:
            raise UnitvisError("no image was recorded, so there is nothing to rank")
        if len(self.coverage):  # none are known where they came on a GPU
            self._check_ids()
        if self.precision != "fp32" and images is not None:
            from unitvis.reranking.rerank import rescored

            return rescored(self, open_source(images, self.transform))
        values, ids, positions = (part.cpu().numpy() for part in uk.topk_read(self.state))
        nan = self.state[:, -2:].cpu().numpy()
        tops = {}
        for layer, part in zip(self.layers, self._units, strict=True):
            places = Top(values[part], ids[part], positions[part], nan[part])
            tied = (places.ids[:, self.k] >= 0) & (places.values[:, self.k] == places.values[:, self.k - 1])
            status = self._status(tied, part)
            tops[layer.name] = layer_top(layer, self.fields[layer.name], self.unit, self.k, places, status)
        run = Run(tops, self._manifest(tops), {})
        if images is not None:
            run.attach(open_source(images, self.transform))
        return run

    def _status(self, tied: Any, units: slice) -> Any:
        """Of a layer's units; tied [units]: the k-th shares its value with the next."""
        return np.where(tied, TIED, SEPARATED) if self.precision == "fp32" else np.full(len(tied), UNSEPARATED)

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
            "plan": "as asked",
            "source": {"kind": "recorder"},
            "transform": self.transform.to_json() if self.transform else None,
            "fingerprint": fingerprint(self.device),
            "scan": self.how,
        }

    def _manifest(self, tops: dict[str, LayerTop]) -> dict[str, Any]:
        return {
            **self.about(),
            "layers": {name: top.info for name, top in tops.items()},
            "images": self.images,
            "coverage": self.coverage.ranges.tolist(),
            "failures": [],
            "seconds": {"preparation": self.preparation},
            "warnings": [w for top in tops.values() if (w := saturation(top))],
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
        self._check_ids()
        return Partial(identity, self.state.to("cpu", copy=True), self.coverage.copy(), failures, seconds)

    def _check_ids(self) -> None:
        """UnitvisError where the known ids are not one for each image."""
        if len(self.coverage) != self.images:
            raise UnitvisError(
                f"{self.images} images were recorded under {len(self.coverage)} known ids; give each image one of its "
                "own, on the CPU (what comes after the images is taken for ids, not labels), and drop a Recorder that "
                "raised"
            )

    def go_on(self, part: Partial) -> None:
        """Take over what `part` gave; only in place of nothing, after `prepare`."""
        self.state = part.state.to(self.device, copy=True)
        self.coverage = part.coverage.copy()
        self.images = len(self.coverage)


def _whole_numbers(ids: Tensor | Sequence[int]) -> Tensor:
    """Ids as int64; UnitvisError for what is no whole number."""
    try:
        given = ids if isinstance(ids, Tensor) else torch.from_numpy(np.asarray(ids))
        if given.dtype == torch.bool or given.is_floating_point():
            raise UnitvisError(f"ids are whole numbers from 0, not {str(given.dtype).removeprefix('torch.')}")
        return given.to(torch.int64)
    except (TypeError, OverflowError) as error:
        raise UnitvisError(f"ids are whole numbers from 0: {first_line(error)}") from error


def _units(layer: Layer, unit: str) -> int:
    return layer.channels * (layer.height * layer.width if unit == "neuron" else 1)
