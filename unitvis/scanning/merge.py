"""Merge runs over parts of the same images into one run, equal to that of one scan over all of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from unitvis import models
from unitvis.errors import UnitvisError
from unitvis.files import only_writer
from unitvis.half_precision.step import HALF
from unitvis.network.device import fingerprint
from unitvis.network.identity import outline
from unitvis.ranking.recorder import Recorder
from unitvis.reranking.witness import HALF_ROUNDINGS
from unitvis.results.folder import check_output
from unitvis.run import Run, load
from unitvis.scanning.scan import finish_run
from unitvis.sources import Source, open_as_described, reopen_source
from unitvis.state.interval_set import IntervalSet
from unitvis.state.noise_numbers import ROUNDING
from unitvis.state.overlap import contradiction
from unitvis.state.partial import (
    OTHER_POSITIONS,
    Identity,
    Partial,
    joined_seen,
    ranked_inside,
    refuse_another_model,
    refuse_differences,
    same_images,
    units_of_layers,
)
from unitvis.state.topk import TopK


@torch.inference_mode(False)
def merge(
    runs: Sequence[Run | str | Path],
    model: nn.Module | str | models.Loaded | None = None,
    *,
    out: str | Path | None = None,
    images: object = None,
    device: torch.device | str | None = None,
    on_error: str = "skip",
    partial: bool = False,
    overwrite: bool = False,
) -> Run:
    """Merge the runs of shards (`scan(shard=)`), or runs that were merged before, into one, and run the second pass.

    The order of the runs does not matter, and a run may be given twice.

    Args:
        runs: runs, or their folders.
        model: the model that was scanned, or its spec; None: loaded as the manifest says, where that names a model of
            torchvision or timm with its own or random weights. Code that a manifest names (file.py:function) is not
            executed, and weights (a checkpoint's path) are not read.
        out: folder to write the merged run into.
        images: the images that were scanned, as for `scan`; None: opened as the manifest says.
        device: device of the second pass; None: the model's own.
        on_error: "raise": NaN and infinite responses raise UnitvisError; "skip": the manifest counts them.
        partial: merge although images are missing, into a run without winners that can be merged again.
        overwrite: replace a run in `out`.

    Raises UnitvisError that names what differs between the runs, or which images are missing.
    """
    folder = None if out is None else check_output(out, overwrite=overwrite)
    with only_writer(folder):
        loaded = {str(run): load(run) for run in runs if not isinstance(run, Run)}
        loaded |= {f"run {number}": run for number, run in enumerate(runs, 1) if isinstance(run, Run)}
        if not loaded:
            raise UnitvisError("there is nothing to merge; name the runs of the shards")
        run = _merged_run(loaded, model, images, device, on_error, partial=partial)
        if folder is not None:
            run.write(folder)
    return run


def _merged_run(
    loaded: Mapping[str, Run],
    model: nn.Module | str | models.Loaded | None,
    images: object,
    device: torch.device | str | None,
    on_error: str,
    *,
    partial: bool,
) -> Run:
    """Merge runs, given by name; see `merge`."""
    parts: dict[str, Partial] = {}
    for name, run in loaded.items():
        if run.partial is None:
            raise UnitvisError(f"{name} has no state to merge; runs of shards have one: scan with --shard I/N")
        parts[name] = run.partial
    merged = merge_partials(parts)
    manifest = next(iter(loaded.values())).manifest
    if by_slot := {name: None for run in loaded.values() for name in run.manifest["scan"].get("by_slot", ())}:
        manifest = manifest | {"scan": manifest["scan"] | {"by_slot": list(by_slot)}}
    records = {id: record for run in loaded.values() for id, record in run.records.items()}
    labels = {run.labels: name for name, run in loaded.items() if run.labels is not None}
    if len(labels) > 1:
        one, other, *_ = labels.values()
        raise UnitvisError(f"{one} and {other} name classes differently; remove the labels.json of one of them")
    if partial:
        failures = {failure["id"]: failure for run in loaded.values() for failure in run.manifest["failures"]}
        run = _partial_run(merged, manifest, [failures[id] for id in merged.failures])
        run.records = {id: records[id] for id in merged.candidates.tolist() if id in records}
    else:
        run = _finished_run(merged, parts, manifest, records, model, images, device, on_error)
    run.set_labels(next(iter(labels), None))
    return run


ANOTHER_MODEL = "the model is not that of the runs (in the runs and here)"


def merge_partials(parts: Mapping[str, Partial]) -> Partial:
    """Merge parts, given by name, that may overlap; UnitvisError if they are not parts of one scan."""
    # The largest first: a part whose images are all covered already is skipped, and its NaN are not counted twice.
    order = sorted(parts, key=lambda name: -len(parts[name].coverage))
    first = order[0]
    merged, seconds = parts[first], parts[first].seconds
    topk, largest_inputs, coverage = merged.topk.to("cpu"), merged.largest_inputs.to("cpu"), merged.coverage
    batch_sizes, failures, seen = merged.batch_sizes, dict(merged.failures), merged.seen
    for name in order[1:]:
        part = parts[name]
        refuse_differences(f"{first} and {name} cannot be merged", merged.identity, part.identity)
        part = part.ordered(list(merged.identity["layers"]))
        failures |= part.failures
        try:
            seen = joined_seen(seen, part.seen)
        except UnitvisError as error:
            raise UnitvisError(f"{first} and {name} cannot be merged: {error}") from error
        shared = coverage & part.coverage
        _refuse_contradiction(f"{first} and {name} cannot be merged", merged.identity, topk, part.topk, shared)
        if len(shared) == len(part.coverage):
            continue
        if len(shared) and (topk.counts_nan() & part.topk.counts_nan()).any():
            raise UnitvisError(
                f"{name} has images {shared} in common with the others, and both count NaN responses, which cannot be "
                "told apart; merge runs that overlap wholly or not at all"
            )
        topk.merge_all(part.topk)
        largest_inputs.merge_all(part.largest_inputs)
        coverage, seconds = coverage | part.coverage, seconds + part.seconds
        batch_sizes |= part.batch_sizes
    failed = np.array(sorted(failures), np.int64)
    # An image that one run could not read and another one could is no failure.
    failures = {id: failures[id] for id in failed[~coverage.holds(failed)].tolist()}
    seen = seen[np.isin(seen["id"], topk.images())]
    return Partial(merged.identity, topk, largest_inputs, batch_sizes, coverage, failures, seconds, seen)


def _refuse_contradiction(what: str, scanned: Identity, one: TopK, other: TopK, shared: IntervalSet) -> None:
    """UnitvisError, starting with `what`, where an image that both ranked gave them different responses.

    Rounding alone may differ: of layers whose bits depend on an image's place in its batch, and of half precision.
    """
    if not len(shared):
        return
    mine, theirs = one.read(), other.read()
    sizes = units_of_layers(scanned)
    layer_of = np.repeat(np.arange(len(sizes)), sizes)
    if (precision := scanned["precision"]) == "fp32":
        slack, share = ROUNDING * mine.largest_of_layers(sizes), 0.0
    else:
        slack, share = HALF_ROUNDINGS * torch.finfo(HALF[precision]).eps * mine.largest, 0.5
    if found := contradiction(mine, theirs, shared, slack, share):
        values = " and ".join("less than the last winner" if v is None else f"{v:.9g}" for v in found[2:])
        layer = list(scanned["layers"])[layer_of[found.unit]]
        raise UnitvisError(
            f"{what}: image {found.image} gave other responses in each ({values}, in layer {layer!r}); give each image "
            "an id of its own, the same in all runs"
        )


def missing_ids(part: Partial, images: int | None) -> IntervalSet:
    """Ids of 0 <= id < images that the part neither ranked nor lists as failures."""
    return IntervalSet([(0, images or 0)]) - (part.coverage | IntervalSet.of(part.failures))


def _partial_run(part: Partial, manifest: dict[str, Any], failures: list[dict[str, Any]]) -> Run:
    """Make a run without winners from a part, to be merged again."""
    found = {"failures": failures, "images": len(part.coverage), "coverage": part.coverage.ranges.tolist()}
    if part.batch_sizes - {manifest["scan"]["batch_size"]}:
        found["scan"] = manifest["scan"] | {"batch_sizes": sorted(part.batch_sizes)}
    return Run({}, manifest | found | {"shard": None, "partial": True}, {}, partial=part)


def _finished_run(
    part: Partial,
    parts: Mapping[str, Partial],
    manifest: dict[str, Any],
    records: Mapping[int, dict[str, Any]],
    model: nn.Module | str | models.Loaded | None,
    images: object,
    device: torch.device | str | None,
    on_error: str,
) -> Run:
    """Make the run of all images from a part that covers them: re-rank if needed, then the second pass."""
    start = time.perf_counter()
    source = _reopened_source(manifest, images)
    if len(beyond := part.coverage - IntervalSet([(0, source.length or 0)])):
        raise UnitvisError(
            f"the runs have images that are not there: {beyond}, of {source.length:,}; give the images that were "
            "scanned"
        )
    if len(gap := missing_ids(part, source.length)):
        raise UnitvisError(
            f"{len(gap):,} of {source.length:,} images are in none of the runs: {gap}; scan the shards that hold them, "
            "or merge what there is with partial=True (--partial)"
        )
    module, origin = _checked_model(manifest, model)
    names, inside = list(manifest["layers"]), ranked_inside(manifest)
    chosen = {"unit": manifest["unit"], "inside": bool(inside)}
    with Recorder(module, names, manifest["k"], **chosen, device=device, transform=source.transform) as recorder:
        channels, height, width = manifest["input"]
        recorder.prepare((channels, height, width))
        refuse_another_model(ANOTHER_MODEL, manifest["model"], recorder.network.description)
        refuse_differences(OTHER_POSITIONS, inside, ranked_inside(recorder.about()))
        recorder.set_precision(manifest["scan"]["precision"], manifest["scan"]["batch_size"])
        part = part.ordered(recorder.network.layer_names)
        recorder.restore(part)
        source.add_failures(part.failures)
        checked = _check_same_images(recorder, source, parts, manifest["fingerprint"])
        undecided = manifest["precision"] == "exact" and recorder.precision != "fp32"
        run = recorder.ranked(source if undecided else None)
    run.attach(source, records)
    run.partial = part
    run.manifest["witness"] = checked
    run.manifest |= {"precision": manifest["precision"], "plan": manifest["plan"]}
    run.manifest["model"] |= origin
    if by_slot := manifest["scan"].get("by_slot"):
        run.manifest["scan"]["by_slot"] = by_slot
    run.manifest["failures"] = [asdict(failure) for failure in source.failures]
    run.manifest["seconds"] |= {"scan": part.seconds, "merge": time.perf_counter() - start}
    finish_run(run, source, recorder.network, on_error)
    return run


def _check_same_images(
    recorder: Recorder, source: Source, parts: Mapping[str, Partial], then: Mapping[str, str]
) -> dict[str, int]:
    """Hash the winners of each part and compute some again; UnitvisError that names a part which other images made.

    then: the fingerprint of the parts. Returns the sums of what `check_witness` does.
    """
    sums: Counter[str] = Counter()
    bits = fingerprint(recorder.network.device) == then
    winners = recorder.topk.images(recorder.k)
    for name, part in parts.items():
        noted = part.noted_winners
        others = f"{name} was not made of the images in {source.describe()['path'] or source.kind!r}"
        try:
            source.note(part.seen)
            source.check_noted(np.intersect1d(noted, winners).tolist())
        except UnitvisError as error:
            raise UnitvisError(
                f"{others}: {error}, or give the images that were scanned (--images, images=)"
            ) from error
        try:
            ranked = part.ordered(recorder.network.layer_names).topk.read()
            sums.update(recorder.check_witness(source, ranked, bits=bits))
        except UnitvisError as error:
            if len(noted):
                raise UnitvisError(
                    f"the images of {name} are those that were scanned and give other responses here: {error}; merge "
                    "with the network, libraries and settings of the scan, or scan that shard again"
                ) from error
            raise UnitvisError(
                f"{others}, or by another network: {error}; give the images that were scanned (--images, images=), or "
                "scan that shard again"
            ) from error
    return dict(sums)


def _reopened_source(manifest: dict[str, Any], images: object) -> Source:
    """Open the images of the runs; UnitvisError if they, or their number or names, are not those that were scanned."""
    transform, wanted = manifest["transform"], manifest["source"]
    source = reopen_source(wanted, transform) if images is None else open_as_described(images, wanted, transform)
    if wanted["kind"] == "recorder":
        return source
    found = source.describe()
    if found["kind"] == wanted["kind"] and found.get("images") != wanted.get("images"):
        raise UnitvisError(
            f"the images are not those of the runs: the {source.kind} has {found.get('images')} images now, and "
            f"{wanted.get('images')} were scanned; restore it, or scan again"
        )
    refuse_differences("the images are not those of the runs (then and now)", same_images(wanted), same_images(found))
    return source


def _checked_model(
    manifest: dict[str, Any], model: nn.Module | str | models.Loaded | None
) -> tuple[nn.Module, dict[str, Any]]:
    """Load or check the model of the runs; returns it with its spec and file for the manifest."""
    recorded = manifest["model"]
    if model is None:
        spec = recorded.get("spec")
        if spec is None:
            raise UnitvisError("the runs do not say where their model is; give model= (--model) for the second pass")
        # A run folder is data: no code and no file that it names is opened.
        weights = f" --weights {recorded['file']}" if recorded.get("file") else ""
        if not models.names_library_model(spec):
            raise UnitvisError(
                f"the runs name {spec!r} as their model, and code that a run names is not executed; name it yourself, "
                f"with --model {spec}{weights}, or model="
            )
        if weights:
            raise UnitvisError(
                f"the runs name {recorded['file']!r} as the weights of {spec}, and files that a run names are not "
                f"read; name them yourself, with --model {spec}{weights}, or model="
            )
        model = models.load(spec, pretrained=recorded.get("pretrained", True))
    module, _, origin = models.resolved(model)
    refuse_another_model(ANOTHER_MODEL, recorded, outline(module))
    return module, origin
