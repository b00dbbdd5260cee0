"""Bits of responses under other numbers of threads and in other slots of the compute batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unitvis
from support import brute
from support.scans import arrays, images, scan
from unitvis.network.network import Network
from unitvis.scanning.verify import verify


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before, fast = torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()
    yield
    torch.set_num_threads(before)
    torch.backends.mha.set_fastpath_enabled(fast)


def product(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(x, weight)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    scripted_product = torch.jit.script(product)


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "einsum": lambda x, w: torch.einsum("nc,cd->nd", x, w),
    "tensordot": lambda x, w: torch.tensordot(x, w, 1),
    "inner": lambda x, w: torch.inner(x, w.T.contiguous()),
    "mm by name": lambda x, w: torch.mm(input=x, mat2=w),
    "aten": torch.ops.aten.mm,
    "multi_dot": lambda x, w: torch.linalg.multi_dot([x, w, w.T]),
    "mv": lambda x, w: torch.stack([torch.mv(w.T.contiguous(), row) for row in x]),
    "scripted": lambda x, w: scripted_product(x, w),  # the function itself cannot be copied
    "bilinear": lambda x, w: F.bilinear(x[:, :32], x[:, :32], w.T.reshape(64, 32, 32)),
}


class Product(nn.Module):
    """Products of a few rows and many columns, which libraries split along the sum over the threads."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.product, self.tap = nn.Parameter(torch.randn(1024, 64)), product, nn.BatchNorm1d(64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x.flatten(1)[:, :1024], self.weight)
        return self.tap(y[:, :64])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 8, 8)
        self.encoder = nn.TransformerEncoderLayer(64, 4, 2048, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.patches(x).flatten(2).transpose(1, 2))


def check_one_thread_bits(model: nn.Module, layer: str, pixels: Tensor, counts: tuple[int, ...]) -> None:
    """Fail unless a scan has the bits of an eager forward pass on one thread, whatever the number of threads."""
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)  # it calls no modules that could be read
    kept = [brute.outputs(model, [layer], batch)[layer] for _, batch in brute.canonical_batches(pixels)]
    out = torch.cat(kept)[: len(pixels)]
    out = out.amax(1) if out.ndim == 3 else out.flatten(2).amax(2) if out.ndim == 4 else out
    want = out.sort(0, descending=True).values[:9].T.numpy()
    torch.backends.mha.set_fastpath_enabled(True)
    for count in counts:
        torch.set_num_threads(count)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of slots
            run = scan(model, pixels, layer, precision="fp32")
        np.testing.assert_array_equal(run[layer].values.view(np.int32), want.view(np.int32), err_msg=f"{count} threads")
        assert torch.get_num_threads() == count


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_have_the_bits_of_one_thread_however_they_are_written(name: str) -> None:
    torch.manual_seed(0)
    check_one_thread_bits(Product(PRODUCTS[name]).eval(), "tap", images(40, 19), (2, 3))


def test_a_transformer_has_the_bits_of_one_thread_though_its_first_images_are_black() -> None:
    torch.manual_seed(0)
    pixels = torch.cat([torch.zeros(16, 3, 24, 24), images(48, 24)])
    check_one_thread_bits(Encoder().eval(), "encoder.linear2", pixels, (2, 3, 4))


def rounding_by_place(function: Callable[[Tensor], Tensor]) -> float:
    """A number that the function rounds otherwise when it does not lie next to others in memory."""
    numbers = torch.linspace(-6, 6, 4097)
    differ = function(numbers[:4096]) != function(numbers.repeat_interleave(2)[::2][:4096])
    if not differ.any():
        pytest.skip("this processor rounds alike everywhere")
    return float(numbers[int(differ.int().argmax())])


@pytest.mark.parametrize("function", [F.silu, F.softplus, torch.sigmoid, F.mish])
def test_activations_that_round_by_place_have_the_bits_of_one_thread(function: Callable[[Tensor], Tensor]) -> None:
    class Activation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.tap = nn.Conv2d(3, 37, 1), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.tap(function(self.conv(x)))

    model = Activation().eval()
    nn.init.zeros_(model.conv.weight)
    nn.init.constant_(model.conv.bias, rounding_by_place(function))
    torch.set_num_threads(1)
    kept = [brute.outputs(model, ["tap"], batch)["tap"] for _, batch in brute.canonical_batches(images(32, 13))]
    want = torch.cat(kept).flatten(1).sort(0, descending=True).values[:2].T
    for count in (3, 5):
        torch.set_num_threads(count)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of slots
            run = scan(model, images(32, 13), "tap", 2, unit="neuron")
        np.testing.assert_array_equal(run["tap"].values, want.numpy())


def test_few_places_that_round_otherwise_are_found_on_any_images() -> None:
    rounding_by_place(F.silu)
    for seed in range(8):
        torch.manual_seed(seed)
        network = Network(nn.Sequential(nn.Conv2d(3, 37, 1), nn.SiLU(), nn.Conv2d(37, 2, 1)).eval())
        network.examine((3, 13, 13))
        torch.set_num_threads(3)
        with network.evaluating(), network.reading() as canonical:
            found = canonical.check(images(16, 13, seed))
        assert found.threads == {3: 1}
        assert found.by_slot == ["2"]


def test_whole_images_for_each_thread_keep_the_power_of_two_below() -> None:
    rounding_by_place(F.silu)
    network = Network(nn.Sequential(nn.Conv2d(3, 32, 1), nn.SiLU(), nn.Conv2d(32, 2, 1)).eval())
    network.examine((3, 32, 32))
    torch.set_num_threads(3)
    with network.evaluating(), network.reading() as canonical:
        found = canonical.check(images(16, 32))
    assert (found.threads, found.by_slot) == ({3: 2}, [])


def gated(seed: int = 0) -> nn.Sequential:
    """An activation of 80 numbers a batch, of which the last 16 do not fill a vector of the processor."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Mish(), nn.Conv2d(5, 4, 1)).eval()


def test_responses_that_depend_on_the_slot_are_named_and_compared_to_rounding() -> None:
    rounding_by_place(F.mish)
    model, pixels = gated(), images(200, 9)
    with pytest.warns(UserWarning, match=r"depend on an image's place .* 2 of 2 layers \(2, 3\)"):
        run = scan(model, pixels, ["2", "3"], precision="fp32")
    assert run.manifest["scan"]["by_slot"] == ["2", "3"]
    found = verify(run, model)
    assert (found["by_slot"], found["wrong"]) == (["2", "3"], 0)
    assert found["equal"] < found["winners"]
    run["3"].values[2, 4] *= 1.001
    assert verify(run, model)["wrong"] == 1
    run.manifest["scan"].pop("by_slot")  # where the scan did not look, for want of images after a resume
    assert verify(run, model)["wrong"] == 1


def test_merged_shards_say_which_layers_depend_on_the_slot() -> None:
    rounding_by_place(F.mish)
    model, pixels = gated(), images(90, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shards = [scan(model, pixels, ["0", "2"], shard=(number, 3), precision="fp32") for number in (1, 2, 3)]
        merged = unitvis.merge(shards, model, images=pixels)
        whole = scan(model, pixels, ["0", "2"], precision="fp32")
    assert merged.manifest["scan"]["by_slot"] == ["2"]
    np.testing.assert_allclose(merged["2"].values, whole["2"].values, rtol=1e-5)
    assert arrays(merged)["0/values"] == arrays(whole)["0/values"]
    part = unitvis.merge(shards[:2], partial=True)
    assert part.manifest["scan"]["by_slot"] == ["2"]


def test_neighbours_that_change_a_response_are_noticed_in_any_order() -> None:
    class Relative(nn.Module):
        """Responses relative to the largest of the batch: the same in any order, but not beside other images."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.tap = nn.Conv2d(3, 4, 3), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.tap(y / y.detach().abs().max())

    network = Network(Relative().eval())
    network.examine((3, 9, 9), "tap")
    with network.evaluating(), network.reading() as canonical:
        assert canonical.check(images(16, 9)).mixed == "tap"
        with pytest.raises(unitvis.UnitvisError, match="mixes the images of a batch"):
            network.check_independence(canonical, images(5, 9))
