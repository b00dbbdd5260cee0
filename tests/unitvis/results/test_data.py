"""Units that never fired, and winners that did not."""

from __future__ import annotations

import torch
from torch import nn

from support.scans import scan


def test_dead_units_and_what_did_not_fire() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU()).eval()
    model[0].weight.data[:] = torch.tensor([1.0, 1.0, -1.0])[:, None, None, None]
    model[0].bias.data[:] = torch.tensor([0.0, -100.0, 0.0])
    run = scan(model, torch.tensor([-2.0, 3.0, 1.0])[:, None, None, None].expand(3, 1, 4, 4), k=3)
    assert run["0"].dead.tolist() == [False, True, False]
    assert run["0"].fired.tolist() == [[True, True, False], [False] * 3, [True, False, False]]
