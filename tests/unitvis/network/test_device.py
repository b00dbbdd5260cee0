"""Where a network can be scanned: a device that computes, with memory for the state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from support.scans import images, scan, small_net
from unitvis import UnitvisError


def test_neurons_that_do_not_fit_are_refused_with_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unitvis.network.device.free_memory", lambda device: 2.0**30)
    with pytest.raises(UnitvisError, match=r"the state of 1,048,576 units needs 1.2 GiB, and 1.0 GiB are free"):
        scan(nn.Sequential(nn.Conv2d(1, 16, 1)), torch.zeros(1, 1, 256, 256), unit="neuron")


def test_a_device_that_nothing_runs_on_is_refused() -> None:
    with pytest.raises(UnitvisError, match="a model on device 'meta' cannot be scanned"):
        scan(small_net(), images(5), device="meta")
