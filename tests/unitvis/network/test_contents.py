"""What attributes hold is part of a network's identity, in whichever container they hold it."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import json
import os
import subprocess
import sys
import types
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import unitvis
from support.scans import images
from unitvis import UnitvisError
from unitvis.network.attributes import described_attributes
from unitvis.network.network import Network
from unitvis.state.partial import differences


@dataclasses.dataclass
class Settings:
    cap: float


@dataclasses.dataclass(slots=True)
class Slotted:
    cap: float


class Plain:
    """An object of no particular kind, with a public and a private attribute."""

    def __init__(self, cap: float) -> None:
        self.cap, self._made = cap, object()


class Own(float):
    pass


class Net(nn.Module):
    """Two convolutions and whatever a test adds."""

    def __init__(self, held: object = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)
        self.held = held
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def of_class(cap: float) -> nn.Module:
    class Classy(Net):
        CAPS: ClassVar = {"cap": [cap]}

    return Classy()


def of_buffer(cap: float) -> nn.Module:
    model = Net()
    del model.held
    model.register_buffer("held", torch.tensor([1.0, cap]), persistent=False)
    return model


def of_pytorch(cap: float) -> nn.Module:
    model = Net()
    model.bound = nn.ReLU6()
    model.bound.max_val = cap
    return model


def of_loose_module(cap: float) -> nn.Module:
    loose = nn.PReLU()
    loose.weight.data.fill_(cap)
    return Net([loose])


def of_itself(cap: float) -> nn.Module:
    held: list[Any] = [cap]
    held.append(held)
    return Net(held)


def large(cap: float) -> Tensor:
    """100,000 numbers, of which two thousand are bounded."""
    return torch.arange(100_000).float().sin().where(torch.arange(100_000) > 2000, torch.tensor(cap))


# Networks that hold a number, each in another way.
HOLDING: dict[str, Callable[[float], nn.Module]] = {
    "numpy's float64": lambda cap: Net(np.float64(cap)),
    "numpy's float32": lambda cap: Net(np.float32(cap)),
    "numpy's int": lambda cap: Net(np.int16(cap * 10)),
    "float of one's own": lambda cap: Net(Own(cap)),
    "list": lambda cap: Net([cap]),
    "dict": lambda cap: Net({"a": {"cap": (cap, None)}}),
    "deque": lambda cap: Net(deque([cap])),
    "tuple of lists": lambda cap: Net(([cap],)),
    "frozenset": lambda cap: Net(frozenset([cap, "a"])),
    "data class": lambda cap: Net(Settings(cap)),
    "data class with slots": lambda cap: Net([Slotted(cap)]),
    "namespace": lambda cap: Net(types.SimpleNamespace(cap=cap)),
    "object": lambda cap: Net(Plain(cap)),
    "class of settings": lambda cap: Net(type("Settings", (), {"cap": cap, "__module__": "settings"})),
    "enum": lambda cap: Net(enum.Enum("Caps", {"CAP": cap}).CAP),
    "partial": lambda cap: Net(functools.partial(torch.clamp, max=cap)),
    "complex array": lambda cap: Net(np.array([cap * 1j])),
    "array": lambda cap: Net(np.array([[0, cap]])),
    "array in a dict": lambda cap: Net({"mean": [np.array([0, cap], np.float32)]}),
    "whole numbers": lambda cap: Net(np.arange(100) * int(cap * 10)),
    "infinities": lambda cap: Net(torch.tensor([0.0, np.inf if cap < 1.7 else -np.inf])),
    "tensor": lambda cap: Net(torch.tensor(cap)),
    "bfloat16": lambda cap: Net(torch.tensor(cap, dtype=torch.bfloat16)),
    "sign": lambda cap: Net(torch.tensor(-2.0 if cap < 1.7 else 1.0)),
    "large tensor": lambda cap: Net(large(cap)),
    "buffer": of_buffer,
    "class": of_class,
    "attribute of PyTorch's": of_pytorch,
    "module in a list": of_loose_module,
    "list that holds itself": of_itself,
}


def described(model: nn.Module) -> dict[str, Any]:
    attributes, arrays = described_attributes(model)
    return {"attributes": attributes, "arrays": arrays}


@pytest.mark.parametrize("kind", HOLDING)
def test_a_number_is_compared_wherever_it_is_held(kind: str) -> None:
    make = HOLDING[kind]
    told = list(differences({"model": described(make(1.5))}, {"model": described(make(1.9))}))
    assert len(told) == 1
    assert list(differences({"model": described(make(1.5))}, {"model": described(make(1.5))})) == []


def test_what_differs_is_named() -> None:
    def told(one: nn.Module, other: nn.Module) -> list[str]:
        return list(differences({"model": described(one)}, {"model": described(other)}))

    assert told(Net({"cap": 1.5}), Net({"cap": 2.0})) == ["model.attributes.held is {'cap': 1.5} and {'cap': 2.0}"]
    assert told(of_buffer(1.5), of_buffer(1.9)) == ["the numbers in held differ"]
    assert told(of_pytorch(1.5), of_pytorch(1.9)) == ["model.attributes.bound.max_val is 1.5 and 1.9"]
    assert told(of_class(1), of_class(2)) == ["model.attributes.class Classy.CAPS is {'cap': [1]} and {'cap': [2]}"]
    assert told(Net({"mean": np.array([0.5])}), Net({"mean": np.array([0.6])})) == [
        "the numbers in held['mean'] differ"
    ]


def test_other_rounding_and_what_only_one_of_two_holds_are_no_difference() -> None:
    tables = [torch.arange(1000).to(dtype).sin().float() for dtype in (torch.float32, torch.float64)]
    assert not torch.equal(*tables)
    for one, other in ((tables[0], tables[1]), (np.float32(1.5), 1.5), ([], None)):
        names = ("arrays",) if other is None else ("attributes", "arrays")
        then, now = ({"model": {k: described(Net(each))[k] for k in names}} for each in (one, other))
        assert list(differences(then, now)) == []
    assert list(differences({"model": {}}, {"model": described(Net([1.5]))})) == []  # of an earlier version


class Caching(Net):
    """Counts its passes in a list and in place, and keeps what it computes."""

    def __init__(self) -> None:
        super().__init__({"passes": [0], "total": np.zeros(1), "last": Settings(0), "seen": torch.zeros(3)})

    def forward(self, x: Tensor) -> Tensor:
        self.held["passes"].append(len(x))
        self.held["total"] += 1
        self.held["last"].cap = float(len(x))
        self.held["seen"].add_(1)
        return super().forward(x)


def test_what_a_pass_changes_does_not_count() -> None:
    def description(model: nn.Module) -> dict[str, Any]:
        network = Network(model)
        network.examine((3, 12, 12))
        return network.description

    used = Caching()
    used(images(5, 12))
    then, now = description(Caching()), description(used)
    assert "held" not in {**then["attributes"], **now["attributes"], **now.get("arrays", {})}
    assert list(differences({"model": then}, {"model": now})) == []


def digest() -> str:
    """Hash of descriptions of all kinds, with sets of texts, which Python orders anew in each process."""
    texts = [f"name {number}" for number in range(50)]
    sets = [set(texts), frozenset(texts), tuple(set(texts)), list(set(texts)), object(), lambda x: x, {object(): 1}]
    every = [described(model) for model in (Net(sets), *(make(1.5) for make in HOLDING.values()))]
    return hashlib.sha256(json.dumps(every).encode()).hexdigest()


def test_another_process_describes_a_network_in_the_same_bytes() -> None:
    paths = [str(Path(__file__).parent), *sys.path]
    environment = {**os.environ, "PYTHONHASHSEED": "12", "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", "import test_contents; print(test_contents.digest())"]
    other = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert other.strip() == digest()


def test_what_is_too_large_or_cannot_be_looked_at_is_left_out() -> None:
    class Raising(dict[str, int]):
        def items(self) -> Any:
            raise RuntimeError

    deep: Any = 1
    for _ in range(2000):
        deep = [deep]
    for held in (list(range(20_000)), Raising(), object(), lambda: 1, "a/path", "cuda:0", torch.Generator()):
        assert described(Net(held)) == {"attributes": {}, "arrays": {}}
    assert described(Net(deep))["attributes"]["held"].count("[") == 7
    assert described(Net(torch.empty(1, device="meta").expand(2**40)))["arrays"] == {}


def test_a_scan_is_not_gone_on_with_where_a_container_changed(tmp_path: Path) -> None:
    pixels = images(20, 12)
    np.save(tmp_path / "pixels.npy", pixels.mul(40).add(128).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy())
    source = {"images": tmp_path / "pixels.npy", "transform": unitvis.Transform(), "progress": False}
    model = Net([1.5, np.array([1.5])])
    run = unitvis.scan(model, out=tmp_path / "run", **source)
    unitvis.scan(Net([1.5, np.array([1.5])]), out=tmp_path / "run", resume=True, **source)
    for held, said in (
        ([1.9, np.array([1.5])], "model.attributes.held is"),
        ([1.5, np.array([1.9])], "numbers in held"),
    ):
        with pytest.raises(UnitvisError, match=said):
            unitvis.scan(Net(held), out=tmp_path / "run", resume=True, **source)
        with pytest.raises(UnitvisError, match=said):
            unitvis.gallery(run, tmp_path / "gallery", Net(held))
    manifest = tmp_path / "run" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"held[1]": "', '"held[1]": "*'))
    with pytest.raises(UnitvisError, match=r"model\.arrays\.held\[1\] is .* not float32 numbers in base64"):
        unitvis.load(tmp_path / "run")
