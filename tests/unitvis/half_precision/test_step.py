"""The step in half precision: the same candidates whatever computes it, and no copy to the host."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import unitvis
import unitvis_kernels as uk
from support import brute, zoos
from support.scans import by_half, pictures, tiny_net
from unitvis.half_precision import parts, rewrite, step
from unitvis.half_precision.capture import ForbidHostSync
from unitvis.half_precision.step import Step
from unitvis.network.canonical import canonical_settings
from unitvis.state.magnitudes import SCALES, ranked_magnitudes
from unitvis.state.topk import TopK


def stepping(model: nn.Module, images: Tensor, device: str = "cpu", size: int = 64, **options: Any) -> Step:
    """A step over the default layers."""
    layers = unitvis.scan(model, images[:2], k=1, progress=False).layers
    sample = images[:16].to(device).contiguous(memory_format=torch.channels_last)
    with canonical_settings(sample.device):
        maps = brute.outputs(model, layers, sample)
    ends = list(itertools.accumulate(maps[name].shape[1] for name in layers))
    units = [slice(end - maps[name].shape[1], end) for name, end in zip(layers, ends, strict=True)]
    responses = torch.cat([maps[name].flatten(2).amax(2) for name in layers], dim=1)
    topk = TopK.empty(ends[-1], 32, torch.device(device))
    return Step(
        model,
        dict(zip(layers, units, strict=True)),
        topk,
        ranked_magnitudes(images.shape[1], torch.device(device)),
        axes=dict.fromkeys(layers, 1),
        dtype=torch.float16,
        size=size,
        neurons=False,
        sample=sample,
        responses=responses,
        **({"transform": None} | options),
    )


def test_alexnet_with_conv_argmax_wherever_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    zoos.importable()
    import torchvision

    torch.manual_seed(0)
    model, images = torchvision.models.alexnet(weights=None).eval(), pictures(48, 64)
    calls: list[bool] = []
    fused = uk.conv_argmax

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(options["store"])
        return fused(*args, **options)

    monkeypatch.setattr(uk, "conv_argmax", counted)
    monkeypatch.setattr(parts, "prefer", lambda *shape, **options: (True, "measured"))
    monkeypatch.setattr(step, "rewritten", lambda *a, one_pass, **given: rewrite.rewritten(*a, one_pass=True, **given))
    run = by_half(model, images)
    assert calls[:5] == [True, True, True, True, False]  # the last map is not stored
    brute.check(run, brute.responses(model, run.layers, images, brute.canonical_batches(images)))


def test_padding_of_the_last_batch_is_no_image() -> None:
    model, images = tiny_net(), pictures(70)
    once = stepping(model, images)
    once(images[:64], torch.arange(64))
    once(images[64:], torch.arange(64, 70))
    ids = uk.topk_read(once.topk.tensor)[1]
    assert ids.max() < 70
    assert all(len(set(row.tolist())) == 32 for row in ids)


class Leaving(TorchDispatchMode):
    """Lists operations that read a device's memory from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        taken, given = ([t for t in tree_leaves(part) if isinstance(t, Tensor)] for part in ((args, kwargs), result))
        self.calls += 1
        if any(t.device.type == "cuda" for t in taken):
            written = given + ([args[0]] if "copy_" in str(func) else [])
            if torch.Tag.data_dependent_output in func.tags or any(t.device.type != "cuda" for t in written):
                self.found.append(str(func))
        return result


def test_nothing_leaves_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(step, "rewritten", lambda *a, one_pass, **given: rewrite.rewritten(*a, one_pass=True, **given))
    transform = unitvis.Transform(mean=(0.5, 0.5, 0.5))
    one = stepping(tiny_net(), pictures(16), transform=transform)
    with FakeTensorMode(allow_non_fake_inputs=True):  # a GPU that computes nothing
        for module in one.model.modules():
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                holder = module._parameters if name in module._parameters else module._buffers
                holder[name] = nn.Parameter(fake) if name in module._parameters else fake
        for name in ("topk", "largest_inputs"):
            state = getattr(one, name).tensor
            setattr(one, name, TopK(torch.empty(state.shape, dtype=torch.int64, device="cuda")))
        one._device = torch.device("cuda")
        pixels = torch.empty(64, 20, 20, 3, dtype=torch.uint8, device="cuda")
        ids = torch.empty(64, dtype=torch.int64, device="cuda")
        with Leaving() as leaving, ForbidHostSync():
            one._merge(pixels, ids)
        assert leaving.calls > 10
        assert leaving.found == []
        with Leaving() as leaving:  # the judge sees what it is there for
            pixels.cpu()
            torch.empty(3).copy_(torch.empty(3, device="cuda"))
        assert len(leaving.found) == 2


class OverKeys(TorchDispatchMode):
    """Lists operators that read or write keys: int64, at least so many elements."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.found = elements, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        if any(t.dtype == torch.int64 and t.numel() >= self.elements for t in tensors):
            self.found.add(str(func))
        return result


@pytest.mark.parametrize("kind", ["pixels", "floats"])
def test_keys_take_no_pass_of_their_own(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(step, "rewritten", lambda *a, one_pass, **given: rewrite.rewritten(*a, one_pass=True, **given))
    one = stepping(tiny_net(), pictures(64), transform=unitvis.Transform(mean=(0.5, 0.5, 0.5)))
    pixels = torch.randint(0, 256, (64, 20, 20, 3), dtype=torch.uint8)
    images = pixels if kind == "pixels" else pixels.permute(0, 3, 1, 2).float()
    monkeypatch.setattr(step, "merge_magnitudes", lambda *_: None)  # whose keys are few and made by PyTorch
    one._merge(images, torch.arange(64))
    fewest = min(units.stop - units.start for units in one._layers.values())
    with OverKeys(64 * fewest) as passes:
        one._merge(images, torch.arange(64, 128))
    own = {name for name in passes.found if name.startswith("unitvis.")}
    assert "unitvis.topk_merge_.default" in own
    assert passes.found - own <= {"aten.slice.Tensor", "aten.select.int"}  # views
    with OverKeys(64 * fewest) as passes:  # the judge sees what it is there for
        torch.cat([one._written, one._written], dim=1)
    assert passes.found


class Readers(TorchDispatchMode):
    """Lists, in order, the operators that read a tensor or what the operator `then` makes; views are none."""

    def __init__(self, tensor: Tensor, then: str) -> None:
        super().__init__()
        self.then, self.memory, self.found = then, {tensor.untyped_storage().data_ptr()}, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        taken, given = ([t for t in tree_leaves(part) if isinstance(t, Tensor)] for part in ((args, kwargs), result))
        own, made = ({t.untyped_storage().data_ptr() for t in tensors} for tensors in (taken, given))
        if own & self.memory and not made <= own:
            self.found.append(str(func))
        if str(func) == self.then:
            self.memory |= made
        return result


@pytest.mark.parametrize(("kind", "operator"), [("pixels", "normalize"), ("floats", "arrange")])
def test_the_input_takes_one_pass_and_its_magnitudes_another(
    monkeypatch: pytest.MonkeyPatch, kind: str, operator: str
) -> None:
    monkeypatch.setattr(step, "rewritten", lambda *a, one_pass, **given: rewrite.rewritten(*a, one_pass=True, **given))
    one = stepping(tiny_net(), pictures(64), transform=unitvis.Transform(mean=(0.5, 0.5, 0.5)))
    pixels = torch.randint(0, 256, (64, 20, 20, 3), dtype=torch.uint8)
    images = pixels if kind == "pixels" else pixels.permute(0, 3, 1, 2).float()
    with Readers(images, f"unitvis.{operator}.default") as readers:
        one._merge(images, torch.arange(64))
    assert readers.found == [
        "unitvis.magnitudes.default",
        f"unitvis.{operator}.default",
        "aten.convolution.default",
    ]
    inputs = images if kind == "floats" else one._transform.normalize(images)
    want = inputs.abs().amax((2, 3))
    found = uk.topk_read(one.largest_inputs.tensor)[0][::SCALES, :64]
    assert torch.equal(found, want.sort(dim=0, descending=True).values.T)
    assert torch.equal(torch.from_numpy(one.magnitudes(images))[:, ::SCALES].float(), want)


def test_a_step_that_fails_leaves_no_keys_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "rewritten", lambda *a, one_pass, **given: rewrite.rewritten(*a, one_pass=True, **given))
    images = pictures(128)
    one, other = stepping(tiny_net(), images), stepping(tiny_net(), images)
    for each in (one, other):
        each(images[:64], torch.arange(64))
    with monkeypatch.context() as patched:
        patched.setattr(uk, "topk_merge_", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            one(9 * images[:64], torch.arange(64, 128))
    for each in (one, other):
        each(images[64:], torch.arange(64, 128))
    assert torch.equal(one.topk.tensor, other.topk.tensor)


def test_a_step_of_another_size_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "rewritten", lambda *a, one_pass, **given: rewrite.rewritten(*a, one_pass=True, **given))
    images = pictures(128)
    one, other = stepping(tiny_net(), images), stepping(tiny_net(), images)
    for start in (0, 64):
        one(images[start : start + 64], torch.arange(start, start + 64))
    other(images[:64], torch.arange(64))
    other.resize(32)
    for start in (64, 96):
        other(images[start : start + 32], torch.arange(start, start + 32))
    assert torch.equal(one.largest_inputs.tensor, other.largest_inputs.tensor)
    found, want = uk.topk_read(other.topk.tensor), uk.topk_read(one.topk.tensor)
    torch.testing.assert_close(found[0], want[0], rtol=2e-3, atol=2e-3)  # another batch, other last bits
    assert set(found[1].flatten().tolist()) - set(range(64))


def test_thresholds_and_blocks_change_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "rewritten", lambda *a, one_pass, **given: rewrite.rewritten(*a, one_pass=True, **given))
    g = torch.Generator().manual_seed(7)
    pixels = torch.randint(0, 256, (320, 20, 20, 3), dtype=torch.uint8, generator=g)
    rising = (pixels * torch.linspace(0.1, 1, 320)[:, None, None, None]).to(torch.uint8)  # most pass, to the end
    transform = unitvis.Transform(mean=(0.5, 0.5, 0.5), std=(0.2, 0.3, 0.4))
    for images in (pixels, rising):
        by_pixels, by_floats = (stepping(tiny_net(), pictures(16), transform=transform) for _ in range(2))
        want = TopK.empty(by_pixels.topk.units, 32, torch.device("cpu"))
        for start in range(0, 320, 64):
            part, ids = images[start : start + 64], torch.arange(start, start + 64)
            by_pixels(part, ids)
            by_floats(transform.normalize(part, torch.float16), ids)
            want.merge(by_pixels.keys(part), ids, overflows=True)
        assert torch.equal(by_pixels.topk.tensor, want.tensor)
        assert torch.equal(by_floats.topk.tensor, want.tensor)


def on_gpu(model: nn.Module, images: Tensor, pin: bool = False) -> Step:
    one = stepping(model, images, "cuda")
    for start in range(0, len(images), 64):
        part = images[start : start + 64]
        one(part.pin_memory() if pin else part, torch.arange(start, start + len(part)))
    torch.cuda.synchronize()
    return one


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
class TestOnAGpu:
    def test_captured_and_eager_steps_agree(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, images = tiny_net().cuda(), pictures(300)
        captured = on_gpu(model, images)
        assert captured.how["captured"] is True, captured.how
        pinned = on_gpu(model, images, pin=True)
        assert torch.equal(pinned.topk.tensor, captured.topk.tensor)
        assert torch.equal(pinned.largest_inputs.tensor, captured.largest_inputs.tensor)
        monkeypatch.setattr("unitvis.half_precision.capture.Replay._capture", lambda self: "asked not to")
        eager = on_gpu(model, images)
        assert eager.how["captured"] == "asked not to"
        assert torch.equal(eager.topk.tensor, captured.topk.tensor)
        assert torch.equal(eager.largest_inputs.tensor, captured.largest_inputs.tensor)

    def test_a_scan_is_exact(self) -> None:
        model, images = tiny_net().cuda(), pictures(2000)
        run = by_half(model, images.cuda())
        want = unitvis.scan(model, images.cuda(), precision="fp32", progress=False)
        for name, top in run.tops.items():
            decided = top.status != "unseparated"
            assert decided.mean() > 0.8
            assert (top.images == want[name].images)[decided].all()
            assert (top.values == want[name].values)[decided].all()

    def test_no_copy_to_the_host_and_no_growth(self) -> None:
        model, images = tiny_net().cuda(), pictures(640)
        one = on_gpu(model, images[:128])
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
        activities = list(torch.profiler.supported_activities())
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            for start in range(128, 640, 64):
                one(images[start : start + 64], torch.arange(start, start + 64))
        names = [event.name for event in profile.events()]
        assert any("Graph" in name for name in names)
        assert not [n for n in names if "DtoH" in n or "cudaDeviceSynchronize" in n or "cudaStreamSynchronize" in n][1:]
        assert torch.cuda.max_memory_allocated() == before

    def test_a_model_that_looks_at_its_values_runs_eagerly(self) -> None:
        class Choosy(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 4, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.conv(x) if float(x.sum()) > -1e9 else self.conv(-x)

        with (
            pytest.warns(UserWarning, match="receptive fields of conv are unknown"),
            pytest.warns(UserWarning, match="could not be followed"),
        ):
            one = on_gpu(Choosy().cuda(), pictures(128))
        assert "cannot be traced" in one.how["rewritten"]
        assert re.search(
            r"aten\.(item|_local_scalar_dense)\.default makes the host wait for the device", one.how["captured"]
        )
        assert (uk.topk_read(one.topk.tensor)[1] >= 0).all()
