"""The demo's network does what its record says."""

from __future__ import annotations

import pytest
import torch

from unitvis.demo import network
from unitvis.demo.train import accuracy
from unitvis.errors import UnitvisError


def test_the_network_is_as_good_as_its_record(drawn):
    net, record = network.load(), network.record()
    assert network.WEIGHTS.stat().st_size <= 4_000_000
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())
    assert [name for name, part in net.named_modules() if isinstance(part, torch.nn.Conv2d)] == list(network.LAYERS)
    assert min(dict(net.named_parameters())["classify.weight"].flatten()) >= 0  # a unit speaks against no class
    images, labels = (torch.from_numpy(array) for array in drawn)
    spread = (record["accuracy"] * (1 - record["accuracy"]) / len(labels)) ** 0.5
    assert accuracy(net, images, labels) > record["accuracy"] - 4 * spread - 0.01  # 0.01: the record's own sample


@pytest.mark.parametrize(
    ("content", "said"), [(None, "missing"), (b"not weights", "cannot be used"), (b"", "cannot be used")]
)
def test_absent_or_damaged_weights_say_how_to_make_them(tmp_path, content, said):
    path = tmp_path / "network.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnitvisError, match=f"(?s){said}.*python -m unitvis.demo.train"):
        network.load(path)
