"""The rewritten copy of a model against the model itself, in float32."""

from __future__ import annotations

import operator
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unitvis
import unitvis_kernels as uk
from support import zoos
from support.brute import outputs
from unitvis.half_precision import rewrite
from unitvis.half_precision.parts import Blocked, Chain, Residual, Taps
from unitvis.half_precision.rewrite import NotRewrittenError, rewritten


def norm(channels: int) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(channels)
    for tensor, low, high in ((made.running_mean, -1, 1), (made.running_var, 0.5, 2), (made.weight.data, -2, 2)):
        tensor.uniform_(low, high)
    return made


class Block(nn.Module):
    """A residual block as torchvision writes it: one ReLU for all places, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), norm(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), norm(6)
        self.down = nn.Sequential(nn.Conv2d(3, 6, 1), norm(6))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.down(x)
        return self.relu(out)


class Functional(nn.Module):
    """Functions, branches, an in-place change whose result nobody takes, and a pool that rounds up."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3, dilation=2, groups=1)
        self.c = nn.Conv2d(4, 8, 1, groups=4)
        self.d = nn.Conv2d(12, 5, 3, padding=1, padding_mode="reflect")
        self.up = nn.MaxPool2d(2, ceil_mode=True)
        self.tail = nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        y = self.b(x).relu_()
        z = self.c(y)
        z.add_(1)
        y = torch.cat([torch.relu(z), y], dim=1)
        y = self.d(y)
        y = F.max_pool2d(F.relu6(y), 2)
        return self.tail(self.up(y))


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.next = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)
        self.conv.register_forward_hook(lambda module, args, output: output * -1)

    def forward(self, x: Tensor) -> Tensor:
        return self.next(self.relu(self.conv(x)))


class Sums(nn.Module):
    """Sums with a shortcut as networks write them, and sums that only look like it; the first convolution is patches.

    Identities as timm has them, sums that are a layer themselves, of the input, in place, of one map twice and of maps
    of different sizes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 5, stride=4, padding=1), norm(6), nn.ReLU(inplace=True))
        self.conv1, self.bn1, self.drop, self.act1 = nn.Conv2d(6, 6, 1), norm(6), nn.Identity(), nn.ReLU(inplace=True)
        self.conv2, self.act2 = nn.Conv2d(6, 6, 3, padding=1), nn.ReLU6(inplace=True)
        self.inverted = nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), norm(6))
        self.sum, self.again = nn.Identity(), nn.Identity()
        self.grown, self.squeezed = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.twice, self.left, self.right = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv2(self.act1(self.drop(self.bn1(self.conv1(x)))))
        y += x
        x = self.act2(y)
        x = self.again(self.sum(x + self.inverted(x)))
        same = x
        x.add_(self.grown(x))
        x = x + self.squeezed(x.mean((2, 3), keepdim=True)) + same
        two = self.twice(x)
        x = torch.add(two, two)
        y = self.left(x)
        return F.relu(torch.add(y, self.right(x), alpha=2)) + y


def stack() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, 2, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 9, 3, groups=1),
        nn.ReLU6(), nn.Conv2d(9, 4, 1, bias=False), norm(4), nn.MaxPool2d(2), nn.Sigmoid(), nn.Conv2d(4, 7, 1),
    )  # fmt: skip


# A model, choices of layers, and the chains and sums of the first choice: as a CPU runs it, and in one pass.
MODELS: dict[str, tuple[Callable[[], nn.Module], list[list[str]], tuple[int, int], tuple[int, int]]] = {
    "residual": (
        Block, [["bn1", "bn2", "down.1"], ["conv1", "relu"][:1], ["down"], ["bn1", "conv2"], ["bn1", "bn2", "relu"]],
        (3, 0), (1, 1),
    ),
    "sums": (
        Sums,
        [
            ["stem.1", "bn1", "conv2", "inverted.1", "grown", "squeezed", "twice", "left", "right"],
            ["stem.2", "drop", "act2", "sum", "again"], ["conv1", "act1", "sum"], ["stem", "inverted.0", "again"],
        ],
        (9, 0), (6, 3),
    ),
    "functional": (Functional, [["a", "b", "c", "d", "tail"], ["b"], ["up"], ["c", "up"]], (4, 0), (4, 0)),
    "hooked": (Hooked, [["conv", "next"], ["relu"]], (1, 0), (1, 0)),
    "stack": (
        stack, [["0", "3", "6", "9"], ["1"], ["0", "1", "2"], ["4", "5", "7"], ["2", "6", "8"]], (4, 0), (4, 0),
    ),
}  # fmt: skip


def keys(copied: nn.Module, layers: list[str], images: Tensor) -> dict[str, Tensor]:
    with torch.inference_mode():
        return dict(zip(layers, copied(images), strict=True))


def units(model: nn.Module, layers: list[str], images: Tensor) -> dict[str, slice]:
    found, start, maps = {}, 0, outputs(model, layers, images)
    for name in layers:
        found[name] = slice(start, start := start + maps[name].shape[1])
    return found


def chains(copied: nn.Module, kind: type[nn.Module] = Chain) -> int:
    return sum(isinstance(module, kind) for module in copied.modules())


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_keys_are_those_of_the_model(name: str, one_pass: bool) -> None:
    torch.manual_seed(0)
    make, choices, *most = MODELS[name]
    model = make().eval()
    images = torch.randn(3, 3, 20, 23).contiguous(memory_format=torch.channels_last)
    for number, layers in enumerate(choices):
        columns, taps = units(model, layers, images), Taps()
        copied = rewritten(model, columns, taps, one_pass=one_pass)
        copied.graph.lint()
        assert number > 0 or (chains(copied), chains(copied, Residual)) == most[one_pass]
        want, returned = outputs(model, layers, images), keys(copied, layers, images)
        taps.keys = torch.full((3, columns[layers[-1]].stop), uk.BLANK)
        for layer, found in keys(copied, layers, images).items():  # the same, written where they are wanted
            assert torch.equal(found, returned[layer])
            assert torch.equal(found, taps.keys[:, columns[layer]])
        for layer, found in returned.items():
            values, positions = uk.unpack(found)
            flat = want[layer].flatten(2)
            torch.testing.assert_close(values, flat.amax(2), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(flat.gather(2, positions[..., None])[..., 0], values, rtol=1e-5, atol=1e-5)
            if not one_pass and not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
                assert torch.equal(found, uk.spatial_argmax(want[layer]))  # the very same operations


@pytest.mark.parametrize("name", ["residual", "sums", "stack"])
def test_keys_of_a_part_of_each_map(name: str) -> None:
    torch.manual_seed(5)
    make, choices, *_ = MODELS[name]
    model = make().eval()
    images = torch.randn(3, 3, 36, 39).contiguous(memory_format=torch.channels_last)
    for layers in choices:
        want = outputs(model, layers, images)
        some = {layer: (1, want[layer].shape[2], 0, 1) if at % 2 else None for at, layer in enumerate(layers)}
        some["squeezed"] = None  # one pixel
        for parts in (some, dict.fromkeys(layers, (0, 1, 0, 1))):
            copied = rewritten(model, units(model, layers, images), Taps(), one_pass=True, inside=parts)
            for layer, found in keys(copied, layers, images).items():
                values, positions = uk.unpack(found)
                top, bottom, left, right = parts[layer] or (0, None, 0, None)
                part = want[layer][:, :, top:bottom, left:right]
                torch.testing.assert_close(values, part.amax((2, 3)), rtol=1e-5, atol=1e-5)
                at = want[layer].flatten(2).gather(2, positions[..., None])[..., 0]
                torch.testing.assert_close(at, values, rtol=1e-5, atol=1e-5)


def test_nothing_runs_after_the_last_layer_and_the_model_is_untouched() -> None:
    model = stack().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copied = rewritten(model, {"3": slice(0, 9)}, Taps(), one_pass=True)
    assert chains(copied) == 2
    assert not any(isinstance(module, nn.Sigmoid) for module in copied.modules())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_below_the_floor_no_position_is_looked_for() -> None:
    torch.manual_seed(1)
    model, taps = stack().eval(), Taps()
    images = torch.randn(40, 3, 20, 23)
    copied = rewritten(model, {"0": slice(0, 8), "5": slice(8, 12)}, taps, one_pass=False)
    full = keys(copied, ["0", "5"], images)
    values = torch.cat([uk.unpack(full[name])[0] for name in full], dim=1)
    taps.thresholds = values.sort(dim=0).values[-2]
    for (name, found), part in zip(keys(copied, ["0", "5"], images).items(), (slice(0, 8), slice(8, 12)), strict=True):
        reaches = values[:, part] >= taps.thresholds[part]
        assert torch.equal(found[reaches], full[name][reaches])
        assert torch.equal(found >> 32, full[name] >> 32)
        assert (uk.unpack(found)[1] == 2**31 - 1).any()


class Choosy(nn.Module):
    """What it does depends on the sizes it sees, which a trace does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.shape[0] > 0 else self.conv(-x)


def test_what_cannot_be_traced_is_scanned_as_it_is() -> None:
    with pytest.raises(NotRewrittenError, match="cannot be traced"):
        rewritten(Choosy(), {"conv": slice(0, 4)}, Taps(), one_pass=True)
    images = torch.randn(20, 3, 9, 9)
    run = unitvis.scan(Choosy(), images, precision="fp16", progress=False)
    assert "cannot be traced" in run.manifest["scan"]["rewritten"]


def test_a_trace_leaves_the_models_of_other_threads_alone() -> None:
    class Busy(nn.Module):
        """Waits for a thread that runs a model of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.maps = nn.Conv2d(3, 4, 3), []

        def forward(self, x: Tensor) -> Tensor:
            own = nn.Conv2d(3, 2, 3)
            with ThreadPoolExecutor(1) as pool:
                shape = pool.submit(lambda: own(torch.zeros(1, 3, 9, 9)).shape).result()
            return self.conv(x) * shape[1]

    graph = rewritten(Busy(), {"conv": slice(0, 4)}, Taps(), one_pass=True)
    assert graph(torch.zeros(2, 3, 9, 9))[0].shape == (2, 4)


def test_a_wrong_copy_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    model, images = stack(), torch.randn(40, 3, 20, 23)
    right = unitvis.scan(model, images, precision="fp16", progress=False)
    assert right.manifest["scan"]["rewritten"] == "4 chains of a convolution and what follows it"
    monkeypatch.setattr(rewrite, "_RELUS", rewrite._RELUS | {nn.ReLU: "relu6", nn.ReLU6: "relu"})
    loud = images * 50
    run = unitvis.scan(model, loud, precision="fp16", progress=False)
    assert run.manifest["scan"]["rewritten"] == "no: rewritten, layer '3' gives other responses"
    np_want = unitvis.scan(model, loud, precision="fp32", progress=False)
    for name in run:  # what is scanned instead is right
        largest = abs(np_want[name].values).max()
        assert abs(run[name].values - np_want[name].values).max() < 0.01 * largest


@pytest.mark.parametrize("name", ["alexnet", "resnet18", "googlenet", "densenet121", "mobilenet_v2"])
def test_networks_of_torchvision(name: str) -> None:
    zoos.importable()
    import torchvision

    torch.manual_seed(3)
    more = {"init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, **more).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
    images = torch.randn(2, 3, 64, 80).contiguous(memory_format=torch.channels_last)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d if name != "alexnet" else nn.Conv2d)]
    layers = [n for n in layers if "aux" not in n]
    copied = rewritten(model, units(model, layers, images), Taps(), one_pass=True)
    called = [copied.get_submodule(node.target) for node in copied.graph.nodes if node.op == "call_module"]
    absorbed = sum(type(module) in (Chain, nn.Conv2d) for module in called)  # the latter before a sum
    assert absorbed >= (len(layers) if name != "densenet121" else 59)  # half of its norms come before
    assert chains(copied, Residual) == {"resnet18": 8, "mobilenet_v2": 10}.get(name, 0)
    want = outputs(model, layers, images)
    for layer, found in keys(copied, layers, images).items():
        largest = float(want[layer].abs().max())
        torch.testing.assert_close(uk.unpack(found)[0], want[layer].amax((2, 3)), rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_residual_network_has_no_elementwise_operator_left(library: str) -> None:
    zoos.importable()
    module = pytest.importorskip(library)
    with torch.device("meta"):
        made = module.models.resnet50() if library == "torchvision" else module.create_model("resnet50")
    model = made.eval()
    norms = [name for name, found in model.named_modules() if isinstance(found, nn.BatchNorm2d)]
    blocks = list(model.get_submodule("layer3")._modules)
    for layers in (norms, [*norms, *(f"layer3.{block}" for block in blocks)], ["layer4.2.bn3"]):
        order = {name: slice(9 * at, 9 * at + 9) for at, name in enumerate(layers)}
        copied = rewritten(model, order, Taps(), one_pass=True)
        called = [copied.get_submodule(node.target) for node in copied.graph.nodes if node.op == "call_module"]
        assert {type(module) for module in called} == {Blocked, Chain, Residual, nn.Conv2d}
        assert {node.target for node in copied.graph.nodes if node.op.startswith("call_f")} == {operator.getitem}
        assert not [node for node in copied.graph.nodes if node.op == "call_method"]
        assert sum(type(module) is Residual for module in called) == 16
        assert sum(type(module) is nn.Conv2d for module in called) == 20  # four of them projections
        sums = [module for module in called if type(module) is Residual]
        assert sum(tap is not None for one in sums for tap in one.taps) == len(
            [name for name in layers if name.endswith(("bn3", "downsample.1")) or name in order.keys() - set(norms)]
        )


FIRST_LAYERS: dict[str, tuple[Callable[[], nn.Conv2d], tuple[int, int] | None]] = {  # and the blocks it gets
    "as AlexNet": (lambda: nn.Conv2d(3, 6, 11, 4, 2), (4, 4)),
    "as ResNet-50": (lambda: nn.Conv2d(3, 6, 7, 2, 3, bias=False), (1, 1)),
    "as VGG16": (lambda: nn.Conv2d(3, 6, 3, padding=1), (1, 1)),
    "patches": (lambda: nn.Conv2d(3, 6, 8, 8), (8, 8)),
    "oblong": (lambda: nn.Conv2d(3, 6, (5, 4), (3, 5), (1, 2)), (3, 5)),
    "four channels": (lambda: nn.Conv2d(4, 6, 3), None),
    "groups": (lambda: nn.Conv2d(3, 6, 3, groups=3), None),
    "dilated": (lambda: nn.Conv2d(3, 6, 3, dilation=2), None),
    "padded by name": (lambda: nn.Conv2d(3, 6, 3, padding="same"), None),
    "padded otherwise": (lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), None),
    "windows of padding": (lambda: nn.Conv2d(3, 6, 1, padding=2), None),
}


@pytest.mark.parametrize("name", FIRST_LAYERS)
def test_the_first_convolution_gets_its_input_in_blocks(name: str) -> None:
    torch.manual_seed(4)
    make, block = FIRST_LAYERS[name]
    conv = make()
    model = nn.Sequential(conv, nn.ReLU(inplace=True), nn.Conv2d(6, 4, 1)).eval()
    taps, order = Taps(), {"0": slice(0, 6), "2": slice(6, 10)}
    copied = rewritten(model, order, taps, one_pass=True)
    blocks = [module for module in copied.modules() if isinstance(module, Blocked)]
    assert bool(blocks) == (block is not None)
    for size in ((29, 34), (32, 33)):  # strides that leave pixels over, and that do not
        images = torch.randn(2, conv.in_channels, *size)
        want = torch.cat([one.amax((2, 3)) for one in outputs(model, list(order), images).values()], dim=1)
        if blocks:
            assert uk.Blocks.of(conv.in_channels, size, blocks[0].kernel, blocks[0].geometry).block == block
        found = torch.cat(list(keys(copied, list(order), images).values()), dim=1)
        torch.testing.assert_close(uk.unpack(found)[0], want, rtol=1e-5, atol=1e-5)


def test_an_input_that_others_read_keeps_its_layout() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.next = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(7, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.next(torch.cat([self.conv(x), x], dim=1))

    model, images = Shared().eval(), torch.randn(2, 3, 9, 9)
    copied = rewritten(model, {"conv": slice(0, 4), "next": slice(4, 8)}, Taps(), one_pass=True)
    assert not chains(copied, Blocked)
    found = keys(copied, ["conv", "next"], images)["next"]
    torch.testing.assert_close(uk.unpack(found)[0], model(images).amax((2, 3)), rtol=1e-5, atol=1e-5)
