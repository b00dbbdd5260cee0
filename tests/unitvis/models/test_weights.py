"""Weights from files of the common forms."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from support.clock import in_time
from support.commands import model_file
from unitvis import UnitvisError, models
from unitvis.models.weights import load_weights


def test_weights_are_loaded_from_common_checkpoints(tmp_path: Path) -> None:
    model = model_file(tmp_path)
    weights = {name: tensor + 1 for name, tensor in models.load(model).model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": t for name, t in weights.items()}}, tmp_path / "a.pt")
    save_file(weights, tmp_path / "b.safetensors")
    for name in ("a.pt", "b.safetensors"):
        loaded = models.load(model, tmp_path / name).model.state_dict()
        assert all(torch.equal(loaded[key], weights[key]) for key in weights)
    (tmp_path / "ints.py").write_text("def f():\n    return 3\n")
    with pytest.raises(UnitvisError, match=r"returned a int, not an nn.Module"):
        models.load(f"{tmp_path / 'ints.py'}:f")


def test_a_checkpoint_that_does_not_fit_names_every_key(tmp_path: Path) -> None:
    def small() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 10))

    state = small().state_dict()
    state["0.weight"] = torch.zeros(5, 3, 3, 3)
    state["extra.weight"] = state.pop("1.bias")
    torch.save(state, tmp_path / "w.pt")
    told = (
        r"\(missing: 1.bias; unexpected: extra.weight; of another shape: 0.weight \[5, 3, 3, 3\] for \[4, 3, 3, 3\]\)"
        r"; name a function that builds the network"
    )
    with pytest.raises(UnitvisError, match=told):
        load_weights(small(), tmp_path / "w.pt")
    deeper = nn.Sequential(*list(small())[:3], nn.Linear(17, 2))
    torch.save(deeper.state_dict(), tmp_path / "d.pt")
    with pytest.raises(UnitvisError, match=r"of another shape: 3.weight \[2, 17\] for \[10, 16\], 3.bias"):
        load_weights(small(), tmp_path / "d.pt")


@pytest.mark.parametrize(
    ("keys", "prefix"),
    [
        (("model_state_dict",), ""),
        (("state_dict",), "model."),  # Lightning
        (("model", "state_dict"), "module._orig_mod."),  # a compiled model in DistributedDataParallel
        ((), "backbone."),
        ((), ""),
    ],
)
def test_a_state_dict_is_found_wherever_training_loops_put_it(
    keys: tuple[str, ...], prefix: str, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    wanted = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    saved: dict[str, object] = {f"{prefix}{name}": tensor for name, tensor in wanted.items()}
    for key in reversed(keys):
        saved = {key: saved, "epoch": 3}
    torch.save(saved, tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in wanted.items())


def test_what_a_checkpoint_holds_beside_the_model_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    saved = {f"model.{name}": tensor + 1 for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": saved | {"criterion.weight": torch.ones(10)}}, tmp_path / "w.ckpt")
    with pytest.warns(UserWarning, match=r"left out of the weights.*: criterion\.weight"):
        load_weights(model, tmp_path / "w.ckpt")


def test_names_that_begin_as_a_wrapper_does_are_kept(tmp_path: Path) -> None:
    model = nn.Module()
    model.model = nn.Sequential(nn.Linear(2, 3))
    wanted = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    torch.save(wanted, tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in wanted.items())


def test_a_checkpoint_with_two_networks_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    saved = {f"{who}.{name}": tensor for who in ("student", "teacher") for name, tensor in model.state_dict().items()}
    torch.save(saved, tmp_path / "w.pt")
    with pytest.raises(UnitvisError, match=r"several networks that fit, under 'student\.', 'teacher\.'"):
        load_weights(model, tmp_path / "w.pt")


def quantised() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.zeros(4, 3, 3, 3), 1, 0, torch.qint8)


def itself() -> dict[object, Any]:
    state: dict[object, Any] = {}
    state["model"] = state
    return state


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"3.weight": torch.zeros(1).expand(10**8, 4)},
            r"'3.weight' in .* is \[100000000, 4\], 1,600,000,000 bytes, of",
        ),
        ({"0.weight": torch.zeros(4, 3, 3, 3).to_sparse()}, "'0.weight' in .* is a sparse tensor"),
        ({"0.weight": torch.zeros(4, 3, 3, 3, device="meta")}, "'0.weight' in .* is on the device meta"),
        ({"0.weight": quantised}, "'0.weight' in .* is a quantised tensor"),
        ({"0.bias": torch.zeros(4, dtype=torch.complex64)}, r"\(complex in place of real: 0.bias\)"),
        ({0: torch.zeros(1)}, "holds no state dict"),
        (itself(), "holds a dictionary that holds itself"),
        ({"a." * 2**19 + "x": torch.zeros(1)}, r"\(unexpected: (a\.){100}\); name a function"),
    ],
    ids=["expanded", "sparse", "meta", "quantised", "complex", "number", "itself", "long"],
)
@pytest.mark.filterwarnings("ignore")  # of torch, for tensors of these kinds
def test_tensors_that_no_network_can_take_are_refused(changed: dict[object, Any], message: str, tmp_path: Path) -> None:
    changed = {key: value() if value is quantised else value for key, value in changed.items()}
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2, bias=False))
    state = dict(model.state_dict()) | changed
    torch.save(state if "model" not in changed else changed, tmp_path / "w.pt")
    with in_time(), pytest.raises(UnitvisError, match=message) as refused:
        load_weights(model, tmp_path / "w.pt")
    assert "\n" not in str(refused.value)


def test_a_short_expanded_tensor_is_loaded(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    torch.save(model.state_dict() | {"0.bias": torch.ones(1).expand(4)}, tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert model[0].bias.tolist() == [1, 1, 1, 1]


def two(first: float, second: float) -> list[dict[str, Any]]:
    """The state dicts of a network whose weights all are one of two numbers."""
    state = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)).state_dict()
    return [{name: torch.full_like(tensor, value) for name, tensor in state.items()} for value in (first, second)]


ONE, TWO = two(1, 2)
OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(4, 3, 3, 3)}}, "param_groups": [{"lr": 0.1}]}
HEAD = TWO | {"2.weight": torch.zeros(9, 4), "2.bias": torch.zeros(9)}  # of another number of classes


@pytest.mark.parametrize(
    ("saved", "told"),
    [
        ({"state_dict": ONE, "ema": TWO}, r"under 'state_dict', 'ema': 'state_dict' is loaded; save another one alone"),
        (
            {"state_dict": ONE, "ema": {"shadow": {f"module.{k}": v for k, v in TWO.items()}}},
            "under 'state_dict', 'ema': 's",
        ),
        ({"model": ONE, "model_ema": HEAD, "x": ONE}, "under 'model', 'model_ema': 'model' is loaded"),
        ({"state_dict": {"model": ONE, "ema": TWO}}, "under 'model', 'ema': 'model' is loaded"),
        ({"state_dict": ONE, "optimizer": OPTIMIZER, "scheduler": {"last": 3}, "epoch": 3, "args": {}}, None),
        ({"state_dict": ONE, "model": dict(ONE)}, None),
        ({"net": ONE, "critic": {"0.weight": torch.zeros(1, 4), "2.bias": torch.zeros(1)}}, None),
    ],
    ids=["ema", "inside", "head", "below", "training", "twins", "another network"],
)
def test_a_warning_tells_which_network_of_a_checkpoint_is_loaded(
    saved: dict[str, Any], told: str | None, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    torch.save(saved, tmp_path / "w.pt")
    with pytest.warns(UserWarning, match=f"holds several networks that fit, {told}") if told else nullcontext():
        load_weights(model, tmp_path / "w.pt")
    assert all((tensor == 1).all() for tensor in model.state_dict().values())


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"state_dict": TWO, "model": ONE}, "several networks that fit, under 'state_dict', 'model'; save the one to"),
        ({"net": TWO, "model": ONE, "ema": ONE}, "under 'model', 'net'"),
        (
            ONE | {"0.weight": ONE["0.weight"].to(torch.int8)},
            r"\(whole numbers in place of real: 0.weight int8\); name",
        ),
        (ONE | {"0.bias": ONE["0.bias"].bool()}, "whole numbers in place of real: 0.bias bool"),
    ],
)
def test_weights_of_which_nobody_knows_what_they_are_are_refused(
    saved: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    torch.save(saved, tmp_path / "w.pt")
    with pytest.raises(UnitvisError, match=message):
        load_weights(model, tmp_path / "w.pt")


def test_weights_in_another_precision_and_buffers_of_whole_numbers_are_loaded(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model.register_buffer("mean", torch.zeros(3))
    saved = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    torch.save(saved | {"mean": torch.tensor([1, 2, 3])}, tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert model.get_buffer("mean").tolist() == [1, 2, 3]
