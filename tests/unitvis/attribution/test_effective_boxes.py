"""Effective boxes: of many layers, and where a layer has no gradient or unknown boxes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from support.scans import images, scan, tiny_net
from unitvis.attribution import effective_boxes
from unitvis.network import gradients
from unitvis.network.network import Network


def test_a_layer_without_gradients_is_scanned_and_has_no_effective_box() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.sigmoid(self.a(x))
            y *= 2
            return self.b(y)

    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="layer 'b' has no effective box, for want of gradients .*inplace"):
        run = scan(Overwrites(), images(20), ["a", "b"])
    assert (run["b"].images >= 0).all()


def test_a_pass_over_several_layers_gives_each_layer_the_gradients_of_its_own_winners(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gradients, "MAX_GRADIENTS", 4)
    passes = []
    reading_maps = Network.reading_maps
    monkeypatch.setattr(
        Network, "reading_maps", lambda self, *args: passes.append(args[0]) or reading_maps(self, *args)
    )
    model, pixels = tiny_net(), images(30, size=20)
    run = scan(model, pixels)
    assert passes == [["0", "4", "6"]]
    for name, top in run.tops.items():
        ((image, neuron, centre),) = effective_boxes._sampled_winners(top, 1)
        inputs = pixels[[image]].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model[: int(name) + 1](inputs)[0][neuron], inputs)
        squares = gradient[0].square().sum(0)
        rows, columns = np.indices(squares.shape) + 0.5
        sides = 2 * np.maximum(abs(columns - centre[0]), abs(rows - centre[1])) + 1
        inside = {side: float(squares[torch.from_numpy(sides <= side)].sum()) for side in np.unique(np.rint(sides))}
        want = next(side for side, share in inside.items() if share >= 0.9 * float(squares.sum()))
        assert top.info["effective_box"] == want, name


@pytest.mark.filterwarnings("ignore:the model has forward hooks")
@pytest.mark.parametrize("fit", [0, 2])
def test_gradients_that_do_not_fit_into_memory_are_found_in_halves(fit: int) -> None:
    model, pixels = tiny_net(), images(30, size=20)
    want = scan(model, pixels)

    def allocate(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].requires_grad and len(args[0]) > fit:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model[0].register_forward_pre_hook(allocate)
    if fit:
        run = scan(model, pixels)
    else:
        with pytest.warns(UserWarning, match="has no effective box, for want of memory") as told:
            run = scan(model, pixels)
        assert sum("for want of memory" in str(warning.message) for warning in told) == len(run.layers)
    sides = {name: top.info["effective_box"] if fit else None for name, top in want.tops.items()}
    assert {name: top.info["effective_box"] for name, top in run.tops.items()} == sides


@pytest.mark.filterwarnings("ignore:the model's code could not be followed")
def test_where_boxes_are_unknown_there_is_no_effective_box() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > -1e9 else -x

    model = nn.Sequential(nn.Conv2d(3, 4, 5), Branches(), nn.Conv2d(4, 5, 5))
    with pytest.warns(UserWarning, match="the receptive fields of 2 are unknown, so whole images are drawn"):
        run = scan(model, images(20))
    assert run["0"].info["effective_box"]
    assert run["2"].info["effective_box"] is None
