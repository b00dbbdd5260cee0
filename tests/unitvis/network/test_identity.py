"""What tells two networks apart: tensors, modules, and what layers compute from fixed noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unitvis
from support.scans import images, scan
from unitvis import UnitvisError
from unitvis.network.network import Network
from unitvis.state.partial import differences


class Net(nn.Module):
    """Two convolutions with a function between them, of which no module tells."""

    def __init__(self, between: Callable[[Tensor], Tensor] = F.relu, padding: str = "zeros") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, padding=1, padding_mode=padding)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


class Counting(Net):
    """A network that counts its calls, and one that keeps its last mean, in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.mean()
        return super().forward(x)


def description(model: nn.Module) -> dict[str, object]:
    network = Network(model.eval())
    network.examine((3, 12, 12))
    return network.description


EDITS = {
    "gelu": lambda: Net(F.gelu),
    "leaky": lambda: Net(lambda x: F.leaky_relu(x, 0.001)),
    "circular": lambda: Net(padding="circular"),
    "scaled": lambda: Net(lambda x: 1.001 * F.relu(x)),
}


@pytest.mark.parametrize("edit", EDITS)
def test_the_same_weights_in_another_network_are_told_apart(edit: str) -> None:
    other = EDITS[edit]()
    assert all(torch.equal(a, b) for a, b in zip(Net().state_dict().values(), other.state_dict().values(), strict=True))
    told = list(differences({"model": description(Net())}, {"model": description(other)}))
    assert "the network computes something else in second" in told
    assert list(differences({"model": description(Net())}, {"model": description(Net())})) == []


class Capped(nn.Module):
    """A bound, as an attribute or as a number in code, that responses to noise of -2..2 do not reach."""

    def __init__(self, bound: float, *, named: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)
        self.folder, self.device, self.calls = f"runs/{bound}", "cpu" if bound < 50 else "cuda:0", 0
        if named:
            self.cap = (bound, None)
        self.bounded = lambda x: x.clamp(0, bound)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.second(self.bounded(self.first(x)))


def test_a_bound_that_the_noise_does_not_reach_is_told() -> None:
    pixels = torch.rand(99, 3, 12, 12, generator=torch.Generator().manual_seed(1)) * 4 - 2
    assert Capped(8, named=True).first(pixels).max() < 8  # of noise as loud as the quiet one

    def told(one: nn.Module, other: nn.Module) -> list[str]:
        return list(differences({"model": description(one)}, {"model": description(other)}))

    assert told(Capped(99, named=False), Capped(8, named=False)) == ["the network computes something else in second"]
    assert told(Capped(99, named=True), Capped(98, named=True)) == ["model.attributes.cap is (99, None) and (98, None)"]
    used = Capped(99, named=True).eval()
    used(pixels)  # a counter, a path and a device are no part of a network, and an attribute may be new
    assert told(Capped(99, named=True), used) == told(Capped(99, named=True), Capped(99, named=False)) == []
    earlier = {k: v for k, v in description(used).items() if not k.startswith(("loud", "attr"))}
    assert list(differences({"model": earlier}, {"model": description(used)})) == []


class Images(Net):
    """Takes only inputs that can be normalised images."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.abs().max() < 10
        return super().forward(x)


@pytest.mark.filterwarnings("ignore:the model.s code could not be followed", "ignore:the receptive fields of")
def test_a_network_that_refuses_loud_noise_is_described_by_the_quiet_one() -> None:
    found = description(Images())
    assert "loud_responses" not in found
    other = {key: value for key, value in description(Net()).items() if key not in ("class", "modules")}
    assert list(differences({"model": {key: found[key] for key in found if key in other}}, {"model": other})) == []
    assert scan(Images().eval(), images(3, 12).clamp(-4, 4)).layers == ["first", "second"]


@pytest.mark.parametrize("edit", ["gelu", "circular"])
def test_another_network_is_neither_resumed_nor_merged_nor_drawn(edit: str, tmp_path: Path) -> None:
    pixels = images(20, 12)
    np.save(tmp_path / "pixels.npy", pixels.mul(40).add(128).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy())
    source = {"images": tmp_path / "pixels.npy", "transform": unitvis.Transform(), "progress": False}
    run = unitvis.scan(Net(), out=tmp_path / "run", **source)
    with pytest.raises(UnitvisError, match=r"holds the run of another scan .*computes something else in second"):
        unitvis.scan(EDITS[edit](), out=tmp_path / "run", resume=True, **source)
    with pytest.raises(UnitvisError, match=r"not the one that was scanned .*computes something else in second"):
        unitvis.gallery(run, tmp_path / "gallery", EDITS[edit]())
    shards = [unitvis.scan(Net(), shard=(number, 2), **source) for number in (1, 2)]
    with pytest.raises(UnitvisError, match=r"not that of the runs .*computes something else in second"):
        unitvis.merge(shards, EDITS[edit]())
    other = unitvis.scan(EDITS[edit](), shard=(2, 2), **source)
    with pytest.raises(UnitvisError, match=r"run 1 and run 2 cannot be merged.*computes something else in second"):
        unitvis.merge([shards[0], other], Net())
    assert np.array_equal(unitvis.merge(shards, Net())["second"].images, run["second"].images)


class Gains(nn.Module):
    """A layer of 256 channels, each times a number that no attribute of the model holds."""

    def __init__(self, gains: dict[int, float] | None = None, strongest: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.scaled = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 256, 3), nn.Identity()
        self.second.weight.data[0] *= strongest
        self.gains = lambda: gains or {}

    def forward(self, x: Tensor) -> Tensor:
        gain = torch.ones(256, 1, 1)
        for channel, value in self.gains().items():
            gain[channel] = value
        return self.scaled(self.second(self.first(x).relu()) * gain)


@pytest.mark.parametrize("gain", [1.01, 0.999, -1.0])
@pytest.mark.parametrize("strongest", [1.0, 1000.0])
def test_one_channel_among_many_that_is_computed_otherwise_is_told(gain: float, strongest: float) -> None:
    def described(gains: dict[int, float]) -> dict[str, object]:
        network = Network(Gains(gains, strongest).eval())
        network.examine((3, 12, 12), ["scaled"])
        return network.description

    for channel in (7, 100, 255):
        told = list(differences({"model": described({})}, {"model": described({channel: gain})}))
        assert len(told) == 1
        assert told[0] in (
            f"the network computes something else in scaled (channel {channel})",
            "the network computes something else in scaled",  # the layer's numbers differ as well
        )
    assert list(differences({"model": described({})}, {"model": described({7: 1.0})})) == []


def test_a_scan_is_not_gone_on_with_where_one_channel_changed(tmp_path: Path) -> None:
    pixels = images(20, 12)
    np.save(tmp_path / "pixels.npy", pixels.mul(40).add(128).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy())
    source = {"images": tmp_path / "pixels.npy", "transform": unitvis.Transform(), "progress": False}
    unitvis.scan(Gains(strongest=1000).eval(), out=tmp_path / "run", layers=["scaled"], **source)
    other = Gains({100: 1.01}, 1000).eval()
    with pytest.raises(UnitvisError, match=r"something else in scaled \(channel 100\)"):
        unitvis.scan(other, out=tmp_path / "run", layers=["scaled"], resume=True, **source)
    with pytest.raises(UnitvisError, match=r"something else in scaled \(channel 100\)"):
        unitvis.gallery(unitvis.load(tmp_path / "run"), tmp_path / "gallery", other)
    manifest = tmp_path / "run" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"channels": {\n   "scaled": "', '"channels": {\n   "scaled": "*'))
    with pytest.raises(UnitvisError, match=r"model\.channels\.scaled is .* not float32 numbers in base64"):
        unitvis.load(tmp_path / "run")


def test_other_rounding_is_no_other_network() -> None:
    network = Network(Gains().eval())
    network.examine((3, 12, 12), ["scaled"])
    then = network.responses_to_noise()
    network.model.double()

    def single(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        return output.float()

    network.model.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    network.model.scaled.register_forward_hook(single)
    now = network.responses_to_noise()
    assert now["channels"] != then["channels"]
    assert list(differences(then, now, "model")) == []


def test_buffers_that_a_pass_changes_do_not_count() -> None:
    model = Counting()
    then = description(model)
    model.calls += 5
    assert list(differences({"model": then}, {"model": description(model)})) == []
    model.first.bias.data[0] += 1
    assert any("weights" in told for told in differences({"model": then}, {"model": description(model)}))


class WithExtraState(Net):
    def __init__(self, state: object) -> None:
        super().__init__()
        self.state = state

    def get_extra_state(self) -> object:
        return self.state

    def set_extra_state(self, state: object) -> None:
        self.state = state


def test_state_that_is_no_tensor_counts() -> None:
    assert description(WithExtraState({"a": 1}))["weights"] == description(WithExtraState({"a": 1}))["weights"]
    assert description(WithExtraState({"a": 1}))["weights"] != description(WithExtraState({"a": 2}))["weights"]
    assert scan(WithExtraState(Path("x")).eval(), images(4, 12)).layers == ["first", "second"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_dynamically_quantised_model_is_scanned() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(400, 5)).eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert scan(quantised, images(4, 12)).layers == ["0"]
    other = torch.ao.quantization.quantize_dynamic(
        nn.Sequential(model[0], nn.Flatten(), nn.Linear(400, 5)).eval(), {nn.Linear}, dtype=torch.qint8
    )
    assert description(quantised)["weights"] != description(other)["weights"]


def test_the_order_of_sets_and_addresses_do_not_count() -> None:
    class Odd(nn.Conv2d):
        def __init__(self, *names: str) -> None:
            super().__init__(3, 2, 3)
            self.names = names

        def extra_repr(self) -> str:
            return f"{{{', '.join(self.names)}}} {object()}"

    one, other, third = Odd("'a'", "'b'"), Odd("'b'", "'a'"), Odd("'a'", "'d'")  # as another process prints a set
    for each in (other, third):
        each.load_state_dict(one.state_dict())
    assert repr(one) != repr(other)
    assert description(nn.Sequential(one)) == description(nn.Sequential(other))
    assert description(nn.Sequential(one)) != description(nn.Sequential(third))
