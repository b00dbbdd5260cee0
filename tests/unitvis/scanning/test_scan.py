"""A scan in float32 against brute force, whatever its batch size, threads, order and surroundings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from support import brute
from support.scans import LAYERS, arrays, images, scan, small_net
from unitvis import Recorder, UnitvisError


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
        (small_net(), images(2), {"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
        (lambda x: x, images(2), {}, "must be a torch.nn.Module, not function"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_refusals(model: nn.Module, pixels: Tensor, options: dict[str, object], message: str) -> None:
    layers = options.pop("layers", None)
    with pytest.raises(UnitvisError, match=message):
        scan(model, pixels, layers, **options)


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
    assert arrays(scan(inside, pixels * 2, LAYERS)) == want
