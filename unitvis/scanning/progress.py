"""Checkpoints of a scan: written at intervals and on signals, and read to resume it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np

from unitvis.choices import CHECKPOINT_SECONDS
from unitvis.errors import Interrupted, UnitvisError, abridged
from unitvis.half_precision.step import HALF
from unitvis.half_precision.suitability import fallbacks
from unitvis.network.network import Network
from unitvis.ranking.recorder import Recorder
from unitvis.results.folder import read_manifest
from unitvis.run import Run, load
from unitvis.scanning.absences import differing_nan, readable_failures
from unitvis.scanning.claims import differing_network
from unitvis.scanning.signals import Signals
from unitvis.scanning.verify import Comparison
from unitvis.sources import Source
from unitvis.sources.base import map_in_order, usable_cores
from unitvis.state.checkpoints import HOW_TO_RESUME, SCAN_CHECKPOINT, Checkpoints, check_seconds
from unitvis.state.partial import PARTIAL_ARRAYS, Identity, Partial, identity, refuse_differences
from unitvis.state.shards import Shard
from unitvis.state.topk import Ranked

_START_AGAIN = "start again with --overwrite"


class Progress:
    """Context of the loop of a scan, which writes its checkpoints::

        with Progress(folder, recorder, source, shard) as progress:
            for batch in source.batches(n, ids=progress.unread_ids()):
                recorder(batch.pixels, batch.ids)
                progress.after_batch()
            progress.finish()
            ...  # the second pass, and writing the run

    folder: of the checkpoints; None: no checkpoints and no signal handlers. every: seconds between checkpoints. SIGINT
    and SIGTERM end the loop with a checkpoint and `Interrupted`; a second signal raises it at once, as does the first
    one after `finish`.
    """

    def __init__(
        self,
        folder: Path | None,
        recorder: Recorder,
        source: Source,
        shard: Shard | None,
        every: float = CHECKPOINT_SECONDS,
    ) -> None:
        check_seconds(every)
        self._folder = folder if source.rereadable else None
        self._checkpoints = None if self._folder is None else Checkpoints(self._folder / SCAN_CHECKPOINT, every)
        self._recorder, self._source, self._shard = recorder, source, shard
        self.ids = None if shard is None else shard.ids(source.length, source.kind)
        self.earlier_seconds = 0.0  # seconds of scanning in earlier attempts
        self.checkpoint_seconds = 0.0  # seconds that checkpoints took
        self.witness: dict[str, int] | None = None  # what `check_witness` found when the scan was resumed
        self._identity: Identity | None = None
        self._signals = Signals()

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        if self._folder is not None:
            self._signals.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._signals.__exit__()

    def resume(self, batch_size: int | None, precision: str) -> Run | None:
        """Continue from the folder's checkpoint, if there is one; returns the run if the folder holds it finished.

        precision: as asked for, see `scan`. The scan continues in the one that it began with, where that is among its
        `fallbacks`. Raises UnitvisError that names the difference if the folder holds another scan, or what other
        images or another network gave, or where "exact" is asked for and a finished run was ranked in half precision.
        """
        precisions = fallbacks(precision)
        if self._folder is None or self._checkpoints is None:
            raise UnitvisError(f"a {self._source.kind} is read once, so a scan of it cannot be resumed")
        if part := self._checkpoints.read(Partial.from_arrays, PARTIAL_ARRAYS):
            if part.identity["precision"] in precisions:
                if precision in HALF and part.identity["precision"] != precision:
                    warnings.warn(
                        f"the scan in {self._folder} was begun in {part.identity['precision']} and goes on in it, not "
                        f"in {precision} as asked; for another precision start again with --overwrite"
                    )
                self._recorder.set_precision(part.identity["precision"], batch_size)
            self._prepare_same_scan(f"the scan in {self._folder} cannot be resumed (then and now)", part.identity)
            self._recorder.restore(part.ordered(self._recorder.network.layer_names))
            self.earlier_seconds = part.seconds
            what = f"the scan in {self._folder} cannot be resumed"
            self._check_noted(what, part)
            self.witness = self._check_witness(what, noted=len(part.noted_winners) > 0)
            return None
        if not (self._folder / "manifest.json").exists():
            return None
        manifest = read_manifest(self._folder)
        found = identity(manifest) | {"shard": manifest.get("shard")}
        if precision == "exact" and manifest["precision"] in HALF and found["precision"] in HALF:
            raise UnitvisError(
                f"the finished run in {self._folder} was scanned with precision {manifest['precision']}, and so "
                f"float32 did not decide its ranks; give --precision {manifest['precision']}, or start again with "
                f"--overwrite for an exact one"
            )
        if found["precision"] in precisions:
            self._recorder.set_precision(found["precision"], batch_size)
        self._prepare_same_scan(f"{self._folder} holds the run of another scan (then and now)", found)
        run = load(self._folder, self._source)
        self._check_finished(f"the finished run in {self._folder} is not believed", run)
        return run

    def _prepare_same_scan(self, what: str, found: Identity) -> None:
        """Prepare the recorder for the scan that was found; UnitvisError, starting with `what`, if it is another."""
        outline = self._recorder.network.description  # before any pass, class and number of parameters
        known_later = ("input", "layers", "unit", "inside")
        unprepared = {key: found[key] for key in known_later if key in found}  # known once it is prepared
        unprepared["model"] = {**found["model"], **outline}
        refuse_differences(what, found, self._identity_now() | unprepared)
        channels, height, width = found["input"]
        self._recorder.prepare((channels, height, width))
        refuse_differences(what, found, self.identity)

    def _check_finished(self, what: str, run: Run) -> None:
        """Raise UnitvisError, starting with `what`, where the run cannot be the end of this scan."""
        network, part = self._recorder.network, run.partial
        failed = readable_failures((failure["id"] for failure in run.manifest["failures"]), self._source)
        if failed:
            raise UnitvisError(f"{what}: {abridged(failed)}")
        if not run.tops and part is not None:  # of a shard
            self._check_noted(what, part)
            ranked = part.ordered(network.layer_names).topk.read()
            self._check_witness(what, ranked, noted=len(part.noted_winners) > 0)
            return
        if run.manifest.get("weights") == "moving":
            raise UnitvisError(f"{what}, because its network's weights moved; {_START_AGAIN}")
        if found := differing_network(run, network):
            raise UnitvisError(f"{what}, because the network contradicts it (then and now): {abridged(found)}")
        boxes = Comparison(network, run)
        if not boxes.same_boxes.all():
            first = int(np.argmin(boxes.same_boxes))
            raise UnitvisError(
                f"{what}, because a winner of layer {run.layers[boxes.winners.layer[first]]!r} has the box "
                f"{boxes.winners.boxes[first].tolist()} there and {boxes.boxes[first].tolist()} now; {_START_AGAIN}"
            )
        workers = usable_cores() if self._source.threads else 0
        try:
            for _, checked in map_in_order(self._source.check, run.records.values(), workers, ahead=2 * workers):
                checked()
        except UnitvisError as error:
            raise UnitvisError(f"{what}, because its images have changed: {error} (--overwrite)") from error
        canonical = run.manifest["precision"] not in HALF
        self._check_witness(what, _ranked(run, network), noted=len(run.records) > 0, canonical=canonical)
        if canonical and (found := differing_nan(run, network, self._source)):
            raise UnitvisError(f"{what}, because the network contradicts it: {abridged(found)}; {_START_AGAIN}")

    def _check_noted(self, what: str, part: Partial) -> None:
        """Raise UnitvisError, starting with `what`, where a winner's hash is not that of a part of the scan."""
        try:
            self._source.note(part.seen)
            self._source.check_noted(part.noted_winners.tolist())
        except UnitvisError as error:
            raise UnitvisError(f"{what}, because its images have changed: {error} (--overwrite)") from error

    def _check_witness(self, what: str, ranked: Ranked | None = None, *, noted: bool, **options: Any) -> dict[str, int]:
        """Raise UnitvisError, starting with `what`, where some winners give other responses; see `check_witness`.

        noted: the hashes of their images are known, and are the same.
        """
        remedy = _START_AGAIN
        try:
            return self._recorder.check_witness(self._source, ranked, bits=True, **options)
        except UnitvisError as error:
            if noted:
                why = "because its responses have changed and its images have not: the network, a library or a setting"
                raise UnitvisError(f"{what}, {why} differs: {error}; restore that, or {remedy}") from error
            why = "because its images or the network have changed"
            raise UnitvisError(f"{what}, {why}: {error}; restore them, or {remedy}") from error

    @property
    def identity(self) -> Identity:
        """Identity of this scan, computed once: it hashes the weights."""
        if self._identity is None:
            self._identity = self._identity_now()
        return self._identity

    def _identity_now(self) -> Identity:
        described = self._recorder.about() | {"source": self._source.describe()}
        return identity(described) | {"shard": None if self._shard is None else str(self._shard)}

    def unread_ids(self) -> Iterable[int] | None:
        """Ids still to be read; None: all of them. Images that failed before a resume are read again."""
        if self.ids is None and not len(self._recorder.coverage):
            return None
        return self._recorder.coverage.left(range(self._source.length or 0) if self.ids is None else self.ids)

    def after_batch(self) -> None:
        """Write a checkpoint if one is due; after a signal write one and raise `Interrupted`."""
        if self._signals.received is not None:
            self.checkpoint()
            raise Interrupted(f"interrupted after {self._progress_text()}; {HOW_TO_RESUME}", self._signals.received)
        if self._checkpoints is not None and self._checkpoints.due:
            self.checkpoint()

    def finish(self) -> None:
        """Write the last checkpoint; from here on a signal raises `Interrupted` at once."""
        self.checkpoint()
        self._signals.raise_at_once(f"interrupted after the scan, before its run was written; {HOW_TO_RESUME}")

    def checkpoint(self) -> None:
        """Write a checkpoint; UnitvisError, with the way to resume, if the disk refuses."""
        start = time.perf_counter()
        self._recorder.flush()
        if self._checkpoints is None or not self._recorder.images:
            return
        part = self.snapshot()
        try:
            self._checkpoints.write(part.arrays())
        except OSError as error:
            raise UnitvisError(
                f"after {self._progress_text()} the checkpoint could not be written into {self._folder}: "
                f"{error.strerror}; fix that, then {HOW_TO_RESUME}"
            ) from error
        self.checkpoint_seconds += time.perf_counter() - start

    def snapshot(self) -> Partial:
        """State of the scan so far, taken at once."""
        return self._recorder.snapshot(self.identity, self._source.failure_reasons, self.seconds, self._source)

    @property
    def seconds(self) -> float:
        """Seconds of scanning in this attempt and the earlier ones, without the preparation."""
        return self.earlier_seconds + time.perf_counter() - self._start - self._recorder.network.preparation

    def _progress_text(self) -> str:
        """Progress in words: "N of M images", or "N images" if the total is unknown."""
        total = "" if self._source.length is None else f" of {len(self.ids or range(self._source.length)):,}"
        return f"{self._recorder.images:,}{total} images"


def _ranked(run: Run, network: Network) -> Ranked:
    """The winners of a run in the order of the network's units, as a top-k has them."""
    tops = [run.tops[name] for name in network.layer_names]
    flat = [
        np.where(top.images < 0, -1, 0 if network.unit == "neuron" else top.positions @ [top.info["width"], 1])
        for top in tops
    ]
    values, images = (np.concatenate([getattr(top, key) for top in tops]) for key in ("values", "images"))
    return Ranked(values, images, np.concatenate(flat), np.zeros((len(images), 2), np.int64))
