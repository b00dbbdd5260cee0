"""Default layers of models that nobody chose by hand: as many units as channels, with the values that a hook sees."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unitvis
from support import zoos

MAX_PARAMETERS = 500e6
MODELS = [(zoo, index) for zoo, count in (("timm", 20), ("torchvision", 10)) for index in range(count)]


def build(zoo: str, index: int) -> tuple[str, Callable[[], nn.Module], tuple[int, int, int]]:
    """The model of a zoo whose name has this place by SHA-256: its name, constructor, and input [C, H, W]."""
    zoos.importable()
    timm, torchvision = pytest.importorskip("timm"), pytest.importorskip("torchvision")
    if zoo == "timm":
        name = smallest(timm.list_models(), index)
        return name, lambda: timm.create_model(name), timm.get_pretrained_cfg(name).input_size
    name = smallest(torchvision.models.list_models(torchvision.models), index)
    side = torchvision.models.get_model_weights(name).DEFAULT.transforms().crop_size[0]
    return name, lambda: torchvision.models.get_model(name, weights=None), (3, side, side)


def smallest(names: Sequence[str], index: int) -> str:
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[index]


def norm_before(model: nn.Module, layer: str) -> nn.Module | None:
    """For a module inside a BatchNorm that is handed its value before an activation: that BatchNorm."""
    parent = model.get_submodule(layer.rpartition(".")[0])
    return parent if isinstance(parent, nn.BatchNorm2d) else None


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def channels_of(module: nn.Module) -> int:
    return module.out_channels if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) else module.num_features


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("zoo", "index"), MODELS)
def test_default_layers_have_the_units_and_values_of_a_hook(zoo: str, index: int) -> None:
    name, make, shape = build(zoo, index)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            parameters = sum(parameter.numel() for parameter in make().parameters())
        except (RuntimeError, NotImplementedError):  # computes with its weights already when it is made
            parameters = 0
    if parameters > MAX_PARAMETERS:
        pytest.skip(f"{name} has {parameters / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = make().eval()
    image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    refusal = ""
    try:
        with unitvis.Recorder(model, k=1) as recorder:  # a scan without effective boxes, which take most of its time
            recorder(image)
        run = recorder.result()
    except unitvis.UnitvisError as error:
        refusal = str(error)
        print(f"{name} {shape}: refused: {refusal}")
    assert "\n" not in refusal
    if refusal:
        return
    largest: dict[str, Tensor] = {}

    def keep(layer: str, module: nn.Module, output: Tensor) -> None:
        assert output.shape[1] == channels_of(module)  # every convolution and BatchNorm has its channels there
        largest[layer] = output.detach().transpose(0, 1).flatten(1).amax(1)

    modules = {layer: norm_before(model, layer) or model.get_submodule(layer) for layer in run}
    for layer, module in modules.items():
        if module is model.get_submodule(layer):
            module.register_forward_hook(lambda m, _, out, layer=layer: keep(layer, m, out))
        else:
            module.register_forward_pre_hook(lambda m, args, layer=layer: keep(layer, m, normed(m, args[0])))
    with torch.no_grad():
        model(image)
    for layer, values in largest.items():
        assert len(run[layer]) == run[layer].info["channels"] == channels_of(modules[layer]), layer
        slack = 1e-3 * float(values.abs().max())
        torch.testing.assert_close(torch.from_numpy(run[layer].values[:, 0]), values, rtol=1e-3, atol=slack)
    print(f"{name} {shape}: {len(largest)} layers, {sum(map(len, largest.values()))} units equal")
