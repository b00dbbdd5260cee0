"""What half precision hides: it is scanned in a wider precision, and no unit is called decided that is not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Self

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unitvis
from support.brute import wrong
from support.scans import by_half, pictures, tiny_net
from unitvis.half_precision.suitability import nearly_flat, suitable_precision, unsuitable_layers
from unitvis.network.network import Network
from unitvis.ranking.recorder import Recorder
from unitvis.reranking import rerank
from unitvis.results.arrays import UNSEPARATED
from unitvis.state.sampling import sample

COUNT = 600
OUTSIDE = np.setdiff1d(np.arange(COUNT), sample(np.array([[0, COUNT]])))[::40]  # nine images that no sample has


class Between(nn.Module):
    """Eight mixtures of the colours of each pixel, something made of them, and a convolution over that."""

    def __init__(self, between: Callable[[Tensor], Tensor], scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 1)
        self.first.weight.data = scale * F.normalize(torch.randn(8, 3, 1, 1), dim=1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))

    def fit(self, images: Tensor) -> Self:
        """Make the last units like these images best: each weight is what one of them gives in the last row."""
        with torch.no_grad():
            features = self.between(self.first(images[:8]))[:, :, -1, -1]
        self.last.weight.data = F.normalize(features, dim=1)[:, :, None, None]
        return self.eval()


def layer_norm(x: Tensor) -> Tensor:
    x = x - x.mean(1, keepdim=True)
    return x / (x.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()


def skewness(x: Tensor) -> Tensor:
    v = x.pow(2).mean((2, 3), keepdim=True)
    return x.pow(3).mean((2, 3), keepdim=True) / v / v.sqrt()


def gate(x: Tensor) -> Tensor:
    return x * (x.mean((1, 2, 3), keepdim=True) > 0.5).to(x.dtype)


def clauses(model: nn.Module, images: Tensor, precision: str = "fp16") -> dict[str, str]:
    """What `unsuitable_layers` finds in the model's convolutions."""
    return unsuitable_layers(examined(model, images), images[:16], precision)


def examined(model: nn.Module, images: Tensor) -> Network:
    network = Network(model.eval())
    network.examine((images.shape[1], images.shape[2], images.shape[3]))
    return network


def even(count: int = COUNT) -> Tensor:
    """Pictures of one contrast."""
    images = pictures(count, 12)
    return images / images.std((1, 2, 3), keepdim=True)


def loud_ones() -> tuple[nn.Module, Tensor]:
    """The squares of nine images overflow, of which the first convolution shows nothing and the second 0."""
    images = even()
    images[OUTSIDE] = 12 * F.normalize(torch.randn(len(OUTSIDE), 3, 1, 1), dim=1)
    return Between(layer_norm, 40).fit(images[OUTSIDE]), images


def faint_ones() -> tuple[nn.Module, Tensor]:
    """The cubes of nine images vanish before they are divided by their squares."""
    images = even()
    images[OUTSIDE] = 0
    images[OUTSIDE, :, 4:7, 4:7] = 0.12 * F.normalize(torch.randn(len(OUTSIDE), 3, 1, 1), dim=1)
    return Between(skewness, 0.02).fit(images[OUTSIDE]), images


def close_ones() -> tuple[nn.Module, Tensor]:
    """The means of nine images lie just above a threshold, and in half precision on it."""
    images = even()
    images = images - images.mean((2, 3), keepdim=True) + 2
    model = Between(gate)
    model.first.weight.data = torch.eye(8, 3)[:, :, None, None]
    images[OUTSIDE] = 0
    images[OUTSIDE, :, -1, -1] = 144 * 8 * 0.5 * (1 + 1e-5) / 3
    return model.fit(images[OUTSIDE]), images


@pytest.mark.parametrize(
    ("case", "precision", "reason"),
    [
        (loud_ones, "bf16", r"before layer 'last' is read, numbers reach .*; float16 ends at 6\.55e\+04"),
        (faint_ones, "bf16", "layer 'last' depends on numbers below 0.00098"),
        (close_ones, "fp32", "before layer 'last' is read, aten._to_copy.default makes a step"),
    ],
)
def test_rare_images_that_half_precision_gets_wrong(
    case: Callable[[], tuple[nn.Module, Tensor]], precision: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rerank, "MAX_RECOMPUTED_SHARE", math.inf)  # nothing but the bound decides
    torch.manual_seed(0)
    model, images = case()
    with pytest.warns(UserWarning, match=reason):
        run = by_half(model, images, k=5)
    assert run.manifest["scan"]["precision"] == precision
    assert wrong(run, model, images) == 0
    assert not np.isin(OUTSIDE, sample(np.array([[0, COUNT]]))).any()  # or a sample would have shown them
    assert np.isin(run["last"].images[:, 0], OUTSIDE).sum() >= 4  # of 8 units like one of them best


def test_what_the_first_batch_does_not_show_the_sample_does() -> None:
    model, images = loud_ones()
    images[:64] /= 100
    with Recorder(model, k=5, precision="fp16") as recorder:
        for start in range(0, COUNT, 64):
            recorder(images[start : start + 64])
    with pytest.warns(
        UserWarning, match="float16 ends at .* all images are computed again in float32 up to layer 'last'"
    ):
        run = recorder.result(images)
    assert run.manifest["scan"]["precision"] == "fp16"
    assert (run["last"].status != UNSEPARATED).all()
    assert wrong(run, model, images) == 0


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(3), nn.LayerNorm([3, 12, 12])])
def test_rare_images_of_almost_one_colour(norm: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rerank, "MAX_RECOMPUTED_SHARE", math.inf)  # nothing but the bound decides
    torch.manual_seed(0)
    images = 128 + 40 * F.interpolate(torch.randn(COUNT, 3, 3, 3), size=(12, 12)) + 15 * torch.randn(COUNT, 3, 12, 12)
    images[OUTSIDE] = 128
    images[OUTSIDE, :, 4, 6] += 0.05  # less than the spacing of float16 there
    model = nn.Sequential(norm, nn.Conv2d(3, 6, 3, padding=1)).eval()
    with pytest.warns(UserWarning, match="layer '1' errs by .* in float16 where an image is nearly of one colour, and"):
        run = by_half(model, images, k=5)
    assert run.manifest["scan"]["precision"] == "fp32"
    assert wrong(run, model, images) == 0
    assert np.isin(run["1"].images[:, 0], OUTSIDE).any()


@pytest.mark.parametrize(("precision", "seed"), [("fp16", 1), ("fp16", 2), ("bf16", 0)])
def test_rare_bright_images_beside_a_channel_that_is_always_larger(
    precision: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As depth in metres lies beside RGB: the layer reads each channel alone, and the fourth tells nothing."""
    monkeypatch.setattr(rerank, "MAX_RECOMPUTED_SHARE", math.inf)  # nothing but the bound decides
    fine, faint = (2.0**-10, 4e-4) if precision == "fp16" else (2.0**-7, 3e-3)  # spacing of numbers near 1
    count, g = 1500, torch.Generator().manual_seed(seed)

    def texture(of: int, strength: Tensor) -> Tensor:
        return strength * faint * (2 * torch.rand(of, 3, 16, 16, generator=g) - 1)

    colours = 0.03 * torch.rand(count, 3, 1, 1, generator=g) + texture(
        count, 0.4 + 0.6 * torch.rand(count, 1, 1, 1, generator=g)
    )
    outside = np.setdiff1d(np.arange(count), sample(np.array([[0, count]])))
    rare = torch.from_numpy(outside[64:])[torch.randperm(len(outside) - 64, generator=g)[:12]]
    bright = (1.1 + 0.8 * torch.rand(12, 3, 1, 1, generator=g)) / fine
    colours[rare] = bright.round() * fine + texture(12, 0.95 + 0.05 * torch.rand(12, 1, 1, 1, generator=g))
    depth = (3 * (0.8 + 0.2 * torch.rand(count, 1, 1, 1, generator=g))).expand(-1, -1, 16, 16)
    images = torch.cat([colours, depth], dim=1)
    torch.manual_seed(seed)
    first = nn.Conv2d(4, 8, 3, padding=1, padding_mode="replicate", bias=False, groups=4)
    first.weight.data -= first.weight.data.mean((2, 3), keepdim=True)
    model = nn.Sequential(first, nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()
    run = by_half(model, images, precision)
    assert run.manifest["scan"]["precision"] == precision
    assert (run["0"].status[:6] != UNSEPARATED).any()
    assert wrong(run, model, images) == 0
    assert np.isin(run["0"].images[:6], rare.numpy()).any()


@pytest.mark.parametrize("black", [True, False])
def test_a_black_image_in_the_sample_opens_no_unit(black: bool) -> None:
    """It gives the bias of a unit that rare images open by about a rounding error, and half precision does not."""
    count, seed = 900, 9884
    sampled = set(sample(np.array([[0, count]])).tolist())
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    brightness = 0.35 + 0.3 * torch.rand(count, 1, 1, 1, generator=g)
    images = (brightness + 0.12 * torch.randn(count, 3, 8, 8, generator=g)).clamp(0, 1)
    first = nn.Conv2d(3, 8, 3, padding=1, padding_mode="replicate")
    model = nn.Sequential(first, nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()
    weight = torch.randn(3, 3, 3, generator=g)
    weight = weight / weight.abs().mean() * 20
    weight -= weight.abs().mean() * 0.5
    patch = 0.5 + 0.42 * weight.sign()
    rounding = 2.0**-12 * float((weight * patch).norm())
    if (weight * patch).sum() < 0:
        below = weight < 0
        patch[below] *= float((weight * patch)[~below].sum() / -(weight * patch)[below].sum())
    first.weight.data[:7] *= 0.3
    first.weight.data[7], first.bias.data[7] = weight, 0.002 * rounding
    others = torch.tensor([id for id in range(64, count) if id not in sampled])
    rare = others[torch.randperm(len(others), generator=g)[:3]].tolist()
    if black:
        images[min(id for id in sampled if id >= 64)] = 0
    half = copy.deepcopy(first).half()
    with torch.no_grad():
        for id, opening in zip(rare, (0.8, 1.3, 1.8), strict=True):
            for _ in range(60):  # until half precision closes it
                images[id] = (0.4 + 0.1 * torch.randn(3, 8, 8, generator=g)).clamp(0, 1)
                own = images[id, :, 2:5, 2:5]
                own[:] = (patch + 0.02 * torch.randn(3, 3, 3, generator=g)).clamp(0, 1)
                for _ in range(6):
                    missing = opening * rounding - float(first(images[id : id + 1])[0, 7, 3, 3])
                    own += missing * weight / (weight * weight).sum()
                if half(images[id : id + 1].half())[0, 7].amax() < -0.2 * rounding:
                    break
            else:
                raise AssertionError("no image was found")
    model[2].weight.data[:, 7] = 12 / rounding * torch.tensor([1.0, -1.0]).repeat(4)[:, None, None]
    with Recorder(model, k=1, precision="fp16", batch_size=100) as recorder:
        for batch in images.split(100):
            recorder(batch)
    run = recorder.result(images)
    assert run.manifest["scan"]["precision"] == "fp16"
    assert (run["2"].status != UNSEPARATED).any()
    assert wrong(run, model, images) == 0


class Threshold(nn.Module):
    """Rare images alone exceed a threshold, by less than a rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.threshold = nn.Parameter(torch.zeros(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x) - self.threshold))


@pytest.mark.parametrize(("precision", "fine"), [("bf16", 1.0), ("fp16", 1 / 8)])
def test_units_that_the_sample_never_opens_are_not_decided_by_it(
    precision: str, fine: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rerank, "MAX_RECOMPUTED_SHARE", math.inf)  # nothing but the bound decides
    torch.manual_seed(0)
    count = 1500
    outside = np.setdiff1d(np.arange(count), sample(np.array([[0, count]])))[::10]
    images, model = 0.5 * torch.randn(count, 3, 12, 12), Threshold().eval()
    images[outside] = 2 * torch.randn(1, 3, 12, 12) + 0.02 * fine * torch.randn(len(outside), 3, 12, 12)
    images *= 16  # far from the smallest numbers of float16
    with torch.no_grad():
        model.threshold.copy_((model.first(images[outside]).amax((0, 2, 3)) - 0.16 * fine)[:, None, None])
    run = by_half(model, images, precision)
    assert run.manifest["scan"]["precision"] == precision
    assert wrong(run, model, images) == 0
    assert (run["last"].status == UNSEPARATED).any()


def test_images_of_almost_one_grey_are_like_those_of_the_data_set() -> None:
    for images in (torch.randint(3, 250, (5, 9, 7, 3), dtype=torch.uint8), torch.randn(2, 11, 8, 6)):
        flat = nearly_flat(images)
        assert (flat.dtype, flat.shape) == (images.dtype, (16, *images.shape[1:]))
        extent = float(images.float().max() - images.float().min())
        within = (flat.float().amax((1, 2, 3)) - flat.float().amin((1, 2, 3))) / extent
        assert bool((within > 0).all() and (within < 0.02).all())


def test_the_room_that_is_kept() -> None:
    model, images = nn.Sequential(nn.Conv2d(3, 1, 1, bias=False)), torch.ones(16, 3, 2, 2)
    for largest, fits in ((65504 / 16, True), (65504 / 16 + 1, False)):
        model[0].weight.data = torch.full((1, 3, 1, 1), largest / 3)
        assert (clauses(model, images) == {}) == fits
        assert clauses(model, images, "bf16") == {}
    model[0].weight.data *= 1e34
    assert "bfloat16 ends at 3.39e+38" in clauses(model, images, "bf16")["0"]
    network = examined(model, images)
    assert suitable_precision(network, images, "fp16")[0] == "fp32"
    images[3, 1, 1, 1] = math.nan  # what is not finite in float32 is no overflow
    images[4, 1, 1, 1] = math.inf
    model[0].weight.data = torch.ones(1, 3, 1, 1)
    assert clauses(model, images) == {}


class Sums(nn.Module):
    """Large on the way, small in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.tap = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x - 40000 - 30000 + 60000 + 50000
        return self.tap(F.relu(x - 40000))


def test_operations_without_a_trace_in_the_layers() -> None:
    images = pictures(16, 8)
    assert "numbers reach 7e+04" in clauses(Sums(), images)["tap"]
    attention = nn.TransformerEncoderLayer(8, 1, 8, batch_first=True).eval()
    attention.self_attn.in_proj_weight.data *= 200  # products of queries and keys are large, and a softmax follows them
    model = Between(lambda x: attention(x.flatten(2).mT).mT[..., None])
    assert "numbers reach" in clauses(model, images)["last"]
    attention.self_attn.in_proj_weight.data /= 200
    assert clauses(model, images) == {}


@pytest.mark.parametrize(
    ("steep", "harmless"),
    [
        (lambda x: F.hardtanh(1000 * x, 0, 1), lambda x: F.hardtanh(1000 * x, 0, 100)),
        (lambda x: F.hardtanh_(1000 * x), lambda x: F.hardtanh_(40 * x)),
        (lambda x: (1000 * x).clamp_(0, 1), lambda x: (40 * x).clamp_(0, 1)),
        (lambda x: (1000 * x).clamp(min=0).clamp(max=1), lambda x: (40 * x).clamp(min=0).clamp(max=1000)),
        (lambda x: torch.minimum(F.relu(1000 * x), torch.ones(1)), lambda x: torch.minimum(F.relu(x), torch.ones(1))),
        (lambda x: F.relu6(-1500 * x), lambda x: F.relu6(-90 * x)),
        (lambda x: F.hardsigmoid(-1500 * x), lambda x: F.hardsigmoid(-90 * x)),
        (lambda x: x * torch.sigmoid(1000 * x), lambda x: x * torch.sigmoid(40 * x)),
        (lambda x: torch.tanh(1000 * x), lambda x: torch.tanh(40 * x)),
        (
            lambda x: F.relu(1000 * x).clamp(max=1),
            lambda x: (x - 30).clamp(min=0) + torch.maximum(x, torch.ones(1)),
        ),
        (lambda x: torch.softmax(-1000 * x, 1), lambda x: torch.softmax(torch.cat([x, x - 1000], 1), 1)[:, :8]),
    ],
)
def test_functions_whose_slope_a_rounding_error_crosses(
    steep: Callable[[Tensor], Tensor], harmless: Callable[[Tensor], Tensor]
) -> None:
    images = pictures(16, 8)
    reason = clauses(Between(steep), images)["last"]
    assert "goes from one bound to the other within 1/" in reason
    assert clauses(Between(harmless), images) == {}


@torch.library.custom_op("unitvis_test::steps", mutates_args=())
def steps(x: Tensor) -> Tensor:
    """An operator of which PyTorch knows nothing."""
    return x.floor()


@pytest.mark.parametrize(
    ("between", "step"),
    [
        (lambda x: x * (x > 0.1), "aten.mul.Tensor"),
        (lambda x: torch.where(x > 0.1, x, -x), "aten.where.self"),
        (lambda x: x.round(), "aten.round.default"),
        (lambda x: torch.div(x, 0.1, rounding_mode="floor"), "aten.div.Tensor_mode"),
        (lambda x: F.threshold(x, 0.1, 0.0), "aten.threshold.default"),
        (lambda x: x.gather(1, x.argsort(1)), "aten.gather.default"),
        (lambda x: -x if x.sum() > 0.1 else x, "aten._local_scalar_dense.default"),
        (lambda x: torch.nan_to_num(x), "aten.nan_to_num.default"),
        (lambda x: x.clone().masked_fill_(x > 0.1, 0), "aten.masked_fill_.Scalar"),
        (lambda x: x.clone().floor_(), "aten.floor_.default"),
        (lambda x: x * x.clone().lt_(0.1), "aten.lt_.Scalar"),
        (lambda x: x * torch.lt(x, 0.1, out=torch.empty_like(x)), "aten.lt.Scalar_out"),
        (lambda x: torch.copysign(x, x - 0.1), "aten.copysign.Tensor"),
        (lambda x: torch.atan2(x, x - 0.1), "aten.atan2.default"),
        (lambda x: x.to(torch.float8_e5m2).float(), "aten._to_copy.default"),
        (lambda x: x.view(torch.int32).bitwise_and(-65536).view(torch.float32), "aten.view.dtype"),
        (lambda x: x * float(x.mean().numpy()), "numpy()"),
        (lambda x: x * x.mean((1, 2, 3)).tolist()[0], "tolist()"),
        (lambda x: torch.ops.unitvis_test.steps(x), "unitvis_test.steps.default"),
        (lambda x: x * F.relu(x).norm(p=0, dim=1, keepdim=True), "aten.linalg_vector_norm.default"),
        (lambda x: x * torch.linalg.vector_norm(x, 0, dim=1, keepdim=True), "aten.linalg_vector_norm.default"),
        (lambda x: x * torch.pow(0.0, F.relu(x)), "aten.pow.Scalar"),
        (lambda x: F.relu(x).pow(0.02), "aten.pow.Tensor_Scalar"),
        (lambda x: F.relu(x).pow(torch.full((1,), 0.02)), "aten.pow.Tensor_Tensor"),
        (lambda x: F.relu(x).pow(1 / 3) + x.norm(dim=1, keepdim=True) + F.normalize(x), None),
        (lambda x: F.threshold(x, 0.1, 0.1), None),
        (lambda x: x.sort(1).values + F.max_pool2d(x, 3, 1, 1) + x.max(1, keepdim=True).values, None),
        (lambda x: x * (torch.arange(x.shape[-1]) > 2.0) + F.gelu(x).clamp(-1, 1), None),
    ],
)  # fmt: skip
def test_steps(between: Callable[[Tensor], Tensor], step: str | None) -> None:
    found = clauses(Between(between), pictures(16, 8))
    assert "first" not in found  # it is read before
    assert found == (
        {}
        if step is None
        else {"last": f"before layer 'last' is read, {step} makes a step, which a rounding error can take"}
    )


def test_a_model_that_half_precision_cannot_compute_is_scanned_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unitvis.scanning.precision.speed", lambda device, precision: 6.0)
    monkeypatch.setattr("unitvis.scanning.precision.OBSERVING_PASSES", 0)  # or few images would be scanned in float32
    single = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    model, images = Between(lambda x: torch.einsum("nchw,cd->ndhw", x, single)).eval(), pictures(900, 8)
    run = unitvis.scan(model, images, k=2, progress=False)
    assert run.manifest["scan"]["precision"] == "fp32"
    assert run.manifest["plan"].startswith("float32: it does not compute in float16 (the model raised RuntimeError")
    assert wrong(run, model, images) == 0
    model = tiny_net()
    model[4].running_var[0] = 1e6  # its square root alone would do
    network = examined(model, pictures(16))
    assert suitable_precision(network, pictures(16), "fp16") == (
        "bf16",
        "'4.running_var' holds 1e+06, and float16 ends at 6.55e+04",
    )


def test_a_copy_in_half_precision_that_does_not_fit_into_memory_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def halves(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("unitvis.half_precision.suitability._half_values", halves)
    with Recorder(tiny_net(), precision="fp16") as recorder:
        reason = recorder.settle_precision(pictures(16))
    assert (recorder.precision, reason) == ("fp32", "a copy of the model in float16 does not fit into memory beside it")


def test_a_scan_asked_for_in_half_precision_is_resumed(tmp_path: Path) -> None:
    model, images = tiny_net(), pictures(60) * 1e6
    with pytest.warns(UserWarning, match="scanned in bfloat16"):
        first = unitvis.scan(model, images, precision="fp16", out=tmp_path / "run", progress=False)
    again = unitvis.scan(model, images, precision="fp16", out=tmp_path / "run", resume=True, progress=False)
    assert again.manifest["scan"]["precision"] == first.manifest["scan"]["precision"] == "bf16"
    with pytest.raises(unitvis.UnitvisError, match="precision is bf16 and fp32"):
        unitvis.scan(model, images, precision="fp32", out=tmp_path / "run", resume=True, progress=False)
