"""Seeded networks of operations that half precision is bad at: division, powers, exp, norms, gates, steps."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SPACE = (2, 3)  # the axes of rows and columns


def _variance(x: Tensor, axes: int | tuple[int, ...]) -> Tensor:
    return (x - x.mean(axes, keepdim=True)).pow(2).mean(axes, keepdim=True)


def _by_moments(x: Tensor, eps: float) -> Tensor:
    mean = x.mean(SPACE, keepdim=True)
    return (x - mean) / ((x * x).mean(SPACE, keepdim=True) - mean**2).clamp(min=0).add(eps).sqrt()


def _skewness(x: Tensor) -> Tensor:
    v = x.pow(2).mean(SPACE, keepdim=True)
    return x * (x.pow(3).mean(SPACE, keepdim=True) / v / v.sqrt())


def _relative(norms: Tensor, eps: float) -> Tensor:
    return norms / (norms.mean(1, keepdim=True) + eps)


# Map [N, C, H, W], a small number, a number about 1, an exponent -> map of the same shape.
OPERATIONS: dict[str, Callable[[Tensor, float, float, float], Tensor]] = {
    "layer norm by hand": lambda x, eps, c, p: (x - x.mean(1, keepdim=True)) / (_variance(x, 1) + eps).sqrt(),
    "rms norm": lambda x, eps, c, p: x * torch.rsqrt(x.pow(2).mean((1, 2, 3), keepdim=True) + eps),
    "normalize": lambda x, eps, c, p: F.normalize(x, dim=1, eps=eps),
    "divisive norm": lambda x, eps, c, p: x / (c + x.pow(2).sum(1, keepdim=True)),
    "l2 norm": lambda x, eps, c, p: x / (x.norm(dim=1, keepdim=True) + eps),
    "by deviation": lambda x, eps, c, p: x / (x.std(SPACE, keepdim=True) + eps),
    "by moments": lambda x, eps, c, p: _by_moments(x, eps),
    "by skewness": lambda x, eps, c, p: _skewness(x),
    "gauss": lambda x, eps, c, p: torch.exp(-x * x),
    "exp gate": lambda x, eps, c, p: x * torch.exp(-x.abs()),
    "softmax by hand": lambda x, eps, c, p: x.exp() / x.exp().sum(1, keepdim=True),
    "softplus by hand": lambda x, eps, c, p: torch.log1p(torch.exp(x)),
    "logsumexp by hand": lambda x, eps, c, p: x - x.exp().mean(1, keepdim=True).add(eps).log(),
    "log": lambda x, eps, c, p: torch.log(x.abs() + eps),
    "power": lambda x, eps, c, p: x.abs().pow(p),
    "fourth root": lambda x, eps, c, p: x.pow(4).mean(1, keepdim=True).add(eps).pow(0.25) - x.abs(),
    "gem": lambda x, eps, c, p: x * x.clamp(min=1e-6).pow(p).mean(SPACE, keepdim=True).pow(1 / p),
    "reciprocal": lambda x, eps, c, p: 1 / (c + x * x),
    "response norm": lambda x, eps, c, p: x * _relative(x.norm(dim=SPACE, keepdim=True), eps),
    "squeeze and excite": lambda x, eps, c, p: x * torch.sigmoid(3 * x.mean(SPACE, keepdim=True)),
    "gate a channel": lambda x, eps, c, p: x * (x.mean(SPACE, keepdim=True) > 0).to(x.dtype),
    "gate an image": lambda x, eps, c, p: x * (x.mean((1, 2, 3), keepdim=True) > 0).to(x.dtype),
    "where": lambda x, eps, c, p: torch.where(x.abs() < 1, x, x.sign() * x.abs().sqrt()),
    "nan to num": lambda x, eps, c, p: torch.nan_to_num(x / x.pow(2).mean((1, 2, 3), keepdim=True)),
    "tanh of a cube": lambda x, eps, c, p: torch.tanh(x.pow(3)),
    "large sums": lambda x, eps, c, p: F.relu(x - 30 * x + 20 * x + 10 * x),
    "relu": lambda x, eps, c, p: F.relu(x),
}


class Odd(nn.Module):
    """One of the operations, with numbers of its own."""

    def __init__(self, name: str, numbers: tuple[float, float, float]) -> None:
        super().__init__()
        self.name, self.numbers = name, numbers

    def forward(self, x: Tensor) -> Tensor:
        return OPERATIONS[self.name](x, *self.numbers)


def odd_network(seed: int) -> nn.Sequential:
    """36 units in three convolutions, of which two have weights of any size and are followed by odd operations."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    modules: list[nn.Module] = []
    for channels in (3, 12):
        conv = nn.Conv2d(channels, 12, 3, padding=1, bias=rng.random() < 0.7)
        conv.weight.data *= 10 ** rng.uniform(-3, 3)
        modules.append(conv)
        for _ in range(rng.choice([1, 1, 2])):
            numbers = (10.0 ** rng.choice([-12, -8, -6, -5]), 10 ** rng.uniform(-3, 1), rng.choice([0.5, 1.5, 2, 3, 4]))
            modules.append(Odd(rng.choice(sorted(OPERATIONS)), numbers))
    return nn.Sequential(*modules, nn.Conv2d(12, 12, 3, padding=1)).eval()


def uneven_pictures(count: int, side: int, seed: int) -> Tensor:
    """Coarse patterns on fine noise, float32 [count, 3, side, side].

    Their contrasts are log-normal for an even seed; for an odd one they are alike, and one in 150 is 2 to 4 times that.
    """
    g = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.randn(count, 3, side // 4, side // 4, generator=g), size=(side, side))
    fine = torch.randn(count, 3, side, side, generator=g)
    normal, uniform, chance = (draw(count, 1, 1, 1, generator=g) for draw in (torch.randn, torch.rand, torch.rand))
    contrast = 0.5 + uniform / 2
    rare = torch.where(chance < 1 / 150, 2 + 2 * uniform, contrast)
    return (rare if seed % 2 else torch.exp(normal / 2)) * (coarse + 0.1 * fine)
