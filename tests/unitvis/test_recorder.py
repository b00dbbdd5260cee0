"""The Recorder, and scan over arrays, against brute force over canonical responses."""

from __future__ import annotations

import math
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unitvis
from support import brute
from unitvis import Recorder, UnitvisError
from unitvis.network.canonical import canonical_settings


def small_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(8, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU6(inplace=True),
        nn.Conv2d(12, 10, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(10 * 4 * 4, 7),
    ).eval()


LAYERS = ["0", "4", "6", "9"]


def images(count: int = 45, size: int = 28, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def scan(model: nn.Module, pixels: object, layers: object = None, k: int = 9, **options: object) -> unitvis.Run:
    return unitvis.scan(model, pixels, layers, k, progress=False, **options)


def arrays(run: unitvis.Run) -> dict[str, bytes]:
    return {
        f"{name}/{key}": getattr(top, key).tobytes()
        for name, top in run.tops.items()
        for key in ("values", "images", "positions", "boxes", "status")
    }


@pytest.mark.parametrize("k", [1, 9, 60])
def test_scan_equals_brute_force(k: int) -> None:
    model, pixels = small_net(), images()
    run = scan(model, pixels, LAYERS, k)
    brute.check(run, brute.responses(model, LAYERS, pixels, brute.canonical_batches(pixels)))
    assert run.layers == LAYERS
    assert (run["0"].boxes[:, : min(k, 45), 2] - run["0"].boxes[:, : min(k, 45), 0] == 5).all()
    assert not run["0"].boxes[:, 45:].any()


def test_neurons_equal_brute_force() -> None:
    model, pixels = small_net(), images(30)
    run = scan(model, pixels, ["6", "9"], 5, unit="neuron")
    assert [len(run[name]) for name in run] == [10 * 4 * 4, 7]
    brute.check(run, brute.responses(model, ["6", "9"], pixels, brute.canonical_batches(pixels), neurons=True))


def test_default_layers_are_convolutions_or_the_batchnorm_behind_them() -> None:
    assert scan(small_net(), images(3)).layers == ["0", "4", "6"]


def test_in_place_activation_does_not_spoil_the_layer_before_it() -> None:
    model, pixels = small_net(), images(20)
    run = scan(model, pixels, ["0", "1"])
    assert run["0"].info["feeds_relu"]
    before = brute.outputs(model, ["0"], next(iter(brute.canonical_batches(pixels)))[1])["0"]
    assert (before < 0).any()
    brute.check(run, brute.responses(model, ["0", "1"], pixels, brute.canonical_batches(pixels)))


def test_how_it_was_scanned_does_not_show() -> None:
    model, pixels = small_net(), images(53)
    want = arrays(scan(model, pixels, LAYERS))
    for batch_size in (1, 7, 16, 100):
        assert arrays(scan(model, pixels, LAYERS, batch_size=batch_size)) == want
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert arrays(scan(model, pixels, LAYERS)) == want
    finally:
        torch.set_num_threads(threads)
    order = np.random.default_rng(0).permutation(53)
    with Recorder(model, LAYERS) as recorder:
        for part in np.array_split(order, 9):
            recorder(pixels[part], part)
    assert arrays(recorder.result()) == want


def test_large_linear_layers_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Flatten(), nn.Linear(32 * 16 * 16, 256)).eval()
    pixels, threads, found = images(20, 18), torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            found.append(arrays(scan(model, pixels, ["0", "2"])))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def test_recorder_counts_ids_up_and_mixes_batch_sizes() -> None:
    model, pixels = small_net(), images(41)
    with Recorder(model, LAYERS) as recorder:
        for part in torch.split(pixels, [3, 1, 30, 7]):
            recorder(part)
    assert arrays(recorder.result()) == arrays(scan(model, pixels, LAYERS))


class Constant(nn.Module):
    """Responses are what the test puts into the images: channel c is the mean of channel c."""

    def __init__(self) -> None:
        super().__init__()
        self.tap = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.tap(x * 1.0)


def planted(values: list[float]) -> Tensor:
    """Images [n, 3, 2, 2] whose three channels all hold the value at row 1, column 0, and less elsewhere."""
    pixels = torch.full((len(values), 3, 2, 2), -math.inf)
    pixels[:, :, 1, 0] = torch.tensor(values)[:, None]
    return pixels


def recorded(pixels: Tensor, k: int, layer: str = "tap") -> unitvis.Run:
    with Recorder(Constant(), [layer], k) as recorder:
        recorder(pixels)
    return recorder.result()


def test_ties_go_to_the_lower_id_and_are_named() -> None:
    run = recorded(planted([1, 5, 5, 0, 5, 2]), 2)
    assert run["tap"].images.tolist() == [[1, 2]] * 3
    assert run["tap"].status.tolist() == ["tied"] * 3
    assert not run["tap"].separated.any()
    assert recorded(planted([1, 5, 5, 0, 5, 2]), 3)["tap"].status.tolist() == ["separated"] * 3
    assert recorded(planted([1, 5, 5, 0, 5, 5]), 6)["tap"].status.tolist() == ["separated"] * 3
    assert recorded(planted([-0.0, 0.0, 0.0]), 2)["tap"].images.tolist() == [[0, 1]] * 3


def test_blanks_stay_blank() -> None:
    top = recorded(planted([3, 4]), 4)["tap"]
    assert top.images.tolist() == [[1, 0, -1, -1]] * 3
    assert np.isnan(top.values[:, 2:]).all()
    assert (top.positions[:, 2:] == -1).all()
    assert (top.positions[:, :2] == [1, 0]).all()


def test_nan_takes_no_place_and_is_counted() -> None:
    pixels = planted([1, 2, 3, 4])
    pixels[2, 1, 0, 0] = math.nan
    pixels[3, 1, 0, 1] = math.nan
    run = recorded(pixels, 3)
    assert run["tap"].images.tolist() == [[3, 2, 1], [1, 0, -1], [3, 2, 1]]
    assert run.manifest["layers"]["tap"]["nan"] == {"responses": 2, "units": 1, "first_image": 2}


def test_infinite_responses_are_counted_with_their_first_image() -> None:
    pixels = planted([1, math.inf, 3, math.inf, -math.inf])
    pixels[1, 0, 1, 0] = 7
    info = recorded(pixels, 2).manifest["layers"]["tap"]["infinite"]
    assert info == {"responses": 5, "units": 3, "first_image": 1}
    assert recorded(planted([-math.inf, 1]), 1).manifest["layers"]["tap"]["infinite"] is None


@pytest.mark.parametrize(("odd", "message"), [(math.nan, "NaN responses in 3 units"), (math.inf, "infinite responses")])
def test_odd_responses_stop_a_scan_that_is_to_stop_at_errors(odd: float, message: str) -> None:
    pixels = planted([1, 2, odd, 4])
    assert scan(Constant(), pixels, "tap", 2).manifest["images"] == 4
    with pytest.raises(UnitvisError, match=f"layer tap: .*{message}.*; first: image 2; on_error='skip'"):
        scan(Constant(), pixels, "tap", 2, on_error="raise")


def test_dead_units_and_what_did_not_fire() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU()).eval()
    model[0].weight.data[:] = torch.tensor([1.0, 1.0, -1.0])[:, None, None, None]
    model[0].bias.data[:] = torch.tensor([0.0, -100.0, 0.0])
    run = scan(model, torch.tensor([-2.0, 3.0, 1.0])[:, None, None, None].expand(3, 1, 4, 4), k=3)
    assert run["0"].dead.tolist() == [False, True, False]
    assert run["0"].fired.tolist() == [[True, True, False], [False] * 3, [True, False, False]]


def test_saturating_layer_is_named_with_the_one_to_use() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 2, 1)).eval()
    model[1].weight.data.fill_(40)
    with pytest.warns(UserWarning, match=r"layer '2' saturates: in 100% .* \(up to 6\); rank .* layer '1'"):
        run = scan(model, images(30, 12), "2")
    assert (run["2"].status == "tied").all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scan(model, images(30, 12))


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.never = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.Conv2d(5, 5, 3)
        self.second_runs = 0

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.first(x))
        self.second_runs += 1
        return self.second(x)


def test_forward_stops_after_the_last_tapped_layer() -> None:
    model = Counting().eval()
    scan(model, iter([images(20, 9)]), "first")
    assert model.second_runs <= 3  # the examination, the receptive fields; never in the scan
    runs = model.second_runs
    with Recorder(model, "second") as recorder:
        recorder(images(48, 9))
    assert model.second_runs > runs + 3


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.other = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.conv(self.conv(x)))


def test_layers_are_chosen_by_name_or_pattern() -> None:
    model, pixels = small_net(), images(2)
    assert scan(model, pixels, ["6", "[04]"]).layers == ["0", "4", "6"]
    with pytest.raises(UnitvisError, match="no layer is named '10'; the closest are"):
        scan(model, pixels, ["10"])
    with pytest.raises(UnitvisError, match="no layer is named 'conv9'; there are 0, 1, 2"):
        scan(model, pixels, "conv9")
    with pytest.raises(UnitvisError, match="no layer was named"):
        scan(model, pixels, [])
    with pytest.raises(UnitvisError, match="layer 'never' never ran"):
        scan(Counting(), pixels, "never")
    with pytest.raises(UnitvisError, match="layer 'conv' runs 2 times"):
        scan(Twice(), pixels, "conv")
    with pytest.warns(UserWarning, match="left out.* conv"):
        assert scan(Twice(), pixels).layers == ["other"]
    with pytest.raises(UnitvisError, match="no convolution that runs once; name layers"):
        scan(nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 2)), pixels)


class Raising(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 100:
            raise RuntimeError("too wide for me\nand more lines")
        return self.conv(x)


class Stochastic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x + float(np.random.default_rng().random()))


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x - float(x[0].mean()))


@pytest.mark.parametrize(
    ("model", "pixels", "options", "message"),
    [
        (Raising(), images(2, 120), {}, "the model raised RuntimeError on a batch of shape .*: too wide for me$"),
        (Stochastic(), images(20), {}, "other responses when the same images come in another order"),
        (Mixing(), images(20), {}, "other responses when the same images come in another order"),
        (small_net(), torch.randn(2, 3, 28), {}, r"\[2, 3, 28\]"),
        (small_net(), torch.randn(2, 4, 28, 28), {}, "raised RuntimeError on a batch of shape"),
        (small_net(), torch.zeros(2, 3, 28, 28, dtype=torch.int64), {}, "int64"),
        (small_net(), images(2), {"k": 0}, "k must be a whole number of at least 1, not 0"),
        (small_net(), images(2), {"unit": "filter"}, "'channel' or 'neuron', not 'filter'"),
        (small_net(), images(2), {"precision": "fp8"}, "exact, fp32, fp16, bf16, not 'fp8'"),
        (small_net(), images(2), {"batch_size": 0}, "batch_size must be at least 1, not 0"),
        (lambda x: x, images(2), {}, "must be a torch.nn.Module, not function"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_refusals(model: nn.Module, pixels: Tensor, options: dict[str, object], message: str) -> None:
    layers = options.pop("layers", None)
    with pytest.raises(UnitvisError, match=message):
        scan(model, pixels, layers, **options)


def test_recorder_refuses_what_is_no_batch() -> None:
    with Recorder(small_net()) as recorder:
        recorder(images(2))
        with pytest.raises(UnitvisError, match="2 images came with ids of shape"):
            recorder(images(2), [1, 2, 3])
        with pytest.raises(UnitvisError, match="came with the id -1; ids are whole numbers from 0"):
            recorder(images(2), [3, -1])
        with pytest.raises(UnitvisError, match="ndarray"):
            recorder(np.zeros((2, 3, 28, 28)))
    with pytest.raises(UnitvisError, match="inside its block"):
        Recorder(small_net())(images(2))
    with pytest.raises(UnitvisError, match="no image was recorded"), Recorder(small_net()) as recorder:
        recorder.result()


def test_images_of_another_size_are_refused() -> None:
    with Recorder(small_net(), ["0"]) as recorder:
        for count in (5, 16):
            recorder(images(count, 28))
            with pytest.raises(UnitvisError, match=r"\[3, 30, 28\].*\[3, 28, 28\]"):
                recorder(torch.zeros(16, 3, 30, 28))


def test_neurons_that_do_not_fit_are_refused_with_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unitvis.network.device.free_memory", lambda device: 2.0**30)
    with pytest.raises(UnitvisError, match=r"the state of 1,048,576 units needs 1.2 GiB, and 1.0 GiB are free"):
        scan(nn.Sequential(nn.Conv2d(1, 16, 1)), torch.zeros(1, 1, 256, 256), unit="neuron")


def test_model_and_settings_are_left_as_they_were() -> None:
    model = small_net().train()
    model[4].eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    before = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled()
    scan(model, images(5))
    with pytest.raises(UnitvisError):
        scan(model, torch.zeros(2, 3, 2, 2))
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert (
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(),
    ) == before


def precisions() -> dict[str, object]:
    """Both of PyTorch's ways of saying how float32 is computed; the older one raises where they disagree."""
    backends = torch.backends
    return {
        "products": torch.get_float32_matmul_precision(),
        "older": [backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32],
        "newer": [b.fp32_precision for b in (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul)],
    }


@pytest.mark.parametrize("products", ["highest", "high", "medium"])
def test_how_float32_is_computed_is_said_once_and_taken_back(products: str) -> None:
    start = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(products)
    try:
        before = precisions()
        with canonical_settings(torch.device("cpu")):
            assert precisions() == {"products": "highest", "older": [False, False], "newer": ["ieee"] * 3}
        assert precisions() == before
    finally:
        torch.set_float32_matmul_precision(start)


def test_a_half_precision_model_is_scanned_in_float32_and_stays_half() -> None:
    model, pixels = small_net().half(), images(20)
    run = scan(model, pixels, LAYERS)
    assert next(model.parameters()).dtype == torch.float16
    assert arrays(run) == arrays(scan(small_net().half().float(), pixels, LAYERS))


def test_autocast_and_inference_mode_around_a_scan_change_nothing() -> None:
    model, pixels = small_net(), images(20)
    want = arrays(scan(model, pixels, LAYERS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert arrays(scan(model, pixels, LAYERS)) == want
    with torch.no_grad():
        assert arrays(scan(model, pixels, LAYERS)) == want
    with torch.inference_mode():
        assert arrays(scan(model, pixels.clone(), LAYERS)) == want


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loop_in_inference_mode_changes_nothing(precision: str) -> None:
    model, pixels = small_net(), images(40)
    results = []
    for inference in (False, True):
        with Recorder(model, LAYERS, precision=precision) as recorder:
            for part in pixels.split(12):
                with torch.inference_mode(inference):
                    recorder(part.clone())
        with torch.inference_mode(inference):
            results.append(arrays(recorder.result(pixels)))
    assert results[0] == results[1]


def test_tokens_and_channels_last_layers_are_taken_as_such() -> None:
    torch.manual_seed(0)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.mix = nn.Conv2d(3, 6, 4, 4), nn.LayerNorm(6), nn.Linear(6, 9)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(self.norm(self.embed(x).flatten(2).transpose(1, 2)))

    model, pixels = Tokens().eval(), images(10, 16)
    run = scan(model, pixels, ["norm", "mix"], 3)
    assert (run["mix"].info["channels"], run["mix"].info["height"], run["mix"].info["width"]) == (9, 1, 16)
    out = brute.outputs(model, ["mix"], next(iter(brute.canonical_batches(pixels)))[1])["mix"][:10].numpy()
    assert (run["mix"].images[:, 0] == out.max(axis=1).argmax(axis=0)).all()
    assert (run["mix"].positions[:, 0, 1] == out[run["mix"].images[:, 0], :, np.arange(9)].argmax(axis=1)).all()


def test_a_layer_with_its_channels_last_is_refused_where_its_kind_does_not_tell() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.grow, self.act = nn.Conv2d(3, 6, 3), nn.Linear(6, 24), nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.grow(self.conv(x).permute(0, 2, 3, 1)))

    model, pixels = Block().eval(), images(5, 12)
    with pytest.raises(UnitvisError, match=r"layer 'act' puts its channels last, .*\[N, 10, 10, 24\]"):
        scan(model, pixels, "act")
    run = scan(model, pixels, "grow")
    assert (run["grow"].info["channels"], run["grow"].info["height"]) == (24, 10)


def test_ids_are_kept_as_they_came_and_are_one_an_image() -> None:
    model, pixels = small_net(), images(40)
    want = arrays(scan(model, pixels, LAYERS))
    buffer = torch.empty(7, dtype=torch.int64)
    with Recorder(model, LAYERS) as recorder:
        for start in range(0, 40, 7):
            part = pixels[start : start + 7]
            buffer[: len(part)] = torch.arange(start, start + len(part))
            recorder(part, buffer[: len(part)])
    assert arrays(recorder.result()) == want
    with Recorder(model, LAYERS) as recorder:
        recorder(pixels, torch.arange(40) % 4)  # labels
    with pytest.raises(UnitvisError, match="40 images were recorded under 4 known ids; give each image one"):
        recorder.result()
    for ids, said in ((torch.rand(40), "not float32"), ([True] * 40, "not bool"), (["a"] * 40, "from 0")):
        with Recorder(model, LAYERS) as recorder, pytest.raises(UnitvisError, match=f"ids are whole numbers.*{said}"):
            recorder(pixels, ids)


def test_a_loop_may_train_the_model_meanwhile() -> None:
    model, pixels = small_net(), images(40)
    want = arrays(scan(model, pixels, LAYERS))
    mean = model[4].running_mean.clone()
    with Recorder(model, LAYERS) as recorder:
        for part in pixels.split(13):
            model.train()
            recorder(part)
            assert all(module.training for module in model.modules())
    assert arrays(recorder.result()) == want
    assert torch.equal(model[4].running_mean, mean)


def test_scans_in_threads_leave_the_settings_as_they_were() -> None:
    def settings() -> tuple[object, ...]:
        return precisions(), torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic

    before = settings()
    computing, enough = threading.Event(), threading.Event()

    def compute() -> None:
        with canonical_settings(torch.device("cpu")):
            computing.set()
            assert enough.wait(300)  # seconds: a test that hangs ends

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(compute)
        assert computing.wait(300)
        with canonical_settings(torch.device("cpu")):
            both = settings()
            enough.set()
            other.result()
            assert settings() == both != before  # the first to begin is not the last to end
    assert settings() == before


@pytest.mark.parametrize("default", ["float64", "meta"])
def test_defaults_of_the_process_change_nothing(default: str) -> None:
    model, pixels = small_net(), images(20)
    want = arrays(scan(model, pixels, LAYERS))
    if default == "float64":
        torch.set_default_dtype(torch.float64)
    else:
        torch.set_default_device("meta")
    try:
        found = arrays(scan(model, pixels, LAYERS))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert found == want


def test_a_model_may_overwrite_its_input_and_be_compiled() -> None:
    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.mul_(2))

    pixels = images(20)
    want = arrays(scan(small_net(), pixels * 2, LAYERS))
    layers = [f"net.{layer}" for layer in LAYERS]
    assert list(arrays(scan(Doubles(), pixels, layers)).values()) == list(want.values())
    assert arrays(scan(torch.compile(small_net(), backend="eager"), pixels * 2, LAYERS)) == want
    inside = small_net()
    inside.compile(backend="eager")
    found = arrays(scan(inside, pixels * 2, LAYERS))
    assert all(found[name] == want[name] for name in want if not name.endswith("boxes"))  # probed, so not beyond edges


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


def test_a_device_that_nothing_runs_on_is_refused() -> None:
    with pytest.raises(UnitvisError, match="a model on device 'meta' cannot be scanned"):
        scan(small_net(), images(5), device="meta")
