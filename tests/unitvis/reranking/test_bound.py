"""The bound on half precision's errors."""

from __future__ import annotations

import math

import numpy as np

from unitvis.reranking.bound import upper_bound


def test_the_bound_holds_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    tails = {
        "normal": lambda n: rng.normal(size=n), "exponential": lambda n: rng.exponential(size=n),
        "t of 6": lambda n: rng.standard_t(6, size=n), "uniform": lambda n: rng.uniform(size=n),
    }  # fmt: skip
    for name, draw in tails.items():
        exceeded = sum(draw(20_000).max() > upper_bound(draw(8_000), 20_000, doubt=0.01) for _ in range(300))
        assert exceeded <= 3, name
    assert upper_bound(rng.normal(size=50), 100) == math.inf
    assert upper_bound(np.zeros(1000), 100) == 0
