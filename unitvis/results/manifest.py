"""What a run's manifest says of a scan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from unitvis.network.device import fingerprint
from unitvis.network.network import Network
from unitvis.results.arrays import LayerArrays
from unitvis.results.folder import FORMAT


def scan_manifest(network: Network, k: int, precision: str, scan: Mapping[str, Any]) -> dict[str, Any]:
    """What is ranked and how, before the first result. scan: how the images are computed."""
    return {
        "format": FORMAT,
        "model": dict(network.description),
        "input": list(network.input_shape),
        "layers": {layer.name: asdict(layer) for layer in network.layers},
        "k": k,
        "unit": network.unit,
        "precision": precision,
        "plan": "as asked",
        "source": {"kind": "recorder"},
        "transform": network.transform.to_json() if network.transform else None,
        "fingerprint": fingerprint(network.device),
        "scan": dict(scan),
    }


def saturation_warning(top: LayerArrays) -> str | None:
    """A sentence where a layer that takes a convolution's output reaches one same largest value again and again."""
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
