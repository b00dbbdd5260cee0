"""Recorder: batches in, the strongest responses of every unit out. `scan` is a source and one of these."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unitvis.errors import UnitvisError
from unitvis.half_precision.candidates import EXTRA_CANDIDATES
from unitvis.half_precision.step import HALF, Step
from unitvis.ranking.batches import check_coverage
from unitvis.ranking.recording import Recording
from unitvis.ranking.repetition import repetition_warning
from unitvis.ranking.winners import keep_sample, ranked_run, reranked_run
from unitvis.reranking.rerank import Scanned
from unitvis.reranking.witness import check_witness
from unitvis.results.manifest import scan_manifest
from unitvis.run import Run
from unitvis.sources import Source, open_source
from unitvis.state.interval_set import IntervalSet
from unitvis.state.partial import SEEN, Identity, Partial, identity
from unitvis.state.topk import Ranked

# Share of a layer's largest response by which the images of a loop may give others when they are read again.
LOOP_ROUNDING = 1e-4


class Recorder(Recording):
    """Ranks units inside a loop of your own::

        with unitvis.Recorder(model, ["features.10"]) as recorder:
            for images, labels in loader:
                recorder(images)
        run = recorder.result()

    model: a module, or a spec such as "torchvision:alexnet", which brings its transform. layers: names or shell
    patterns; None: every convolution, after the BatchNorm that directly follows it. exclude: names or shell patterns of
    layers to leave out. unit: "channel" ranks the largest response over positions, "neuron" every element of the map.
    inside: rank only positions that read no padding, see `inside.rank_inside`.
    device: None is the model's own. transform: normalises pixels, which must come resized and cropped as it would.
    precision: "fp32" is canonical (compute batches of 16); "fp16" and "bf16" rank what a copy of the model gives in
    half precision, in batches of batch_size (None: 64, on a GPU 256), which is halved where memory runs out. weights:
    "fixed" refuses, at `result`, weights that were written to between calls; "moving" ranks each image by the weights
    that it met, in float32, and no unit is separated.

    State on the device is O(units x k); nothing is copied to the host before `result`. A GPU that scans in half
    precision fetches a pinned batch after the call: write into one only two calls later. The model is left as it was
    found.
    """

    @torch.inference_mode(False)
    def result(self, images: object = None) -> Run:
        """The run so far: float32 values, images, positions and boxes of the k winners of every unit.

        images: whatever `scan` takes and can be read again by id, to cut patches from and for the sample of
        `LayerTop.typical`; after half precision also to compute again what can win. Without them such a run ranks what
        half precision said, and nothing is separated. Sixteen winners are read from them and computed again:
        UnitvisError if they give other responses than were recorded under their ids. That with the largest id is one of
        them, so that a loop which left images out and let ids be counted is found. The manifest's `witness` says so, or
        why it was not checked.
        """
        with self._lock:
            return self._result(images)

    def _result(self, images: object) -> Run:
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
                    f"the images given are not those that were recorded under their ids: {error}; a loop that "
                    "shuffles, augments or leaves images out must hand over ids and the very images: "
                    "recorder(images, ids)"
                ) from error
        length = None if source is None else source.length
        if length is not None and len(more := self.coverage - IntervalSet([(0, length)])):
            raise UnitvisError(
                f"{length:,} images were given, and image {more.ranges[0, 0]:,} was recorded; give all of them"
            )
        # In float32 the witness tells; half precision gives some images the same responses within its rounding.
        if self._counted and self.precision != "fp32" and length is not None and self.images < length:
            warnings.warn(
                f"{self.images:,} images were recorded without ids, and {length:,} were given: if the loop left out "
                "any but the last ones, as a collate_fn that drops images does, winners may be wrong; give ids to the "
                "Recorder: recorder(images, ids)"
            )
        run = self._ranked(source)
        run.manifest["witness"] = checked
        if source is not None and self.precision == "fp32":
            run.attach(source)
            if source.rereadable:
                keep_sample(run, self.network, source)
        if repeated := repetition_warning(self.topk.read(), self.k):
            warnings.warn(repeated)
        return run

    def ranked(self, source: Source | None = None) -> Run:
        """Like `result`, without the witness and with no images to cut patches from; source: see `_ranked`."""
        with self._lock:
            self._check_recorded()
            return self._ranked(source)

    def _ranked(self, source: Source | None) -> Run:
        """The run of the top-k as it is. source: after half precision, to compute again what can win."""
        if self.precision != "fp32" and source is not None:
            if self._begun:
                self._step.release()
            run = reranked_run(self.network, self.scanned, source, self._manifest("exact"))
        else:
            decided = np.full(self.network.units, self.precision == "fp32" and self._weights == "fixed")
            run = ranked_run(self.network, self.topk, self.k, decided, self._manifest(self.precision))
        run.set_labels(self.labels)
        return run

    def check_witness(
        self, source: Source, ranked: Ranked | None = None, *, canonical: bool = False, **options: Any
    ) -> dict[str, int]:
        """Compute some winners (None: of the images so far) again, see `reranking.witness`, which has the options.

        canonical: their responses are, whatever the precision of the scan.
        """
        if self.precision != "fp32" and not canonical:
            options |= {"half": self._half_responses, "resolution": torch.finfo(HALF[self.precision]).eps}
        ranked = self.topk.read() if ranked is None else ranked
        with self.network.evaluating():
            return check_witness(self.network, ranked, self.k, source, **options)

    @property
    def scanned(self) -> Scanned:
        """What half precision leaves to be decided by float32."""
        if len(self.coverage) != self.images:
            raise UnitvisError("ids must come on the CPU, or nothing tells which images can be computed again")
        return Scanned(
            self.k,
            self.topk,
            self.largest_inputs,
            self.coverage,
            responses=self._half_responses,
            magnitudes=self._magnitudes,
            precision=self.precision,
            batch_sizes=sorted(self.batch_sizes or {self._size}),
        )

    def _half_responses(self, images: Tensor, size: int | None = None) -> NDArray[np.float64]:
        """Responses in half precision, float64 [N, units], of images as they were read.

        size: as how many images they are computed at once, RuntimeError where memory runs out over them; None: as many
        as the scan does, and fewer where they do not fit.
        """
        step = self._begun_step(images)

        def compute() -> NDArray[np.float64]:
            now = size or self._size
            return np.concatenate([step.responses(part, now) for part in torch.split(images, now)])

        if size:
            return compute()
        responses = self._halving(compute)
        self._tell_of_halving()
        return responses

    def _magnitudes(self, images: Tensor, size: int) -> NDArray[np.float64]:
        """How large the inputs are, float64 [N, C * SCALES], of images as they were read, `size` of them at once."""
        step = self._begun_step(images)
        return np.concatenate([step.magnitudes(part) for part in torch.split(images, size)])

    def _begun_step(self, images: Tensor) -> Step:
        if not self._begun:  # the scan was another process's
            self._begin(images)
        return self._step

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
            if self.batch_sizes - {self._size}:
                how["batch_sizes"] = sorted(self.batch_sizes)
        manifest = scan_manifest(self.network, self.k, self.precision, how)
        if self._origin["spec"] is not None:
            manifest["model"] |= self._origin
        return manifest

    def partial(self, seconds: float = 0.0, read_from: Source | None = None, **entries: Any) -> Run:
        """A run with what `merge` needs of the images so far, and no winners yet; their ids must be known.

        seconds: of scanning. read_from: source of the images. entries: of the manifest, in place of a recorder's own.
        """
        self.flush()
        manifest = self.about() | {"partial": True, "shard": None, "failures": []} | entries
        failures = {failure["id"]: failure["reason"] for failure in manifest["failures"]}
        part = self.snapshot(identity(manifest), failures, seconds, read_from)
        counted = {"images": self.images, "coverage": part.coverage.ranges.tolist()}
        manifest |= {**counted, "seconds": {"preparation": self.network.preparation}}
        run = Run({}, manifest, {}, partial=part)
        run.set_labels(self.labels)
        return run

    def snapshot(
        self, identity: Identity, failures: Mapping[int, str], seconds: float, read_from: Source | None = None
    ) -> Partial:
        """All that was recorded so far, taken at once: one copy from the device. read_from: see `partial`."""
        with self._lock:
            return self._snapshot(identity, failures, seconds, read_from)

    def _snapshot(
        self, identity: Identity, failures: Mapping[int, str], seconds: float, read_from: Source | None
    ) -> Partial:
        self.flush()
        check_coverage(self.coverage, self.images)
        if self._weights == "moving":
            raise UnitvisError("responses of weights that move cannot be merged; record with weights='fixed'")
        if self._watch is not None:
            self._watch.refuse(hashes=False)
        topk = self.topk.to("cpu")
        seen = np.zeros(0, SEEN) if read_from is None else read_from.noted(topk.images())
        return Partial(
            identity,
            topk,
            self.largest_inputs.to("cpu"),
            frozenset(self.batch_sizes),
            self.coverage.copy(),
            failures,
            seconds,
            seen,
        )

    def restore(self, part: Partial) -> None:
        """Go on from a snapshot; only before the first image, after `prepare`."""
        self.topk, self.largest_inputs = part.topk.to(self.network.device), part.largest_inputs.to(self.network.device)
        self.coverage = part.coverage.copy()
        self.images, self._settled = len(self.coverage), True
        self.batch_sizes = set(part.batch_sizes)
