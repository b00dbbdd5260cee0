"""What a run says of its network and its images, beside what they are now."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping
from typing import Any

import numpy as np

from unitvis.errors import UnitvisError
from unitvis.network.device import fingerprint
from unitvis.network.network import Network
from unitvis.ranking.winners import field_info, sampled_again
from unitvis.results.data import RunData
from unitvis.sources.base import Source, same_name
from unitvis.state.interval_set import IntervalSet
from unitvis.state.noise_numbers import ROUNDING
from unitvis.state.partial import differences, same_images


def differing_network(run: RunData, network: Network) -> list[str]:
    """Say what the manifest has of the model and of its layers that the network contradicts: `k is 9 and 5`.

    network: with the run's layers and their receptive fields. What the manifest leaves out is not compared, nor a
    receptive field that was followed on one machine alone, whose library may have other operators.
    """
    then, now = run.manifest["model"], network.description
    shared = [key for key in now if key in then]
    found = list(differences({"model": {k: then[k] for k in shared}}, {"model": {k: now[k] for k in shared}}))
    same = fingerprint(network.device) == run.manifest["fingerprint"]
    entries: dict[str, dict[str, Any]] = {}
    for layer in network.layers:
        said, field = run.tops[layer.name].info["receptive_field"], field_info(network.fields[layer.name])
        entries[layer.name] = {key: value for key, value in layer.to_json().items() if key != "head"}
        if "head" in run.tops[layer.name].info:
            entries[layer.name]["head"] = layer.head
        if same:
            entries[layer.name]["receptive_field"] = field
        elif said["method"] == field["method"]:
            entries[layer.name]["receptive_field"] = field | {"note": said["note"]}
    given = {name: {key: run.tops[name].info.get(key, "nothing") for key in entry} for name, entry in entries.items()}
    return found + list(differences({"layers": given}, {"layers": entries}))


_OF_FILES = {"folder", "list", "paths", "tar"}  # kinds of sources whose records identify files


def compares_images(run: RunData) -> bool:
    """Whether the images that are read now can be compared with what the run says of those that were scanned."""
    kinds = {run.source.kind, run.manifest["source"]["kind"]}
    return len(kinds) == 1 or kinds <= _OF_FILES


def uncompared(run: RunData) -> str | None:
    """What of the images is not compared, because they are read now from another kind of source; None: nothing."""
    then, now = run.manifest["source"]["kind"], run.source.kind
    if then == now:
        return None
    what = "their names were" if compares_images(run) else "names, sizes and hashes of images and failed images were"
    return f"the run says that its images came from a {then}, and they are read from a {now}: {what} not compared"


def differing_images(run: RunData) -> list[str]:
    """Say what the run has of its images that their source contradicts; see `uncompared`."""
    source, then = run.source, run.manifest["source"]
    if not compares_images(run):
        return []
    now = json.loads(json.dumps(source.describe()))  # tuples are lists
    if now["kind"] != then["kind"]:
        records = ({**record, "name": source.name(record["id"])} for record in run.records.values())
        return [sentence for record in records for sentence in _differing_record(record, source)]
    found = list(differences({"source": same_images(then)}, {"source": same_images(now)}))
    for failure in run.manifest["failures"]:
        if not same_name(name := source.name(failure["id"]), failure["name"]):
            found.append(f"the name of image {failure['id']}, which failed, is {failure['name']!r} and {name!r}")
    return found + [sentence for record in run.records.values() for sentence in _differing_record(record, source)]


def differing_sample(run: RunData, network: Network, by_slot: Container[str]) -> list[str]:
    """Say what of a run's sample its images contradict: which images it has, and the first response that differs.

    network: with the run's layers. Responses must be bit-equal under the run's fingerprint, and otherwise, as in the
    layers `by_slot`, within 1e-5 of the layer's largest. No sentence about a run without a sample.
    """
    if run.sample is None:
        return []
    if len(beyond := IntervalSet(run.manifest["coverage"]) - IntervalSet([(0, run.source.length or 0)])):
        return [f"the sample is of a coverage with images that are not there: {beyond}"]
    try:
        now = sampled_again(run.manifest, network, run.source)
    except UnitvisError as error:
        return [f"the sample of the images cannot be computed again: {error}"]
    if not np.array_equal(run.sample.images, now.images):
        return ["the images of the sample are not those of the coverage whose ids have the smallest hashes"]
    same = fingerprint(network.device) == run.manifest["fingerprint"]
    found = []
    if compares_images(run):
        for id, before, after in zip(now.images, run.sample.hashes.tolist(), now.hashes.tolist(), strict=True):
            if before != after:
                found.append(f"the hash of image {id} of the sample is {before!r} and {after!r}")
    for name, then in run.sample.responses.items():
        equal = (then == now.responses[name]) | (np.isnan(then) & np.isnan(now.responses[name]))
        if not same or name in by_slot:
            won = np.abs(run.tops[name].values)
            with np.errstate(invalid="ignore"):
                equal |= np.abs(then - now.responses[name]) <= ROUNDING * won[np.isfinite(won)].max(initial=0)
        if not equal.all():
            at = np.unravel_index(np.argmin(equal), equal.shape)
            values = f"{then[at]:.9g} in the sample and {now.responses[name][at]:.9g} now"
            found.append(f"image {now.images[at[0]]} gives unit {at[1]} of layer {name!r} {values}")
    return found


def _differing_record(record: Mapping[str, Any], source: Source) -> Iterator[str]:
    """Sentences about the record of an image; none where the image cannot be read now."""
    if record["id"] in source.failure_reasons:
        return
    for key, now in source.record(record["id"]).items():
        then = record.get(key, now)
        if not (same_name(then, now) if key == "name" else then == now):
            yield f"the {key} of {record['name']!r} is {then!r} and {now!r}"
