"""The manifest of a scan, and its warnings about layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unitvis.errors import abridged
from unitvis.network.device import fingerprint
from unitvis.network.network import Network
from unitvis.results.arrays import LayerArrays
from unitvis.results.folder import FORMAT


def scan_manifest(network: Network, k: int, precision: str, scan: Mapping[str, Any]) -> dict[str, Any]:
    """Make the manifest's entries that are known before the first image. scan: how the images are computed."""
    return {
        "format": FORMAT,
        "model": dict(network.description),
        "input": list(network.input_shape),
        "layers": {layer.name: layer.to_json() for layer in network.layers},
        "k": k,
        "unit": network.unit,
        "precision": precision,
        "plan": "as asked",
        "source": {"kind": "recorder"},
        "transform": network.transform.to_json() if network.transform else None,
        "fingerprint": fingerprint(network.device),
        "scan": {**scan, **({"by_slot": network.bits.by_slot} if network.bits.by_slot else {})},
    }


def unknown_boxes_warning(tops: Mapping[str, LayerArrays]) -> list[str]:
    """A warning that names the layers whose receptive fields are unknown, with the first one's reason, if any are."""
    unknown = [name for name, top in tops.items() if top.info["receptive_field"]["method"] == "unknown"]
    if not unknown:
        return []
    note = tops[unknown[0]].info["receptive_field"]["note"]
    return [f"the receptive fields of {abridged(unknown)} are unknown, so whole images are drawn: {note}"]


def saturation_warning(top: LayerArrays) -> str | None:
    """A warning for an activation in which at least 10% of the firing units have k equal winners; else None."""
    firing = top.fired.all(axis=1)
    if top.info["fed_by"] is None or top.values.shape[1] < 2 or not firing.any():
        return None
    equal = top.values[firing, 0] == top.values[firing, -1]
    if equal.mean() < 0.1:
        return None
    return (
        f"layer {top.name!r} saturates: in {equal.mean():.0%} of its units all {top.values.shape[1]} winners have the "
        f"same value (up to {top.values[firing, 0][equal].max():g}); rank what goes into it: layer "
        f"{top.info['fed_by']!r}"
    )
