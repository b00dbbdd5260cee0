"""What a scan of some of the images comes to: all that is needed to go on with it, or to merge it with others."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unitvis.errors import UnitvisError, some
from unitvis.state.intervals import Coverage

Identity = dict[str, Any]


@dataclass(frozen=True)
class Partial:
    """The state of all units after the images of `coverage`, taken together with them."""

    identity: Identity  # what must be equal for two of them to be parts of one scan; JSON
    state: Tensor  # int64 [units, 2M + 2], on the CPU, see unitvis_kernels.topk_state
    coverage: Coverage  # ids whose responses are in the state
    failures: Mapping[int, str]  # ids that could not be used, with the reason
    seconds: float  # of scanning so far

    @property
    def candidates(self) -> NDArray[np.int64]:
        """The ids that hold a place in the state, ascending."""
        places = (self.state.shape[1] - 2) // 2
        ids = np.unique(self.state[:, places : 2 * places].numpy())
        return ids[ids >= 0]

    def write(self, path: Path) -> None:
        """As an npz without pickle, on the disk when this returns."""
        reasons = sorted(set(self.failures.values()))
        number = {reason: n for n, reason in enumerate(reasons)}
        about = {"identity": self.identity, "reasons": reasons, "seconds": self.seconds}
        with open(path, "wb") as file:
            np.savez(
                file,
                about=np.frombuffer(json.dumps(about).encode(), np.uint8),
                state=self.state.numpy(),
                coverage=self.coverage.ranges,
                failed=np.array(list(self.failures), np.int64),
                reason=np.array([number[reason] for reason in self.failures.values()], np.int64),
            )
            file.flush()
            os.fsync(file.fileno())


def read_partial(path: Path) -> Partial:
    """What `Partial.write` wrote; every byte is checked against the file's checksums. UnitvisError if it is not so."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            parts = {name: arrays[name] for name in ("about", "state", "coverage", "failed", "reason")}
        about = json.loads(parts["about"].tobytes())
        reasons = [about["reasons"][number] for number in parts["reason"].tolist()]
        failures = dict(zip(parts["failed"].tolist(), reasons, strict=True))
        state = torch.from_numpy(parts["state"])
        return Partial(about["identity"], state, Coverage(parts["coverage"]), failures, about["seconds"])
    except Exception as error:  # a damaged file makes numpy and zipfile raise nearly anything
        raise UnitvisError(f"{path} is damaged ({' '.join(str(error).split())})") from error


def identity(manifest: Mapping[str, Any]) -> Identity:
    """What of a manifest two scans must share to be parts of one; where the images lie may differ."""
    shared = {key: manifest[key] for key in ("input", "k", "unit", "transform", "fingerprint")}
    shared["precision"] = manifest["scan"]["precision"]
    model = {key: manifest["model"][key] for key in ("class", "parameters", "weights")}
    layers = {name: [info[key] for key in ("channels", "height", "width")] for name, info in manifest["layers"].items()}
    source = {key: value for key, value in manifest["source"].items() if key != "path"}
    return json.loads(json.dumps({"model": model, "layers": layers, **shared, "source": source}))  # tuples are lists


def differences(one: Any, other: Any, name: str = "") -> Iterable[str]:
    """What is not equal in two identities, as sentences: `k is 9 and 5`."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in [*one, *(key for key in other if key not in one)]:
            inside = f"{name}.{key}" if name else key
            yield from differences(one.get(key, "nothing"), other.get(key, "nothing"), inside)
    elif one != other:
        yield f"{name} is {_shown(one)} and {_shown(other)}"


def refuse_differences(what: str, one: Identity, other: Identity) -> None:
    """UnitvisError that names what differs, if anything does."""
    if different := list(differences(one, other)):
        raise UnitvisError(f"{what}: {some(different)}")


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
