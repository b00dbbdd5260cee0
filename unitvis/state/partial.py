"""The state of a scan of some of the images: all that is needed to resume it, or to merge it with others."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from unitvis.errors import UnitvisError, abridged
from unitvis.files import parsed_json, read_arrays, write_arrays
from unitvis.schema import (
    BATCH_SIZE,
    COUNT,
    MAX_ID,
    MAX_K,
    NUMBER,
    OBJECT,
    SECONDS,
    TEXT,
    UNICODE,
    ByName,
    Optional,
    Schema,
    choice,
    problem,
    whole,
)
from unitvis.state.interval_set import IntervalSet
from unitvis.state.magnitudes import shape_of_ranked
from unitvis.state.noise_numbers import NUMBERS, changed_arrays, changed_layers
from unitvis.state.topk import TopK

Identity = dict[str, Any]
# Entries that a manifest and an identity share, as JSON.
SHARED: dict[str, Schema] = {
    "model": {
        "class": TEXT,
        "parameters": COUNT,
        "weights?": UNICODE,
        "modules?": TEXT,
        "attributes?": ByName(TEXT),
        "arrays?": ByName(NUMBERS),
        "responses?": ByName(Optional([NUMBER])),
        "channels?": ByName(NUMBERS),
        "loud_responses?": ByName(Optional([NUMBER])),
        "loud_channels?": ByName(NUMBERS),
    },
    "input": (whole(1, 10**6), whole(1, 10**6), whole(1, 10**6)),
    "k": whole(1, MAX_K),
    "unit": choice("channel", "neuron"),
    "transform": Optional(OBJECT),
    "fingerprint": OBJECT,
}
_IDENTITY = SHARED | {
    "precision": choice("fp32", "fp16", "bf16"),
    "layers": ByName((whole(1, 10**6), whole(1, 10**6), whole(1, 10**6))),
    "inside?": ByName((COUNT, COUNT, COUNT, COUNT)),
    "source": {"kind": TEXT, "images?": Optional(COUNT)},
    "shard?": Optional(TEXT),
}
_ABOUT = {
    "format?": COUNT,
    "identity": _IDENTITY,
    "batch_sizes": [BATCH_SIZE],
    "reasons": [TEXT],
    "seconds": SECONDS,
}
FORMAT = 3  # version of the arrays
OTHER_POSITIONS = "the positions whose boxes lie in the image are not those that were ranked (then and now)"
PARTIAL_ARRAYS = ("about", "state", "largest_inputs", "coverage", "failed", "reason", "seen")  # their names
# Entries of a model that are equal up to rounding, see `noise_numbers`.
_ROUNDED = ("arrays", "responses", "channels", "loud_responses", "loud_channels")
# Of an image that was read: hash of its bytes or pixels, original width and height.
SEEN = np.dtype([("id", "<i8"), ("digest", "V16"), ("width", "<u4"), ("height", "<u4")])


@dataclass(frozen=True)
class Partial:
    """The top-k of all units after exactly the images of `coverage`, with those that failed."""

    identity: Identity  # what must be equal for two of them to be parts of one scan; JSON
    topk: TopK  # on the CPU
    largest_inputs: TopK  # on the CPU: images by the magnitudes of their inputs, see `ranked_magnitudes`
    batch_sizes: frozenset[int]  # in which half precision computed the images, and on which its bits depend
    coverage: IntervalSet  # ids whose responses are in the top-k
    failures: Mapping[int, str]  # ids that could not be used, with the reason
    seconds: float  # of scanning so far
    seen: NDArray[np.void]  # SEEN [images]: of the images that hold a place, where their source noted them

    @property
    def candidates(self) -> NDArray[np.int64]:
        """The ids that hold a place, ascending."""
        return self.topk.images()

    @property
    def noted_winners(self) -> NDArray[np.int64]:
        """The ids that hold one of the first k places and are noted in `seen`, ascending."""
        return np.intersect1d(self.topk.images(self.identity["k"]), self.seen["id"])

    def ordered(self, layers: Sequence[str]) -> Self:
        """The same with the units in the order of these layers, which are its own.

        One network may run its branches in another order in each process, as where it keeps their names in a set.
        """
        own = self.identity["layers"]
        if list(own) == list(layers):
            return self
        counts = units_of_layers(self.identity)
        ends = dict(zip(own, np.cumsum(counts).tolist(), strict=True))
        count = dict(zip(own, counts, strict=True))
        rows = np.concatenate([np.arange(ends[name] - count[name], ends[name]) for name in layers])
        identity = self.identity | {"layers": {name: own[name] for name in layers}}
        return replace(self, identity=identity, topk=TopK(self.topk.tensor[torch.from_numpy(rows)]))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything as arrays, for an npz file without pickle."""
        reasons = sorted(set(self.failures.values()))
        number = {reason: n for n, reason in enumerate(reasons)}
        about = {
            "format": FORMAT,
            "identity": self.identity,
            "batch_sizes": sorted(self.batch_sizes),
            "reasons": reasons,
            "seconds": self.seconds,
        }
        if wrong := problem(about, _ABOUT):
            raise UnitvisError(f"nothing could read again what is to be written of this scan: {wrong}")
        return {
            "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
            "state": self.topk.tensor.numpy(),
            "largest_inputs": self.largest_inputs.tensor.numpy(),
            "coverage": self.coverage.ranges,
            "failed": np.array(list(self.failures), np.int64),
            "reason": np.array([number[reason] for reason in self.failures.values()], np.int64),
            "seen": self.seen,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """What `arrays` gave; UnitvisError for another version's arrays, and nearly anything for others."""
        about = parsed_json(arrays["about"].tobytes())
        if wrong := problem(about, {"format?": COUNT}):
            raise ValueError(wrong)
        if (version := about.get("format", 1)) != FORMAT:
            raise UnitvisError(f"has format {version}, and this version of unitvis reads format {FORMAT}")
        if arrays["seen"].dtype != SEEN or arrays["seen"].ndim != 1:
            raise ValueError(f"the table of images is {arrays['seen'].dtype}")
        if wrong := problem(about, _ABOUT) or _arrays_problem(about, arrays):
            raise ValueError(wrong)
        half, scanned = about["identity"]["precision"] != "fp32", len(arrays["coverage"])
        if bool(about["batch_sizes"]) != (half and scanned > 0):
            raise ValueError(
                f"batch_sizes is {about['batch_sizes']}, and the precision {about['identity']['precision']}"
            )
        reasons = [about["reasons"][number] for number in arrays["reason"].tolist()]
        failures = dict(zip(arrays["failed"].tolist(), reasons, strict=True))
        topk, largest_inputs = (TopK(torch.from_numpy(arrays[name])) for name in ("state", "largest_inputs"))
        coverage = IntervalSet(arrays["coverage"])
        sizes = frozenset(about["batch_sizes"])
        return cls(about["identity"], topk, largest_inputs, sizes, coverage, failures, about["seconds"], arrays["seen"])

    def write(self, path: Path) -> None:
        """As an npz file, on the disk when this returns."""
        write_arrays(path, self.arrays())


def read_partial(path: Path) -> Partial:
    """What `Partial.write` wrote; every byte is checked against the file's checksums. UnitvisError if it is not so."""
    try:
        return Partial.from_arrays(read_arrays(path, PARTIAL_ARRAYS))
    except UnitvisError as error:
        raise UnitvisError(f"{path} {error}") from error
    except Exception as error:  # a damaged file makes numpy and zipfile raise nearly anything
        raise UnitvisError(f"{path} is damaged ({' '.join(str(error).split())})") from error


def _arrays_problem(about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> str | None:
    """What of the arrays does not fit together, or not to what `about` says; None if all does."""
    identity: Identity = about["identity"]
    units = sum(units_of_layers(identity))
    state = arrays["state"]
    wide = 2 * (identity["k"] + 1) + 2  # see `TopK`; half precision keeps more places
    if state.dtype != np.int64 or state.ndim != 2 or len(state) != units or state.shape[1] < wide or state.shape[1] % 2:
        return f"the state is {state.dtype} {list(state.shape)}, of {units} units"
    half = identity["precision"] != "fp32"
    lists = {
        "largest_inputs": shape_of_ranked(identity["input"][0] if half else 0),
        "coverage": (len(arrays["coverage"]), 2),
        "failed": arrays["reason"].shape,
        "reason": (arrays["failed"].size,),
    }
    for name, shape in lists.items():
        if arrays[name].dtype != np.int64 or arrays[name].shape != shape:
            return f"{name} is {arrays[name].dtype} {list(arrays[name].shape)}"
    if bool(about["batch_sizes"]) != (half and len(arrays["coverage"]) > 0):
        return f"batch_sizes is {about['batch_sizes']}, and the precision {identity['precision']}"
    coverage = arrays["coverage"].ravel()
    if (coverage < 0).any() or (np.diff(coverage) <= 0).any():
        return "the coverage is no list of ranges"
    total = identity["source"].get("images")  # None: not known
    if total is not None and len(coverage) and coverage[-1] > total:
        return f"the coverage ends at image {coverage[-1] - 1}, of {total}"
    seen, failed = arrays["seen"]["id"], arrays["failed"]
    if (np.diff(seen) <= 0).any():
        return "the table of images is not in order"
    covered = IntervalSet(arrays["coverage"])
    held = {name: TopK(torch.from_numpy(arrays[name])) for name in ("state", "largest_inputs")}
    for name, topk in held.items():
        if wrong := topk.problem(len(covered)):
            return f"{name}: {wrong}"
    for ids in (*(topk.images() for topk in held.values()), seen):
        if len(outside := ids[~covered.holds(ids)]):
            return f"image {outside[0]} holds a place, or a line in the table of images, and was not scanned"
    if len(outside := failed[(failed < 0) | (failed >= (MAX_ID + 1 if total is None else total))]):
        return f"image {outside[0]} is said to have failed, of {total}"
    return None


def units_of_layers(identity: Identity) -> list[int]:
    """The number of units of each layer, in the order of the rows of the top-k."""
    maps = identity["layers"].values()
    return [math.prod(shape) if identity["unit"] == "neuron" else shape[0] for shape in maps]


def joined_seen(one: NDArray[np.void], other: NDArray[np.void]) -> NDArray[np.void]:
    """The union of two SEEN tables, by id; UnitvisError where they have an image with another content each."""
    seen = np.unique(np.concatenate([one, other]))  # by id, then by digest
    for id in seen["id"][1:][seen["id"][1:] == seen["id"][:-1]].tolist():
        raise UnitvisError(f"image {id} had another content in each; scan one of them again")
    return seen


def identity(manifest: Mapping[str, Any]) -> Identity:
    """What of a manifest two scans must share to be parts of one; where the images lie may differ."""
    shared = {key: manifest[key] for key in ("input", "k", "unit", "transform", "fingerprint")}
    shared["precision"] = manifest["scan"]["precision"]
    described = manifest["model"]
    keys = ("class", "parameters", "weights", "modules", "attributes", *_ROUNDED)
    model = {key: described[key] for key in keys if key in described}
    layers = {name: [info[key] for key in ("channels", "height", "width")] for name, info in manifest["layers"].items()}
    if inside := ranked_inside(manifest):
        shared["inside"] = inside
    source = same_images(manifest["source"])
    return json.loads(json.dumps({"model": model, "layers": layers, **shared, "source": source}))  # tuples are lists


def batch_sizes(scan: Mapping[str, Any]) -> list[int]:
    """In which batch sizes half precision computed the images, as a manifest's entry `scan` says; ascending."""
    return scan.get("batch_sizes", [scan["batch_size"]])


def ranked_inside(manifest: Mapping[str, Any]) -> dict[str, list[int]]:
    """The rectangles of positions that alone were ranked, by layer, see `Layer`; empty where all were."""
    return {name: info["inside"] for name, info in manifest["layers"].items() if "inside" in info}


def same_images(source: Mapping[str, Any]) -> dict[str, Any]:
    """A source's description without what may differ for the same images: where they lie, and files beside them."""
    return {key: value for key, value in source.items() if key not in ("path", "others")}


def differences(one: Any, other: Any, name: str = "") -> Iterable[str]:
    """What is not equal in two identities, as sentences: `k is 9 and 5`."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        changed, arrays = (changed_layers(one, other), changed_arrays(one, other)) if name == "model" else ([], [])
        if name == "model":
            one, other = ({k: v for k, v in each.items() if k not in _ROUNDED} for each in (one, other))
            both = one.get("attributes", {}).keys() & other.get("attributes", {}).keys()
            for each in (one, other):  # versions of a library may give a module more attributes
                each["attributes"] = {k: v for k, v in each.get("attributes", {}).items() if k in both}
        for key in [*one, *(key for key in other if key not in one)]:
            inside = f"{name}.{key}" if name else key
            yield from differences(one.get(key, "nothing"), other.get(key, "nothing"), inside)
        if arrays:
            yield f"the numbers in {abridged(arrays)} differ"
        if changed:
            yield f"the network computes something else in {abridged(changed)}"
    elif one != other:
        yield f"{name} is {_shown(one)} and {_shown(other)}"


def refuse_differences(what: str, one: Identity, other: Identity) -> None:
    """UnitvisError that names what differs, if anything does."""
    if different := list(differences(one, other)):
        raise UnitvisError(f"{what}: {abridged(different)}")


def refuse_another_model(what: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """UnitvisError, starting with `what`, if a manifest's description of a model lacks or contradicts one of `now`.

    Entries: see `network.identity`; what the manifest says beside them does not count.
    """
    refuse_differences(what, {"model": {key: then[key] for key in now if key in then}}, {"model": dict(now)})


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
