"""Recorder: batches in, the strongest responses of every unit out. `scan` is a source and one of these."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from unitvis import models
from unitvis.errors import UnitvisError, error_text
from unitvis.half_precision.candidates import EXTRA_CANDIDATES
from unitvis.half_precision.step import HALF, Step
from unitvis.half_precision.suitability import NAMES, suitable_precision
from unitvis.network.device import refuse_state, unwrapped
from unitvis.network.forward import COMPUTE_BATCH, CanonicalPass
from unitvis.network.network import Network, Shape
from unitvis.ranking.batches import check_coverage, checked_ids, checked_images
from unitvis.ranking.repetition import repetition_warning
from unitvis.ranking.watch import WeightsWatch
from unitvis.ranking.winners import ranked_run, reranked_run
from unitvis.reranking.rerank import Scanned
from unitvis.reranking.witness import ROUNDING, check_witness
from unitvis.results.manifest import scan_manifest
from unitvis.run import Run
from unitvis.sources import Source, open_source
from unitvis.sources.transform import Transform
from unitvis.state.interval_set import IntervalSet
from unitvis.state.partial import SEEN, Identity, Partial, identity
from unitvis.state.topk import TopK

LOOP_ROUNDING = (
    1e-4  # share of a layer's largest response by which the images of a loop may give others when read again
)


class Recorder:
    """Ranks units inside a loop of your own::

        with unitvis.Recorder(model, ["features.10"]) as recorder:
            for images, labels in loader:
                recorder(images)
        run = recorder.result()

    model: a module, or a spec such as "torchvision:alexnet", which brings its transform. layers: names or shell
    patterns; None: every convolution, after the BatchNorm that directly follows it. exclude: names or shell patterns of
    layers to leave out. unit: "channel" ranks the largest response over positions, "neuron" every element of the map.
    device: None is the model's own. precision: "fp32" is canonical (compute batches of 16); "fp16" and "bf16" rank what
    a copy of the model gives in half precision, in batches of batch_size. weights: "fixed" refuses, at `result`,
    weights that were written to between calls; "moving" ranks each image by the weights that it met, in float32, and no
    unit is separated.

    State on the device is O(units x k); nothing is copied to the host before `result`. A GPU that scans in half
    precision fetches a pinned batch after the call: write into one only two calls later. The model is left as it was
    found.
    """

    make_step = Step.of  # of a scan in half precision; a subclass of Step can emulate it

    def __init__(
        self,
        model: nn.Module | str | models.Loaded,
        layers: Sequence[str] | str | None = None,
        k: int = 9,
        *,
        exclude: Sequence[str] | str = (),
        unit: str = "channel",
        device: torch.device | str | None = None,
        transform: Transform | None = None,
        precision: str = "fp32",
        batch_size: int = 4 * COMPUTE_BATCH,
        weights: str = "fixed",
    ) -> None:
        if not isinstance(k, int) or k < 1:
            raise UnitvisError(f"k must be a whole number of at least 1, not {k!r}")
        if unit not in ("channel", "neuron"):
            raise UnitvisError(f"unit must be 'channel' or 'neuron', not {unit!r}")
        if weights not in ("fixed", "moving"):
            raise UnitvisError(f"weights must be 'fixed' or 'moving', not {weights!r}")
        model, own_transform, self._origin = models.resolved(model)
        self.network = Network(model, device=device, transform=transform or own_transform)
        self._given = unwrapped(model)
        if weights == "moving" and self.network.model is not self._given:
            raise UnitvisError(
                "weights='moving' ranks the model itself, and this one would be copied, because it is on another "
                "device or not in float32; leave out device=, or move the model before"
            )
        self.k, self.images = k, 0  # images: how many are in the top-k
        self.coverage = IntervalSet()  # the ids given; after `flush` all of them are in the top-k
        self.topk: TopK  # made with the first batch
        self._layers, self._exclude, self._unit, self._weights = layers, exclude, unit, weights
        self._first_shape: torch.Size | None = None  # of the first image as it came
        self._next_id = 0
        self._waiting: list[tuple[Tensor, Tensor]] = []  # images and ids, fewer than are computed at once
        self._begun = self._settled = False
        self._watch: WeightsWatch | None = None  # of weights that are to stay fixed, from the first call on
        self._canonical: CanonicalPass  # in float32, once it has begun
        self._step: Step  # in half precision, once it has begun
        self._stack = ExitStack()
        self._open = False
        self.set_precision(precision, batch_size)

    def __enter__(self) -> Self:
        self._stack.enter_context(self.network.evaluating())
        self._open = True
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        with self._stack:
            if error is None:
                self.flush()
            self._open = False

    def set_precision(self, precision: str, batch_size: int) -> None:
        """Choose how the images are computed, before the first one is."""
        if precision != "fp32" and precision not in HALF:
            raise UnitvisError(f"precision must be fp32, {' or '.join(HALF)}, not {precision!r}")
        if precision != "fp32" and self._weights == "moving":
            raise UnitvisError(f"weights='moving' needs precision='fp32': {precision} ranks with a copy of the weights")
        self.precision, self._size = precision, COMPUTE_BATCH if precision == "fp32" else batch_size

    @torch.inference_mode(False)
    def settle_precision(self, images: Tensor) -> str | None:
        """Take the next wider precision where the one chosen does not suit the network; the reason, None if it suits.

        images: as they were read; what the network computes from them decides. Only before the first image.
        """
        self._settled = True
        if self.precision == "fp32":
            return None
        if not self.network.layers:
            self.prepare(self.network.input_shape_of(images))
        with self.network.evaluating():
            precision, reason = suitable_precision(self.network, images, self.precision)
        self.set_precision(precision, self._size)
        return reason

    @torch.inference_mode(False)
    def prepare(self, shape: Shape) -> None:
        """For inputs [C, H, W]: find the layers and what their neurons see, and describe the model.

        All that can fail because of the model fails here, before the first image is computed.
        """
        self.network.examine(shape, self._layers, self._unit, self._exclude)
        try:
            self.network.description  # noqa: B018  it is kept
        except UnitvisError:
            raise
        except Exception as error:
            raise UnitvisError(
                f"the model cannot be described for the manifest, because its state_dict() cannot be read "
                f"({error_text(error)}); give a model whose state can be read"
            ) from error
        refuse_state(self.network.units, self.k + 1, COMPUTE_BATCH, self.network.device)
        self.network.find_receptive_fields()

    @torch.inference_mode(False)  # a loop may be in it; the top-k outlives the loop
    def __call__(self, batch: Tensor, ids: Tensor | Sequence[int] | None = None) -> None:
        """Take a batch: float [N, C, H, W], already normalised, or uint8 [N, H, W, 3] where a transform was given.

        ids: whole numbers from 0, one an image, each used once; None counts up.
        """
        if not self._open:
            raise UnitvisError("a Recorder records inside its block: with unitvis.Recorder(...) as recorder: ...")
        images = checked_images(batch, self._first_shape, uint8=self.network.transform is not None)
        self._first_shape = images.shape[1:]
        if self._weights == "fixed" and self._watch is None:
            self._watch = WeightsWatch(self._given)
        if not self._settled and len(images) and (reason := self.settle_precision(images)):
            warnings.warn(f"{reason}; the images are scanned in {NAMES[self.precision]}")
        if self.precision == "fp32":
            images = images.to(self.network.device)
        if ids is None:
            ids = torch.arange(self._next_id, self._next_id + len(images), device="cpu")
        ids = checked_ids(ids, len(images))
        known = ids.numpy().copy() if ids.device.type == "cpu" else ()  # ids that came on a GPU stay unknown
        self._next_id += len(images)
        if self._waiting:
            waiting = self._waiting.pop()
            images, ids = torch.cat([waiting[0], images]), torch.cat([waiting[1], ids])
        whole = len(images) - len(images) % self._size
        for start in range(0, whole, self._size):
            self._rank(images[start : start + self._size], ids[start : start + self._size])
        if whole < len(images):
            self._waiting.append((images[whole:].clone(), ids[whole:].clone()))
        self.coverage.add(np.asarray(known, np.int64))
        if self._weights == "moving":
            self.flush()

    @torch.inference_mode(False)
    def flush(self) -> None:
        """Compute the images that wait for a whole compute batch."""
        if self._waiting:
            self._rank(*self._waiting.pop())

    def _rank(self, images: Tensor, ids: Tensor) -> None:
        """Compute at most as many images as are computed at once, and fold them into the top-k."""
        with self.network.evaluating():  # a loop may train the model meanwhile
            if self._watch is not None:
                self._watch.look()
            if not self._begun:
                self._begin(images)
            if self.precision == "fp32":
                keys = self._canonical.keys(images, self.topk.threshold())
                self.topk.merge(keys, ids.to(keys.device))
            else:
                self._step(images, ids)
            if self._watch is not None:
                self._watch.settle()
        self.images += len(ids)

    def _begin(self, images: Tensor) -> None:
        """Find the layers by the first images, and see that their responses can be ranked."""
        if not self.network.layers:
            self.prepare(self.network.input_shape_of(images))
        if self.images == 0:
            # One more than k in float32 tells whether the k-th is tied; in half precision there are candidates.
            places = self.k + (1 if self.precision == "fp32" else EXTRA_CANDIDATES)
            self.topk = TopK.empty(self.network.units, places, self.network.device)
        if self.precision == "fp32":
            self._canonical = self._stack.enter_context(self.network.reading())
            self.network.check_independence(self._canonical, images[:COMPUTE_BATCH])
        else:
            self._step = self.make_step(self.network, self.topk, images, precision=self.precision, size=self._size)
        self._begun = True

    @torch.inference_mode(False)
    def result(self, images: object = None) -> Run:
        """The run so far: float32 values, images, positions and boxes of the k winners of every unit.

        images: whatever `scan` takes and can be read again by id, to cut patches from; after half precision also to
        compute again what can win. Without them such a run ranks what half precision said, and nothing is separated.
        Sixteen winners are read from them and computed again: UnitvisError if they give other responses than were
        recorded under their ids. The manifest's `witness` says so, or why it was not checked.
        """
        self._check_recorded()
        source = None if images is None else open_source(images, self.network.transform)
        checked: dict[str, int] | str
        if source is None:
            checked = "not checked: no images were given"
        elif not source.rereadable:
            checked = f"not checked: a {source.kind} is read once"
        elif self._weights == "moving":
            checked = "not checked: the weights moved"
        else:
            try:  # the loop may have normalised the images otherwise, so their last bits may differ
                checked = self.check_witness(source, rounding=LOOP_ROUNDING)
            except UnitvisError as error:
                raise UnitvisError(
                    f"the images given are not those that were recorded under their ids: {error}; a loop that shuffles "
                    "or augments must hand over ids and the very images: recorder(images, ids)"
                ) from error
        run = self._ranked(source)
        run.manifest["witness"] = checked
        if source is not None and self.precision == "fp32":
            run.attach(source)
        if repeated := repetition_warning(self.topk.read(), self.k):
            warnings.warn(repeated)
        return run

    def ranked(self, source: Source | None = None) -> Run:
        """Like `result`, without the witness and with no images to cut patches from; source: see `_ranked`."""
        self._check_recorded()
        return self._ranked(source)

    def _ranked(self, source: Source | None) -> Run:
        """The run of the top-k as it is. source: after half precision, to compute again what can win."""
        if self.precision != "fp32" and source is not None:
            return reranked_run(self.network, self.scanned, source, self._manifest("exact"))
        decided = np.full(self.network.units, self.precision == "fp32" and self._weights == "fixed")
        return ranked_run(self.network, self.topk, self.k, decided, self._manifest(self.precision))

    def _check_recorded(self) -> None:
        """Raise UnitvisError unless there are images, each under an id of its own, ranked by one set of weights."""
        self.flush()
        if self.images == 0:
            raise UnitvisError("no image was recorded, so there is nothing to rank")
        if len(self.coverage):  # none are known where they came on a GPU
            check_coverage(self.coverage, self.images)
        if self._watch is not None:
            self._watch.refuse(hashes=True)

    def check_witness(
        self, source: Source, topk: TopK | None = None, *, bits: bool = False, rounding: float = ROUNDING
    ) -> dict[str, int]:
        """Compute some winners of a top-k (None: of the images so far) again, see `reranking.witness`."""
        half = None if self.precision == "fp32" else self._half_responses
        resolution = 0.0 if self.precision == "fp32" else torch.finfo(HALF[self.precision]).eps
        topk = self.topk if topk is None else topk
        with self.network.evaluating():
            return check_witness(
                self.network, topk, self.k, source, bits=bits, rounding=rounding, half=half, resolution=resolution
            )

    @property
    def scanned(self) -> Scanned:
        """What half precision leaves to be decided by float32."""
        if len(self.coverage) != self.images:
            raise UnitvisError("ids must come on the CPU, or nothing tells which images can be computed again")
        return Scanned(self.k, self.topk, self.coverage, self._half_responses, self.precision)

    def _half_responses(self, images: Tensor) -> Any:
        if not self._begun:  # the scan was another process's
            self._begin(images)
        return np.concatenate([self._step.responses(part) for part in torch.split(images, self._size)])

    def _manifest(self, precision: str) -> dict[str, Any]:
        return {
            **self.about(),
            "precision": precision,
            "images": self.images,
            "coverage": self.coverage.ranges.tolist(),
            "failures": [],
            **({"weights": "moving"} if self._weights == "moving" else {}),
            "seconds": {"preparation": self.network.preparation},
        }

    def about(self) -> dict[str, Any]:
        """What is recorded and how, for a manifest."""
        how: dict[str, Any] = {"precision": self.precision, "batch_size": self._size}
        if self.precision != "fp32":
            how |= {"candidates": self.k + EXTRA_CANDIDATES, **(self._step.how if self._begun else {})}
        manifest = scan_manifest(self.network, self.k, self.precision, how)
        if self._origin["spec"] is not None:
            manifest["model"] |= self._origin
        return manifest

    def partial(self, seconds: float = 0.0, read_from: Source | None = None, **entries: Any) -> Run:
        """A run with what `merge` needs of the images so far, and no winners yet; their ids must be known.

        seconds: of scanning. read_from: source of the images. entries: of the manifest, in place of a recorder's own.
        """
        manifest = self.about() | {"partial": True, "shard": None, "failures": []} | entries
        failures = {failure["id"]: failure["reason"] for failure in manifest["failures"]}
        part = self.snapshot(identity(manifest), failures, seconds, read_from)
        counted = {"images": self.images, "coverage": part.coverage.ranges.tolist()}
        return Run({}, manifest | counted | {"seconds": {"preparation": self.network.preparation}}, {}, partial=part)

    def snapshot(
        self, identity: Identity, failures: Mapping[int, str], seconds: float, read_from: Source | None = None
    ) -> Partial:
        """All that was recorded so far, taken at once: one copy from the device. read_from: see `partial`."""
        self.flush()
        check_coverage(self.coverage, self.images)
        if self._weights == "moving":
            raise UnitvisError("responses of weights that move cannot be merged; record with weights='fixed'")
        if self._watch is not None:
            self._watch.refuse(hashes=False)
        topk = self.topk.to("cpu")
        seen = np.zeros(0, SEEN) if read_from is None else read_from.noted(topk.images())
        return Partial(identity, topk, self.coverage.copy(), failures, seconds, seen)

    def restore(self, part: Partial) -> None:
        """Go on from a snapshot; only before the first image, after `prepare`."""
        self.topk, self.coverage = part.topk.to(self.network.device), part.coverage.copy()
        self.images, self._settled = len(self.coverage), True
