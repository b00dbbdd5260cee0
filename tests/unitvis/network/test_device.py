"""Where a network can be scanned: a device that computes, with memory for the state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from support.scans import images, scan, small_net
from unitvis import UnitvisError


def test_neurons_that_do_not_fit_are_refused_with_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unitvis.network.device.free_memory", lambda device: 2.0**30)
    with pytest.raises(UnitvisError, match=r"the state of 1,048,576 units needs 1.4 GiB, and 1.0 GiB are free"):
        scan(nn.Sequential(nn.Conv2d(1, 16, 1)), torch.zeros(1, 1, 256, 256), unit="neuron")


def test_a_device_that_nothing_runs_on_is_refused() -> None:
    with pytest.raises(UnitvisError, match="a model on device 'meta' cannot be scanned"):
        scan(small_net(), images(5), device="meta")


def test_a_model_that_does_not_fit_on_its_device_is_refused_in_a_line() -> None:
    class Huge(nn.Conv2d):
        def _apply(self, *args: object, **options: object) -> nn.Module:
            if self.weight.dtype == torch.float64:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90.00 GiB.\nmore")
            return super()._apply(*args, **options)

    model = nn.Sequential(Huge(3, 4, 3))
    model.double()
    said = r"^the model in float32 does not fit into memory \(CUDA out of memory. Tried to allocate 90.00 GiB.\); free"
    with pytest.raises(UnitvisError, match=said):
        scan(model, images(5))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")  # of torch.compile's own imports
@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda m: nn.DataParallel(torch.compile(m))])
def test_layers_have_their_own_names_inside_wrappers(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = small_net()
    run, want = scan(wrap(model), images(20)), scan(model, images(20))
    assert run.layers == want.layers
    assert all(run[name].values.tobytes() == want[name].values.tobytes() for name in run)


@pytest.mark.parametrize("form", ["script", "trace", "export"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_models_without_layers_to_read_are_refused_in_one_line(form: str) -> None:
    model, example = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.zeros(1, 3, 9, 9)
    made = {
        "script": lambda: torch.jit.script(model),
        "trace": lambda: torch.jit.trace(model, example),
        "export": lambda: torch.export.export(model, (example,)),
    }[form]()
    with pytest.raises(UnitvisError, match="keeps no layers that can be read; give the eager module") as refused:
        scan(made, images(5))
    assert "\n" not in str(refused.value)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this PyTorch has no distributed package")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_weights_spread_over_processes_are_refused_and_those_of_ddp_are_not(process_group: None) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    whole = scan(nn.parallel.DistributedDataParallel(model), images(5))
    assert whole.layers == ["0"]
    for shard in (fully_shard, lambda m: FullyShardedDataParallel(m, device_id=torch.device("cpu"))):
        sharded = shard(copy.deepcopy(model))
        with pytest.raises(UnitvisError, match=r"spread over processes \(FSDP\); give a whole one"):
            scan(sharded, images(5))


class PartlyHalf(nn.Module):
    """A layer in half precision between casts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3).half()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).half()).float()


def test_a_model_of_mixed_types_that_casts_is_refused_with_the_reason() -> None:
    with pytest.raises(
        UnitvisError, match=r"the model mixes float16 and float32, and does not run .*; give model.float"
    ):
        scan(PartlyHalf().eval(), images(3, 12))


class Spectral(nn.Module):
    """A Fourier layer with complex weights, as in Fourier neural operators, beside a buffer of another type."""

    def __init__(self, kind: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lift, self.project = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 3)
        self.weights = nn.Parameter(torch.randn(6, 6, 12, 7, dtype=torch.complex64))
        self.register_buffer("scale", torch.ones((), dtype=kind))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.einsum("nchw,cdhw->ndhw", torch.fft.rfft2(self.lift(x)), self.weights)
        return self.project(torch.fft.irfft2(spectrum) * self.scale)


def in_double(model: Spectral) -> Spectral:
    model.double().weights.data = model.weights.data.to(torch.complex128)  # double() leaves complex numbers alone
    return model


@pytest.mark.filterwarnings("ignore:.*the images are scanned in float32")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: Spectral(torch.float32),
        lambda: Spectral(torch.float64),
        lambda: in_double(Spectral(torch.float64)),
    ],
    ids=["float32", "a float64 buffer", "double"],
)
def test_complex_weights_keep_their_imaginary_part(build: Callable[[], nn.Module], precision: str) -> None:
    made, pixels = build().eval(), images(20, 12)
    before = copy.deepcopy(made.state_dict())
    run = scan(made, pixels, precision=precision)
    with torch.no_grad():
        want = Spectral(torch.float32)(pixels).amax((2, 3)).sort(0, descending=True).values.T[:, :9]
    np.testing.assert_allclose(run["project"].values, want.numpy(), rtol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
