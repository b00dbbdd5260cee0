"""Print what a run holds, what was skipped and what was drawn, after a command of the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unitvis.drawing.patches import units_at_the_border
from unitvis.errors import abridged, printable
from unitvis.network.network import Network
from unitvis.pages import MAX_UNITS
from unitvis.results.arrays import STATUSES, UNSEPARATED
from unitvis.results.nonfinite import odd_responses
from unitvis.run import Run
from unitvis.sources import PackSource, Source
from unitvis.sources.image_names import others_in_words


def _say(line: str) -> None:
    """Print a line, which may hold names that come from files."""
    print(printable(line))


def print_run(run: Run) -> None:
    """Print a run's counts, speed and precision, or that it is a shard's, and the images that were skipped."""
    if run.tops:
        _print_result(run)
    else:
        _say(f"{run.manifest['images']:,} images; `unitvis merge` makes a run of all shards")
    if run.tops or run.manifest["shard"]:  # a partial merge has opened no images
        _print_others(run.source)
    _print_failures(run.manifest["failures"], "the manifest")


def _print_others(source: Source) -> None:
    """Print how many files beside the images were left alone, by their endings."""
    if source.others:
        _say(f"{others_in_words(source.others)} left alone; --images-ending reads others")


def _print_failures(failures: Sequence[Mapping[str, Any]], where: str) -> None:
    """Print the number of skipped images, and the first ten with their reasons; where: the file that lists them all."""
    if failures:
        _say(f"{len(failures)} images could not be read and were skipped (all are listed in {where}):")
        for failure in failures[:10]:
            _say(f"  {failure['name']!r}: {failure['reason']}")  # !r: a name may hold anything


def _print_result(run: Run) -> None:
    """Print a finished run: images, units, seconds, number of units of each status, precision."""
    counts = run.count()
    seconds = _seconds(run)
    images = run.manifest["images"]
    statuses = ", ".join(f"{count} {name}" for name, count in counts.items() if name != "units" and count)
    rate = f" ({images / scan:.0f} images/s)" if (scan := seconds["scan"]) else ""  # none in merged runs of Recorders
    _say(
        f"{images:,} images, {counts['units']:,} units of {len(run)} layers in {scan:.1f} s{rate} after "
        f"{seconds['preparation']:.1f} s of preparation, second pass {seconds['second pass']:.1f} s: {statuses}"
    )
    _say(_input_sentence(run.manifest))
    if run.manifest["precision"] == "exact":
        _say(f"precision: {run.manifest['plan']}")
    if unseparated := {name: top.info["unseparated"] for name, top in run.tops.items() if top.info["unseparated"]}:
        layers = ", ".join(f"{count} of {name}" for name, count in unseparated.items())
        _say(f"unseparated: {STATUSES[UNSEPARATED]}: {layers}")
    for sentence in odd_responses(run):
        _say(sentence)
    if border := sum(units_at_the_border(run, layer) for layer in run):
        _say(f"in {border:,} units most patches lie at the border and show more padding than picture (scan --inside)")


def _input_sentence(manifest: Mapping[str, Any]) -> str:
    """What the network was given, since forgotten options change every result: size of the input and its values."""
    channels, height, width = manifest["input"]
    if (transform := manifest["transform"]) is None:
        return f"input: {channels} x {height} x {width}, values as they came"
    given = [name for name in ("mean", "std") if transform[name] is not None]
    values = ", ".join(f"{name} {' '.join(f'{one:g}' for one in transform[name])}" for name in given)
    colours = ", grey" if channels == 1 else ""
    return f"input: {width} x {height} pixels{colours}, pixels / 255, {values or 'no mean or std'}"


def print_pack(packed: PackSource) -> None:
    """Print a pack's path and size, and the images that could not be packed."""
    images, height, width, _ = packed.describe()["shape"]
    _say(f"{packed.path}: {images:,} images, {width} x {height} pixels")
    _print_others(packed)
    failures = [{"name": packed.name(id), "reason": reason} for id, reason in packed.unusable.items()]
    _print_failures(failures, Path(packed.path).with_suffix(".json").name)


def print_layers(network: Network) -> None:
    """Print a table of the layers: kind of module, channels, sizes of map and receptive field, stride in pixels.

    A line below it names the layer of a classifier's outputs, where it is not among them.
    """
    kinds = {name: type(module).__name__ for name, module in network.model.named_modules()}
    wide = max(len("kind"), *(len(kinds[layer.name]) for layer in network.layers))
    _say(f"{'layer':<28} {'kind':<{wide}} {'channels':>8} {'map':>11} {'receptive field':>17} {'stride':>9}")
    for layer in network.layers:
        field = network.fields[layer.name]
        size = "whole image" if field.whole_image else f"{field.size[0]} x {field.size[1]}"
        size = "unknown" if field.method == "unknown" else size
        stride = f"{field.stride[0]:g} x {field.stride[1]:g}" if field.stride else "-"
        kind, cells = f"{kinds[layer.name]:<{wide}}", f"{layer.height} x {layer.width}"
        _say(f"{layer.name:<28} {kind} {layer.channels:>8} {cells:>11} {size:>17} {stride:>9}")
        if field.note:
            _say(f"  receptive field unknown, so whole images are drawn: {field.note}")
    if network.head is not None and network.head not in network.layer_names:
        _say(f"not among them: {network.head} ({kinds[network.head]}), whose units are the network's outputs")


def print_drawn(sheets: Sequence[Path], page: Path | None, units: int) -> None:
    """Print where the sheets and the gallery are; page: the gallery's first page, None if it was not drawn."""
    _say(f"{len(sheets)} sheets in {sheets[0].parent}")
    if page is None:
        _say(f"no gallery: {units:,} units are too many ({MAX_UNITS:,} at most)")
    else:
        _say(f"gallery: open {page} in a browser")


def print_times(run: Run, drawing: float) -> None:
    """Print where the time went: of the run's scan, as its manifest has it, and of drawing, in seconds."""
    parts = {name: value for name, value in _seconds(run).items() if value >= 0.05} | {"drawing": drawing}
    _say("time: " + ", ".join(f"{name} {value:.1f} s" for name, value in parts.items()))


def _seconds(run: Run) -> dict[str, float]:
    """Seconds of a scan's parts, from its manifest; what is computed again in float32 is of the second pass."""
    seconds = {name.replace("_", " "): value for name, value in run.manifest["seconds"].items()}
    seconds["second pass"] = seconds.get("second pass", 0.0) + seconds.pop("rescoring", 0.0)
    return {"scan": 0.0, "preparation": 0.0} | seconds


def print_verified(found: Mapping[str, Any]) -> None:
    """Print how many winners were reproduced; found: what `verify` returned."""
    how = (
        "bit for bit"
        if found["same_fingerprint"]
        else "within 1e-5 of the layer's largest (another machine or version)"
    )
    if found["same_fingerprint"] and (by_slot := found["by_slot"]):
        how += f", but within 1e-5 of the layer's largest where bits depend on the batch ({abridged(by_slot)})"
    _say(f"{found['winners'] - found['wrong']:,} of {found['winners']:,} winners were reproduced {how}")
    if found["wrong"]:
        _say(f"the first that was not: {found['first_wrong']}")
    if found["differing"]:
        _say(f"what the run says and what is now: {abridged(found['differing'])}")
    if found["uncompared"]:
        _say(found["uncompared"])
    _say(
        "compared: values, positions, boxes, what the run says of model, layers and images, and samples of failed "
        "images, NaN responses and all responses; only a scan tells whether other images win, and each unit's status"
    )
